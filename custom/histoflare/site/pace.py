"""When a site answers: at public times, which tell neither how long it worked nor how that went.

How long a step takes depends on which patients were drawn and on what they have. So an answer waits, whatever
it is (an update, the same one again, a refusal), until a public number of seconds after its opening.

Where the work took longer, the answer waits for twice, four times, … as long, and from then on every answer
of this kind in this run does. So a run tells of lateness a few times at most, once for each doubling,
whatever public time its lead chose and however often it is resumed: the site's own file keeps the time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from histoflare.storage import write_json

POLL_SECONDS = 0.1
"""How often ``stopped`` is asked while an answer waits."""

PREPARING, TRAINING, EVALUATING = "prepare", "train", "evaluate"
"""What an answer is of: the data were read, or nothing was done; a round; an evaluation."""


class Pace:
    """The public times of one run at one site.

    Args:
        seconds: After which an answer comes; at least 1.
        file: Where longer times are kept.
        say: Takes lines for the site's own log.
        clock: Seconds that only go forward. sleep: Waits for some.
    """

    def __init__(
        self,
        seconds: int,
        file: Path,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds = seconds
        self._file = file
        self._say = say
        self._clock = clock
        self._sleep = sleep
        self._opened = clock()
        self._longer = _read(file, say)

    def open(self, at: float) -> None:
        """Begin to count at a public time, by ``clock``: when a task arrived."""
        self._opened = at

    def close(self, kind: str, stopped: Callable[[], bool]) -> bool:
        """Wait for the public time of what was opened; what comes after is opened then.

        Args:
            kind: :data:`PREPARING`, :data:`TRAINING` or :data:`EVALUATING`.
            stopped: Asked meanwhile; true ends the wait.

        Returns:
            Whether the time has come; False if ``stopped`` before.
        """
        usual = max(self._seconds, self._longer.get(kind, 0))
        seconds, taken = usual, self._clock() - self._opened
        while seconds < taken:
            seconds *= 2
        if seconds > usual:
            self._lengthen(kind, seconds, f"{taken:.1f} s, and the public time was {usual} s")
        self._opened += seconds
        while (left := self._opened - self._clock()) > 0:
            if stopped():
                return False
            self._sleep(min(POLL_SECONDS, left))
        return True

    def _lengthen(self, kind: str, seconds: int, why: str) -> None:
        self._longer[kind] = seconds
        self._say(
            f"late ({kind}): {why} after the opening. It is {seconds} s from now on in this run; ask the "
            "lead for more answer_seconds."
        )
        try:
            write_json(self._file, self._longer)
        except OSError as error:
            self._say(f"{self._file}: cannot be written ({error}): the time is kept until this job ends.")


def _read(file: Path, say: Callable[[str], None]) -> dict[str, int]:
    try:
        content = json.loads(file.read_text())
        return {kind: int(content[kind]) for kind in (PREPARING, TRAINING, EVALUATING) if kind in content}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        say(f"{file}: cannot be read ({error}); the job's own public time counts.")
        return {}
