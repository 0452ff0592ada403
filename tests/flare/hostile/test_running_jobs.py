"""Tasks that a changed server replaces in a job that runs."""

from __future__ import annotations

import pytest

from .attack import SITES, Attack
from .running_jobs import IN_TASKS, OTHER_TASKS

pytestmark = [pytest.mark.flare, pytest.mark.slow]


@pytest.mark.parametrize("site", SITES)
def test_a_task_that_is_none_of_the_job_is_refused_with_a_code(attack: Attack, site: str) -> None:
    task, code = OTHER_TASKS[site]
    assert attack.codes(task) == {site: {code}}


@pytest.mark.parametrize("site", SITES)
def test_a_task_with_an_object_is_asked_for_again(attack: Attack, site: str) -> None:
    """And not one byte of it is used: the one after all of them is answered."""
    assert attack.federation.log(site).read_text().count("Failed to get_task") >= len(IN_TASKS)
    assert site in attack.codes(OTHER_TASKS[site][0])
