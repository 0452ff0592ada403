"""PyTorch's SGD and Adam without its compiler.

An optimizer of PyTorch's imports ``torch._dynamo`` when it is made and at its step (765 modules, sympy among
them), in case that somebody compiles it. Nothing is compiled here, and every trainer's process would pay a
second for it. What the compiler's entries wrap is called directly: the arithmetic is PyTorch's own.
"""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import torch

_ADD: Any = unwrap(torch.optim.Optimizer.add_param_group)
_ZERO: Any = unwrap(torch.optim.Optimizer.zero_grad)


class SGD(torch.optim.SGD):
    """``torch.optim.SGD``, with the same bytes after each step."""

    add_param_group = _ADD
    zero_grad = _ZERO
    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


class Adam(torch.optim.Adam):
    """``torch.optim.Adam``, with the same bytes after each step."""

    add_param_group = _ADD
    zero_grad = _ZERO
    step = torch.no_grad()(unwrap(torch.optim.Adam.step))
