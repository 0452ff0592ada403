"""Who is in a sum: what a site takes for a list, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import example, given
from hypothesis import strategies as st

from histoflare.errors import JobError
from histoflare.privacy.secure_sum.hello import (
    MOST_CERTIFICATE,
    MOST_SITES,
    Hello,
    RoundKeys,
    Transcript,
    check_hellos,
    countable,
    signed_part,
)
from histoflare.privacy.secure_sum.identity import Identity, verify

from ...refusals import raises_reason
from .sites import ATTEMPT, ROUND, RUN, hellos_of, keys_of, say_hello, transcript_of

SITES = ("a", "b", "c")
Hellos = tuple[Hello, ...]


def test_a_list_of_all_sites_is_taken_by_each_of_them_in_any_order() -> None:
    keys = keys_of(SITES)
    hellos = hellos_of(keys)
    for each in keys:
        check_hellos(hellos, each, verify)
        check_hellos(hellos[::-1], each, verify)


def signed_anew(hello: Hello, **changes: Any) -> Hello:
    """Return another hello of the same site for this attempt, signed by whoever made it up."""
    identity, changed = Identity(), replace(hello, **changes)
    signed = signed_part(RUN, ROUND, ATTEMPT, changed.site, changed.key, changed.nonce)
    return replace(changed, certificate=identity.certificate, signature=identity.sign(signed))


def own_key_swapped(hellos: Hellos) -> Hellos:
    return (
        signed_anew(hellos[0], key=X25519PrivateKey.generate().public_key().public_bytes_raw()),
        *hellos[1:],
    )


def own_nonce_swapped(hellos: Hellos) -> Hellos:
    return (signed_anew(hellos[0], nonce=bytes(32)), *hellos[1:])


def own_certificate_swapped(hellos: Hellos) -> Hellos:
    return (signed_anew(hellos[0]), *hellos[1:])


def own_hello_missing(hellos: Hellos) -> Hellos:
    return hellos[1:]


def own_key_as_another_s(hellos: Hellos) -> Hellos:
    return (hellos[0], signed_anew(hellos[1], key=hellos[0].key), hellos[2])


def another_key_twice(hellos: Hellos) -> Hellos:
    return (*hellos[:2], signed_anew(hellos[2], key=hellos[1].key))


def nonce_twice(hellos: Hellos) -> Hellos:
    return (*hellos[:2], signed_anew(hellos[2], nonce=hellos[1].nonce))


def site_twice(hellos: Hellos) -> Hellos:
    return (*hellos, say_hello(RoundKeys.new("b", RUN, ROUND, ATTEMPT)))


def certificate_twice(hellos: Hellos) -> Hellos:
    """One that is two sites: both hellos are signed well, by one key."""
    one = Identity()
    return hellos[0], *(say_hello(RoundKeys.new(site, RUN, ROUND, ATTEMPT), one) for site in ("b", "c"))


def own_key_in_another_writing(hellos: Hellos) -> Hellos:
    """With the bit that X25519 does not look at."""
    key = hellos[0].key[:-1] + bytes([hellos[0].key[-1] ^ 128])
    return (*hellos[:2], signed_anew(hellos[2], key=key))


def secret_of_zeros(hellos: Hellos) -> Hellos:
    """The point of order 1: whatever is multiplied with it is 0."""
    return (*hellos[:2], signed_anew(hellos[2], key=bytes(32)))


def wrong_signature(hellos: Hellos) -> Hellos:
    last = bytearray(hellos[2].signature)
    last[0] ^= 1
    return (*hellos[:2], replace(hellos[2], signature=bytes(last)))


def another_s_name(hellos: Hellos) -> Hellos:
    """What c signed, said to be d's."""
    return (*hellos[:2], replace(hellos[2], site="d"))


def of_another(run: str, round_index: int, attempt: int) -> Callable[[Hellos], Hellos]:
    """A hello that was good elsewhere, sent again."""
    return lambda hellos: (*hellos[:2], say_hello(RoundKeys.new("c", run, round_index, attempt)))


def no_key_in_the_certificate(hellos: Hellos) -> Hellos:
    return (*hellos[:2], replace(hellos[2], certificate=b"certificate"))


def alone(hellos: Hellos) -> Hellos:
    return hellos[:1]


def too_many(hellos: Hellos) -> Hellos:
    more = [f"site {index}" for index in range(MOST_SITES)]
    return (hellos[0], *hellos_of(keys_of(more)))


@pytest.mark.parametrize(
    "tamper",
    [
        own_key_swapped,
        own_nonce_swapped,
        own_certificate_swapped,
        own_hello_missing,
        own_key_as_another_s,
        another_key_twice,
        nonce_twice,
        site_twice,
        certificate_twice,
        own_key_in_another_writing,
        secret_of_zeros,
        wrong_signature,
        another_s_name,
        of_another(RUN, ROUND, ATTEMPT - 1),
        of_another(RUN, ROUND - 1, ATTEMPT),
        of_another("other run", ROUND, ATTEMPT),
        no_key_in_the_certificate,
        alone,
        too_many,
    ],
    ids=lambda tamper: tamper.__name__,
)
def test_a_list_that_was_tampered_with_is_refused(tamper: Callable[[Hellos], Hellos]) -> None:
    keys = keys_of(SITES)
    with raises_reason("SUM_LIST_INVALID"):
        check_hellos(tamper(hellos_of(keys)), keys[0], verify)


