"""The transports, by the word that a job uses for each: one file and one line here."""

from __future__ import annotations

TRANSPORTS = {
    "float32": "histoflare.rounds.transports.float32:Float32",
    "float16": "histoflare.rounds.transports.float16:Float16",
    "masked_sum": "histoflare.rounds.transports.masked_sum:MaskedSum",
}
"""Word in a job's ``[transport]`` → its class."""
