"""A consortium with certificates: an authority, kits of sites with keys, and signed hellos."""

from __future__ import annotations

import json
from pathlib import Path

from nvflare.lighter.utils import Identity, generate_cert, generate_keys, serialize_cert, serialize_pri_key

from histoflare.flare.site_keys import SimulatedKeys, SiteKeys
from histoflare.privacy.secure_sum.hello import RoundKeys

SERVER = "server"


class Consortium:
    """An authority, and what it gives to participants.

    Args:
        folder: Gets a kit for each site that is asked for.
    """

    def __init__(self, folder: Path, name: str = "consortium") -> None:
        self.folder = folder
        self._issuer = Identity(name)
        self.key, public = generate_keys()
        self.root = generate_cert(self._issuer, self._issuer, self.key, public, ca=True)

    def kit(self, site: str, role: str | None = None) -> Path:
        """Write a client's kit with a new key; one made anew has another certificate."""
        startup = self.folder / site / "startup"
        startup.mkdir(parents=True, exist_ok=True)
        key, public = generate_keys()
        certificate = generate_cert(Identity(site, role=role), self._issuer, self.key, public)
        (startup / "client.key").write_bytes(serialize_pri_key(key))
        (startup / "client.crt").write_bytes(serialize_cert(certificate))
        (startup / "rootCA.pem").write_bytes(serialize_cert(self.root))
        (startup / "fed_client.json").write_text(json.dumps({"servers": [{"identity": SERVER}]}))
        return startup.parent

    def keys(self, site: str, role: str | None = None) -> SiteKeys:
        """Return the keys of a site's new kit."""
        return SiteKeys.of_kit(self.kit(site, role))


def hello_of(
    site: str, keys: SiteKeys | SimulatedKeys, run: str = "run", index: int = 0, attempt: int = 0
) -> dict[str, str]:
    """Return a site's hello for an attempt, as it sends it."""
    return RoundKeys.new(site, run, index, attempt).hello(keys.certificate, keys.sign).to_json()
