"""Names of our own headers, DXO meta and return codes on FLARE messages."""

from __future__ import annotations

ASKED = "histoflare_asked"
"""Server-side task header: the sites that the topology asks in this round. Not sent on."""

TOTAL_ROUNDS = "histoflare_total_rounds"
"""Task header: the last round of the job plus one, whether or not it is resumed."""

ATTEMPT = "histoflare_attempt"
"""Task header and cookie, only where the server sees a sum: which attempt at the round it is, from 0."""

HELLOS = "histoflare_hellos"
"""Task header: the hellos of all sites whose updates are summed, in order."""

WEIGHT = "histoflare_weight"
"""DXO meta: the aggregation weight of an update."""

METRICS = "histoflare_metrics"
"""DXO meta of an update: metrics of the model that the site received, as far as its policy lets them out."""

NUMBERS = "histoflare_numbers"
"""DXO meta of an update: the numbers that the strategy has a site send beside it."""

RELEASE = "histoflare_release"
"""DXO meta: the stamp of the site's gate, with the digest of what it let out, its scope and mechanism."""

PSEUDONYM = "histoflare_pseudonym"
"""Reply header: the name under which other sites may see this one."""

REFUSED = "REFUSED_"
"""Prefix of our return codes; the rest is one of :data:`histoflare.reasons.REASONS`."""
