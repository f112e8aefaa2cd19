"""Divergence between the attention maps of a student layer and of the final layer.

    s_ij = cap(scale * <q_i, k_j>)   over the keys j that query i sees
    q = softmax_j(s) of the student, p = softmax_j(s) of the teacher (detached), per query head
    loss_i = token_weight_i * mean over heads of divergence(p, q)

cap(s) = c * tanh(s / c) where softcap = c is given, else s. Head h of one layer meets head h of the
other; within a layer it reads key head h // (H / J). The divergences are those of
`oisd_kernels.reference`; jsd with beta = 1/2 is eq. 8 to 10 of arXiv 2605.29089.
"""

from collections.abc import Callable

from torch import Tensor

from oisd_kernels import checks, reference

OP = "attention_divergence"
NAMES = ("reference", "torch", "triton", "cuda")
# In order of preference: "auto" takes the first. Each takes every argument but `impl`.
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"reference": reference.attention_divergence}


def attention_divergence(
    q: Tensor,
    k: Tensor,
    q_teacher: Tensor,
    k_teacher: Tensor,
    *,
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    scale_teacher: float | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    key_index: Tensor | None = None,
    lse: Tensor | None = None,
    lse_teacher: Tensor | None = None,
    reduction: str = "none",
    impl: str = "auto",
) -> Tensor:
    """Signed, weighted divergence of a layer's attention from the final layer's, per query.

    Two forms: dense (B sequences of T tokens) and packed (N tokens of all sequences in a row). In
    the dense form every position counts as a key; pack to leave padding out.

    Args:
        q: [B, T, H, K] or [N, H, K], the student's queries after rotary embedding. Receives
            gradient, as `k` does.
        k: [B, T, J, K] or [N, J, K], its keys; J divides H.
        q_teacher: as `q` with the same H; K may differ. Receives no gradient.
        k_teacher: as `k`; J and K may differ from the student's.
        token_weight: [B, T] or [N], signed, any float dtype; receives no gradient. Rows of weight 0
            are left out: they give 0 and pass no gradient on, even if they hold NaN.
        cu_seqlens: packed form only, int32 or int64 [number of sequences + 1], from 0 to N, never
            falling. None: one sequence. Its values are checked on the CPU only.
        causal: query i sees keys j <= i.
        window: i - window < j <= i if causal, |i - j| < window if not; at least 1. Where the two
            layers have different windows pass the smaller: both distributions are then over the
            keys that both layers see.
        softcap: c of c * tanh(scores / c) in both layers, above 0, applied after the scale.
        scale: multiplies the scores. None: K ** -0.5, each layer's own K.
        scale_teacher: the teacher's. None: as `scale`.
        divergence: "jsd", "forward_kl" = KL(teacher||student), "reverse_kl" = KL(student||teacher).
        beta: the teacher's share of the mixture of "jsd", in (0, 1).
        key_index: int64 [B, T, M] or [N, M], for each query the positions of its sampled keys
            within its own sequence; -1 is an empty slot. Keys that the masks hide are left out,
            duplicates count once, and both distributions are renormalised over the rest. A query
            left without a key gives 0 and no gradient. Its values are checked on the CPU only.
        lse, lse_teacher: [B, H, T] or [H, N] (FlashAttention's layout), logsumexp of the scaled and
            capped scores over the visible keys, where the attention forward has them. They save
            kernels a pass and add no information: "reference" checks their shape and ignores them.
        reduction: "none"; "sum"; "mean", which divides by the number of rows of weight other than 0
            (the result is 0 if there is none).
        impl: "reference" (maps in memory, plain autograd). "auto" takes it, as the only one
            available. "torch", "triton", "cuda" are reserved names and an error until they exist.

    Returns:
        token_weight * divergence in nats, mean over heads, [B, T] or [N], or a scalar. float32;
        float64 if q, k or the teacher's is.

    All float dtypes may be mixed; the computation is in the dtype of the result, autocast or not.

    Raises:
        ValueError: a shape, dtype, device or value is not as above, or lse comes with key_index
            (it covers all keys).

    Source: arXiv 2605.29089, eq. 8 to 10; the weight is its clipped advantage.
    """
    checks.check_dims(OP, "q", q, {3: "[N, H, K]", 4: "[B, T, H, K]"})
    *rows, heads, _ = q.shape
    letters = "N" if len(rows) == 1 else "B, T"
    _check_layer(q, k, "", letters, rows, heads, q)
    checks.check_dims(OP, "q_teacher", q_teacher, {q.dim(): f"[{letters}, H, K]"})
    _check_layer(q_teacher, k_teacher, "_teacher", letters, rows, heads, q)
    device = q.device
    if token_weight is not None:
        checks.check_tensor(OP, "token_weight", token_weight, f"[{letters}]", rows, device=device)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, rows, q)
    checks.check_flag(OP, "causal", causal)
    checks.check_count(OP, "window", window)
    checks.check_positive(OP, "softcap", softcap, optional=True)
    checks.check_positive(OP, "scale", scale, optional=True)
    checks.check_positive(OP, "scale_teacher", scale_teacher, optional=True)
    checks.check_divergence(OP, divergence, beta)
    if key_index is not None:
        _check_key_index(key_index, letters, rows, cu_seqlens, q)
    layout, sizes = (
        ("[H, N]", (heads, *rows)) if len(rows) == 1 else ("[B, H, T]", (rows[0], heads, rows[1]))
    )
    for name, x in (("lse", lse), ("lse_teacher", lse_teacher)):
        if x is not None and key_index is not None:
            remedy = "it covers all keys, key_index only some: pass one of them"
            raise checks.argument_error(OP, name, "be None beside key_index", "a tensor", remedy)
        if x is not None:
            checks.check_tensor(OP, name, x, layout, sizes, device=device)
    checks.check_choice(OP, "reduction", reduction, checks.REDUCTIONS)
    run = checks.choose(OP, impl, IMPLEMENTATIONS, NAMES)
    return run(
        q,
        k,
        q_teacher,
        k_teacher,
        token_weight=token_weight,
        cu_seqlens=cu_seqlens,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        scale_teacher=scale_teacher,
        divergence=divergence,
        beta=beta,
        key_index=key_index,
        lse=lse,
        lse_teacher=lse_teacher,
        reduction=reduction,
    )


