"""Attention, its divergence and both in one backward, against float64 at a model's true heads.

Letters: S student layers, N tokens of all sequences, H query heads, J key heads, K head dimension,
M sampled keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.case import EXACT, Bound, Result, leaves_of, seeded, token_weights
from benchmarks.gpu.place import Place
from benchmarks.gpu.worker import Check, Outcome, Work
from oisd_kernels import AttentionAlignment, attention_divergence, flash_attention, reference
from oisd_kernels.checks import DIVERGENCES

# What attention returns is rounded to the inputs' dtype.
FLASH = {torch.float32: EXACT[torch.float32], torch.bfloat16: Bound(5e-3, 5e-3)}
LEAVES = ("q", "k", "v")


def tensors(
    place: Place, dtype: torch.dtype, width: int, width_teacher: int, layers: int
) -> dict[str, Any]:
    """Packed q, k, v, d_out and the teacher's, scores of standard deviation 1.5; weights [N]."""
    generator = seeded(0, place.device)
    heads, key_heads = place.attention[:2]
    tokens = sum(place.lengths)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, device=place.device)

    student = (layers, tokens) if layers > 1 else (tokens,)
    q, k = normal(*student, heads, width, scale=1.5), normal(*student, key_heads, width)
    qt = normal(tokens, heads, width_teacher, scale=1.5)
    kt = normal(tokens, key_heads, width_teacher)
    if width == width_teacher and layers == 1:  # related, as layers of one model are
        qt, kt = (qt + q) * 0.5**0.5, (kt + k) * 0.5**0.5
    floats = {"q": q, "k": k, "qt": qt, "kt": kt, "v": normal(tokens, key_heads, width),
              "d_out": normal(tokens, heads, width)}  # fmt: skip
    ends = torch.tensor(place.lengths, device=place.device).cumsum(0)
    offsets = torch.nn.functional.pad(ends, (1, 0)).int()
    # A gradient of the same size as attention's own, so that a missing term shows.
    weight = 30 * token_weights(tokens, place.device, 0, dropped=0.25)
    rounded = {name: x.to(dtype) for name, x in floats.items()}
    return rounded | {"offsets": offsets, "weight": weight}


def flash(
    place: Place,
    impl: str,
    width: int | None = None,
    width_teacher: int | None = None,
    dtype: torch.dtype | None = None,
    divergence: str | None = None,
    **masks: Any,
) -> Outcome:
    """`flash_attention`; with a divergence also the alignment in its backward."""
    dtype, width = dtype or place.dtype, width or place.attention.dim
    given = tensors(place, dtype, width, width_teacher or width, 1)
    shared = {"cu_seqlens": given.pop("offsets"), **masks}

    def gradients(own: dict[str, Any], out: Tensor, lse: Tensor, rows: Tensor | None) -> Result:
        total = (out * own["d_out"]).sum() + lse.sum()
        found = {"out": out.detach(), "lse": lse.detach()}
        if rows is not None:
            total, found["loss"] = total + rows.sum(), rows.detach()
        grads = torch.autograd.grad(total, [own[name] for name in LEAVES])
        return found | {f"d_{name}": g for name, g in zip(LEAVES, grads, strict=True)}

    own = leaves_of(given, LEAVES, None)
    alignment = None if divergence is None else AttentionAlignment(divergence)
    out, lse = flash_attention(
        *(own[name] for name in LEAVES), alignment=alignment, impl=impl, **shared
    )
    rows = None
    if alignment is not None:
        rows = alignment.loss(own["qt"], own["kt"], token_weight=own["weight"])
    found = gradients(own, out, lse, rows)

    own = leaves_of(given, LEAVES, torch.float64)
    out, lse = reference.attention(*(own[name] for name in LEAVES), **shared)
    if divergence is not None:
        rows = reference.attention_divergence(
            own["q"], own["k"], own["qt"], own["kt"], token_weight=own["weight"],
            divergence=divergence, **shared,
        )  # fmt: skip
    return Outcome(found, gradients(own, out, lse, rows), FLASH[dtype])


