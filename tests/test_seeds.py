"""Seeds depend on their parts and on nothing else."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from histoflare.seeds import derive_seed

PARTS = st.lists(st.one_of(st.integers(-(2**63), 2**63), st.text(max_size=8)), max_size=4)


@given(PARTS, PARTS)
def test_equal_parts_equal_seeds_and_different_parts_different_seeds(one: list, other: list) -> None:
    assert 0 <= derive_seed(*one) < 2**63
    assert (derive_seed(*one) == derive_seed(*other)) == (
        [(type(part), part) for part in one] == [(type(part), part) for part in other]
    )


def test_where_a_part_ends_matters() -> None:
    assert (
        len({derive_seed("a", "b"), derive_seed("ab"), derive_seed("a", "b", ""), derive_seed(1, "1")}) == 4
    )


def test_another_process_derives_the_same() -> None:
    code = "from histoflare.seeds import derive_seed; print(derive_seed(7, 'train', 'site', 3))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ended.stdout) == derive_seed(7, "train", "site", 3)
