"""Nobody else on the machine reads what a site has of its patients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from histoflare.privacy.plan import UpdateNoise
from histoflare.privacy.policy import POLICIES, read_policy
from histoflare.site.bookkeeping import Bookkeeping
from histoflare.site.ledgers import audit_log_of, on_workstation
from histoflare.site.trainer import Trainer

from ..flare.bags_on_disk import write_site
from .tasks import SHARED_BODY, TASK, first_state, setup_of

WEIGHTS = 10_000
"""At least as many as the model has."""
PLAN = UpdateNoise(clip_norm=1.0, budget_epsilon=4.0, budget_share=1.0).settled(1, WEIGHTS)


@pytest.fixture(params=[0o000, 0o022], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def readable_by_others(folder: Path) -> list[Path]:
    """Return what of ``folder``, itself and all below it, is not for its owner alone."""
    return [path for path in (folder, *folder.rglob("*")) if path.stat().st_mode & 0o077]


def test_after_a_run_nothing_of_a_site_can_be_read_by_others(tmp_path: Path, umask: None) -> None:
    """A protected round with a state that stays, an evaluation, ledger, key, releases, audit log, notes."""
    site = on_workstation("a", write_site(tmp_path, "a", slides=20))
    policy = replace(read_policy(POLICIES / "dp-update.toml"), minimum_patients=2)
    assert policy.protection is not None
    policy = replace(policy, protection=replace(policy.protection, evaluations=1))
    bookkeeping = Bookkeeping(
        site, policy, PLAN, rounds=1, weights=WEIGHTS, run="run-1", labels=list(TASK.labels), data="bags"
    )
    bookkeeping.reserve()
    trainer = Trainer(
        setup_of(site, strategy=SHARED_BODY, plan=PLAN, roles=bookkeeping.roles), lambda _: None
    )
    model = first_state()
    try:
        bookkeeping.train(model, 0, lambda: trainer.train(model, 0, 1))
        bookkeeping.evaluate(model, "test", "q", lambda: trainer.evaluate(model, "test"))
    finally:
        trainer.close()
    written = [
        *site.records.rglob("state_*.safetensors"),
        *site.records.rglob("evaluation_test.csv"),
        *site.records.rglob("events.out.tfevents.*"),
        *site.ledger.parent.rglob("release_*.safetensors"),
    ]
    assert len(written) == 4, "the run wrote what is looked at"
    assert all(path.is_file() for path in (site.ledger, site.ledger_key))
    assert list(audit_log_of(site).read())
    assert readable_by_others(tmp_path / "a") == []
