"""The gradients of single losses, beside that of their weighted sum.

Each is taken by a backward of its own into the parameters' `grad`, whose own content is set aside,
because a sharded parameter is known to autograd in no other way. The sum's backward follows on the
same graph and is the same to the bit with and without this. GRPO's gradient needs no backward: it
is the sum's less the weighted terms'.

Memory is bounded. Of more than `MOST_NUMBERS` trained numbers, those of a process's part where
processes share one model, only every n-th number of a gradient is kept, with a prime n, so that all
rows and columns have their part; norms are then estimates from tens of millions of numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from oisd.norms import total_norm
from oisd.run.processes import Processes
from oisd.sharding import backward_alone, own_part

MOST_NUMBERS = 1 << 25  # of each gradient that is kept: 128 MiB in float32
_STRIDES = 1, 3, 7, 17, 37, 79, 163, 331, 673, 1361, 2729
# Of a gradient's norm: float32 sums over many tokens, which are in a float64 model too.
_LEAST_ROUNDING = 1e-5


class Parallel(Protocol):
    """Parameters, the processes that share their gradients, and how these are brought together."""

    processes: Processes

    @property
    def parameters(self) -> Sequence[Tensor]: ...

    def sum_over_processes(self, gradients: Sequence[Tensor]) -> Tensor:
        """In place, as it is done to the parameters' gradients; returns the norm of the result."""
        ...


class TermGradients:
    """The gradients of some losses, those of `names`, over the micro-batches of a minibatch.

    optimizer: an `Optimizer`, or what has its parameters and brings gradients together as it does.
    entire: keep every number of them, whatever the size of the model.
    """

    def __init__(self, optimizer: Parallel, names: Iterable[str], entire: bool = False) -> None:
        self._optimizer, self.parameters = optimizer, optimizer.parameters
        self._kept: dict[str, list[Tensor | None]] = {
            name: [None] * len(self.parameters) for name in names
        }
        self._sharded = any(isinstance(p, DTensor) for p in self.parameters)
        size = 0 if entire else sum(p.numel() for p in self.parameters)
        if self._sharded:
            size //= optimizer.processes.size
        fitting = (n for n in _STRIDES if size <= n * MOST_NUMBERS)
        self._stride = next(fitting, _STRIDES[-1])

    def __bool__(self) -> bool:
        return bool(self._kept)

    def add(self, losses: Mapping[str, Tensor], model: nn.Module) -> None:
        """Add those of a micro-batch; before the backward of the losses' sum.

        losses: GRPO's among them.
        model: which they come from.
        """
        for name, kept in self._kept.items():
            if not losses[name].requires_grad:  # no adapter lies beneath what it looks at
                continue
            summed = [parameter.grad for parameter in self.parameters]
            hooks = []
            for i, parameter in enumerate(self.parameters):
                parameter.grad = None
                # Each as soon as it is there: all at once would be another whole gradient.
                take = partial(self._take, kept, i)
                hooks.append(parameter.register_post_accumulate_grad_hook(take))
            backward_alone(model, losses[name], losses["grpo"])
            for i, (parameter, own) in enumerate(zip(self.parameters, summed, strict=True)):
                hooks[i].remove()
                self._take(kept, i, parameter)  # what shards it may not have called the hook
                parameter.grad = own

    def add_apart(self, losses: Mapping[str, Tensor]) -> None:
        """As `add`, without a touch to the parameters' `grad`, which must not be sharded.

        For the moment it takes the memory of one loss's whole gradient.
        """
        for name, loss in losses.items():
            if loss.requires_grad:
                found = torch.autograd.grad(
                    loss, list(self.parameters), retain_graph=True, allow_unused=True
                )
                for i, gradient in enumerate(found):
                    self._keep(self._kept[name], i, gradient)

    def _take(self, kept: list[Tensor | None], i: int, parameter: Tensor) -> None:
        self._keep(kept, i, parameter.grad)
        parameter.grad = None

    def _keep(self, kept: list[Tensor | None], i: int, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        found, had = self._part(gradient), kept[i]
        if had is not None:
            had += found
        else:
            kept[i] = found if self._stride == 1 else found.clone()

    def _part(self, gradient: Tensor) -> Tensor:
        own = own_part(gradient)
        return own if self._stride == 1 else own.flatten()[:: self._stride]

    def norms(self, weights: Mapping[str, float], dtype: torch.dtype) -> dict[str, float]:
        """The norm of each loss's gradient over all processes, unweighted; GRPO's in any case.

        Call it once, when the parameters have the gradient of the sum over all processes, before it
        is clipped. The memory of the terms' gradients is used up.

        weights: of the losses in the sum.
        dtype: of the backward pass. A difference within its rounding is taken for a GRPO's norm of
            0, unless that gradient was measured by itself.
        """
        found, processes = {}, self._optimizer.processes
        summed = self._optimizer.sum_over_processes
        for name, kept in self._kept.items():
            # A parameter that this process's rows do not reach may be reached by another's.
            reached = zip(*processes.gather([part is not None for part in kept]), strict=True)
            for i, anywhere in enumerate(map(any, reached)):
                if anywhere and kept[i] is None:
                    kept[i] = torch.zeros_like(self._part(self.parameters[i].detach()))
            held = [part for part in kept if part is not None]
            found[name] = self._norm(held) if self._sharded else summed(held)
        if "grpo" not in found:
            parts = [self._part(p.grad) for p in self.parameters if p.grad is not None]
            total, rest = self._norm(parts), self._norm(self._rest(weights))
            rounding = max(_LEAST_ROUNDING, 8 * torch.finfo(dtype).eps) * total
            found["grpo"] = torch.where(rest > rounding, rest, 0.0)
        device = self.parameters[0].device
        together = torch.stack([norm.to(device, torch.float64) for norm in found.values()])
        processes.broadcast([together])  # what follows from them must not differ by a rounding
        scaled = (together * sqrt(self._stride)).tolist()
        return dict(zip(found, scaled, strict=True))

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of gradients that are sums already; of all parts, where processes have parts."""
        norm = total_norm(gradients)
        if not self._sharded:
            return norm
        square = norm.to(self.parameters[0].device).square()
        self._optimizer.processes.sum_([square])
        return square.sqrt()

    def _rest(self, weights: Mapping[str, float]) -> list[Tensor]:
        """The sum's gradient less the weighted ones here, which are overwritten."""
        rest = []
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            left = self._part(parameter.grad)
            for name, kept in self._kept.items():
                part = kept[i]
                if part is not None:  # into its memory; the sum's gradient stays as it is
                    left = part.mul_(-weights[name]).add_(left)
            rest.append(left)
        return rest
