"""A site's own notes of a run, on its own disk: what it keeps from round to round, TensorBoard, predictions.

Everything lies in ``<records>/<run>/``; nothing of it leaves the site.

What a strategy keeps at the site (personal layers, control variates) is written once a round, before the
round's answer is given, as ``state_<round>.safetensors``. Round r starts from the newest state of a round
*before* r, never from that of r itself, and of the states the newest two are kept. So the newest round can be
run again, after a crash of any process or by a job that resumes, and starts where it started the first time
and gives the same bytes. A run that goes back further finds nothing kept and starts from the global model.
States of later rounds are of a history that is no more; writing round r removes them.

``run.json`` says what made the states: the task, the strategy with what it shares, the privacy plan and,
under one, a hash of the training patients. A job that trains anything else under the run's name is refused:
it could have what a site keeps for itself sent out.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch

from histoflare.errors import JobError
from histoflare.rounds.state import State
from histoflare.site.run_name import is_run_name
from histoflare.storage import make_folder, write_bytes, write_json, write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SITE = "site"
ROUND = "round"
RUN_FILE = "run.json"
LOSS_FILE = "loss.json"
BEFORE = {
    "strategy": {"batch_norm": "shared", "trains": None},
    "task": {"train": "all", "windows_per_record": 4},
}
"""What notes of an earlier version do not say, of a task whatever its data."""


class RunRecords:
    """The notes of one run at one site.

    Args:
        folder: The site's folder for the notes of all runs.
        run: Name of the run: 1 to 64 of A-Z, a-z, 0-9, '_', '.', '-', and not only dots. A run's name must
            be its own: a second run of the same name could start from what the first one kept.
        site: The site; written into every state, so that two sites that share a folder find out.

    Raises:
        JobError: ``run`` cannot be the name of a folder (RUN_INVALID).
    """

    def __init__(self, folder: Path, run: str, site: str) -> None:
        if not is_run_name(run):
            raise JobError(
                f"A run's name is 1 to 64 of A-Z, a-z, 0-9, '_', '.' and '-', and not {run!r}.",
                reason="RUN_INVALID",
            )
        self.folder = folder / run
        self._site = site
        self._writer: SummaryWriter | None = None

    def claim(
        self,
        task: Mapping[str, Any],
        strategy: Mapping[str, Any] | None,
        plan: Mapping[str, Any] | None = None,
        patients: Iterable[str] = (),
        split: Mapping[str, Any] | None = None,
    ) -> None:
        """Make this run the one of ``task`` and ``strategy``, or check that it is.

        What the strategy keeps at the site may tell of every patient it was trained on, without noise: under
        a privacy plan a run stays with its plan, and what it kept goes with its training patients. Other
        patients are no reason to refuse: a refusal would tell that there are others.

        Args:
            task, strategy: Their settings, as JSON. Strategy None: a job that only evaluates.
            plan: The privacy plan's settings; None: nothing is protected.
            patients: Who is trained on.
            split: The protocol's rule for manifests without a split column. It is noted, and not compared:
                who is trained on is.

        Raises:
            JobError: The run is of something else, or its notes cannot be used (RECORDS_INVALID).
        """
        path = self.folder / RUN_FILE
        known = "\n".join(sorted(set(patients))).encode()
        cohort = None if plan is None else hashlib.sha256(known).hexdigest()
        content = {"task": task, "strategy": strategy, "plan": plan, "cohort": cohort, "split": split}
        wanted = json.loads(json.dumps(content))
        try:
            if not path.is_file():
                if strategy is not None:
                    write_json(path, wanted)
                return
            made = json.loads(path.read_text())
            for notes in (made, wanted):
                for part, before in BEFORE.items():
                    notes[part] = notes[part] and before | notes[part]
            same = made["task"] == wanted["task"] and (
                wanted["strategy"] is None or all(made[name] == wanted[name] for name in ("strategy", "plan"))
            )
            if same and strategy is not None and made["cohort"] != cohort:
                for index in self._rounds():
                    self._state_path(index).unlink()
                write_json(path, wanted)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unusable(path, f"it is damaged ({error})") from error
        if not same:
            raise JobError(
                f"{self.folder.name}: the run of this name was of another task, strategy or privacy plan. "
                "A job that goes on after it must be the same job (histoflare resume).",
                reason="RECORDS_INVALID",
            )

    def is_protected(self) -> bool:
        """Return whether the run trains under a privacy plan: what is kept here then tells of its patients.

        Raises:
            JobError: The run's notes are damaged (RECORDS_INVALID).
        """
        path = self.folder / RUN_FILE
        try:
            return path.is_file() and json.loads(path.read_text())["plan"] is not None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unusable(path, f"it is damaged ({error})") from error

    def load_state(self, before: int | None = None) -> State:
        """Return what the strategy kept at this site; empty if nothing.

        Args:
            before: The round that is about to run: the newest state of an earlier one is taken. None takes
                the newest.

        Raises:
            JobError: The file is damaged or another site's (RECORDS_INVALID).
        """
        usable = [index for index in self._rounds() if before is None or index < before]
        if not usable:
            return {}
        path = self._state_path(max(usable))
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as opened:
                written = opened.metadata() or {}
                # Copies: what the file gives is mapped from it, and the file may be replaced.
                state = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise _unusable(path, f"it is damaged ({error})") from error
        if written != {SITE: self._site, ROUND: str(max(usable))}:
            raise _unusable(path, f"it says it is of {written}; every site needs a records folder of its own")
        return state

    def save_state(self, round_index: int, state: State) -> None:
        """Keep ``state`` as that of the end of ``round_index``, and the newest before it; drop all others.

        Raises:
            JobError: It cannot be written (RECORDS_INVALID).
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        content = safetensors.torch.save(tensors, metadata={SITE: self._site, ROUND: str(round_index)})
        try:
            write_bytes(self._state_path(round_index), content)
            earlier = [index for index in self._rounds() if index < round_index]
            for index in set(self._rounds()) - {round_index, max(earlier, default=round_index)}:
                self._state_path(index).unlink(missing_ok=True)
        except OSError as error:
            raise JobError(
                f"{self.folder}: this site's notes cannot be written ({error.strerror or error}). Make room, "
                "or give another folder as records in the site's file.",
                reason="RECORDS_INVALID",
            ) from error

    def add_scalars(self, round_index: int, values: Mapping[str, float | None]) -> None:
        """Add a round's figures to TensorBoard; None is left out.

        A round that is run again replaces what was written of it and after it.
        """
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            make_folder(self.folder / "tensorboard")
            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=round_index)
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, round_index)
        self._writer.flush()

    def note_loss(self, round_index: int, loss: float) -> None:
        """Write down the mean training loss of the newest round, for who watches at this site."""
        write_json(self.folder / LOSS_FILE, {"round": round_index, "loss": loss})

    def read_loss(self) -> float | None:
        """Return the loss that was noted last; None if there is none that can be read."""
        try:
            return float(json.loads((self.folder / LOSS_FILE).read_text())["loss"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_predictions(self, split: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
        """Write ``evaluation_<split>.csv``: what the task notes of each slide or image (``Task.notes``)."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
        path = self.folder / f"evaluation_{split}.csv"
        write_text(path, text.getvalue())
        return path

    def _state_path(self, round_index: int) -> Path:
        return self.folder / f"state_{round_index:05d}.safetensors"

    def _rounds(self) -> list[int]:
        """Return the rounds whose state is there."""
        found = (re.fullmatch(r"state_(\d+)\.safetensors", path.name) for path in self.folder.glob("state_*"))
        return [int(match[1]) for match in found if match]


def _unusable(path: Path, why: str) -> JobError:
    return JobError(
        f"{path}: cannot be used: {why}. Remove it to go on with what the global model has in its place.",
        reason="RECORDS_INVALID",
    )
