"""A site believes a list of hellos only if it can, and pads one vector for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nvflare.private.fed.utils.identity_utils import IdentityAsserter

from histoflare.flare.job import Job, read_job
from histoflare.flare.site_keys import SimulatedKeys, SiteKeys
from histoflare.flare.site_sum import SiteSum, hash_agreed
from histoflare.privacy.secure_sum.hello import Hello, signed_part
from histoflare.privacy.spend import Spend
from histoflare.site.messages import TrainAnswer
from tests.refusals import raises_reason

from .certified import SERVER, Consortium, hello_of

SITES = ("a", "b", "c")
ME = "a"


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("kits"))


@pytest.fixture(scope="module")
def keys(consortium: Consortium) -> dict[str, SiteKeys]:
    return {site: consortium.keys(site) for site in SITES}


@pytest.fixture(scope="module")
def job(repository: Path) -> Job:
    return read_job(repository / "jobs" / "mem_fedavg")


def pinned(keys: dict[str, SiteKeys], *names: str, trust_ca: bool = False) -> Any:
    """Return an open policy with the pins of these sites."""
    pins = {site: keys[site].fingerprint for site in names}
    return SimpleNamespace(pins=pins, trust_ca=trust_ca, protection=None)


class Round:
    """One attempt of three sites, as the server sees it."""

    def __init__(self, keys: Mapping[str, SiteKeys | SimulatedKeys], job: Job, attempt: int = 0) -> None:
        self.sums = {site: SiteSum(site, keys[site], job, "run") for site in keys}
        self.attempt = attempt
        self.hellos = {site: each.hello(0, attempt) for site, each in self.sums.items()}

    def join(self, policy: Any, site: str = ME, received: str = "model", **changes: Any) -> Any:
        said = {"hellos": list(self.hellos.values()), "round_index": 0, "attempt": self.attempt} | changes
        plan = SimpleNamespace(spend=lambda: Spend(1.0))
        return self.sums[site].join(received=received, policy=policy, plan=plan, **said)


def test_the_random_directions_are_in_what_the_sites_of_a_sum_hash(repository: Path) -> None:
    """Sites with other directions would add up gradients of different features."""
    first = read_job(repository / "jobs" / "linear_shared")
    model = first.task.model
    others = [replace(model, direction_seed=1), replace(model, directions=model.directions + 1)]
    hashes = {hash_agreed(replace(first, task=replace(first.task, model=each))) for each in (model, *others)}
    assert len(hashes) == 3 and hash_agreed(first) in hashes


def test_the_pads_of_all_sites_cancel_and_each_hides_its_vector(keys: dict[str, SiteKeys], job: Job) -> None:
    policy, made = pinned(keys, *SITES), Round(keys, job)
    joined = {site: made.join(policy, site) for site in SITES}
    assert {each.countable for each in joined.values()} == {3}
    assert len({each.transcript for each in joined.values()}) == 1
    vectors = {site: np.full(1000, 2**40 + index) for index, site in enumerate(SITES)}
    sent = {}
    for site, vector in vectors.items():
        vector.flags.writeable = False  # as it may come from the trainer's process
        answer = joined[site].sealed(TrainAnswer({"w": vector}, 7.0, {}, patients=5))
        assert answer.weight == 1.0, "the weight is in the vector"
        sent[site] = answer.tensors["w"]
        assert (sent[site] != vector).all()
        shares = np.unpackbits(np.ascontiguousarray(sent[site]).view(np.uint8)).mean()
        assert shares == pytest.approx(0.5, abs=0.01), "every bit is as often 0 as 1"
    assert (sum(sent.values()) == sum(vectors.values())).all()


def test_another_model_is_another_sum(keys: dict[str, SiteKeys], job: Job) -> None:
    """A server that gives sites different models gets noise."""
    policy, made = pinned(keys, *SITES), Round(keys, job)
    assert made.join(policy).transcript != made.join(policy, "b", received="another").transcript


def test_another_job_is_another_sum(keys: dict[str, SiteKeys], job: Job) -> None:
    """A server that deploys one site's job with less noise, or another seed, gets noise too."""
    policy = pinned(keys, *SITES)
    made = Round(keys, job)
    made.sums["b"] = SiteSum("b", keys["b"], replace(job, seed=job.seed + 1), "run")
    made.hellos["b"] = made.sums["b"].hello(0, 0)
    assert made.join(policy).transcript != made.join(policy, "b").transcript


