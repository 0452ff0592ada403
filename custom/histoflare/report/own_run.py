"""What a site's own page says of a run when it has nothing but the site's own notes, ledger and log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from markupsafe import Markup

from histoflare.privacy.words import ALL_COLLUDE, IF_CA_IS_HONEST, say_delta
from histoflare.report.charts import draw_lines
from histoflare.report.figures import NAMES
from histoflare.report.guarantee_words import say_epsilon
from histoflare.report.privacy_section import PrivacySection

UPDATE, EVALUATION, FAILED, UNANSWERED = "update", "evaluation", "failed", "unanswered"
WHAT = {
    UPDATE: "update let out",
    EVALUATION: "figures of the model let out",
    FAILED: "failed: nothing left, and the round is paid for",
    UNANSWERED: "booked, and no answer left (yet)",
}
"""``what`` of a row, in words."""


@dataclass(frozen=True)
class LeftRow:
    """What left the site, or was paid for, by the site's ledger.

    Attributes:
        when: UTC. what: A key of :data:`WHAT`. round_number: From 1; None: of no round.
        patients: Behind it. protected: Whether a mechanism protects it.
        figures: Names of the figures that left.
    """

    when: datetime
    what: str
    round_number: int | None
    patients: int
    protected: bool
    figures: Sequence[str] = ()

    @property
    def words(self) -> str:
        """What it was."""
        return WHAT[self.what]


@dataclass(frozen=True)
class RefusedRow:
    """What the site refused, by its own log: ``code`` left it; what was wrong and what to do did not."""

    code: str
    detail: str
    times: int
    first: datetime
    last: datetime
    todo: str = ""


@dataclass(frozen=True)
class Spent:
    """What a patient spent. Every ε is by Rényi DP.

    Attributes:
        epsilon, delta: Of the run, from its booked and reserved rounds; ε may be infinite.
        booked, reserved: Rounds.
        in_all: Over all jobs of the ledger, as jobs are admitted by, for the most exposed patient.
        budget: What each patient has. Both are None where no policy says a budget.
        trusts_server, repeatable: Whether the server could take the noise off, or anybody.
        trusts_ca: Whether sites were counted on that only the certificate authority vouches for.
        colluders: Where noise was shared: how many sites ``epsilon`` has collude with the server; else None.
        if_all_collude, in_all_if_all_collude, budget_if_all_collude: As without the suffix, should all other
            sites collude; None where nothing was shared.
    """

    epsilon: float
    delta: float
    booked: int
    reserved: int
    in_all: float | None = None
    budget: float | None = None
    trusts_server: bool = False
    repeatable: bool = False
    trusts_ca: bool = False
    colluders: int | None = None
    if_all_collude: float | None = None
    in_all_if_all_collude: float | None = None
    budget_if_all_collude: float | None = None


@dataclass(frozen=True)
class OwnRun:
    """One run, as the site itself knows it.

    Attributes:
        run: Its name. rounds: Of the job, as far as the site knows; None: it does not.
        left: By time. refused: By code. spent: None where nothing was reserved.
        curves: Name of a figure → (round from 0, value), from the site's TensorBoard.
        longer_seconds: Kind of answer → after how many seconds it comes since one was late.
        evaluated: How many slides or images the model was asked about by the site's notes.
        others: Names of the site's other runs.
    """

    run: str
    rounds: int | None = None
    left: Sequence[LeftRow] = ()
    refused: Sequence[RefusedRow] = ()
    spent: Spent | None = None
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    longer_seconds: Mapping[str, int] = field(default_factory=dict)
    evaluated: int = 0
    others: Sequence[str] = ()

    @property
    def lead(self) -> str:
        """The run in a sentence or two."""
        updates = sum(row.what == UPDATE for row in self.left)
        figures = sum(row.what == EVALUATION for row in self.left)
        of = f" of at most {self.rounds}" if self.rounds else ""
        parts = [f"Updates left the site in {updates}{of} rounds." if updates else "No update left the site."]
        if figures:
            parts.append(f"Figures of the model left {'once' if figures == 1 else f'{figures} times'}.")
        if self.refused:
            codes = ", ".join(f"{row.code} ({row.times}×)" for row in self.refused)
            parts.append(f"Refused with {codes}.")
        if not self.left and not self.refused:
            parts.append("The site's ledger and log have nothing of this run.")
        return " ".join(parts)

    @property
    def late(self) -> str:
        """Which answers came late; empty if none did."""
        words = {"prepare": "reading the data", "train": "a round", "evaluate": "an evaluation"}
        found = [f"{words.get(kind, kind)}: {seconds} s" for kind, seconds in self.longer_seconds.items()]
        if not found:
            return ""
        return f"An answer was not ready by its public time. Since then it comes after: {'; '.join(found)}."

    @property
    def charts(self) -> list[tuple[str, Markup]]:
        """Title and chart of each curve."""
        return [
            (_title(name), draw_lines(f"own-{index}", _title(name), {"this site": list(points)}))
            for index, (name, points) in enumerate(sorted(self.curves.items()))
        ]


def make_own_privacy(own: OwnRun) -> PrivacySection:
    """Return what a site's page says of privacy, from its ledger; the sentences are :func:`say_spent`'s."""
    spent = own.spent
    if spent is not None:
        epsilon = "∞" if spent.repeatable else _said(spent.epsilon)
        title = f"Privacy: ε = {epsilon} for each patient at δ = {say_delta(spent.delta)}{_whom(spent)}"
        return PrivacySection({}, False, spent.repeatable, title, "")
    bare = {row.what for row in own.left if not row.protected}
    if UPDATE in bare:
        return PrivacySection({}, True, False, "Privacy: none guaranteed (ε = ∞)", "")
    if EVALUATION in bare:
        return PrivacySection({}, False, False, "Privacy: no ε was spent; figures left without noise", "")
    return PrivacySection({}, False, False, "Privacy: nothing left, and nothing was spent", "")


def say_spent(spent: Spent | None) -> str:
    """Return what a patient spent in a run, and over all jobs."""
    if spent is None:
        return ""
    way = " (RDP)" if spent.budget is None else ""
    said = (
        f"In this run a patient of this site spent ε = {_said(spent.epsilon)}{way} at δ = "
        f"{say_delta(spent.delta)}{_whom(spent)}: {spent.booked} of {spent.reserved} reserved rounds are "
        "booked, and what is reserved and not closed counts too."
    )
    if spent.in_all is not None and spent.budget is not None:
        said += (
            f" Over all jobs in the ledger the most exposed patient is at ε = {_said(spent.in_all)} of the "
            f"budget's {_said(spent.budget)}, as jobs are admitted by."
        )
    if spent.if_all_collude is not None:
        said += f" {ALL_COLLUDE[0].upper()}{ALL_COLLUDE[1:]}, ε = {_said(spent.if_all_collude)}"
        if spent.in_all_if_all_collude is not None and spent.budget_if_all_collude is not None:
            said += f", and over all jobs {_said(spent.in_all_if_all_collude)} of "
            said += _said(spent.budget_if_all_collude)
        said += "."
    if spent.trusts_server:
        said += " The server adds the noise: against the server itself ε = ∞."
    if spent.repeatable:
        said += " The noise can be repeated, so that it protects nobody."
    return said


def _whom(spent: Spent) -> str:
    """Return against whom the figures are; nothing where no noise was shared."""
    if spent.colluders is None:
        return ""
    whom = f" against the server and any {spent.colluders} other site{'s' if spent.colluders > 1 else ''}"
    return f"{whom}, {IF_CA_IS_HONEST}" if spent.trusts_ca else whom


def _said(epsilon: float) -> str:
    return say_epsilon({"epsilon": None if epsilon == float("inf") else epsilon})


def _title(name: str) -> str:
    split, _, metric = name.rpartition("/")
    words = "mean training loss" if name == "loss" else NAMES.get(metric, metric.replace("_", " "))
    title = f"{words[0].upper()}{words[1:]}"
    return f"{title} of the model received, on {split} patients" if split else title
