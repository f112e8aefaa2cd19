"""The attention alignment of OISD as a pure function: eq. 10, as `oisd.losses` has the others.

The paper samples the loss: some decoding steps, and for each of them some keys.

Shape letters: B sequences, T tokens, S student layers, N rows (tokens laid flat), H heads, K head
dimension, M sampled keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oisd.config import AlignmentConfig
from oisd.losses.advantages import clip_advantages
from oisd.losses.metrics import Metrics, add_metrics, means_by_sign
from oisd_kernels import attention_divergence

if TYPE_CHECKING:
    from oisd.models import AttentionPair
    from oisd_kernels import AttentionAlignment


def attention_loss(
    pairs: Sequence[AttentionPair],
    advantages: Tensor,
    config: AlignmentConfig | None = None,
    *,
    token_weight: Tensor,
    cu_seqlens: Tensor | None = None,
    key_index: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Metrics]:
    """Attention alignment, eq. 10: sum_n token_weight_n * Abar_n * 1/H sum_h JS(student, teacher).

    Args:
        pairs: for each student layer its post-rotary queries and keys and the final layer's, dense
            [B, T, H, K] with right padding, or packed [N, H, K], and the layers' sinks. A pair with
            an alignment (see `Taps`) is dense, padded on either side.
        advantages: [B] or [B, T], or packed [N]: of the sequence that each query belongs to.
        config: divergence, beta, clip.
        token_weight: [B, T], or packed [N]; 0 at a query that does not predict a completion token.
        cu_seqlens: of packed sequences.
        key_index: the paper's sampled keys, from `sampled_keys`; all keys by default.
        impl: of `oisd_kernels.attention_divergence`.

    Returns the loss, a mean over the student layers, and the metrics js/attention_pos and
    js/attention_neg over the rows whose weight is not 0.
    """
    config = config or AlignmentConfig()
    if advantages.dim() < token_weight.dim():
        advantages = advantages[:, None]
    # Where the weight is 0 the advantage may be anything, as at padding.
    signed = clip_advantages(advantages, config).float() * token_weight
    signed = torch.where(token_weight == 0, 0.0, signed)
    total = signed.new_zeros(())
    metrics: Metrics = {}
    # The metric is the unweighted divergence. Dividing by the weight is exact enough for it, and
    # rows of weight 0 are in no mean.
    divisor = torch.where(signed == 0, 1.0, signed)
    for group in _alike(pairs):
        if group[0].alignment is None:
            rows = _separate_rows(group, signed, config, key_index, cu_seqlens, impl)
        else:
            rows = _fused_rows(group[0], group[0].alignment, signed, config, key_index, cu_seqlens)
        total = total + rows.sum()
        by_sign = means_by_sign("js/attention", rows.detach() / divisor, signed)
        metrics = add_metrics(metrics, by_sign)
    return total / max(len(pairs), 1), metrics


def _alike(pairs: Sequence[AttentionPair]) -> list[list[AttentionPair]]:
    """Groups of pairs that one call can take, so that the teacher's scores are computed once."""
    groups: dict[object, list[AttentionPair]] = {}
    for number, pair in enumerate(pairs):
        key: object = number
        if pair.alignment is None:
            scales = pair.scale, pair.scale_teacher
            sinks = pair.sink is None
            key = (pair.q.shape, pair.k.shape, scales, pair.softcap, pair.window, sinks)
        groups.setdefault(key, []).append(pair)
    return list(groups.values())


def _separate_rows(
    pairs: Sequence[AttentionPair],
    signed: Tensor,
    config: AlignmentConfig,
    key_index: Tensor | None,
    cu_seqlens: Tensor | None,
    impl: str,
) -> Tensor:
    """Weighted divergence of one or of several student layers, [B, T] or [S, B, T], or packed."""
    first, several = pairs[0], len(pairs) > 1
    sinks = [pair.sink for pair in pairs if pair.sink is not None]  # of all or of none
    return attention_divergence(
        torch.stack([pair.q for pair in pairs]) if several else first.q,
        torch.stack([pair.k for pair in pairs]) if several else first.k,
        first.q_teacher,
        first.k_teacher,
        token_weight=signed,
        cu_seqlens=cu_seqlens,
        window=first.window,
        softcap=first.softcap,
        scale=first.scale,
        scale_teacher=first.scale_teacher,
        divergence=config.divergence,
        beta=config.beta,
        key_index=key_index,
        sink=(torch.stack(sinks) if several else sinks[0]) if sinks else None,
        sink_teacher=first.sink_teacher,
        impl=impl,
    )


def _fused_rows(
    pair: AttentionPair,
    alignment: AttentionAlignment,
    signed: Tensor,
    config: AlignmentConfig,
    key_index: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Weighted divergence [B, T]; the student layer's own attention computes its gradient."""
    if key_index is not None or cu_seqlens is not None:
        raise ValueError(
            "attention_loss: pairs with an alignment must come without key_index and cu_seqlens; "
            'make the Taps with attention_kernel="separate" for those'
        )
    if (alignment.divergence, alignment.beta) != (config.divergence, config.beta):
        raise ValueError(
            f"attention_loss: config must have the alignment's divergence and beta, "
            f"({alignment.divergence!r}, {alignment.beta}), got ({config.divergence!r}, "
            f"{config.beta}); give Taps the same"
        )
    rows = alignment.loss(
        pair.q_teacher.flatten(0, 1),
        pair.k_teacher.flatten(0, 1),
        token_weight=signed.flatten(),
        lse_teacher=pair.lse_teacher,
        scale_teacher=pair.scale_teacher,
        sink_teacher=pair.sink_teacher,
    )
    return rows.view(signed.shape)


def sampled_steps(mask: Tensor, noise: Tensor, count: int) -> Tensor:
    """Keep at most `count` true entries of each row of `mask` (the paper's sampled decoding steps).

    Args:
        mask: [B, T] bool.
        noise: [B, T], independent uniform numbers in [0, 1): the largest are kept.
        count: at least 1.
    """
    chosen = noise.masked_fill(~mask, -1.0).topk(min(count, mask.shape[1]), dim=1).indices
    return torch.zeros_like(mask).scatter(1, chosen, True) & mask


def sampled_keys(
    batch: int, length: int, window: int, stride: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The paper's sampled keys: the nearest `window`, the own position among them, and a stride.

    Returns [B, T, M] int64 positions, M = window + ceil(T / stride): for query t the keys
    t - window + 1 ... t, and every stride-th position (0, stride, ...) before those; -1 where there
    is none.
    """
    t = torch.arange(length, device=device)[:, None]
    near = t - torch.arange(window, device=device)
    far = torch.arange(0, length, stride, device=device).expand(length, -1)
    far = torch.where(far <= t - window, far, -1)
    index = torch.cat([near.clamp(min=-1), far], dim=1)
    return index.expand(batch, -1, -1)