def swap(site: str, hello: Callable[[dict[str, SiteKeys]], dict[str, str]]) -> Any:
    """Return what puts another hello in the place of a site's."""
    return lambda made, keys: made.hellos.update({site: hello(keys)})


@pytest.fixture(scope="module")
def somebody(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SiteKeys]:
    """Keys that an inventor of sites has certified himself, with an authority of the same name."""
    other = Consortium(tmp_path_factory.mktemp("somebody"))
    return {site: other.keys(site) for site in ("b", "d")}


LIES = {
    "this site is missing": lambda made, keys: made.hellos.pop(ME),
    "this site's hello is of another attempt": swap(ME, lambda keys: hello_of(ME, keys[ME])),
    "a hello of an earlier attempt": swap("b", lambda keys: hello_of("b", keys["b"], attempt=1)),
    "a hello of another round": swap("b", lambda keys: hello_of("b", keys["b"], index=1)),
    "a hello of another run": swap("b", lambda keys: hello_of("b", keys["b"], run="other")),
    "a changed key": lambda made, keys: made.hellos["b"].update(key=hello_of("b", keys["b"])["key"]),
    "one site twice": lambda made, keys: made.hellos.update(again=made.hellos["b"]),
    "no list": lambda made, keys: made.hellos.clear(),
    "nonsense": lambda made, keys: made.hellos.update(b={"site": "b"}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_list_that_lies_is_refused(keys: dict[str, SiteKeys], job: Job, lie: str) -> None:
    made = Round(keys, job)
    LIES[lie](made, keys)
    with raises_reason("SUM_LIST_INVALID"):
        made.join(pinned(keys, *SITES, trust_ca=True))


def test_of_a_list_that_is_too_long_nothing_is_read(
    keys: dict[str, SiteKeys], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Round(keys, job)
    monkeypatch.setattr(Hello, "from_json", lambda content: pytest.fail("it was read"))
    with raises_reason("SUM_LIST_INVALID"):
        made.join(pinned(keys, *SITES), hellos=[*made.hellos.values()] * 30)


def test_what_flare_has_a_site_sign_is_no_hello(consortium: Consortium, keys: dict[str, SiteKeys]) -> None:
    """A server chooses a part of what a site signs with the same key when it logs in."""
    kit = consortium.kit("b")
    own = SiteKeys.of_kit(kit)
    said = Hello.from_json(hello_of("b", own))
    content = signed_part("run", 0, 0, "b", said.key, said.nonce)
    flare = IdentityAsserter(str(kit / "startup" / "client.key"), str(kit / "startup" / "client.crt"))
    signed = flare.sign(content, return_str=False)
    assert flare.verify_signature(content, signed)
    keys[ME].verifier({})(said, content)
    with raises_reason("SUM_LIST_INVALID"):
        keys[ME].verifier({})(replace(said, signature=signed), content)
    assert not content.startswith(flare.cn.encode()), "nor is a hello an answer to a login"


@pytest.mark.parametrize("site", ["b", "d"])
def test_an_invented_site_or_key_is_refused(
    keys: dict[str, SiteKeys], somebody: dict[str, SiteKeys], job: Job, site: str
) -> None:
    made = Round(keys, job)
    made.hellos[site] = hello_of(site, somebody[site])
    with raises_reason("SUM_LIST_INVALID", site):
        made.join(pinned(keys, "c", trust_ca=True))


def test_a_certificate_serves_the_site_that_it_names(
    consortium: Consortium, keys: dict[str, SiteKeys], job: Job
) -> None:
    """A site could else count as several."""
    made = Round(keys, job)
    made.hellos["e"] = hello_of("e", consortium.keys("d"))
    with raises_reason("SUM_LIST_INVALID", "e"):
        made.join(pinned(keys, *SITES, trust_ca=True))


@pytest.mark.parametrize("name", [SERVER, "lead"])
def test_the_server_and_persons_are_no_sites(
    consortium: Consortium, keys: dict[str, SiteKeys], job: Job, name: str
) -> None:
    """The authority gave them certificates too."""
    role = None if name == SERVER else "project_admin"
    made = Round(keys, job)
    made.hellos[name] = hello_of(name, consortium.keys(name, role))
    with raises_reason("SUM_LIST_INVALID", name):
        made.join(pinned(keys, *SITES, trust_ca=True))


def test_a_pinned_site_with_another_certificate_is_refused(
    consortium: Consortium, keys: dict[str, SiteKeys], job: Job
) -> None:
    """Whoever holds the authority's key can make one, and read everything in between."""
    made = Round(keys, job)
    made.hellos["b"] = hello_of("b", consortium.keys("b"))
    with raises_reason("SUM_LIST_INVALID", "b", "policy pin"):
        made.join(pinned(keys, *SITES, trust_ca=True))


def test_only_sites_that_are_known_count(consortium: Consortium, keys: dict[str, SiteKeys], job: Job) -> None:
    """With one that colludes two more must be known; more names on the list change nothing."""
    assert Round(keys, job).join(pinned(keys, *SITES)).countable == 3
    assert Round(keys, job).join(pinned(keys, "b", trust_ca=True)).countable == 3
    for policy in (pinned(keys, "b"), pinned(keys)):
        made = Round(keys, job)
        made.hellos |= {name: hello_of(name, consortium.keys(name)) for name in ("d", "e", "f")}
        with raises_reason("SUM_TOO_FEW_KNOWN"):
            made.join(policy)
    made = Round(keys, job)
    del made.hellos["c"]
    with raises_reason("SUM_TOO_FEW_KNOWN"):
        made.join(pinned(keys, *SITES))


def test_a_hello_serves_one_list_whatever_comes_of_it(keys: dict[str, SiteKeys], job: Job) -> None:
    policy = pinned(keys, *SITES)
    made = Round(keys, job)
    made.join(policy)
    with raises_reason("SUM_LIST_INVALID"):
        made.join(policy)
    made = Round(keys, job)
    with raises_reason("SUM_LIST_INVALID"):
        made.join(policy, hellos=[])
    with raises_reason("SUM_LIST_INVALID"):
        made.join(policy)


@pytest.mark.parametrize("changes", [{"round_index": 1}, {"attempt": 1}, {"attempt": None}, {"hellos": None}])
def test_a_list_of_another_attempt_than_the_hello_is_refused(
    keys: dict[str, SiteKeys], job: Job, changes: dict[str, Any]
) -> None:
    with raises_reason("SUM_LIST_INVALID"):
        Round(keys, job).join(pinned(keys, *SITES), **changes)


@pytest.mark.parametrize("attempt", [-1, 1.0, None, True, 2**31, pytest.param(10**5000, id="long")])
def test_an_attempt_is_a_number(keys: dict[str, SiteKeys], job: Job, attempt: Any) -> None:
    with raises_reason("ROUND_INVALID"):
        SiteSum(ME, keys[ME], job, "run").hello(0, attempt)


def test_sites_of_the_simulator_believe_each_other(job: Job) -> None:
    """It has no kits, no pins and no secrets: all its sites are one user's."""
    keys = {site: SimulatedKeys() for site in SITES}
    assert Round(keys, job).join(pinned({})).countable == 3


@pytest.mark.parametrize("file", ["client.key", "client.crt", "rootCA.pem", "fed_client.json"])
def test_a_kit_without_its_keys_is_refused(tmp_path: Path, file: str) -> None:
    kit = Consortium(tmp_path).kit("a")
    (kit / "startup" / file).write_text("{}")
    with raises_reason("KIT_CHANGED"):
        SiteKeys.of_kit(kit)
