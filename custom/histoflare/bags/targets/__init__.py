"""What models on bags learn to say, by name: one file and one line here."""

from __future__ import annotations

from histoflare.bags.targets.classes import Classes
from histoflare.bags.targets.target import Target

TARGETS: dict[str, type[Target]] = {
    "classes": Classes,
}
"""Name → the target with its settings.

>>> from histoflare import TARGETS
>>> TARGETS["classes"](labels=("benign", "tumour")).labels
('benign', 'tumour')
"""
