"""What the lead's kit submits: the server takes none of it, and no job finds what an earlier one left."""

from __future__ import annotations

import pytest
from nvflare.private.admin_defs import MsgHeader, ReturnCode

from histoflare.flare.poc import COMPLETED

from .attack import SITES, Attack

pytestmark = [pytest.mark.flare, pytest.mark.slow]


def test_the_server_takes_no_hostile_archive(attack: Attack) -> None:
    assert len(attack.submitted) > 10
    for name, said in attack.submitted.items():
        assert "JOB_INVALID: " in said, (name, said)


class TestOneAfterTheOther:
    """Two jobs of which the second would use what the first one left."""

    def test_a_first_one_ran_and_left_code_in_its_comments(self, attack: Attack) -> None:
        """Else what follows shows nothing."""
        assert attack.statuses["before"] == COMPLETED
        for site in SITES:
            assert "pathlib.Path(" in attack.left_by_first[site]
            assert "# include file(" in attack.left_by_first[site]

    def test_a_first_one_that_brings_a_file_is_refused(self, attack: Attack) -> None:
        assert len(attack.first_jobs) >= 6
        for name, said in attack.first_jobs.items():
            assert "JOB_INVALID: " in said, (name, said)

    def test_a_second_one_that_names_what_the_first_one_left_is_refused(self, attack: Attack) -> None:
        assert len(attack.second_jobs) >= 13
        for name, said in attack.second_jobs.items():
            assert "JOB_INVALID: " in said, (name, said)

    def test_a_second_one_that_is_taken_has_only_text(self, attack: Attack) -> None:
        """Its text names the first one's folder, FLARE's variables and the environment."""
        assert attack.statuses["references"].startswith("FINISHED")
        assert attack.job_ids["before"] in attack.references
        for site in SITES:
            assert attack.references in attack.federation.log(site).read_text(), "whose purpose it refused"

    def test_a_site_takes_nothing_more_for_a_job_that_it_has(self, attack: Attack) -> None:
        """The server deploys it raw: onto a job that ran, and onto one that was taken and never started."""
        assert len(attack.built_on) > 20
        for name, said in attack.built_on.items():
            assert set(said) == set(SITES), (name, said)
            for headers, body in said.values():
                assert headers[MsgHeader.RETURN_CODE] == ReturnCode.ERROR, name
                assert body.removeprefix("NVFLARE_ERROR: ") == "JOB_INVALID", name

    def test_an_honest_one_runs_behind_all_of_them(self, attack: Attack) -> None:
        assert attack.statuses["after"] == COMPLETED
