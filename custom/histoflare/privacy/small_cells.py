"""Which exact counts may leave together, if none of few patients may be known.

The cells of a block add up to the number of patients, which leaves too. Were a small cell alone held back, it
would be that number less the others. So with it goes the smallest that is not small, and whatever equals that
one. The rule looks at values alone: those that are held back could be exchanged among their cells, and the
same would have left. So none of them can be told (Cox 1980, JASA 75:377-385, complementary suppression).
"""

from __future__ import annotations

from collections.abc import Mapping


def hide_small(cells: Mapping[str, int], least: int) -> dict[str, int]:
    """Return those of a block's counts that may leave.

    Zeros leave where no cell is small, for they then betray nothing; else they are held back as small ones.
    Of two cells a zero counts as small: else 1 and 1, held back, would say that they are not 0 and 2.

    ==================  ===========================================================
    no cell at all      none
    ``least`` <= 1      all
    all large or 0      all
    some small          the large ones, without all that equal the smallest of them
    ==================  ===========================================================

    Args:
        cells: Name → patients; each patient is in one cell.
        least: A count from 1 to below this is small.

    >>> from histoflare.privacy.small_cells import hide_small
    >>> hide_small({"a": 2, "b": 9, "c": 14, "d": 0}, least=5)
    {'c': 14}
    >>> hide_small({"a": 7, "b": 0, "c": 0}, least=5)
    {'a': 7, 'b': 0, 'c': 0}
    """
    from_zero = len(cells) == 2
    if not any((from_zero or count > 0) and count < least for count in cells.values()):
        return dict(cells)
    large = [count for count in cells.values() if count >= least]
    return {name: count for name, count in cells.items() if count >= least and count > min(large)}
