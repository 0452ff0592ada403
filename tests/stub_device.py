"""A device to test with where there is no GPU: it computes on the CPU, and notes what was computed elsewhere.

``stub`` is a backend of torch like any other: a tensor is on it if it was moved there, and an operation on
tensors of both devices is refused, as CUDA refuses it. :class:`Watch` notes besides which operations of a
network, its loss or its gradients' norms ran on the CPU. It cannot tell how fast anything is on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

STUB = "stub"

NETWORK = frozenset(
    {"addmm", "mm", "bmm", "baddbmm", "convolution", "convolution_backward", "native_batch_norm", "tanh"}
    | {"native_batch_norm_backward", "native_layer_norm", "native_group_norm", "gelu", "relu", "threshold"}
    | {"_softmax", "_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward"}
    | {"nll_loss2d_forward", "native_dropout", "linalg_vector_norm", "logsumexp", "sigmoid"}
)
"""What a network, its loss and its gradients' norms are made of, and nothing that is done to data before."""


class _OnStub(torch.Tensor):
    """A tensor on the stub; ``raw`` has its numbers."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> _OnStub:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=f"{STUB}:0",
        )
        made.raw = raw
        return made

    def numpy(self, *, force: bool = False) -> Any:
        """Only with ``force``, as on CUDA."""
        if not force:
            raise TypeError(f"can't convert a {STUB} tensor to numpy: use Tensor.cpu() first")
        return self.detach().cpu().numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    on_stub = [each for each in given if isinstance(each, _OnStub)]
    elsewhere = [each for each in given if not isinstance(each, _OnStub) and each.ndim]
    name = func.overloadpacket.__name__
    if on_stub and elsewhere and name not in ("copy_", "_to_copy"):
        raise RuntimeError(f"{func}: expected all tensors on one device, found {STUB} and cpu")
    args, kwargs = pytree.tree_map(lambda x: x.raw if isinstance(x, _OnStub) else x, (args, kwargs))
    target = kwargs.get("device")
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    found = func(*args, **kwargs)
    if target is not None and torch.device(target).type == "cpu":
        return found
    if name == "copy_" and not isinstance(given[0], _OnStub):
        return given[0]
    in_place = {id(each.raw): each for each in on_stub}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return in_place[id(x)] if id(x) in in_place else _OnStub(x)

    return pytree.tree_map(wrapped, found)


class _Module:
    """What ``torch.cuda`` is to CUDA."""

    seeds: list[int]

    def __init__(self) -> None:
        self.seeds = []

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def manual_seed(self, seed: int) -> None:
        self.seeds.append(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Nothing: it draws from the CPU's."""


@cache
def register() -> _Module:
    """Make the device known to torch, for the rest of this process."""
    module = _Module()
    _setup_privateuseone_for_python_backend(STUB, backend_module=module)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _compute(func, args, kwargs), "PrivateUse1")
    register.library = library  # type: ignore[attr-defined]  # it must live as long as the device
    return module


class Watch(TorchDispatchMode):
    """Counts, while it is entered, the operations of :data:`NETWORK` on the stub and on the CPU.

    A process that it watches must not be multithreaded: a mode is of one thread. The backward pass of tensors
    on the stub runs in a thread of the device, and is seen there as being on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_stub: Counter[str] = Counter()
        self.on_cpu: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if name in NETWORK and given:
            here = any(isinstance(each, _OnStub) for each in given)
            (self.on_stub if here else self.on_cpu)[name] += 1
        return func(*args, **(kwargs or {}))
