"""The server's side of a round: updates are kept, then combined in site order, not in order of arrival."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants

from histoflare.errors import HistoflareError, JobError
from histoflare.flare.header_names import ATTEMPT, METRICS, NUMBERS, RELEASE, WEIGHT
from histoflare.flare.job import job_of
from histoflare.flare.record import EVALUATION_FILE, EVALUATION_TOTAL_FILE, run_folder
from histoflare.flare.tensors import as_arrays, as_state
from histoflare.privacy.plan import PrivacyPlan
from histoflare.privacy.policy import MECHANISMS
from histoflare.privacy.spend import Spend
from histoflare.privacy.tally import TALLY
from histoflare.rounds.evaluation import named
from histoflare.rounds.round import check_update, server_round
from histoflare.rounds.state import State, check_tensors
from histoflare.rounds.strategy import ServerOutcome, Update, join, split
from histoflare.rounds.tally import tally_form_of
from histoflare.seeds import derive_seed
from histoflare.site.messages import digest_of
from histoflare.storage import write_json

MOST_COUNTED = 2.0**40
"""Patients in a count, far beyond those of any sum: what a broken site sends may not overflow the figures."""


class StampedAggregator(Aggregator):
    """Holds a round's stamped results by site; refuses errors, duplicates, late and unstamped ones.

    The stamp is what a site's gate put on what it let out: the digest of the content. It guards against a
    site whose policy file is missing or wrong, and that would send what no gate has seen. It does not guard
    against malice: whoever controls a site can write any stamp.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taking_part: list[str] = []
        self.metrics: dict[str, dict[str, float | None]] = {}
        self.stamps: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self._combined = False
        self._attempt: int | None = None

    def reset(self, fl_ctx: FLContext) -> None:
        """Forget the round's results."""
        self.taking_part, self.metrics, self.stamps, self.notes, self._combined = [], {}, {}, {}, False
        self._attempt = None

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Hold one site's result of this round, or refuse it.

        A refused result costs its site the round and no other site anything. Never raises: FLARE would end
        the round for everybody.
        """
        peer = fl_ctx.get_peer_context()
        site = peer.get_prop(ReservedKey.IDENTITY_NAME) if peer else None
        current = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        if self._combined or site is None or shareable.get_return_code() not in (None, ReturnCode.OK):
            return False
        if site in self.taking_part or shareable.get_cookie(AppConstants.CONTRIBUTION_ROUND) != current:
            return False
        if shareable.get_cookie(ATTEMPT) != self._attempt:
            return False
        try:
            dxo = from_shareable(shareable)
            if dxo.data_kind != self.kind_asked_for(fl_ctx):
                raise JobError(f"{dxo.data_kind} is not what was asked for")
            stamp = dxo.get_meta_prop(RELEASE) or {}
            if stamp.get("digest") != digest_of(dxo.data):
                raise JobError("it does not carry the stamp of the site's gate")
            if not is_stamp(stamp):
                raise JobError("its stamp is not one that a gate writes")
            metrics = _read_metrics(dxo.get_meta_prop(METRICS) or {})
            self.hold(site, dxo, fl_ctx)
        except (HistoflareError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            self.log_warning(fl_ctx, f"the result of {site} is refused: {error}")
            return False
        self.metrics[site] = metrics
        self.stamps[site] = {name: value for name, value in stamp.items() if name != "digest"}
        self.taking_part.append(site)
        return True

    @abstractmethod
    def expect(self, sites: Sequence[str], attempt: int, fl_ctx: FLContext) -> None:
        """Take the results of these sites alone, for one sum.

        Args:
            sites: All that are on the list of hellos. attempt: Which one: no other's results are taken.
        """

    @abstractmethod
    def open_sum(self, fl_ctx: FLContext) -> str:
        """Return why the sum of what came is void; empty if it is not."""

    def kind_asked_for(self, fl_ctx: FLContext) -> DataKind:
        """Return of what kind the round's results are."""
        return DataKind.WEIGHT_DIFF

    @abstractmethod
    def hold(self, site: str, dxo: DXO, fl_ctx: FLContext) -> None:
        """Check and keep a site's result; raise :class:`JobError` if it cannot be used."""


