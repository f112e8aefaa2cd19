"""How much of TRL's update the alignment is: the share of each term's gradient, as `oisd.weights`.

The terms' gradients are taken by `torch.autograd.grad`, which does not disturb data parallelism;
GRPO's is what remains of the parameters' gradient after the backward of the whole loss. Where
parameters or gradients are not whole on each process (FSDP2, DeepSpeed), or scaled (float16), there
is no measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oisd.config import AlignmentConfig
from oisd.norms import total_norm
from oisd.run.processes import Processes
from oisd.term_gradients import TermGradients
from oisd.weights import TERMS, weight_of


class Shares:
    """Measures every `align.share_every`-th optimizer step of a trainer of TRL.

    trainer: it is asked for the step, its parameters and how it is parallel.
    """

    def __init__(self, trainer: Any, align: AlignmentConfig) -> None:
        self._trainer, self._align = trainer, align
        self._weights = {term: weight_of(align, term) for term in TERMS if weight_of(align, term)}
        self._open: TermGradients | None = None
        self.possible = bool(self._weights) and not (
            trainer.is_fsdp_enabled
            or trainer.is_deepspeed_enabled
            or trainer.args.n_gpu > 1
            or trainer.accelerator.mixed_precision == "fp16"
        )

    def add(self, losses: Mapping[str, Tensor], steps: int) -> None:
        """Add the terms of a micro-batch, one of `steps`, before the backward of the whole loss."""
        every = self._align.share_every
        if not (self.possible and every and self._trainer.state.global_step % every == 0):
            return
        if self._open is None:
            parallel = _Parallel([p for p in self._trainer.model.parameters() if p.requires_grad])
            self._open = TermGradients(parallel, losses)
        self._open.add_apart({name: loss / steps for name, loss in losses.items()})

    def finish(self) -> dict[str, float]:
        """share/<term> after the last backward of an optimizer step; {} for one that has none."""
        gradients, self._open = self._open, None
        if gradients is None:
            return {}
        dtype = torch.float32
        if self._trainer.accelerator.mixed_precision == "bf16":
            dtype = torch.bfloat16
        dtypes = {dtype, *(p.dtype for p in gradients.parameters)}
        norms = gradients.norms(self._weights, max(dtypes, key=lambda d: torch.finfo(d).eps))
        if not norms["grpo"] > 0:
            return {}
        return {
            f"share/{term}": weight * norms[term] / norms["grpo"]
            for term, weight in self._weights.items()
        }


class _Parallel:
    """Parameters whose gradients are means over the processes, as data parallelism leaves them."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.processes = Processes(str(parameters[0].device))

    def sum_over_processes(self, gradients: Sequence[Tensor]) -> Tensor:
        self.processes.sum_(gradients)
        for gradient in gradients:
            gradient /= self.processes.size
        return total_norm(gradients)
