"""AdamW over the trained parameters: gradients summed over processes, checked, clipped, applied.

With `rollout.offload` AdamW's two moments are in the host's memory. A step moves those of some
parameters to the card, steps these parameters and moves them back; the numbers are the same to the
bit, because AdamW treats each parameter on its own.

Where processes share one model (`oisd.sharding`), each steps its part of every parameter
with its part of the moments, and gradients arrive summed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from oisd.batch import Batch
from oisd.config import TrainConfig
from oisd.norms import total_norm
from oisd.objective import NonFiniteError
from oisd.run.processes import Processes
from oisd.sharding import (
    as_part,
    blank_part,
    in_shards,
    is_sharded,
    on_host,
    own_part,
)

# Bytes of the moments that are on the card at once, or those of one larger parameter.
_MOMENTS_AT_ONCE = 1 << 29
_HOST = torch.device("cpu")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE = ("step", *_MOMENTS)


class Optimizer:
    """AdamW with its learning-rate schedule; all processes take the same steps."""

    def __init__(self, model: nn.Module, config: TrainConfig, processes: Processes) -> None:
        self.processes, self._sharded = processes, is_sharded(model)
        self.max_grad_norm = config.optimizer.max_grad_norm
        self.offload = config.rollout.offload
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
        )
        self.schedule = get_scheduler(
            "constant_with_warmup" if config.optimizer.schedule == "constant" else "cosine",
            self.adamw,
            num_warmup_steps=config.optimizer.warmup_steps,
            num_training_steps=config.run.steps * config.grpo.minibatches,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; of a model in shards, what `parts` does not have."""
        optimizer = self.adamw.state_dict()
        if self._sharded:
            optimizer = {**optimizer, "state": {}}
        return {"optimizer": optimizer, "schedule": self.schedule.state_dict()}

    def load_state_dict(
        self, state: dict[str, Any], parts: Mapping[str, Tensor] | None = None
    ) -> None:
        """Continue from a checkpoint of one process or of several, on any number of them.

        parts: the moments, if the state has none.
        """
        saved = state["optimizer"]
        for group, theirs in zip(self.adamw.param_groups, saved["param_groups"], strict=True):
            group |= {name: value for name, value in theirs.items() if name != "params"}
        for i, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            if parts is None:
                found = saved["state"].get(i, {})
            else:
                found = {kind: parts[f"{name}/{kind}"] for kind in _STATE}
            if found and found["step"] > 0:
                own = {kind: in_shards(found[kind], parameter) for kind in _MOMENTS}
                self.adamw.state[parameter] = {"step": found["step"], **own}
        if self.offload:
            self._move(self.parameters, to_host=True)
        self.schedule.load_state_dict(state["schedule"])

    def parts(self) -> dict[str, Tensor]:
        """AdamW's state by NAME/KIND, on the host: this process's parts of it."""
        parts = self.blank_parts()
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for kind, value in self.adamw.state.get(parameter, {}).items():
                parts[f"{name}/{kind}"] = on_host(value, parameter)
        return parts

    def blank_parts(self) -> dict[str, Tensor]:
        """What `parts` returns before the first step: where the parts of a checkpoint are read."""
        named = list(zip(self.names, self.parameters, strict=True))
        moments = {f"{n}/{kind}": blank_part(p) for n, p in named for kind in _MOMENTS}
        return moments | {f"{name}/step": torch.zeros(()) for name in self.names}

    def sum_gradients(self) -> Tensor:
        """Sum the parameters' gradients over the processes; returns the norm of the sum."""
        for parameter in self.parameters:
            # A parameter that this process's rows do not reach may be reached by another's.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return self.sum_over_processes([p.grad for p in self.parameters if p.grad is not None])

    def sum_over_processes(self, gradients: Sequence[Tensor]) -> Tensor:
        """Sum in place, unless they are parts of sums already; returns the norm of the sum."""
        if not self._sharded:
            self.processes.sum_(gradients)
        return total_norm(gradients)

    def step(self, norm: Tensor) -> None:
        """Clip the gradients, whose norm this is, and take a step with them."""
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        if self.offload:
            self._step_in_parts()
        else:
            self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()

    def _step_in_parts(self) -> None:
        """AdamW's step, with the moments of some parameters on the card at a time."""
        gradients = [p.grad for p in self.parameters]
        self.adamw.zero_grad()  # it steps the parameters that have a gradient
        for part in parts_of(self.parameters, _MOMENTS_AT_ONCE):
            own = [self.parameters[i] for i in part]
            self._move(own, to_host=False)
            for i, parameter in zip(part, own, strict=True):
                parameter.grad, gradients[i] = gradients[i], None
            self.adamw.step()
            self.adamw.zero_grad()
            self._move(own, to_host=True)

    def _move(self, parameters: Sequence[Tensor], *, to_host: bool) -> None:
        """Move the moments; into pinned memory, from which a card reads fastest, where there is."""
        for parameter in parameters:
            state = self.adamw.state.get(parameter, {})
            device = _HOST if to_host else parameter.device
            for name, moment in state.items():
                if name != "step":  # a number, on the host in any case
                    moved = own_part(moment).to(device)
                    pin = to_host and parameter.device.type == "cuda" and not moved.is_pinned()
                    moved = moved.pin_memory() if pin else moved
                    state[name] = moved if to_host else as_part(moved, parameter)

    def require_finite(
        self,
        batch: Batch,
        parts: Sequence[Tensor],
        losses: Sequence[dict[str, Tensor]],
        norm: Tensor,
    ) -> None:
        """Drop the gradients and raise NonFiniteError, on all processes, if any has a bad loss.

        Args:
            batch: this process's rows of the minibatch.
            parts: the rows of each micro-batch.
            losses: of each micro-batch, by name.
            norm: of the summed gradients.
        """
        bad = norm.isfinite().logical_not().float()
        values = [loss for found in losses for loss in found.values()]
        if values:
            bad = bad + torch.stack(values).isfinite().logical_not().sum()
        self.processes.sum_([bad])
        if bad == 0:
            return
        broken = [
            name
            for name, p in zip(self.names, self.parameters, strict=True)
            if p.grad is not None and not own_part(p.grad).isfinite().all()
        ]
        self.adamw.zero_grad()
        for number, (index, found) in enumerate(zip(parts, losses, strict=True)):
            for name, loss in found.items():
                if not loss.isfinite():
                    part = batch.select(index)
                    raise NonFiniteError(
                        f"loss/{name} is {loss.item()} in micro-batch {number} of {len(parts)} "
                        f"(completions {part.rows.tolist()})",
                        part,
                    )
        if broken:
            raise NonFiniteError(
                f"the gradient of {broken[0]} is not finite, though the losses here are", batch
            )
        raise NonFiniteError("a loss of another process is not finite", batch)


def parts_of(parameters: Sequence[Tensor], most: int) -> list[list[int]]:
    """Indices of parameters next to each other whose moments take at most `most` bytes, or one."""
    parts: list[list[int]] = []
    held = 0
    for i, parameter in enumerate(parameters):
        size = 2 * parameter.numel() * parameter.element_size()
        if parts and held + size <= most:
            parts[-1].append(i)
            held += size
        else:
            parts.append([i])
            held = size
    return parts
