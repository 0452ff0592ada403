"""The protocol's hash: the same for the same agreement, however it is laid out, and another for any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoflare.privacy.protocol import FIELDS, hash_protocol, read_protocols, write_protocols
from tests.refusals import raises_reason

AGREED: dict[str, Any] = {
    "metric": "balanced_accuracy",
    "labels": ["a", "b"],
    "mpp": 0.5,
    "patch_px": 224,
    "encoder": "e:v1",
    "max_patches": 256,
    "split": {"unit": "patient", "test_fraction": 0.2, "seed": 0},
    "stop": {"rounds": 30, "model": "last"},
}


@given(st.permutations([*FIELDS, "encoder", "max_patches"]))
def test_the_order_of_the_fields_does_not_matter(order: list[str]) -> None:
    assert hash_protocol({name: AGREED[name] for name in order}) == hash_protocol(AGREED)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["b", "a"]},
        {"mpp": 0.25},
        {"stop": {"rounds": 31, "model": "last"}},
        {"split": {"unit": "patient", "test_fraction": 0.2, "seed": 1}},
        {"metric": "auc"},
    ],
)
def test_another_agreement_has_another_hash(change: dict[str, Any]) -> None:
    assert hash_protocol(AGREED | change) != hash_protocol(AGREED)


def test_a_whole_float_is_the_whole_number() -> None:
    assert hash_protocol(AGREED | {"mpp": 1.0}) == hash_protocol(AGREED | {"mpp": 1})
    assert hash_protocol(AGREED | {"labels": ("a", "b")}) == hash_protocol(AGREED)


@pytest.mark.parametrize(
    ("protocol", "says"),
    [
        ({name: AGREED[name] for name in FIELDS[1:]}, " metric, one of "),
        (AGREED | {"more": 1}, " more."),
        (AGREED | {"network": "dhunet"}, ": one of encoder and network, window_px; "),
        ({name: AGREED[name] for name in FIELDS}, ": one of encoder and network; "),
        ({name: AGREED[name] for name in FIELDS} | {"network": "dhunet"}, " window_px; "),
        (AGREED | {"window_px": 512}, " window_px."),
        (AGREED | {"mpp": float("nan")}, "float"),
        (AGREED | {"mpp": object()}, "object"),
    ],
)
def test_what_is_no_protocol_has_no_hash(protocol: dict[str, Any], says: str) -> None:
    with raises_reason("PROTOCOL_INVALID", says):
        hash_protocol(protocol)


def test_a_site_reads_the_protocol_it_was_given(tmp_path: Path) -> None:
    other = {name: AGREED[name] for name in FIELDS} | {"network": "dhunet", "window_px": 512}
    for agreed in ([AGREED], [AGREED, other]):
        write_protocols(tmp_path / "protocol.json", agreed)
        assert list(map(hash_protocol, read_protocols(tmp_path / "protocol.json"))) == list(
            map(hash_protocol, agreed)
        )
    for text, says in (("[]", "protocol.json: "), ("{", "JSON"), (json.dumps({"metric": 1}), " labels, ")):
        (tmp_path / "protocol.json").write_text(text)
        with raises_reason("PROTOCOL_INVALID", says):
            read_protocols(tmp_path / "protocol.json")
    with raises_reason("PROTOCOL_MISSING"):
        read_protocols(tmp_path / "none.json")
