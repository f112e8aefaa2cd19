"""Optimizer steps: gradients summed over micro-batches and processes, checked, clipped, applied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from oisd.batch import Batch
from oisd.config import TrainConfig
from oisd.losses import Mean, Metrics, add_metrics
from oisd.objective import Objective, Totals
from oisd.run.processes import Processes


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; raised before an optimizer step is taken with it.

    `found` says which, and `batch` holds the rows that had it.
    """

    def __init__(self, found: str, batch: Batch) -> None:
        super().__init__(found)
        self.found, self.batch = found, batch


class Learner:
    """AdamW with its schedule, and the gradient of an `Objective`."""

    def __init__(self, objective: Objective, config: TrainConfig, processes: Processes) -> None:
        self.objective, self.processes = objective, processes
        self.max_grad_norm = config.optimizer.max_grad_norm
        self.tokens_per_microbatch = config.run.tokens_per_microbatch
        self.grad_norm_every = config.run.grad_norm_every
        model = objective.policy.model
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
        )
        self.schedule = get_scheduler(
            "constant_with_warmup" if config.optimizer.schedule == "constant" else "cosine",
            self.optimizer,
            num_warmup_steps=config.optimizer.warmup_steps,
            num_training_steps=config.run.steps * config.grpo.minibatches,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def learn(
        self, minibatches: Sequence[tuple[Batch, Totals]], step: int
    ) -> tuple[Metrics, dict[str, float]]:
        """One optimizer step for each minibatch, of which this process has a part.

        Returns the metrics of the losses, loss/<name> among them, and the gradient norms before
        clipping: grad_norm, and grad_norm/<name> of each loss on every `grad_norm_every`-th step.
        Raises NonFiniteError on all processes when any of them has a loss that is not finite.
        """
        separately = bool(self.grad_norm_every) and step % self.grad_norm_every == 0
        device = self.parameters[0].device
        sums = {name: torch.zeros((), device=device) for name in self.objective.coefficients}
        norms: dict[str, list[float]] = defaultdict(list)
        metrics: Metrics = {}
        for batch, totals in minibatches:
            own = {name: self._zeros() for name in sums} if separately else {}
            parts = batch.micro_batches(self.tokens_per_microbatch)
            losses = []
            for index in parts:
                found, more = self._backward(batch.select(index), totals, step, own)
                losses.append(found)
                metrics = add_metrics(metrics, more)
            self._sum_over_processes()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters])
            self._require_finite(batch, parts, losses, norm)
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            norms["grad_norm"].append(norm.item())
            for name, gradients in own.items():
                self.processes.sum_(gradients)
                total = torch.nn.utils.get_total_norm(gradients)
                norms[f"grad_norm/{name}"].append(total.item())
            for found in losses:
                for name, loss in found.items():
                    sums[name] += loss
        # Each loss is a sum over the processes' parts, so it is counted on one of them alone.
        count = torch.tensor(
            float(len(minibatches) if self.processes.is_first else 0), device=device
        )
        metrics |= {f"loss/{name}": Mean(total, count) for name, total in sums.items()}
        return metrics, {name: sum(values) / len(values) for name, values in norms.items()}

    def _backward(
        self, batch: Batch, totals: Totals, step: int, own: dict[str, list[Tensor]]
    ) -> tuple[dict[str, Tensor], Metrics]:
        """Add a micro-batch's gradient; to `own`, where asked for, that of each loss alone."""
        losses, metrics = self.objective(batch, totals, step)
        for name, gradients in own.items():
            if not losses[name].requires_grad:  # no adapter is beneath what it looks at
                continue
            found = torch.autograd.grad(
                losses[name], self.parameters, retain_graph=True, allow_unused=True
            )
            for total, gradient in zip(gradients, found, strict=True):
                if gradient is not None:
                    total += gradient
        weighted = [self.objective.coefficients[name] * loss for name, loss in losses.items()]
        torch.stack(weighted).sum().backward()
        return {name: loss.detach().float() for name, loss in losses.items()}, metrics

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(p) for p in self.parameters]

    def _sum_over_processes(self) -> None:
        for parameter in self.parameters:
            # A parameter that this process's rows do not reach may be reached by another's.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.processes.sum_(p.grad for p in self.parameters if p.grad is not None)

    def _require_finite(
        self,
        batch: Batch,
        parts: Sequence[Tensor],
        losses: Sequence[dict[str, Tensor]],
        norm: Tensor,
    ) -> None:
        values = [loss for found in losses for loss in found.values()]
        bad = norm.isfinite().logical_not().float()
        if values:
            bad = bad + torch.stack(values).isfinite().logical_not().sum()
        self.processes.sum_([bad])
        if bad == 0:
            return
        broken = self._broken_gradient()
        self.optimizer.zero_grad()
        for number, (index, found) in enumerate(zip(parts, losses, strict=True)):
            names = [name for name, loss in found.items() if not loss.isfinite()]
            if names:
                part = batch.select(index)
                raise NonFiniteError(
                    f"loss/{names[0]} is {found[names[0]].item()} in micro-batch {number} of "
                    f"{len(parts)} (completions {part.rows.tolist()})",
                    part,
                )
        if broken:
            raise NonFiniteError(
                f"the gradient of {broken} is not finite, though the losses here are", batch
            )
        raise NonFiniteError("a loss of another process is not finite", batch)

    def _broken_gradient(self) -> str | None:
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return name
        return None
