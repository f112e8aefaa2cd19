"""What the layers of a model would say next: the logit lens of every layer, measured.

    q_l = softmax(head(norm(h_l)))      h_l the residual stream after layer l, q_L the model's own

Per layer and token: the likeliest token and its probability, the entropy of q_l, the divergence of
q_l from q_L. The entropy just before each layer's feed-forward block gives the boundary layer of
BuPO: the last layer below the final one whose feed-forward block raises the entropy.

L layers, T tokens, D width, V vocabulary. Layers are counted from 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oisd.models import Taps, UnsupportedModelError
from oisd.models.layout import Layout, find_layout, first_tensor, unwrap
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
        boundary layer follows; this doubles the projections.

    Raises UnsupportedModelError for a model whose layout is not recognised.
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
        self.layout: Layout = find_layout(unwrap(model))
        self.num_layers = len(self.layout.layers)
        if self.num_layers < 2:
            raise UnsupportedModelError("the lens compares layers, but the model has only one")
        below = range(1, self.num_layers)
        self.taps = Taps(model, student_layers=below, attention=False, lens_norm=lens_norm)

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
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
            students, final = self.taps.student_hidden()[:, 0], self.taps.final_hidden()[0]
            head = self.taps.unembedding
            residuals = [self._ready(residual()[0]) for residual in before]
        cap = {"bias": head.bias, "logit_softcap": head.logit_softcap}
        # One call for all layers: the final layer's logits are computed once.
        stats, top = lens_with_top(
            students, final, head.weight, divergence=self.divergence, beta=self.beta, **cap
        )
        entropy_before = stats.divergence.new_full((self.num_layers, len(final)), torch.nan)
        if self.boundary:
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
        """What the unembedding reads for a residual stream [T, D]."""
        if self.lens_norm == "final":
            hidden = self.layout.norm(hidden)
        return hidden * self.layout.scale


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


@contextmanager
def _before_feed_forward(layers: nn.ModuleList) -> Iterator[list[Any]]:
    """For each layer a function that gives the residual stream [B, T, D] before its last block.

    The feed-forward block is the last child called that holds a matrix. Where a norm comes before
    it, the residual stream is what the norm got.
    """
    calls: list[list[tuple[nn.Module, Any, Any]]] = [[] for _ in layers]
    handles = []

    def keep(number: int, child: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        given = next(x for x in [*args, *kwargs.values()] if isinstance(x, Tensor))
        calls[number].append((child, given, first_tensor(out)))

    def residual(number: int) -> Tensor:
        *_, (place, given) = (
            (i, x)
            for i, (child, x, _) in enumerate(calls[number])
            if any(p.ndim > 1 for p in child.parameters())
        )
        for _, norm_input, norm_output in calls[number][:place]:
            if norm_output is given:
                return norm_input
        return given

    for number, layer in enumerate(layers):
        for child in layer.children():
            hook = partial(keep, number)
            handles.append(child.register_forward_hook(hook, with_kwargs=True))
    try:
        yield [partial(residual, number) for number in range(len(layers))]
    finally:
        for handle in handles:
            handle.remove()
