"""Matmuls and allocations counted while an operation runs, on a CPU or on tensors without storage.

A dispatch mode sees a custom op as one call; here its body runs under the mode, so that it counts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LEFT = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}


class _Opening(TorchDispatchMode):
    """Runs custom ops of this library as the torch calls that they consist of."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        opened = OPDEFS.get(function.name().split(".")[0])
        if function.namespace == "oisd_kernels" and opened is not None:
            with self:
                return opened._init_fn(*args, **kwargs)
        out = function(*args, **kwargs)
        self.saw(function, args, out)
        return out

    def saw(self, function: Any, args: tuple[Any, ...], out: Any) -> None:
        raise NotImplementedError


class Matmuls(_Opening):
    """`flops` of all matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def saw(self, function: Any, args: tuple[Any, ...], out: Any) -> None:
        place = LEFT.get(function._schema.name.removeprefix("aten::"))
        if place is not None:
            left, right = args[place], args[place + 1]
            self.flops += 2.0 * left.numel() * right.shape[-1]


class Allocations(_Opening):
    """`most`: the largest number of bytes alive at once in storages made under the mode."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self._alive = {x.untyped_storage()._cdata: 0 for x in inputs}
        self._before = [x.untyped_storage() for x in inputs]
        self.most = 0

    def saw(self, function: Any, args: tuple[Any, ...], out: Any) -> None:
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self._alive:
                    self._alive[key] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, key, None)
        self.most = max(self.most, sum(self._alive.values()))


def equivalents(run: Callable[[], object], unit: float) -> float:
    """Matmul work of a run in units of `unit` flops."""
    with Matmuls() as counted:
        run()
    return counted.flops / unit