class SiteOrderAggregator(StampedAggregator):
    """Gives a round's updates to the strategy in site order, where they are summed in float64.

    FLARE's own aggregators add each update as it arrives; floating-point sums then depend on who is faster.

    Where the server sees only the sum of the updates, the workflow says first whose it is (:meth:`expect`),
    and asks whether it is whole (:meth:`open_sum`) before it goes on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._updates: dict[str, Update] = {}
        self._listed: list[str] | None = None
        self._made: ServerOutcome | None = None

    def reset(self, fl_ctx: FLContext) -> None:
        """Forget the round's updates."""
        super().reset(fl_ctx)
        self._updates, self._listed, self._made = {}, None, None

    def expect(self, sites: Sequence[str], attempt: int, fl_ctx: FLContext) -> None:
        """Forget the round's updates, and take those of these sites alone; see :class:`StampedAggregator`."""
        self.reset(fl_ctx)
        self._listed, self._attempt = list(sites), attempt

    def open_sum(self, fl_ctx: FLContext) -> str:
        """Return why the sum of what came is void; empty if it is not, or cannot be combined whatever it is.

        A whole sum is combined here, and :meth:`aggregate` returns what was made of it.
        """
        self._combined = True
        missing = sorted(set(self._listed or ()) - set(self._updates))
        if missing:
            return f"no update of {', '.join(missing)}"
        try:
            self._made = self._combine(fl_ctx)
        except HistoflareError as error:
            return str(error) if error.reason == "SUM_VOID" else ""  # aggregate says what is wrong
        return ""

    def hold(self, site: str, dxo: DXO, fl_ctx: FLContext) -> None:
        """Keep an update that the strategy can use."""
        if self._listed is not None and site not in self._listed:
            raise JobError("it is not on the list of this sum")
        weight = dxo.get_meta_prop(WEIGHT)
        if not isinstance(weight, float):
            raise JobError("it has no weight")
        numbers = dxo.get_meta_prop(NUMBERS) or {}
        update = Update(site=site, tensors=as_state(dxo.data), weight=weight, numbers=dict(numbers))
        job = job_of(fl_ctx)
        check_update(job.strategy, split(as_state(_weights(fl_ctx)))[0], update, job.transport)
        self._updates[site] = update

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """Return the new global model. Without any update it stays as it was, and the record says so."""
        self._combined = True  # what comes now is of this round, and too late
        weights = _weights(fl_ctx)
        try:
            made = self._made
            if made is None and self._updates:
                made = self._combine(fl_ctx)
            self._updates, self._made = {}, None  # they are gone once they are combined
            if made is not None:
                weights, self.notes = as_arrays(join(made.model, made.own)), made.notes()
        except HistoflareError as error:
            self.taking_part = []
            self.system_panic(f"round not combined: {error}", fl_ctx)
        shareable: Shareable = DXO(DataKind.WEIGHTS, data=weights).to_shareable()
        return shareable

    def _combine(self, fl_ctx: FLContext) -> ServerOutcome:
        """Return what the strategy makes of the updates that are held.

        Raises:
            JobError: They cannot be combined; or a sum was not whole (SUM_VOID).
        """
        job, engine = job_of(fl_ctx), fl_ctx.get_engine()
        there = {client.name for client in engine.get_clients()} | set(self._updates)
        self._check_noise(job.plan)
        model, own = split(as_state(_weights(fl_ctx)))
        return server_round(
            job.strategy,
            model,
            list(self._updates.values()),
            job.training_sites(there),
            job.plan,
            own=own,
            transport=job.transport,
            listed=self._listed,
            round_index=int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND)),
            total_rounds=job.rounds,
            seed=job.seed,
        )

    def _check_noise(self, plan: PrivacyPlan) -> None:
        """Refuse to combine what sites have let out for a server that adds noise, if this one would not.

        Raises:
            JobError: The job's server configuration is not what its sites booked (PRIVACY_MISMATCH).
        """
        stamps = self.stamps.values()
        trusting = [stamp["spend"] for stamp in stamps if stamp["mechanism"] == "server-noise"]
        mine = plan.spend().to_json() if plan.mechanism == "server-noise" else None
        if any(spend != mine for spend in trusting):
            raise JobError(
                "The sites count on noise that this server's configuration does not add.",
                reason="PRIVACY_MISMATCH",
            )


