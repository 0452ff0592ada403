"""What a changed server sends to a site's processes by itself: deployments, commands, objects."""

from __future__ import annotations

import json

import pytest
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.private.admin_defs import MsgHeader, ReturnCode

from .attack import SITES, Attack

pytestmark = [pytest.mark.flare, pytest.mark.slow]

FIXED = ("JOB_INVALID", "NVFLARE_ERROR: JOB_INVALID", "ERROR", "OK", "None")


def test_every_site_says_one_code_of_every_archive(attack: Attack) -> None:
    for codes, answers in (("JOB_INVALID", attack.deployed), ("JOB_VERSION", attack.versions)):
        assert answers
        for name, said in answers.items():
            assert set(said) == set(SITES), (name, said)
            for headers, body in said.values():
                assert headers[MsgHeader.RETURN_CODE] == ReturnCode.ERROR, name
                assert body.removeprefix("NVFLARE_ERROR: ") == codes, name


def test_what_means_nothing_is_taken(attack: Attack) -> None:
    """Else the codes above say nothing of the archives. The other site wants it signed."""
    unsigned, signed = SITES
    assert attack.taken
    for name, said in attack.taken.items():
        assert said[unsigned][0][MsgHeader.RETURN_CODE] == ReturnCode.OK, (name, said)
        headers, body = said[signed]
        assert (headers[MsgHeader.RETURN_CODE], body) == (ReturnCode.ERROR, "JOB_INVALID"), (name, said)


def test_of_an_object_nobody_says_anything(attack: Attack) -> None:
    """A message that is not understood has no answer; of what can be read, the fixed ones."""
    assert len(attack.objects) > 300
    for name, said in attack.objects.items():
        for who, answer in said.items():
            if answer is None or who == "the server's own":
                continue
            headers, body = answer
            assert body in FIXED or json.loads(body)["running_jobs"] is not None, (name, said)
            assert not headers.get(MessageHeaderKey.ERROR), (name, said)


def test_no_object_is_made_or_kept_and_no_process_ends_of_it(attack: Attack) -> None:
    assert not attack.datums.exists()
    assert attack.pids[0] == attack.pids[1] and set(attack.pids[0]) == {"server", *SITES}
