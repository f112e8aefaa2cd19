"""The gradients of single losses, beside that of their weighted sum.

Each is taken by a backward of its own into the parameters' `grad`, whose own content is set aside,
because a sharded parameter is known to autograd in no other way. The sum's backward follows on the
same graph and is the same to the bit with and without this.

A gradient is kept only where a term reaches: of an intermediate layer's terms that is the layers up
to it. GRPO's needs neither memory nor a backward: it is the sum's less the weighted terms'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from oisd.optimizer import Optimizer


class TermGradients:
    """The gradients of some losses, those of `names`, over the micro-batches of a minibatch."""

    def __init__(self, optimizer: Optimizer, names: Iterable[str]) -> None:
        self._optimizer, self._parameters = optimizer, optimizer.parameters
        self._gradients: dict[str, list[Tensor | None]] = {
            name: [None] * len(self._parameters) for name in names
        }

    def __bool__(self) -> bool:
        return bool(self._gradients)

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add those of a micro-batch; before the backward of the losses' sum."""
        for name, own in self._gradients.items():
            if losses[name].requires_grad:  # else no adapter lies beneath what it looks at
                summed = self._exchange(own)
                losses[name].backward(retain_graph=True)
                self._gradients[name] = self._exchange(summed)

    def _exchange(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Give the parameters these gradients and return those that they had."""
        had = [parameter.grad for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return had

    def norms(self, weights: Mapping[str, float], resolution: float) -> dict[str, float]:
        """The norm of each loss's gradient over all processes, unweighted; GRPO's in any case.

        Call it once, when the parameters have the gradient of the sum over all processes, before it
        is clipped. The memory of the terms' gradients is used up.

        weights: of the losses in the sum.
        resolution: the part of the sum's norm below which a difference is rounding, so that GRPO's
            norm is 0. It plays no part where GRPO's gradient was measured by itself.
        """
        found, processes = {}, self._optimizer.processes
        for name, own in self._gradients.items():
            reached = zip(*processes.gather([g is not None for g in own]), strict=True)
            for i, anywhere in enumerate(map(any, reached)):
                if anywhere and own[i] is None:
                    own[i] = torch.zeros_like(self._parameters[i])
            held = [gradient for gradient in own if gradient is not None]
            found[name] = self._optimizer.sum_over_processes(held)
        if "grpo" not in found:
            total = _norm([p.grad for p in self._parameters if p.grad is not None])
            rest = _norm(self._rest(weights))
            found["grpo"] = torch.where(rest > resolution * total, rest, 0.0)
        device = self._parameters[0].device
        together = torch.stack([norm.to(device, torch.float64) for norm in found.values()])
        processes.broadcast([together])  # what follows from them must not differ by a rounding
        return dict(zip(found, together.tolist(), strict=True))

    def _rest(self, weights: Mapping[str, float]) -> list[Tensor]:
        """The sum's gradient less the weighted ones here, which are overwritten."""
        rest = []
        for i, parameter in enumerate(self._parameters):
            left = parameter.grad
            for name, gradients in self._gradients.items():
                gradient = gradients[i]
                if gradient is not None and left is not None:
                    # Into the first term's memory; the sum's own stays as it is.
                    weighted = gradient.mul_(-weights[name])
                    left = weighted.add_(left)
            if left is not None:
                rest.append(left)
        return rest


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