class MetricsCollector(StampedAggregator):
    """Writes what each site says of the model into the run folder; the model itself stays as it is.

    Under a budget a site sends noised counts. Its figures are computed from them here, and those of all sites
    from their sum. Where sites share the noise, there is nothing but the sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self._evaluations: dict[str, dict[str, float | None]] = {}
        self._counts: dict[str, NDArray[np.float64]] = {}
        self._terms: dict[str, State] = {}
        self._listed: list[str] | None = None
        self._total: tuple[list[str], NDArray[np.float64]] | None = None

    def reset(self, fl_ctx: FLContext) -> None:
        """Forget the round's metrics."""
        super().reset(fl_ctx)
        self._evaluations, self._counts, self._total = {}, {}, None
        self._terms, self._listed = {}, None

    def expect(self, sites: Sequence[str], attempt: int, fl_ctx: FLContext) -> None:
        """See :class:`StampedAggregator`. After a void sum none: what comes then is of sites in no sum."""
        self.taking_part = [site for site in self.taking_part if site not in self._terms]
        self._terms, self._listed, self._attempt = {}, list(sites) or None, attempt if sites else None

    def open_sum(self, fl_ctx: FLContext) -> str:
        """See :class:`StampedAggregator`. What comes from now on is of sites that are in no sum."""
        job, listed = job_of(fl_ctx), self._listed or []
        self._listed, self._attempt = None, None
        missing = sorted(set(listed) - set(self._terms))
        if missing or job.tally is None:
            return f"no counts of {', '.join(missing)}"
        try:
            total, _ = job.transport.open(list(self._terms.values()), job.tally.sum_step)
        except HistoflareError as error:
            return str(error)
        self._total = listed, total[TALLY].clamp(-MOST_COUNTED, MOST_COUNTED).numpy()
        return ""

    def kind_asked_for(self, fl_ctx: FLContext) -> DataKind:
        """Return metrics, or an update where a budget pays for counts."""
        return DataKind.METRICS if job_of(fl_ctx).tally is None else DataKind.WEIGHT_DIFF

    def hold(self, site: str, dxo: DXO, fl_ctx: FLContext) -> None:
        """Keep a site's metrics, or its counts and what they say."""
        job = job_of(fl_ctx)
        if job.tally is None:
            self._evaluations[site] = _read_metrics(dxo.data)
            return
        form = tally_form_of(job.task)
        counts: State = {TALLY: torch.empty(form.length, dtype=torch.float64)}
        if self._listed is not None:
            if site not in self._listed:
                raise JobError("it is not on the list of this sum")
            counts = job.transport.form(counts)
        sent = as_state(dxo.data)
        check_tensors(sent, counts, whose="The counts")
        if self._listed is not None:
            self._terms[site] = sent
            return
        self._counts[site] = sent[TALLY].numpy()
        if np.abs(self._counts[site]).max() > MOST_COUNTED:
            raise JobError("its counts are of more patients than any site has")
        std = job.tally.alone().sites_noise
        found = form.figures(self._counts[site], std, seed=derive_seed(job.seed, TALLY, site))
        self._evaluations[site] = named(found)

    def write(self, name: str, fl_ctx: FLContext) -> None:
        """Write the metrics to a file of the run folder. What comes after that is too late."""
        self._combined = True
        write_json(run_folder(fl_ctx) / name, dict(sorted(self._evaluations.items())))
        job = job_of(fl_ctx)
        if job.tally is None:
            return
        if self._total is None:
            sites = job.training_sites(self._counts)
            total = np.sum([self._counts[site] for site in sites], axis=0)
        else:
            sites, total = self._total
        if not sites:
            return
        std = job.tally.sites_noise * math.sqrt(len(sites))
        figures = tally_form_of(job.task).figures(total, std, seed=derive_seed(job.seed, TALLY))
        said = {"sites": sites, "noise_std": std, "figures": named(figures), "counts": total.tolist()}
        write_json(run_folder(fl_ctx) / EVALUATION_TOTAL_FILE, said)

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """Write the metrics and return the model."""
        self.write(EVALUATION_FILE, fl_ctx)
        shareable: Shareable = DXO(DataKind.WEIGHTS, data=_weights(fl_ctx)).to_shareable()
        return shareable


def is_stamp(stamp: Mapping[str, Any]) -> bool:
    """Return whether a stamp says what a gate says: it goes into the run's record."""
    try:
        spend = stamp["spend"]
        if spend is not None:
            Spend.from_json(spend)
        return (
            isinstance(stamp["scope"], str)
            and stamp["mechanism"] in MECHANISMS
            and isinstance(stamp["seeded_noise"], bool)
            and isinstance(stamp.get("trusts_ca", False), bool)
        )
    except (KeyError, TypeError, JobError):
        return False


def _read_metrics(content: Any) -> dict[str, float | None]:
    """Return a site's metrics; one site's nonsense may not end the round of the others."""
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and (value is None or (type(value) is float and math.isfinite(value)))
        for name, value in content.items()
    ):
        raise JobError("its metrics are not names and numbers")
    return dict(content)


def _weights(fl_ctx: FLContext) -> dict[str, Any]:
    weights: dict[str, Any] = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
    return weights
