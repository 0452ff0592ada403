"""What strategies have in common in which sites train side by side and the server combines what they send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from histoflare.errors import JobError
from histoflare.rounds.strategy import Strategy
from histoflare.rounds.topologies.federated import Federated


@dataclass(frozen=True, kw_only=True)
class Hub(Strategy):
    """Every site trains in every round, or some of them do, and the server combines what they send.

    Attributes:
        clients_per_round: See :class:`Federated`.
        share, batch_norm: See :class:`Strategy`.
    """

    clients_per_round: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.topology  # noqa: B018 (says what is wrong with clients_per_round)

    @property
    def topology(self) -> Federated:
        """All sites or some of them, and the server."""
        return Federated(clients_per_round=self.clients_per_round)


@dataclass(frozen=True, kw_only=True)
class EqualHub(Hub):
    """A hub in which a site's size plays no part: nothing about it is sent.

    Attributes:
        clients_per_round: See :class:`Federated`.
        share, batch_norm: See :class:`Strategy`.
    """

    @property
    def equal_weights(self) -> bool:
        """True: what a site sends as its weight is not used."""
        return True


@dataclass(frozen=True, kw_only=True)
class NamedHub(EqualHub):
    """A hub whose server remembers something of each site, and so has to know the sites beforehand.

    Attributes:
        sites: The names of all sites that train, each once.
        clients_per_round: See :class:`Federated`.
        share, batch_norm: See :class:`Strategy`.
    """

    sites: Sequence[str] = ()

    def problems(self) -> list[str]:
        """Return whether a site is named twice, or none is."""
        fits = not isinstance(self.sites, str) and 0 < len(self.sites) == len(set(self.sites))
        return [] if fits else [f"sites: the names of all sites that train, each once, not {self.sites!r}"]

    def check_sites(self, sites: Sequence[str]) -> None:
        """Refuse a site that the job does not name."""
        super().check_sites(sites)
        missing = [site for site in sites if site not in self.sites]
        if missing:
            raise JobError(
                f"The strategy {self.name} remembers something of each site, and the job's sites do not name "
                f"{', '.join(missing)}. Name all sites that train in [strategy], sites."
            )
