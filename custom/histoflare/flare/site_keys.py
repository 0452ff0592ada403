"""A site's key: what it signs its hellos with, and whose hellos it believes.

A hello is signed with the private key of the site's startup kit. A site believes another's hello if the
certificate in it is of the consortium's certificate authority and names that site, and if the signature fits.
Whoever holds the authority's key could make such a certificate for a site that is none: only a certificate
whose fingerprint the site's steward has pinned (``privacy.own_policy``) stands for a site that is known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID
from nvflare.apis.workspace import Workspace

from histoflare.errors import JobError
from histoflare.flare.kit_signature import CLIENT_FILE, ROOT_CERTIFICATE, running_kit
from histoflare.privacy.secure_sum.hello import Hello, Verify
from histoflare.privacy.secure_sum.identity import Identity, verify

KEY_FILE = "startup/client.key"
CERTIFICATE_FILE = "startup/client.crt"

_PADDING = padding.PSS(padding.MGF1(SHA256()), padding.PSS.DIGEST_LENGTH)


@dataclass(frozen=True)
class SiteKeys:
    """One site's private key and certificate, and the authority of the federation.

    Attributes:
        certificate: The site's own, as DER.
        authority: Whose certificates are believed.
        servers: Names of the federation's servers, which no site can have.
        vouches: Whether a certificate says of somebody who it is.
    """

    certificate: bytes
    _key: rsa.RSAPrivateKey
    authority: x509.Certificate
    servers: tuple[str, ...]
    vouches: ClassVar[bool] = True

    @classmethod
    def of_kit(cls, kit: Path) -> SiteKeys:
        """Return the keys of a client's startup kit.

        Args:
            kit: Folder with ``startup``.

        Raises:
            JobError: The kit has no key or certificate that can be used (KIT_CHANGED).
        """
        try:
            key = load_pem_private_key((kit / KEY_FILE).read_bytes(), password=None)
            authority = x509.load_pem_x509_certificate((kit / ROOT_CERTIFICATE).read_bytes())
            client = json.loads((kit / CLIENT_FILE).read_text())
            servers = tuple(str(each["identity"]) for each in client["servers"])
        except (OSError, ValueError, LookupError, TypeError):
            raise _unusable(kit) from None
        if not isinstance(key, rsa.RSAPrivateKey):
            raise _unusable(kit)
        return cls(read_certificate(kit), key, authority, servers)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the certificate, in hex: what the stewards of other sites pin."""
        return fingerprint(self.certificate)

    def sign(self, content: bytes) -> bytes:
        """Return the signature of some bytes (RSA-PSS, SHA-256)."""
        return self._key.sign(content, _PADDING, SHA256())

    def verifier(self, pins: Mapping[str, str]) -> Verify:
        """Return what looks at the certificate and the signature of a hello (``secure_sum.hello.Verify``).

        Args:
            pins: Site → fingerprint of its certificate, as the steward has it.

        Returns:
            A function that raises :class:`JobError` (SUM_LIST_INVALID) where a hello's certificate is not of
            this federation, is another participant's, or is not the pinned one; or where the signature is
            not one of these bytes by the key of the certificate.
        """

        def verify(hello: Hello, signed: bytes) -> None:
            problem = self._certificate_problem(hello, pins) or _signature_problem(hello, signed)
            if problem:
                raise JobError(
                    f"The list of this round's sites cannot be believed: {problem}.",
                    reason="SUM_LIST_INVALID",
                )

        return verify

    def _certificate_problem(self, hello: Hello, pins: Mapping[str, str]) -> str:
        """Return why a hello's certificate is not that of its site; empty if it is."""
        try:
            certificate = x509.load_der_x509_certificate(hello.certificate)
            names = [str(each.value) for each in certificate.subject.get_attributes_for_oid(_NAME)]
            is_person = bool(certificate.subject.get_attributes_for_oid(NameOID.UNSTRUCTURED_NAME))
            certificate.verify_directly_issued_by(self.authority)
        except (ValueError, TypeError, InvalidSignature):
            return f"the certificate of {hello.site} is not of this federation"
        if names != [hello.site] or is_person or hello.site in self.servers:
            return f"the certificate of {hello.site} is another participant's"
        pinned = pins.get(hello.site)
        if pinned is not None and pinned.lower() != hello.fingerprint:
            return (
                f"{hello.site} has another certificate than the pinned one. If its kit was made anew, ask "
                "its people for the fingerprint ('histoflare kit fingerprint') and pin it ('histoflare "
                "policy pin')"
            )
        return ""


_NAME = NameOID.COMMON_NAME


def _signature_problem(hello: Hello, signed: bytes) -> str:
    key = x509.load_der_x509_certificate(hello.certificate).public_key()
    try:
        if not isinstance(key, rsa.RSAPublicKey):
            raise InvalidSignature
        key.verify(hello.signature, signed, _PADDING, SHA256())
    except InvalidSignature:
        return f"the hello of {hello.site} was not signed by it for this attempt"
    return ""


class SimulatedKeys(Identity):
    """Keys of a site in FLARE's simulator, made on the spot: all its sites are one user's."""

    vouches: ClassVar[bool] = False

    def verifier(self, pins: Mapping[str, str]) -> Verify:
        """Return what looks at the signature of a hello; there are no certificates, and no pins."""
        return verify


def keys_of(workspace: Workspace) -> SiteKeys | SimulatedKeys:
    """Return the keys of a running FLARE process: of its kit, or new ones in the simulator, which has none.

    Args:
        workspace: FLARE's own, as from ``fl_ctx.get_engine().get_workspace()``.

    Raises:
        JobError: The kit has no key or certificate that can be used (KIT_CHANGED).
    """
    kit = running_kit(workspace)
    return SimulatedKeys() if kit is None else SiteKeys.of_kit(kit)


def read_certificate(kit: Path) -> bytes:
    """Return the certificate of a client's kit, as DER.

    Raises:
        JobError: There is none (KIT_CHANGED).
    """
    try:
        certificate = x509.load_pem_x509_certificate((kit / CERTIFICATE_FILE).read_bytes())
    except (OSError, ValueError):
        raise _unusable(kit) from None
    return certificate.public_bytes(Encoding.DER)


def fingerprint(certificate: bytes) -> str:
    """Return the SHA-256 of a certificate (DER), in hex: what other sites pin."""
    return hashlib.sha256(certificate).hexdigest()


def _unusable(kit: Path) -> JobError:
    return JobError(
        f"{kit}: not a site's startup kit with {KEY_FILE} and {CERTIFICATE_FILE}. Ask the lead for the kit "
        "anew.",
        reason="KIT_CHANGED",
    )
