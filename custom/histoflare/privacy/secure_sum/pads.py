"""What a site adds to its vector so that the vector tells nothing and the sum of all sites is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

BLOCK = 2**16
"""Numbers padded at once: half a MiB, which stays in a core's cache."""


class Pads:
    """A site's pads for one vector: with each other site a keystream (AES-256 in counter mode).

    Of each two sites, the one that is listed first adds the keystream and the other takes it off, number by
    number modulo 2**64. Each key is derived for one transcript, so the counter begins at 0.

    Args:
        keys: With each other site: the key of 32 bytes, and whether its stream is added (else taken off).
    """

    def __init__(self, keys: Sequence[tuple[bytes, bool]]) -> None:
        self._keys: list[tuple[bytes, bool]] | None = list(keys)

    def add_to(self, vector: dict[str, torch.Tensor], *, block: int = BLOCK) -> dict[str, torch.Tensor]:
        """Add the pads to a vector where it lies, forget them, and return the same vector.

        Args:
            vector: Name → int64 tensor on the CPU, contiguous. In order of name they are one stream.
            block: So many numbers at once; the result does not depend on it.

        Raises:
            RuntimeError: These pads were added before. A pad that serves twice protects nothing.
            TypeError: A tensor is of another kind; nothing was changed.
        """
        if self._keys is None:
            raise RuntimeError("These pads were added to a vector already; a second one needs a new round.")
        for name, tensor in vector.items():
            if tensor.dtype != torch.int64 or tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise TypeError(f"{name} must be a contiguous int64 tensor on the CPU.")
        streams = [
            (Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor(), added)
            for key, added in self._keys
        ]
        self._keys = None
        zeros, memory = memoryview(bytes(8 * block)), np.empty(block, dtype="<u8")
        for _, tensor in sorted(vector.items()):
            numbers = tensor.view(-1).numpy().view("<u8")
            for start in range(0, len(numbers), block):
                piece = numbers[start : start + block]
                words = memory[: len(piece)]
                for stream, added in streams:
                    stream.update_into(zeros[: words.nbytes], words.view(np.uint8).data)
                    (np.add if added else np.subtract)(piece, words, out=piece)
        return vector

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("Pads are never copied or written: a copy would serve a second vector.")
