"""What a refusal is held to: its fixed reason code, and the names and values that its message must say.

Its words are free: a sentence can be made better without a change to a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from histoflare.errors import HistoflareError


@contextmanager
def raises_reason(reason: str, *names: object) -> Iterator[pytest.ExceptionInfo[HistoflareError]]:
    """Require that the block raises a :class:`HistoflareError`, and yield what pytest catches of it.

    Args:
        reason: The reason code that the error must have.
        names: What its message must contain: names of files, fields, options and patients, numbers.
    """
    with pytest.raises(HistoflareError) as caught:
        yield caught
    assert caught.value.reason == reason, caught.value
    missing = [str(name) for name in names if str(name) not in str(caught.value)]
    assert not missing, f"{missing} in: {caught.value}"
