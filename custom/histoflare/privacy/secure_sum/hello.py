"""How the sites of a round make themselves known to each other, and the keys that follow from it.

A round under a secure sum opens with a *hello* of every site: 32 fresh random bytes and a fresh X25519 key,
signed with the site's certificate. The server hands the list of all of them to each site. A site checks the
list (:func:`check_hellos`), puts everything that the round depends on into a :class:`Transcript`, and derives
from its hash what it shares with each other site (:meth:`RoundKeys.pads`).

- A transcript serves one vector. Another attempt has new hellos, and with them other pads: two vectors of one
  site never have the same pad, so their difference tells nothing.
- Sites that were given different lists, models or settings have different transcripts. Their pads do not
  cancel, and the sum is noise.
- The private key is never written, and is forgotten once the pads are made. Whoever steals the key of a
  certificate later opens nothing that was sent before.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, Self

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from histoflare.errors import JobError
from histoflare.privacy.secure_sum.pads import Pads

KEY_BYTES = 32
NONCE_BYTES = 32
MOST_NAME, MOST_CERTIFICATE, MOST_SIGNATURE = 256, 8192, 1024
"""Longest name of a site (in bytes of UTF-8), certificate and signature (bytes)."""

MOST_SITES = 64
"""In one sum; the ring has room for that many (``ring.LIMIT``)."""

Sign = Callable[[bytes], bytes]
"""Returns a signature of these bytes with the site's own private key."""

Verify = Callable[["Hello", bytes], None]
"""Raises :class:`JobError` unless the hello's signature is one of these bytes by the key in its certificate,
and that certificate is the one of ``hello.site``."""


@dataclass(frozen=True)
class Hello:
    """What a site sends to the others of a round. All of it is public.

    Attributes:
        site: Its name.
        certificate: As DER; in one process without certificates, its public key as DER.
        key: Its X25519 public key for this attempt, 32 bytes.
        nonce: 32 random bytes of this attempt.
        signature: Of :func:`signed_part`.
    """

    site: str
    certificate: bytes
    key: bytes
    nonce: bytes
    signature: bytes

    def __post_init__(self) -> None:
        fits = (
            0 < len(self.site.encode()) <= MOST_NAME
            and 0 < len(self.certificate) <= MOST_CERTIFICATE
            and len(self.key) == KEY_BYTES
            and self.key[-1] < 128  # X25519 does not look at this bit: one key could be written in two ways
            and len(self.nonce) == NONCE_BYTES
            and 0 < len(self.signature) <= MOST_SIGNATURE
        )
        if not fits:
            _refuse("a hello has a part that is empty or has not the agreed length")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate's DER, in lower-case hexadecimal digits."""
        return hashlib.sha256(self.certificate).hexdigest()

    def to_json(self) -> dict[str, str]:
        """Return it as plain JSON, its bytes in base64."""
        parts = {"certificate": self.certificate, "key": self.key, "nonce": self.nonce}
        parts["signature"] = self.signature
        return {"site": self.site} | {name: base64.b64encode(part).decode() for name, part in parts.items()}

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Return the hello that :meth:`to_json` wrote.

        Raises:
            JobError: It is not of that form, or a part is too long (SUM_LIST_INVALID).
        """
        names = ("site", "certificate", "key", "nonce", "signature")
        if not isinstance(content, dict) or set(content) != set(names):
            _refuse("a hello has not the agreed parts")
        if not all(isinstance(part, str) and len(part) <= 2 * MOST_CERTIFICATE for part in content.values()):
            _refuse("a part of a hello is no text, or too long")
        try:
            content["site"].encode()  # half of a pair of surrogates is text, and no name
            parts = [base64.b64decode(content[name], validate=True) for name in names[1:]]
        except (binascii.Error, ValueError):
            _refuse("a part of a hello is not written as agreed")
        return cls(content["site"], *parts)


def signed_part(run: str, round_index: int, attempt: int, site: str, key: bytes, nonce: bytes) -> bytes:
    """Return the bytes that a site signs: for which attempt, from whom, and what it sends."""
    return _joined("histoflare secure sum hello 1", run, round_index, attempt, site, key, nonce)


@dataclass(frozen=True)
class Transcript:
    """Everything that a round under a secure sum depends on.

    Attributes:
        job: One hash over version, job and plan: noise multiplier, clip norm, honest sites, sample rate,
            divisor, step and ring, names and shapes of what is sent.
        run: Name of the run.
        round_index: From 0.
        attempt: From 0; a void round is repeated with the next.
        received: Hash of everything received that shapes the update: the model and what came beside it.
        hellos: Of all sites of the round, in the order in which the server lists them.
    """

    job: str
    run: str
    round_index: int
    attempt: int
    received: str
    hellos: tuple[Hello, ...]

    @cached_property
    def sha256(self) -> str:
        """The transcript's hash in hexadecimal digits: what a ledger books, and what pads follow from."""
        parts: list[str | int | bytes] = ["histoflare secure sum transcript 1", self.job, self.run]
        parts += [self.round_index, self.attempt, self.received, len(self.hellos)]
        for hello in self.hellos:
            parts += [hello.site, hello.fingerprint, hello.key, hello.nonce]
        return hashlib.sha256(_joined(*parts)).hexdigest()


