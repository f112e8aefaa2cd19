"""How far the attention of each layer overlaps with the final layer's, head by head.

    overlap_i = mean over heads of sum_j min(a_l,ij, a_L,ij)     1 where they are equal, 0 disjoint

A learned sink is one more j, in a column of its own that the maps leave out. They are kept as a
mean over the heads, for pictures of short texts.

H heads, T tokens, L layers counted from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from oisd.models import AttentionPair, Taps, last_logits_only
from oisd.models.attending import Probe
from oisd_kernels import attention_divergence


class AttentionOverlap(NamedTuple):
    """The attention of one text in the layers asked for, on the CPU."""

    layers: list[int]
    overlap: Tensor  # [layers, T] in [0, 1]
    divergence: Tensor  # [layers, T], nats
    maps: Tensor  # [layers, T, T], mean over heads, query by key
    final_map: Tensor  # [T, T]
    final: str = "final layer"  # the name of the layer compared with: of a hybrid, perhaps another

    def nearest(self, layer: int) -> int:
        """The nearest of `layers` at or below a layer, or the first of them."""
        return max((n for n in self.layers if n <= layer), default=self.layers[0])


class LayerAttention:
    """Compares the attention of some layers with the final layer's.

    Of a hybrid, with that of the last layer that attends by softmax; layers that do not, or whose
    heads cannot be compared with its heads, are left out.

    divergence: of `oisd_kernels.attention_divergence`.
    probe: of the model, where it was probed before.
    Raises UnsupportedModelError if no layer's attention can be compared, and ValueError for a layer
    outside 1..L-1.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int],
        divergence: str = "jsd",
        probe: Probe | None = None,
    ):
        self.model, self.divergence = model, divergence
        probe = probe or Probe(model)
        able, teacher = probe.comparable(layers)
        self.taps = Taps(probe, able, divergence=divergence)
        last = teacher == self.taps.num_layers
        self.final = "final layer" if last else f"layer {teacher}"

    @torch.no_grad()
    def __call__(self, token_ids: Sequence[int]) -> AttentionOverlap:
        """Look at a text of T >= 1 tokens; takes memory for H maps of T x T."""
        device = next(self.model.parameters()).device
        ids = torch.tensor([list(token_ids)], device=device)
        with self.taps:
            self.model(input_ids=ids, use_cache=False, **last_logits_only(self.model, ids))
            pairs = self.taps.attention()
        overlaps, divergences, maps = [], [], []
        final = torch.zeros(0)
        for pair in pairs:
            student = _map(pair, pair.q, pair.k, pair.scale, pair.sink)
            final = _map(
                pair, pair.q_teacher, pair.k_teacher, pair.scale_teacher, pair.sink_teacher
            )
            overlaps.append(torch.minimum(student, final).sum(-1).mean(0))
            divergences.append(
                attention_divergence(
                    pair.q, pair.k, pair.q_teacher, pair.k_teacher, window=pair.window,
                    softcap=pair.softcap, scale=pair.scale, scale_teacher=pair.scale_teacher,
                    divergence=self.divergence, sink=pair.sink, sink_teacher=pair.sink_teacher,
                )[0]
            )  # fmt: skip
            maps.append(student[..., :-1].mean(0))
        return AttentionOverlap(
            list(self.taps.student_layers),
            torch.stack(overlaps).cpu(),
            torch.stack(divergences).cpu(),
            torch.stack(maps).cpu(),
            final[..., :-1].mean(0).cpu(),
            self.final,
        )


def _map(pair: AttentionPair, q: Tensor, k: Tensor, scale: float, sink: Tensor | None) -> Tensor:
    """[H, T, T + 1] attention over the keys that both layers see, and to the sink (0 without)."""
    q, k = (rearrange(x[0].float(), "t h k -> h t k") for x in (q, k))
    k = repeat(k, "j t k -> (j group) t k", group=len(q) // len(k))
    scores = scale * q @ k.mT
    if pair.softcap is not None:
        scores = pair.softcap * torch.tanh(scores / pair.softcap)
    distance = torch.arange(q.shape[1], device=q.device)
    distance = distance[:, None] - distance
    seen = (distance >= 0) & (distance < (pair.window or len(distance)))
    own = scores.new_full((len(q),), -torch.inf) if sink is None else sink.float()
    own = own[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores.masked_fill(~seen, -torch.inf), own], -1).softmax(-1)
