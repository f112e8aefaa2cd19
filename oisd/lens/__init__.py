"""What the layers of a model would say next: the logit lens of every layer, measured.

    q_l = softmax(head(norm(h_l)))      h_l the residual stream after layer l, q_L the model's own

Per layer and token: the likeliest token and its probability, the entropy of q_l, the divergence of
q_l from q_L. The entropy just before each layer's feed-forward block gives the boundary layer of
BuPO: the last layer below the final one whose feed-forward block raises the entropy.

L layers, T tokens, D width, V vocabulary. Layers are counted from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oisd.models import Taps, UnsupportedModelError, last_logits_only
from oisd.models.attending import Probe
from oisd.models.layout import Layout, first_tensor
from oisd_kernels import linear_logprob
from oisd_kernels.lens.logit_lens import lens_with_top


class Lens(NamedTuple):
    """The lens on one text; entropies and divergences in nats, on the CPU."""

    top: Tensor  # [L, P] int64, the likeliest token, for the last P tokens
    probability: Tensor  # [L, P], of it
    divergence: Tensor  # [L, T], 0 for the final layer
    entropy: Tensor  # [L, T]
    entropy_before: Tensor  # [L, T], before the layer's feed-forward block; NaN where not taken
    agreement: Tensor  # [L, T], 1 where the likeliest token is the final layer's


class LensSummary(NamedTuple):
    """Means over the tokens of all texts, [L] each but for the last two."""

    divergence: list[float]
    entropy: list[float]
    entropy_before: list[float]
    agreement: list[float]
    tokens: int
    boundary_layer: int | None


class LayerLens:
    """Reads every layer of a causal language model through its final norm and unembedding.

    model: a transformers causal language model of at least two layers.
    divergence, beta: of `oisd_kernels.logit_lens_divergence`.
    lens_norm: whether the final norm comes before the unembedding ("final") or nothing ("none").
    boundary: whether to measure the entropies before the feed-forward blocks, from which the
        boundary layer follows; this doubles the projections. They are NaN where a layer's
        feed-forward block is not found.

    Raises UnsupportedModelError for a model whose layout is not recognised, or of one layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        divergence: str = "jsd",
        beta: float = 0.5,
        lens_norm: str = "final",
        boundary: bool = True,
    ):
        self.model, self.lens_norm, self.boundary = model, lens_norm, boundary
        self.divergence, self.beta = divergence, beta
        self.probe = Probe(model)
        self.layout: Layout = self.probe.layout
        self.num_layers = len(self.layout.layers)
        if self.num_layers < 2:
            raise UnsupportedModelError(
                f"the lens wants a model of at least two layers, since it compares each with the "
                f"final one; {type(self.layout.model).__name__} has {self.num_layers}"
            )
        below = range(1, self.num_layers)
        self.taps = Taps(self.probe, below, attention=False, lens_norm=lens_norm)

    @torch.no_grad()
    def __call__(self, token_ids: Sequence[int], picture: int = 0) -> Lens:
        """Look at a text of T >= 1 tokens; the last `picture` ones get their likeliest token.

        Projects T tokens of L layers, with `boundary` twice, in the memory of
        `logit_lens_divergence`.
        """
        device = next(self.model.parameters()).device
        ids = torch.tensor([list(token_ids)], device=device)
        watched = self.layout.layers if self.boundary else nn.ModuleList()
        with self.taps, _before_feed_forward(watched) as before:
            self.model(input_ids=ids, use_cache=False, **last_logits_only(self.model, ids))
            students, final = self.taps.student_hidden()[:, 0], self.taps.final_hidden()[0]
            head = self.taps.unembedding
            residuals = [self._ready(stream) for stream in before() or ()]
        cap = {"bias": head.bias, "logit_softcap": head.logit_softcap}
        # One call for all layers: the final layer's logits are computed once.
        stats, top = lens_with_top(
            students, final, head.weight, divergence=self.divergence, beta=self.beta, **cap
        )
        entropy_before = stats.divergence.new_full((self.num_layers, len(final)), torch.nan)
        if residuals:
            rows = torch.cat(residuals)
            entropy = linear_logprob(rows, head.weight, ids.new_zeros(len(rows)), **cap).entropy
            entropy_before = entropy.view(self.num_layers, -1)
        shown = slice(max(len(final) - picture, 0), None)

        def with_final(students: Tensor, final: Tensor) -> Tensor:
            return torch.cat([students, final[None]]).cpu()

        none = torch.zeros_like(stats.teacher_entropy)
        return Lens(
            with_final(top.student_token, top.teacher_token)[:, shown],
            with_final(top.student_logprob, top.teacher_logprob)[:, shown].exp(),
            with_final(stats.divergence, none),
            with_final(stats.student_entropy, stats.teacher_entropy),
            entropy_before.cpu(),
            with_final(stats.top1_agreement, none + 1),
        )

    def _ready(self, hidden: Tensor) -> Tensor:
        """What the unembedding reads for a residual stream: [T, D] for [1, T, D]."""
        tail = self.layout.tail
        if self.lens_norm == "final":
            hidden = tail.read(hidden, frozen=True)
        else:
            hidden = hidden * tail.factor
        return hidden[0] * self.layout.scale


