"""Every reason code is in the list that a site's gate lets out."""

from __future__ import annotations

import re
from pathlib import Path

from histoflare.reasons import REASONS


def test_the_list_of_reasons_is_the_reasons_of_the_code(repository: Path) -> None:
    used = set()
    for path in (repository / "custom" / "histoflare").rglob("*.py"):
        text = path.read_text()
        used |= set(re.findall(r'reason(?:: str)? = "([A-Z_]+)"', text))
        used |= set(re.findall(r'(?:reason=|refused\(|refuse\()"([A-Z_]+)"', text))
    assert used <= REASONS.keys(), sorted(used - REASONS.keys())
