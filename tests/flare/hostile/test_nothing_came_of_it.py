"""What holds after all that was sent: nothing ran, nothing was read or called, no file is left."""

from __future__ import annotations

import pytest

from .attack import KIT_PATH, SITES, Attack
from .watchers import ROLES

pytestmark = [pytest.mark.flare, pytest.mark.slow]

MOST_MORE_BYTES = 300 << 20


def test_nothing_of_a_refused_job_is_left(attack: Attack) -> None:
    assert attack.left == {who: set() for who in ("server", *SITES)}


def test_nothing_ran_and_nobody_was_called(attack: Attack) -> None:
    assert not attack.around.marker.exists()
    assert [path.read_text() for path in attack.marks.iterdir()] == []
    assert attack.listener.calls == 0


def test_no_secret_is_at_the_server(attack: Attack) -> None:
    secrets = {what: value for what, value in attack.secrets().items() if not what.endswith(KIT_PATH)}
    assert len(secrets) >= 5 * len(SITES)
    assert attack.found(secrets) == []


def test_nor_where_a_site_keeps_its_kit(attack: Attack) -> None:
    secrets = {what: value for what, value in attack.secrets().items() if what.endswith(KIT_PATH)}
    assert len(secrets) == len(SITES)
    assert attack.found(secrets) == []


@pytest.mark.parametrize("role", ROLES)
def test_memory_stays(attack: Attack, role: str) -> None:
    assert attack.most[role] < attack.usual[role] + MOST_MORE_BYTES
