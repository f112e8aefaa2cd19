"""What the attention kernels are told beside their tensors: which keys a query sees, whom it meets.

Everything here is packed: N tokens of several sequences in a row. With H query heads and J key
heads (J divides H) head h reads key head h // (H / J). Logsumexp and row statistics are [H, N] in
natural logarithm, FlashAttention's layout.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """The keys that a query sees, by positions within its own sequence.

    Causal: query i sees keys j <= i, of a window i - window < j <= i. Not causal: all keys, of a
    window those with |i - j| < window.
    """

    cu_seqlens: Tensor  # [B + 1] int32, on the tensors' device: sequence b is cu[b] : cu[b + 1]
    sequences: int  # B
    max_length: int | None  # the longest sequence; None where the host would have to ask the device
    causal: bool
    window: int | None
    softcap: float | None  # c of c * tanh(scores / c), after the scale


class Layer(NamedTuple):
    """Student or teacher; both have the same H, heads' width K and J are each one's own.

    Statistics take S student layers at once, with S in front of all shapes.
    """

    q: Tensor  # [N, H, K]
    k: Tensor  # [N, J, K]
    lse: Tensor  # [H, N], over the keys alone
    scale: float
    # [H], the score of one more key; the kernels get it within lse, see `sink.whole`
    sink: Tensor | None = None


class Plain(NamedTuple):
    """What attention's own gradient needs beside its `Layer`."""

    v: Tensor  # [N, J, K]
    out: Tensor  # [N, H, K]
    d_out: Tensor  # [N, H, K]
    d_lse: Tensor | None = None  # [H, N]
    delta: Tensor | None = None  # [H, N], rowsum(dO * O) - dLse, where it is known


class Alignment(NamedTuple):
    """What a backward adds for one student layer; rows of weight 0 cost nothing."""

    teacher: Layer
    row_weight: Tensor  # [N]: upstream gradient times token weight, divided by H
    # [H, N]: <P, softplus(log T - log P + log(beta/(1-beta)))> for jsd, KL(P||T) for reverse_kl;
    # over the keys alone, but for the kernels, who get the sink's part with it
    statistic: Tensor
    divergence: str  # "jsd" | "forward_kl" | "reverse_kl"; forward_kl's statistic is empty
    beta: float  # the teacher's share of jsd's mixture


class SampledStatistics(NamedTuple):
    """Of the divergence over sampled keys; "torch" keeps the value alone, the others are empty."""

    value: Tensor  # [S, N]: mean over heads; 0 where not kept and where no key is left
    # [S, H, N], over the slots that count; where there is none 0, or with a sink -inf
    lse: Tensor
    lse_teacher: Tensor  # [H, N]
    statistic: Tensor  # [S, H, N] of `Alignment`; empty for forward_kl


def geometry_of(call: Any) -> Geometry:
    """Of an op's record, which holds its parts."""
    sequences = call.cu_seqlens.numel() - 1
    masks = call.causal, call.window, call.softcap
    return Geometry(call.cu_seqlens, sequences, call.length, *masks)


def dense_geometry(
    like: Tensor,
    batch: int,
    length: int,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Geometry:
    """Of `batch` sequences of `length` tokens each, on the device of `like`."""
    cu_seqlens = torch.arange(batch + 1, device=like.device, dtype=torch.int32) * length
    return Geometry(cu_seqlens, batch, length, causal, window, softcap)


def packed_geometry(
    like: Tensor,
    tokens: int,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Geometry:
    """Of the sequences in `cu_seqlens`, or of one of `tokens` tokens where that is None."""
    if cu_seqlens is None:
        return dense_geometry(like, 1, tokens, causal, window, softcap)
    sequences = cu_seqlens.numel() - 1
    # No sequence is longer than all tokens together; the exact length is on the device.
    longest = tokens if sequences == 1 else None
    return Geometry(cu_seqlens.int(), sequences, longest, causal, window, softcap)


def pack_statistic(x: Tensor) -> Tensor:
    """[..., B, H, T] -> [..., H, B*T]."""
    return x.transpose(-3, -2).flatten(-2)


def unpack_statistic(x: Tensor, batch: int, length: int) -> Tensor:
    """[H, B*T] -> [B, H, T]."""
    return x.unflatten(1, (batch, length)).transpose(0, 1)
