"""OISD's terms for rollouts in the layout of TRL, after a tapped forward.

Prompts are padded on the left, completions on the right, and parameters may be sharded. Both terms
are means over a rollout's tokens, then over the rollouts (eq. 7, 10 and 11).

Letters: B rollouts, T positions of prompt and completion, N rows that count, D width,
V vocabulary, S student layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from oisd import losses
from oisd.config import AlignmentConfig
from oisd.losses import Metrics
from oisd.models import AttentionPair, Taps, UnsupportedModelError, pack_padded
from oisd.models.layout import is_partitioned

# Options of `oisd train` alone. A weight that keeps a share needs the gradient of each loss apart,
# which sharded training does not give, and a state in the checkpoints, which are not ours here.
OF_THE_TRAINER = (
    "think_share", "attention_share", "think_schedule", "attention_schedule", "advantage",
)  # fmt: skip


@dataclass(frozen=True)
class Rollouts:
    """A micro-batch of rollouts, position by position."""

    predicts: Tensor  # [B, T] bool: whether the next token is one that counts
    attention_mask: Tensor  # [B, T], 0 for padding
    advantages: Tensor  # [B, T], 0 where nothing is predicted


def alignment_losses(
    taps: Taps,
    rollouts: Rollouts,
    align: AlignmentConfig,
    *,
    operand: torch.dtype | None = None,
    noise: torch.Generator,
) -> tuple[dict[str, Tensor], Metrics]:
    """The terms that have a weight in `align`, "think" and "attention", unweighted; their metrics.

    Call it within the tapped model's forward if parameters are sharded. The terms are means over
    the B rollouts.

    taps: open, with the captures of the forward of `rollouts`.
    operand: dtype of the operands of the matmuls against the unembedding; None: that of its weight.
    noise: draws the decoding steps if `align.attention_steps` limits them.
    """
    found: dict[str, Tensor] = {}
    metrics: Metrics = {}
    # The operations choose their precision themselves.
    with torch.autocast(rollouts.predicts.device.type, enabled=False):
        if align.think_weight:
            found["think"], more = _think(taps, rollouts, align, operand)
            metrics |= more
        if align.attention_weight:
            found["attention"], more = _attention(taps, rollouts, align, noise)
            metrics |= more
    return found, metrics


def reduced_means(metrics: Metrics, reduce: Callable[[Tensor], Any]) -> dict[str, float]:
    """The means over all processes, in one reduction; those over nothing are left out everywhere.

    reduce: sums a tensor [metrics, 2] over the processes.
    """
    names = sorted(metrics)
    pairs = [torch.stack([metrics[name].total, metrics[name].count]).float() for name in names]
    sums = reduce(torch.stack(pairs)).tolist()
    return {n: total / count for n, (total, count) in zip(names, sums, strict=True) if count}


@contextmanager
def refused_in_words_of(options: Mapping[str, str]) -> Iterator[None]:
    """Refusals of `Taps` within say how to set what helps there.

    options: by the name of an option of `oisd.models.refusals.Remedy`.
    """
    try:
        yield
    except UnsupportedModelError as error:
        raise error.reworded(lambda remedy: options.get(remedy.option, str(remedy))) from error


def _whole(parameter: Tensor | None) -> Tensor | None:
    """The parameter without gradient, gathered if FSDP2 has sharded it."""
    if parameter is None:
        return None
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def gathered(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    """Context in which parameters that ZeRO-3 has partitioned are whole; others are untouched.

    One that is whole already (tied to embeddings in use, say) must not be released at the end.
    """
    partitioned: Any = {id(p): p for p in parameters if p is not None and is_partitioned(p)}
    if not partitioned:
        return nullcontext()
    from deepspeed import zero  # pyright: ignore[reportMissingImports]

    absent = [p for p in partitioned.values() if p.ds_status.name != "AVAILABLE"]
    return zero.GatheredParameters(absent) if absent else nullcontext()


def _think(
    taps: Taps, rollouts: Rollouts, align: AlignmentConfig, operand: torch.dtype | None
) -> tuple[Tensor, Metrics]:
    """Logit alignment over the rows of advantage other than 0.

    operand: see `alignment_losses`.
    """
    head = taps.unembedding
    token_weight = losses.token_weights(rollouts.predicts, "sequence-mean").flatten()
    signed = rollouts.advantages.flatten()
    rows = signed.nonzero().squeeze(1)
    students = taps.student_hidden().flatten(1, 2)[:, rows]
    final = taps.final_hidden().flatten(0, 1)[rows].detach()
    with gathered(head.weight, head.bias):
        weight, bias = _whole(head.weight), _whole(head.bias)
        assert weight is not None
        operand = operand or weight.dtype
        return losses.think_loss(
            students.to(operand),
            final.to(operand),
            weight.to(operand),
            signed[rows],
            align,
            token_weight=token_weight[rows],
            bias=bias,
            logit_softcap=head.logit_softcap,
        )


def _attention(
    taps: Taps, rollouts: Rollouts, align: AlignmentConfig, noise: torch.Generator
) -> tuple[Tensor, Metrics]:
    """Attention alignment, packed because prompts are padded on the left."""
    steps = rollouts.predicts
    if align.attention_steps is not None:
        uniform = torch.rand(steps.shape, generator=noise, device=steps.device)
        steps = losses.sampled_steps(steps, uniform, align.attention_steps)
    token_weight = losses.token_weights(steps, "sequence-mean")
    # Whole rollouts of advantage 0 are left out.
    live = (rollouts.advantages != 0).any(dim=1, keepdim=True)
    keep = rollouts.attention_mask.bool() & live
    position = keep.cumsum(1) - 1
    pairs = taps.attention()
    first = pairs[0]
    q_teacher, k_teacher, token_weight, advantages, position, cu_seqlens = pack_padded(
        keep, first.q_teacher, first.k_teacher, token_weight, rollouts.advantages, position
    )
    packed: list[AttentionPair] = []
    for pair in pairs:
        q, k, _ = pack_padded(keep, pair.q, pair.k)
        packed.append(pair._replace(q=q, k=k, q_teacher=q_teacher, k_teacher=k_teacher))
    key_index = None
    if align.key_window is not None and align.key_stride is not None:
        sampled = losses.sampled_keys(
            1, keep.shape[1], align.key_window, align.key_stride, keep.device
        )
        key_index = sampled[0, position]
    return losses.attention_loss(
        packed,
        advantages,
        align,
        token_weight=token_weight,
        cu_seqlens=cu_seqlens,
        key_index=key_index,
    )
