from __future__ import annotations

import math

import torch

from histoflare.privacy.plan import Open


def test_open_protects_nothing_and_says_so() -> None:
    plan, tensors = Open(), {"w": torch.randn(3), "b": torch.randn(1)}
    assert plan.epsilon == math.inf
    released = plan.release(tensors, site="s", round_index=0)
    assert list(released) == list(tensors)
    assert all(torch.equal(released[name], tensors[name]) for name in tensors)
    assert plan.epsilon == math.inf
    assert plan.name == "open"
    for words in ("no clipping", "no noise", "∞"):
        assert words in plan.describe()
