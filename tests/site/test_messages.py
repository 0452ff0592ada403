"""Tensors cross a pipe as they are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from typing import Any

import numpy as np
import pytest

from histoflare.site.messages import receive, send

ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "transposed": np.arange(12, dtype=np.float64).reshape(3, 4).T,
    "every second": np.arange(10, dtype=np.int64)[::2],
    "scalar": np.array(3, dtype=np.int64),
    "empty": np.empty((0, 5), dtype=np.float16),
    "bits": np.array([True, False]),
    "odd values": np.array([np.nan, -0.0, np.inf, 1e-45], dtype=np.float32),
    "large": np.random.default_rng(0).normal(size=300_000),
}


@pytest.fixture
def pipe() -> Iterator[Any]:
    ends = Pipe()
    yield ends
    for end in ends:
        end.close()


def test_arrays_arrive_as_they_left(pipe: Any) -> None:
    ours, theirs = pipe
    content = {"round": 3, "text": "größe"}
    sender = threading.Thread(target=send, args=(ours, "train", content, ARRAYS))
    sender.start()
    kind, received, arrays = receive(theirs)
    sender.join()
    assert (kind, received, list(arrays)) == ("train", content, list(ARRAYS))
    for name, sent in ARRAYS.items():
        assert (arrays[name].dtype, arrays[name].shape) == (sent.dtype, sent.shape)
        assert arrays[name].tobytes() == sent.tobytes()
        assert arrays[name].flags.writeable


def test_messages_do_not_run_into_one_another(pipe: Any) -> None:
    ours, theirs = pipe
    send(ours, "say", "first")
    send(ours, "answer", None, {"w": np.ones(2)})
    send(ours, "say", "last")
    assert receive(theirs)[:2] == ("say", "first")
    kind, _, arrays = receive(theirs)
    assert kind == "answer" and arrays["w"].tolist() == [1.0, 1.0]
    assert receive(theirs)[:2] == ("say", "last")


def test_a_closed_pipe_is_the_end(pipe: Any) -> None:
    ours, theirs = pipe
    theirs.close()
    with pytest.raises(OSError):
        send(ours, "say", "anyone?")
    with pytest.raises((EOFError, OSError)):
        receive(ours)
