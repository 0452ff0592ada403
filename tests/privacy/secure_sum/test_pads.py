"""Pads: they cancel in the sum of all, and nothing can be read before."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from histoflare.privacy.secure_sum.hello import MOST_SITES
from histoflare.privacy.secure_sum.pads import Pads
from histoflare.privacy.secure_sum.ring import add_up

from .sites import hellos_of, keys_of, transcript_of

Vector = dict[str, torch.Tensor]
WORDS = st.integers(-(2**63), 2**63 - 1)


def padded(sites: list[str], vectors: list[Vector], blocks: list[int] | None = None) -> list[Vector]:
    """Return the vectors of sites as they leave."""
    keys = keys_of(sites)
    transcript = transcript_of(keys)
    blocks = blocks or [2**16] * len(sites)
    return [
        each.pads(transcript).add_to({n: t.clone() for n, t in vector.items()}, block=block)
        for each, vector, block in zip(keys, vectors, blocks, strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_pads_cancel_for_any_sites_shapes_and_block_sizes(data: st.DataObject) -> None:
    sites = data.draw(st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=7, unique=True))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4))
    blocks = data.draw(st.lists(st.integers(1, 40), min_size=len(sites), max_size=len(sites)))
    vectors = []
    for _ in sites:
        sizes = [math.prod(shape) for shape in shapes]
        drawn = [data.draw(st.lists(WORDS, min_size=size, max_size=size)) for size in sizes]
        vectors.append(
            {
                f"{index}": torch.tensor(words, dtype=torch.int64).reshape(shape)
                for index, (words, shape) in enumerate(zip(drawn, shapes, strict=True))
            }
        )
    left = padded(sites, vectors, blocks)
    expected, found = add_up(vectors), add_up(left)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_order_of_names_in_a_vector_makes_no_difference() -> None:
    vector = {"b": torch.arange(5), "a": torch.arange(3)}
    turned = {"a": torch.arange(3), "b": torch.arange(5)}
    total = add_up(padded(["x", "y"], [vector, turned]))
    assert torch.equal(total["a"], 2 * torch.arange(3)) and torch.equal(total["b"], 2 * torch.arange(5))


def test_as_many_sites_as_there_may_be() -> None:
    sites = [f"site {index}" for index in range(MOST_SITES)]
    total = add_up(padded(sites, [{"w": torch.full((3,), index)} for index in range(MOST_SITES)]))
    assert total["w"].tolist() == [sum(range(MOST_SITES))] * 3


def bits(vector: torch.Tensor) -> np.ndarray:
    return np.unpackbits(vector.numpy().view(np.uint8).reshape(-1, 8), axis=1)


@pytest.mark.parametrize("content", [0, 1, -(2**63)])
def test_a_single_vector_looks_uniform(content: int) -> None:
    """Each of its 64 bits is 1 half of the time, and no two of them go together: 6.5 standard deviations."""
    n = 40_000
    vectors = [{"w": torch.full((n,), content)} for _ in range(3)]
    for left in padded(["a", "b", "c"], vectors):
        ones = bits(left["w"]).astype(np.float64)
        assert np.abs(ones.mean(axis=0) - 0.5).max() < 6.5 * 0.5 / math.sqrt(n)
        together = np.corrcoef(ones, rowvar=False) - np.eye(64)
        assert np.abs(together).max() < 6.5 / math.sqrt(n)
        assert len(left["w"].unique()) == n


def test_all_but_one_site_s_vectors_tell_nothing_of_the_last() -> None:
    n = 40_000
    left = padded(["a", "b", "c"], [{"w": torch.zeros(n, dtype=torch.int64)} for _ in range(3)])
    for missing in range(3):
        rest = add_up([vector for index, vector in enumerate(left) if index != missing])
        assert np.abs(bits(rest["w"]).mean(axis=0) - 0.5).max() < 6.5 * 0.5 / math.sqrt(n)


def streams_of(job: str, received: str, attempt: int, sites: tuple[str, ...]) -> list[bytes]:
    keys = keys_of(sites, attempt)
    transcript = transcript_of(keys, job=job, received=received)
    zeros = [{"w": torch.zeros(64, dtype=torch.int64)} for _ in keys]
    return [
        each.pads(transcript).add_to(zero)["w"].numpy().tobytes()
        for each, zero in zip(keys, zeros, strict=True)
    ]


def test_no_two_transcripts_share_a_stream() -> None:
    """Nor do a repetition of the same round on the same model, or two sites of it."""
    told = [
        *itertools.product(("job", "other"), ("model", "other"), (0, 1), [("a", "b", "c"), ("a", "b", "d")]),
        ("job", "model", 0, ("a", "b", "c")),
    ]
    streams = [stream for each in told for stream in streams_of(*each)]
    words = np.frombuffer(b"".join(streams), dtype=np.uint64)
    assert len(set(words.tolist())) == len(words)


@pytest.mark.parametrize("part", ["job", "received"])
def test_the_same_keys_under_another_transcript_have_another_stream(part: str) -> None:
    """The transcript is in the derivation itself: it does not rest on keys being new."""
    keys = keys_of(["a", "b"])
    first = transcript_of(keys)
    second = transcript_of(keys, **{part: "other"}, hellos=hellos_of(keys))
    a, b = (
        each.pads(transcript).add_to({"w": torch.zeros(8, dtype=torch.int64)})["w"]
        for each, transcript in zip(keys, (first, second), strict=True)
    )
    assert not set((-a).tolist()) & set(b.tolist()), "a and b would cancel if their streams were the same"
    assert (a + b != 0).all()


def test_pads_serve_one_vector() -> None:
    pads = Pads([(bytes(32), True)])
    pads.add_to({"w": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(RuntimeError):
        pads.add_to({"w": torch.zeros(3, dtype=torch.int64)})


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_pads_are_never_copied_or_written(copied: Callable[[Pads], object]) -> None:
    """A copy would serve a second vector, and the difference of the two is that of what they hide."""
    with pytest.raises(TypeError):
        copied(Pads([(bytes(32), True)]))


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3), torch.zeros(3, dtype=torch.int32), torch.arange(6).view(2, 3).t()]
)
def test_a_vector_that_cannot_be_padded_stays_as_it_is_and_so_do_the_pads(tensor: torch.Tensor) -> None:
    pads, good = Pads([(bytes(32), True)]), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError):
        pads.add_to({"a": good, "b": tensor})
    assert not good.any()
    pads.add_to({"a": good})
    assert good.all()


def test_the_stream_is_that_of_aes_256_in_counter_mode() -> None:
    """By hand, block by block, so that sites of another make come to the same."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = bytes(range(32))
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    expected = b"".join(block.update(index.to_bytes(16, "big")) for index in range(3))
    left = Pads([(key, False)]).add_to({"w": torch.zeros(6, dtype=torch.int64)}, block=5)["w"]
    assert (-left).numpy().tobytes() == expected
