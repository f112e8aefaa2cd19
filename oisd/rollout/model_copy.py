"""A copy of the trained model in half precision, which completions are sampled from.

A trained model has float32 parameters. Under autocast each call of the sampler rounds them anew,
and keys come out in float32 again, so that the key-value cache is twice as large. The copy is what
`from_pretrained(dtype=...)` would read if the model were saved now: its weights rounded once,
adapters merged, tied weights tied, and in float32 what the model's class keeps so.

It is filled from the trained weights each time that it is used, and has no memory in between. So it
cannot be out of date, and an update has the room. Filling it reads the weights once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from oisd import adapters
from oisd.models.loading import quiet


class ModelCopy:
    """A copy of a transformers model, which may have adapters, in a dtype of its own.

    model: the one that is copied, of which the copy shares no memory. It may be split over
        processes later; all of them then fill their copies at the same time.
    dtype: of the copy.
    device: where the copy is; by default that of `model`.
    Raises ValueError where the model has weights that a saved one would not have.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        self.source = model
        self.device = torch.device(device or next(model.parameters()).device)
        self.model = _unfilled(model, dtype)
        targets = self.model.state_dict(keep_vars=True)
        names = {weight.name for weight in adapters.plain_weights(model)}
        if names != targets.keys():
            names = sorted(names ^ targets.keys())
            raise ValueError(
                f"model.dtype: a copy of {type(model).__name__} in {dtype} has other weights than "
                f"the model itself ({', '.join(names[:3])}); use float32"
            )
        # Tied weights are one tensor under several names.
        own = {id(target): (name, target) for name, target in targets.items()}
        self._targets = list(own.values())
        self._sizes = []
        for _, target in self._targets:
            target.data = torch.empty(target.shape, dtype=target.dtype, device=self.device)
            self._sizes.append(target.untyped_storage().nbytes())
            target.untyped_storage().resize_(0)
        self.model.to(self.device)  # buffers that are computed, not saved

    @contextmanager
    def filled(self) -> Iterator[Any]:
        """Context in which the copy has the weights that the model has at its beginning."""
        try:
            yield self.fill()
        finally:
            self.release()

    @torch.no_grad()
    def fill(self) -> Any:
        """Read the weights of the model; returns the copy."""
        weights = {weight.name: weight for weight in adapters.plain_weights(self.source)}
        for (name, target), size in zip(self._targets, self._sizes, strict=True):
            target.untyped_storage().resize_(size)
            target.copy_(weights[name].read())
        return self.model

    def release(self) -> None:
        """Give the memory back."""
        for _, target in self._targets:
            target.untyped_storage().resize_(0)


def _unfilled(model: Any, dtype: torch.dtype) -> Any:
    """What `from_pretrained` would make of the model, its weights aside.

    Its reader decides which weights and buffers stay in float32, and computes those that no file
    holds, such as the rotary frequencies.
    """
    numbers: dict[int, int] = {}

    def blank(like: Tensor) -> Tensor:
        # One number for each tensor: the reader ties weights that are equal. It takes no memory,
        # nor does what the reader makes of it in the same dtype.
        number = numbers.setdefault(id(like), len(numbers))
        kind = dtype if like.is_floating_point() else like.dtype
        return torch.tensor(number).to(kind).expand(like.shape)

    with quiet():
        made = type(model).from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict={w.name: blank(w.stored) for w in adapters.plain_weights(model)},
            dtype=dtype,
            attn_implementation=model.config._attn_implementation,
        )
    made.generation_config = copy.deepcopy(model.generation_config)
    # Its weights keep requires_grad: torch.matmul of the last positions, a slice, with a head that
    # has none is a batched one on a CPU, for which it repeats the head for each row.
    return made.eval()
