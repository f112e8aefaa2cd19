"""From a layer's output to what the head reads: the model's tail, which the lens applies as well.

Nearly always it is the final norm. It may also be nothing, several modules one after the other
(streams that are merged, a dense layer before the head), and factors between them. All of it is
found by a probe: modules that ran after the last layer, of which each reads what the one before
returned, times a number. Each must act on each token alone, which is verified as it runs: permuted
tokens give permuted results, and one token alone gives the same row.

Where a model computes its tail in the decoder's own forward (Gemma 3n merges four streams there),
that forward runs again, with one layer in place of all that returns the given hidden states.

B batch, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oisd.models.head import close, snapped, without_hooks

Kept = Mapping[nn.Module, Mapping[str, Tensor]]
_MOST_STEPS = 4


class Step(NamedTuple):
    factor: float  # of what the module reads
    module: nn.Module


class Tail(NamedTuple):
    """What a model does between its last layer and its head, on each token alone."""

    steps: tuple[Step, ...]
    factor: float  # of what the last step returns
    computed: int  # so many steps run in the decoder's forward, whatever logits are kept
    source: nn.Module  # returns their result in a forward

    @property
    def modules(self) -> list[nn.Module]:
        return [step.module for step in self.steps]

    def read(
        self, hidden: Tensor, *, frozen: bool, kept: Kept | None = None, start: int = 0
    ) -> Tensor:
        """What the head reads for a layer's hidden states: [B, T, D].

        frozen: whether the tail's own parameters get no gradient.
        kept: parameters to use in place of a module's own, without its hooks.
        start: the first step to take; the hidden states are those before it.
        """
        for factor, module in self.steps[start:]:
            hidden = scaled(hidden, factor)
            parameters = (kept or {}).get(module)
            if parameters is not None:
                with without_hooks(module):  # DeepSpeed's would fetch the parameters again
                    hidden = torch.func.functional_call(module, dict(parameters), (hidden,))
            elif frozen:
                own = {name: p.detach() for name, p in module.named_parameters()}
                hidden = torch.func.functional_call(module, own, (hidden,))
            else:
                hidden = module(hidden)
        return scaled(hidden, self.factor)


def scaled(hidden: Tensor, factor: float) -> Tensor:
    return hidden if factor == 1 else hidden * factor


class Call(NamedTuple):
    """One call of a module in the probe's forward, after its last layer."""

    module: nn.Module
    given: Tensor
    out: Tensor
    alone: bool  # whether it acts on each token alone


def call_of(module: nn.Module, given: Sequence[Any], out: Any) -> Call | None:
    """A `Call` of a module that took one tensor [1, T, ...] and nothing else; else None."""
    x = given[0]
    if len(given) != 1 or not isinstance(x, Tensor) or not isinstance(out, Tensor):
        return None
    if x.ndim < 3 or not x.is_floating_point() or not out.is_floating_point():
        return None
    return Call(module, x, out, acts_on_each_token(module, x, out))


def acts_on_each_token(module: nn.Module, given: Tensor, out: Tensor, axis: int = 1) -> bool:
    """Verified on what it was given and returned, [1, T, ...].

    axis: of the tokens in `given`. A module runs without its hooks: if they change something, it is
    no step by itself. The decoder's own forward runs with those of the modules in it.
    """
    try:
        with nullcontext() if isinstance(module, Replay) else without_hooks(module):
            turned, first = module(given.flip(axis)), module(given.narrow(axis, 0, 1))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    if not isinstance(turned, Tensor) or not isinstance(first, Tensor):
        return False
    return close(turned.flip(1), out) and close(first, out[:, :1])


def _factor(x: Tensor, wanted: Tensor, numbers: list[float]) -> float | None:
    """c with wanted = c * x, or None; exactly a number of the config where that explains it."""
    if x.shape != wanted.shape:
        return None
    wanted = wanted.to(x.device)  # a model may be spread over several
    if torch.equal(x, wanted):
        return 1.0
    a, b = x.double(), wanted.double()
    factor = float((a * b).sum() / a.square().sum().clamp_min(torch.finfo(a.dtype).tiny))
    within = 16 * max(torch.finfo(x.dtype).eps, torch.finfo(wanted.dtype).eps)
    factor = snapped(factor, numbers, within)
    return factor if factor and close(wanted, (factor * a).to(wanted.dtype)) else None


def find_steps(
    last: Tensor, wanted: Tensor, calls: Sequence[Call], numbers: list[float]
) -> tuple[tuple[Step, ...], float] | None:
    """The fewest steps, and the factor after them, that lead from the last layer's output to it."""
    paths: list[tuple[Tensor, int, tuple[Step, ...]]] = [(last, 0, ())]
    for _ in range(_MOST_STEPS + 1):
        for x, _, steps in paths:
            if (factor := _factor(x, wanted, numbers)) is not None:
                return steps, factor
        paths = [
            (call.out, place + 1, (*steps, Step(factor, call.module)))
            for x, first, steps in paths
            for place, call in enumerate(calls)
            if place >= first and call.alone
            if (factor := _factor(x, call.given, numbers)) is not None
        ]
    return None


class Replay(nn.Module):
    """The decoder's own forward, in which one layer that returns `hidden` stands for all."""

    def __init__(self, decoder: nn.Module, layers: nn.ModuleList, last: nn.Module, outputs: int):
        super().__init__()
        self.decoder = decoder
        self.place = next(
            (holder, name)
            for holder in decoder.modules()
            for name, child in holder.named_children()
            if child is layers
        )
        # Not as children: their parameters are none of the tail's.
        self.last, self.outputs = (last,), outputs

    def gives(self, hidden: Tensor, decoded: Tensor) -> bool:
        """Whether it returns that, whatever the text is, and acts on each token alone."""
        try:
            same = close(self(hidden), decoded)
            return same and acts_on_each_token(self, hidden, decoded, axis=hidden.ndim - 2)
        except Exception:  # the decoder cannot run so
            return False

    def forward(self, hidden: Tensor) -> Tensor:
        # A token of padding may be 0 in a stream, where a decoder that takes its norm has no slope:
        # of such a token, which has no use, that would make every gradient NaN.
        hidden = torch.where((hidden == 0).all(-1, keepdim=True), hidden.detach(), hidden)
        # [B, T]: the two axes before the last, also where streams come first. Any text will do.
        text = torch.ones(hidden.shape[-3:-1], dtype=torch.long, device=hidden.device)
        holder, name = self.place
        layers = holder._modules[name]
        holder._modules[name] = nn.ModuleList([_Given(self.last[0], hidden, self.outputs)])
        try:
            out = self.decoder.forward(input_ids=text, use_cache=False, return_dict=True)
        finally:
            holder._modules[name] = layers
        return out[0]


class _Given(nn.Module):
    """Stands for a layer and returns what it was made with."""

    def __init__(self, layer: nn.Module, hidden: Tensor, outputs: int):
        super().__init__()
        self.layer, self.hidden, self.outputs = (layer,), hidden, outputs

    def forward(self, *_: Any, **__: Any) -> Any:
        if self.outputs == 0:
            return self.hidden
        return (self.hidden, *[None] * (self.outputs - 1))

    def __getattr__(self, name: str) -> Any:  # models read a layer's kind from it
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"][0], name)