def divergence(
    place: Place,
    impl: str,
    kind: str = "jsd",
    width: int | None = None,
    width_teacher: int | None = None,
    dtype: torch.dtype | None = None,
    layers: int = 1,
    sampled: bool = False,
    **masks: Any,
) -> Outcome:
    """`attention_divergence` of one student layer or several, over all keys or sampled ones."""
    dtype, width = dtype or place.dtype, width or place.attention.dim
    given = tensors(place, dtype, width, width_teacher or width, layers)
    shared = {"cu_seqlens": given.pop("offsets"), "divergence": kind, **masks}
    if sampled:
        shared["key_index"] = sample(place)

    def run(impl: str, dtype: torch.dtype | None) -> Result:
        own = leaves_of(given, ("q", "k"), dtype)
        rows = attention_divergence(
            own["q"], own["k"], own["qt"], own["kt"], token_weight=own["weight"], impl=impl,
            **shared,
        )  # fmt: skip
        d_q, d_k = torch.autograd.grad(rows.sum(), (own["q"], own["k"]))
        return {"loss": rows.detach(), "d_q": d_q, "d_k": d_k}

    return Outcome(run(impl, None), run("reference", torch.float64), EXACT[dtype])


def sample(place: Place) -> Tensor:
    """Key positions [N, M] as the paper samples them: a local window, a stride, an empty slot."""
    rows = []
    for length in place.lengths:
        for i in range(length):
            recent = [max(i - back, 0) for back in range(8)]
            strided = [min(step * 16, i) for step in range(7)]
            rows.append([*recent, *strided, -1])
    return torch.tensor(rows, device=place.device)


def other_width(place: Place) -> int:
    """Half the head dimension."""
    return place.attention.dim // 2


def checks(place: Place, impl: str, fused: bool) -> list[Check]:
    """Of attention and the backward that both share, or of the divergence alone."""
    window = place.window
    if fused:
        plain = [
            Check(f"attention, {what}, {impl}", partial(flash, impl=impl, **masks))
            for what, masks in (
                ("causal", {}),
                ("full", {"causal": False}),
                ("window", {"window": window}),
                ("softcap", {"softcap": 10.0}),
            )
        ]
        both = [
            Check(f"attention with {name}, {impl}", partial(flash, impl=impl, divergence=name))
            for name in DIVERGENCES
        ]
        windows = Check(f"attention with jsd, window, {impl}",
                        partial(flash, impl=impl, divergence="jsd", window=window))  # fmt: skip
        return [plain[0], both[0], *plain[1:], *both[1:], windows]
    return [
        Check(f"divergence, jsd, {impl}", partial(divergence, impl=impl)),
        Check(f"divergence, jsd, S = 4, {impl}", partial(divergence, impl=impl, layers=4)),
        Check(f"divergence, jsd, sampled keys, {impl}",
              partial(divergence, impl=impl, sampled=True)),
        *(Check(f"divergence, {name}, {impl}", partial(divergence, impl=impl, kind=name))
          for name in DIVERGENCES[1:]),
        Check(f"divergence, forward_kl, sampled keys, {impl}",
              partial(divergence, impl=impl, kind="forward_kl", sampled=True)),
        Check(f"divergence, jsd, window, {impl}", partial(divergence, impl=impl, window=window)),
        Check(f"divergence, jsd, teacher of half the width, {impl}", partial(narrow, impl=impl)),
    ]  # fmt: skip


def narrow(place: Place, impl: str) -> Outcome:
    return divergence(place, impl, width_teacher=other_width(place))


def attention(work: Work) -> None:
    work.checks(checks(work.place, "triton", fused=True))


def divergences(work: Work) -> None:
    work.checks(checks(work.place, "triton", fused=False))
