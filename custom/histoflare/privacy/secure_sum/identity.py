"""A signing key made on the spot, where sites have no certificates: a federation in one process."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from histoflare.errors import JobError
from histoflare.privacy.secure_sum.hello import Hello


class Identity:
    """An Ed25519 key pair of this process. It says of no site who it is: nobody vouches for the key."""

    def __init__(self) -> None:
        self._private = Ed25519PrivateKey.generate()

    @property
    def certificate(self) -> bytes:
        """The public key as DER, in the place of a certificate."""
        return self._private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def sign(self, signed: bytes) -> bytes:
        """Return a signature of these bytes."""
        return self._private.sign(signed)


def verify(hello: Hello, signed: bytes) -> None:
    """Raise :class:`JobError` (SUM_LIST_INVALID) unless a hello is signed by the key it brings."""
    try:
        key = load_der_public_key(hello.certificate)
        if not isinstance(key, Ed25519PublicKey):
            raise ValueError("not an Ed25519 key")
        key.verify(hello.signature, signed)
    except (ValueError, InvalidSignature) as error:
        raise JobError(
            "A hello in the list is not signed by its own key.", reason="SUM_LIST_INVALID"
        ) from error