@pytest.mark.parametrize(
    "tamper", [own_key_swapped, site_twice, own_key_as_another_s, secret_of_zeros, alone]
)
def test_no_pads_are_made_of_a_list_that_nobody_looked_at(tamper: Callable[[Hellos], Hellos]) -> None:
    keys = keys_of(SITES)
    transcript = transcript_of(keys, hellos=tamper(hellos_of(keys)))
    with raises_reason("SUM_LIST_INVALID"):
        keys[0].pads(transcript)


def test_a_check_of_certificates_that_says_no_is_a_list_refused() -> None:
    keys = keys_of(SITES)

    def none_is_known(hello: Hello, signed: bytes) -> None:
        raise JobError("no such hospital", reason="KIT_CHANGED")

    with raises_reason("SUM_LIST_INVALID", "no such hospital"):
        check_hellos(hellos_of(keys), keys[0], none_is_known)


def test_keys_that_said_no_hello_take_no_list() -> None:
    keys = keys_of(SITES)
    silent = RoundKeys.new("a", RUN, ROUND, ATTEMPT)
    with raises_reason("SUM_LIST_INVALID"):
        check_hellos(hellos_of(keys), silent, verify)


def test_keys_serve_one_transcript() -> None:
    keys = keys_of(SITES)
    hellos = hellos_of(keys)
    keys[0].pads(transcript_of(keys))
    for again in (lambda: keys[0].pads(transcript_of(keys)), lambda: check_hellos(hellos, keys[0], verify)):
        with raises_reason("SUM_LIST_INVALID"):
            again()


@pytest.mark.parametrize("other", [{"run": "other"}, {"round_index": ROUND + 1}, {"attempt": ATTEMPT + 1}])
def test_keys_serve_their_own_attempt_alone(other: dict[str, Any]) -> None:
    keys = keys_of(SITES)
    with raises_reason("SUM_LIST_INVALID"):
        keys[0].pads(replace(transcript_of(keys), **other))


def test_keys_are_never_copied_or_written() -> None:
    keys = RoundKeys.new("a", RUN, ROUND, ATTEMPT)
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            copied(keys)


def test_each_attempt_has_another_key_and_nonce() -> None:
    first, second = (say_hello(RoundKeys.new("a", RUN, ROUND, ATTEMPT)) for _ in range(2))
    assert first.key != second.key and first.nonce != second.nonce


def test_a_hello_is_json_and_comes_back() -> None:
    hello = say_hello(RoundKeys.new("Klinik für Pathologie", RUN, ROUND, ATTEMPT))
    assert Hello.from_json(json.loads(json.dumps(hello.to_json()))) == hello


def hello_json(**changes: Any) -> dict[str, Any]:
    return {**say_hello(RoundKeys.new("a", RUN, ROUND, ATTEMPT)).to_json(), **changes}


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        "hello",
        {},
        {name: part for name, part in hello_json().items() if name != "nonce"},
        hello_json(comment="of 17 patients"),
        hello_json(site=""),
        hello_json(site=7),
        hello_json(site="a" * 257),
        hello_json(site="\ud800"),
        hello_json(key="AAAA"),
        hello_json(nonce=""),
        hello_json(signature=""),
        hello_json(signature="A" * 4 * 400),
        hello_json(certificate="A" * 4 * (MOST_CERTIFICATE // 3 + 1)),
        hello_json(certificate="A" * 3 * MOST_CERTIFICATE),
        hello_json(certificate="not base64!"),
    ],
)
def test_what_is_no_hello_is_refused(content: Any) -> None:
    with raises_reason("SUM_LIST_INVALID"):
        Hello.from_json(content)


@example([("ab", b"c"), ("a", b"bc")])
@given(st.lists(st.tuples(st.text(max_size=3), st.binary(max_size=3)), min_size=2, max_size=2, unique=True))
def test_what_is_signed_differs_wherever_what_is_said_does(said: list[tuple[str, bytes]]) -> None:
    """Also where a name ends in what another key begins with."""
    first, second = (signed_part("r", 0, 0, site, key, b"") for site, key in said)
    assert first != second


def test_every_part_of_a_transcript_is_in_its_hash() -> None:
    keys = keys_of(SITES)
    hellos = hellos_of(keys)
    whole = Transcript("job", "run", 0, 0, "model", hellos)
    changed = [
        replace(whole, **{name: value})
        for name, value in {
            "job": "another",
            "run": "another",
            "round_index": 1,
            "attempt": 1,
            "received": "another",
        }.items()
    ]
    for other in (
        hellos[:2],
        hellos[::-1],
        *(
            (replace(hellos[0], **part), *hellos[1:])
            for part in ({"site": "z"}, {"certificate": b"z"}, {"key": bytes(32)}, {"nonce": bytes(32)})
        ),
    ):
        changed.append(replace(whole, hellos=other))
    hashes = {each.sha256 for each in (whole, *changed)}
    assert len(hashes) == 1 + len(changed)
    assert len(whole.sha256) == 64 and whole.sha256 == replace(whole).sha256


def test_a_site_counts_those_that_its_own_people_named() -> None:
    hellos = hellos_of(keys_of(SITES))
    prints = {hello.site: hello.fingerprint for hello in hellos}
    assert countable(hellos, {}, False, "a") == 1  # itself
    assert countable(hellos, {"b": prints["b"], "z": prints["c"]}, False, "a") == 2
    assert countable(hellos, {"b": prints["b"].upper(), "c": prints["c"]}, False, "a") == 3
    assert countable(hellos, {"b": prints["c"]}, False, "a") == 1, "another certificate than the pinned one"
    assert countable(hellos, {}, True, "a") == 3
    assert countable(hellos, {"b": prints["c"]}, True, "a") == 2, "a pin goes before the CA"
