"""Argument checks that the attention ops share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from oisd_kernels import checks


def check_layer(
    op: str, q: Tensor, k: Tensor, suffix: str, letters: str, rows: Sequence[int], heads: int,
    device: torch.device,
) -> None:  # fmt: skip
    """Queries and keys of one layer, "" or "_teacher", against the student's rows and heads."""
    dim = q.shape[-1]
    q_layout, k_layout = f"[{letters}, H, K]", f"[{letters}, J, K]"
    checks.check_tensor(op, f"q{suffix}", q, q_layout, (*rows, heads, dim), device=device)
    checks.check_tensor(op, f"k{suffix}", k, k_layout, (*rows, None, dim), device=device)
    if heads == 0 or dim == 0:
        raise checks.argument_error(op, f"q{suffix}", "have H and K of at least 1", list(q.shape))
    key_heads = k.shape[-2]
    if key_heads == 0 or heads % key_heads:
        wanted = f"have a number of heads J that divides H = {heads}"
        raise checks.argument_error(op, f"k{suffix}", wanted, f"J = {key_heads}")


def check_masks(op: str, causal: object, window: object, softcap: object) -> None:
    checks.check_flag(op, "causal", causal)
    checks.check_count(op, "window", window)
    checks.check_positive(op, "softcap", softcap, optional=True)


def check_sink(
    op: str, name: str, sink: object, heads: int, layers: Sequence[int], device: torch.device
) -> None:
    """None, or a score for each head, perhaps of each of the `layers` ([] or [S])."""
    if sink is None:
        return
    if layers and isinstance(sink, Tensor) and sink.dim() == 2:
        checks.check_tensor(op, name, sink, "[S, H]", (*layers, heads), device=device)
    else:
        checks.check_tensor(op, name, sink, "[H]", (heads,), device=device)


def check_sinks_meet(
    op: str, divergence: str, sink: Tensor | None, sink_teacher: Tensor | None
) -> None:
    """A KL is infinite where its first layer has a sink and the other none."""
    if divergence == "forward_kl" and sink is None and sink_teacher is not None:
        name, other = "sink", "sink_teacher"
    elif divergence == "reverse_kl" and sink is not None and sink_teacher is None:
        name, other = "sink_teacher", "sink"
    else:
        return
    wanted = f'be a tensor where {other} is one, with divergence="{divergence}"'
    remedy = 'that divergence is infinite; use "jsd"'
    raise checks.argument_error(op, name, wanted, None, remedy)


def check_cu_seqlens(op: str, cu_seqlens: Tensor, rows: Sequence[int], q: Tensor) -> None:
    """Offsets of packed sequences; `rows` are q's leading sizes, (N,) or (B, T)."""
    if len(rows) != 1:
        remedy = "pack q and k to [N, H, K], or leave cu_seqlens out"
        raise checks.argument_error(
            op, "cu_seqlens", "be None in the dense form [B, T, H, K]", "a tensor", remedy
        )
    layout = "[number of sequences + 1]"
    checks.check_tensor(
        op, "cu_seqlens", cu_seqlens, layout, (None,), dtypes=checks.OFFSET_DTYPES, device=q.device
    )
    if cu_seqlens.numel() == 0:
        raise checks.argument_error(op, "cu_seqlens", "have at least one entry", "none", "pass [0]")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return  # a value cannot decide what a compiled graph looks like
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != rows[0] or bool((cu_seqlens.diff() < 0).any()):
        wanted = f"rise from 0 to N = {rows[0]}"
        remedy = "build it as cumsum of the lengths with a 0 in front"
        raise checks.argument_error(op, "cu_seqlens", wanted, offsets, remedy)