def _check_layer(
    q: Tensor, k: Tensor, suffix: str, letters: str, rows: list[int], heads: int, student: Tensor
) -> None:
    """Queries and keys of one layer, "" or "_teacher", against the student's rows and heads."""
    dim = q.shape[-1]
    q_layout, k_layout = f"[{letters}, H, K]", f"[{letters}, J, K]"
    device = student.device
    checks.check_tensor(OP, f"q{suffix}", q, q_layout, (*rows, heads, dim), device=device)
    checks.check_tensor(OP, f"k{suffix}", k, k_layout, (*rows, None, dim), device=device)
    if heads == 0 or dim == 0:
        raise checks.argument_error(OP, f"q{suffix}", "have H and K of at least 1", list(q.shape))
    key_heads = k.shape[-2]
    if key_heads == 0 or heads % key_heads:
        wanted = f"have a number of heads J that divides H = {heads}"
        raise checks.argument_error(OP, f"k{suffix}", wanted, f"J = {key_heads}")


def _check_cu_seqlens(cu_seqlens: Tensor, rows: list[int], q: Tensor) -> None:
    if len(rows) != 1:
        remedy = "pack q and k to [N, H, K], or leave cu_seqlens out"
        raise checks.argument_error(
            OP, "cu_seqlens", "be None in the dense form [B, T, H, K]", "a tensor", remedy
        )
    layout = "[number of sequences + 1]"
    checks.check_tensor(
        OP, "cu_seqlens", cu_seqlens, layout, (None,), dtypes=checks.OFFSET_DTYPES, device=q.device
    )
    if cu_seqlens.numel() == 0:
        raise checks.argument_error(OP, "cu_seqlens", "have at least one entry", "none", "pass [0]")
    if cu_seqlens.device.type == "cpu":
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != rows[0] or bool((cu_seqlens.diff() < 0).any()):
            wanted = f"rise from 0 to N = {rows[0]}"
            remedy = "build it as cumsum of the lengths with a 0 in front"
            raise checks.argument_error(OP, "cu_seqlens", wanted, offsets, remedy)


def _check_key_index(
    key_index: Tensor, letters: str, rows: list[int], cu_seqlens: Tensor | None, q: Tensor
) -> None:
    checks.check_tensor(
        OP,
        "key_index",
        key_index,
        f"[{letters}, M]",
        (*rows, None),
        dtypes=checks.INDEX_DTYPES,
        device=q.device,
    )
    length: int | Tensor = rows[-1]
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        length = cu_seqlens.diff().repeat_interleave(cu_seqlens.diff())[:, None]
    remedy = "positions count from 0 within the query's own sequence, -1 is an empty slot"
    checks.check_values(OP, "key_index", key_index, -1, length, remedy)