def summarise(looks: Sequence[Lens]) -> LensSummary:
    """Means over all tokens of at least one text, and the boundary layer.

    The boundary layer is the last one below the final layer whose feed-forward block raises the
    mean entropy of the lens; None if no block does. Where a layer computes attention and
    feed-forward in parallel, both count as its block.
    """
    means = {
        name: torch.cat([getattr(look, name) for look in looks], dim=1).double().mean(1)
        for name in ("divergence", "entropy", "entropy_before", "agreement")
    }
    raises = means["entropy"] > means["entropy_before"]
    raising = [layer for layer in range(1, len(raises)) if raises[layer - 1]]
    return LensSummary(
        **{name: mean.tolist() for name, mean in means.items()},
        tokens=sum(look.entropy.shape[1] for look in looks),
        boundary_layer=max(raising, default=None),
    )


def without_boundary(summary: LensSummary) -> str:
    """Why a summary has no boundary layer, in words."""
    if any(map(math.isnan, summary.entropy_before)):
        return "not measured, because this model's feed-forward blocks are not found"
    return "none: no block raises the entropy"


@contextmanager
def _before_feed_forward(layers: nn.ModuleList) -> Iterator[Callable[[], list[Tensor] | None]]:
    """Gives a function for after a forward: each layer's residual stream before its feed-forward.

    It returns None unless every layer's block, [B, T, D] in and out, is found. The block is the
    last that a layer calls with two matrices or more: one child, or linear layers of which each
    reads what another child made. Where a norm comes before it, the residual stream is what the
    norm got.
    """
    calls: list[list[_Call]] = [[] for _ in layers]
    streams: list[Tensor | None] = [None for _ in layers]
    handles = []

    def keep(number: int, name: str, child: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        given = next((x for x in [*args, *kwargs.values()] if isinstance(x, Tensor)), None)
        out = first_tensor(out)
        if given is not None and isinstance(out, Tensor):
            calls[number].append(_Call(name, child, given, out))

    def keep_stream(number: int, layer: nn.Module, args: Any, out: Any) -> None:
        streams[number] = first_tensor(out)

    def residuals() -> list[Tensor] | None:
        found = [
            None if stream is None else _residual(own, stream)
            for own, stream in zip(calls, streams, strict=True)
        ]
        complete = [x for x in found if x is not None]
        return complete if len(complete) == len(found) else None

    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_hook(partial(keep_stream, number)))
        for name, child in layer.named_children():
            hook = partial(keep, number, name)
            handles.append(child.register_forward_hook(hook, with_kwargs=True))
    try:
        yield residuals
    finally:
        for handle in handles:
            handle.remove()


class _Call(NamedTuple):
    name: str
    child: nn.Module
    given: Tensor
    out: Tensor

    @property
    def matrices(self) -> int:
        return sum(p.ndim > 1 for p in self.child.parameters())

    @property
    def is_linear(self) -> bool:
        """Whether this is one projection, not a block of several or with attention."""
        return self.matrices == 1 and not any(True for _ in self.child.children())

    @property
    def mixes_tokens(self) -> bool:
        name = f"{self.name} {type(self.child).__name__}".lower()
        return any(word in name for word in ("attn", "attention", "mixer", "mamba", "conv"))


def _residual(calls: Sequence[_Call], stream: Tensor) -> Tensor | None:
    """The residual stream before the feed-forward block of one layer, shaped as its output."""
    for place in range(len(calls) - 1, -1, -1):
        last = calls[place]
        if last.matrices == 0:
            continue
        if last.mixes_tokens:
            return None
        given, matrices = last.given, last.matrices
        for earlier in reversed(calls[:place]):
            if _same(earlier.out, given) and (earlier.matrices == 0 or earlier.is_linear):
                given, matrices = earlier.given, matrices + earlier.matrices
        if matrices > 1 and given.shape[-1] == stream.shape[-1]:
            return given.view(stream.shape) if given.numel() == stream.numel() else None
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that are both alive are one, perhaps in another shape."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