class RoundKeys:
    """A site's secrets for one attempt of one round. They serve one list, one transcript and one vector.

    Nothing of it can be copied or written: a second use of the same key is what must never happen.

    Attributes:
        site: Its name. run: Name of the run.
        round_index: From 0. attempt: From 0.
    """

    def __init__(self, site: str, run: str, round_index: int, attempt: int) -> None:
        self.site, self.run, self.round_index, self.attempt = site, run, round_index, attempt
        self._private: X25519PrivateKey | None = X25519PrivateKey.generate()
        self._nonce = os.urandom(NONCE_BYTES)
        self._sent: Hello | None = None

    @classmethod
    def new(cls, site: str, run: str, round_index: int, attempt: int) -> Self:
        """Return new secrets, from the system's source of randomness."""
        return cls(site, run, round_index, attempt)

    def hello(self, certificate: bytes, sign: Sign) -> Hello:
        """Return what is sent to the others; asked again, the same.

        Args:
            certificate: The site's, as DER.
            sign: Signs with its private key.
        """
        if self._sent is None:
            key = self._own().public_key().public_bytes_raw()
            said = self.signed_part(self.site, key, self._nonce)
            self._sent = Hello(self.site, certificate, key, self._nonce, sign(said))
        return self._sent

    def signed_part(self, site: str, key: bytes, nonce: bytes) -> bytes:
        """Return what ``site`` must have signed in this attempt."""
        return signed_part(self.run, self.round_index, self.attempt, site, key, nonce)

    def pads(self, transcript: Transcript) -> Pads:
        """Return what this site adds to its vector, and forget the private key.

        The list must have passed :func:`check_hellos`; what can be checked without certificates is checked
        here once more.

        Raises:
            JobError: The list will not do, the transcript is of another round or attempt, or these keys have
                served already (SUM_LIST_INVALID).
        """
        if (transcript.run, transcript.round_index, transcript.attempt) != (
            self.run,
            self.round_index,
            self.attempt,
        ):
            _refuse("the list is of another round or attempt than this site's hello")
        secrets = _check_list(transcript.hellos, self)
        self._private = None
        salt = bytes.fromhex(transcript.sha256)
        place = [hello.site for hello in transcript.hellos].index(self.site)
        keys = []
        for index, (other, secret) in enumerate(secrets.items()):
            first, second = (other, self.site) if index < place else (self.site, other)
            info = _joined("histoflare secure sum pad 1", first, second)
            keys.append((HKDF(SHA256(), 32, salt, info).derive(secret), index >= place))
        return Pads(keys)

    def _own(self) -> X25519PrivateKey:
        if self._private is None:
            _refuse("the keys of this attempt have served already")
        return self._private

    def _secret(self, key: bytes) -> bytes:
        try:
            return self._own().exchange(X25519PublicKey.from_public_bytes(key))
        except ValueError:  # cryptography refuses a secret of zeros
            _refuse("a key in the list makes a secret that everybody knows")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("The keys of a round are never copied or written.")


def check_hellos(hellos: Sequence[Hello], mine: RoundKeys, verify: Verify) -> None:
    """Raise :class:`JobError` unless a round's list can be trusted as far as certificates go.

    It holds this site's own hello as it was sent, 2 to 64 sites, no site, certificate, key or nonce twice, no
    key that makes a secret everybody knows, and each hello is signed for this run, round and attempt.

    Args:
        hellos: As the server listed them.
        mine: This site's keys, whose hello was sent.
        verify: Checks a signature and the certificate behind it.

    Raises:
        JobError: With the reason SUM_LIST_INVALID, whatever is wrong.
    """
    _check_list(hellos, mine)
    for hello in hellos:
        try:
            verify(hello, mine.signed_part(hello.site, hello.key, hello.nonce))
        except JobError as error:
            raise JobError(str(error), reason="SUM_LIST_INVALID") from error


def countable(hellos: Sequence[Hello], pins: Mapping[str, str], trust_ca: bool, me: str) -> int:
    """Return how many sites of a list a site counts on, itself included.

    Args:
        hellos: A list that passed :func:`check_hellos`.
        pins: Site → SHA-256 of its certificate's DER in hexadecimal digits, as its own people gave it.
        trust_ca: Whether a site without a pin counts too, on the word of whoever made the certificates. One
            with another certificate than its pin never counts.
        me: This site.
    """
    return sum(
        hello.site == me
        or (pins[hello.site].lower() == hello.fingerprint if hello.site in pins else trust_ca)
        for hello in hellos
    )


def _check_list(hellos: Sequence[Hello], mine: RoundKeys) -> dict[str, bytes]:
    """Return the secret with each other site, in the list's order; refuse a list that will not do."""
    if not 2 <= len(hellos) <= MOST_SITES:
        _refuse(f"a sum is of 2 to {MOST_SITES} sites")
    for what in ("site", "fingerprint", "key", "nonce"):
        if len({getattr(hello, what) for hello in hellos}) < len(hellos):
            _refuse(f"the list holds one {what} twice")
    own = [hello for hello in hellos if hello.site == mine.site]
    if mine._sent is None or own != [mine._sent]:
        _refuse("the list does not hold this site's hello as it was sent")
    return {hello.site: mine._secret(hello.key) for hello in hellos if hello.site != mine.site}


def _joined(*parts: str | int | bytes) -> bytes:
    """Return parts as bytes, each after its length: other parts give other bytes."""
    written = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return b"".join(len(part).to_bytes(8, "big") + part for part in written)


def _refuse(why: str) -> NoReturn:
    raise JobError(
        f"The list of the sites in this sum cannot be used: {why}. Nothing was trained; the round needs new "
        "hellos.",
        reason="SUM_LIST_INVALID",
    )
