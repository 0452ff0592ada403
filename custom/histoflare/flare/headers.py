"""Names of our own headers and return codes on FLARE messages."""

ASKED = "histoflare_asked"
"""Task header: the sites that the strategy asks in this round."""

NOT_ASKED = "histoflare_not_asked"
"""Reply header: this site was not asked in this round and sends nothing."""

WEIGHT = "histoflare_weight"
"""DXO meta: the aggregation weight of an update."""

REFUSED = "REFUSED_"
"""Prefix of our return codes; the rest is the fixed reason code of a :class:`HistoflareError`."""
