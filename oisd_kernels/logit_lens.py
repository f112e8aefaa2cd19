"""Divergence between a student layer's and the final layer's next-token distributions.

    q = softmax(cap(hidden @ weight.T + bias) / temperature)                    student
    p = softmax(cap(teacher_hidden @ weight.T + bias) / temperature)            teacher, detached
    loss = token_weight * divergence(p, q)

cap(z) = c * tanh(z / c) where logit_softcap = c is given, else z. The divergences are those of
`oisd_kernels.reference`; jsd with beta = 1/2 is eq. 7 of arXiv 2605.29089, and the projection is
its eq. 6.
"""

from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor

from oisd_kernels import checks, reference
from oisd_kernels.reference import LensStats

OP = "logit_lens_divergence"
NAMES = ("reference", "chunked", "tiled")
# In order of preference: "auto" takes the first. Each takes every argument but `impl`.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"reference": reference.logit_lens_divergence}


@overload
def logit_lens_divergence(
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    reduction: str = "none",
    grad_weight: bool = False,
    return_stats: Literal[False] = False,
    impl: str = "auto",
    max_bytes: int | None = None,
) -> Tensor: ...


@overload
def logit_lens_divergence(
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    reduction: str = "none",
    grad_weight: bool = False,
    return_stats: Literal[True],
    impl: str = "auto",
    max_bytes: int | None = None,
) -> tuple[Tensor, LensStats]: ...


def logit_lens_divergence(
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    reduction: str = "none",
    grad_weight: bool = False,
    return_stats: bool = False,
    impl: str = "auto",
    max_bytes: int | None = None,
) -> Tensor | tuple[Tensor, LensStats]:
    """Signed, weighted divergence of logit-lens distributions from the final layer's, per token.

    Args:
        hidden: [S, N, D] or [N, D], student hidden states after the final norm. Receives gradient.
        teacher_hidden: [N, D], final hidden state after the final norm. Receives none.
        weight: [V, D], the unembedding.
        bias: [V].
        token_weight: [N] or [S, N], signed, any float dtype; receives no gradient. Rows of weight 0
            are dropped before any matmul: they cost nothing, give 0 and pass no gradient on, even
            if they hold NaN.
        divergence: "jsd", "forward_kl" = KL(teacher||student), "reverse_kl" = KL(student||teacher).
        beta: the teacher's share of the mixture of "jsd", in (0, 1).
        temperature: divides the logits, above 0.
        logit_softcap: c of c * tanh(logits / c), above 0, applied before the temperature.
        reduction: "none"; "sum"; "mean", which divides by the number of rows of weight other than 0
            (the result is 0 if there is none).
        grad_weight: let the student branch pass gradient to `weight` and `bias`.
        return_stats: also return `LensStats`.
        impl: "reference" (all logits in memory, plain autograd). "auto" takes it, as the only one
            available. "chunked" and "tiled" are reserved names and an error until they exist.
        max_bytes: workspace budget in bytes; "reference" does not chunk and so has no use for it.

    Returns:
        token_weight * divergence in nats, [S, N] (or [N], as `hidden`), or a scalar. float32;
        float64 if hidden, teacher_hidden, weight or bias is. With `return_stats`, (loss, stats).

    All float dtypes may be mixed; the computation is in the dtype of the result, autocast or not.

    Raises:
        ValueError: a shape, dtype, device or value is not as above.

    Source: arXiv 2605.29089, eq. 6 and 7; the weight is its clipped advantage.
    """
    checks.check_dims(OP, "hidden", hidden, {2: "[N, D]", 3: "[S, N, D]"})
    *layers, tokens, width = hidden.shape
    shape = "[S, N, D]" if layers else "[N, D]"
    checks.check_tensor(OP, "hidden", hidden, shape, hidden.shape)
    device = hidden.device
    checks.check_tensor(
        OP, "teacher_hidden", teacher_hidden, "[N, D]", (tokens, width), device=device
    )
    checks.check_head(OP, hidden, weight, bias)
    if token_weight is not None:
        checks.check_dims(OP, "token_weight", token_weight, {1: "[N]", 2: "[S, N]"})
        per_layer = bool(layers) and token_weight.dim() == 2
        layout, sizes = ("[S, N]", (*layers, tokens)) if per_layer else ("[N]", (tokens,))
        checks.check_tensor(OP, "token_weight", token_weight, layout, sizes, device=device)
    checks.check_divergence(OP, divergence, beta)
    checks.check_positive(OP, "temperature", temperature)
    checks.check_positive(OP, "logit_softcap", logit_softcap, optional=True)
    checks.check_choice(OP, "reduction", reduction, checks.REDUCTIONS)
    checks.check_flag(OP, "grad_weight", grad_weight)
    checks.check_flag(OP, "return_stats", return_stats)
    checks.check_count(OP, "max_bytes", max_bytes)
    run = checks.choose(OP, impl, IMPLEMENTATIONS, NAMES)
    return run(
        hidden,
        teacher_hidden,
        weight,
        bias=bias,
        token_weight=token_weight,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        logit_softcap=logit_softcap,
        reduction=reduction,
        grad_weight=grad_weight,
        return_stats=return_stats,
        max_bytes=max_bytes,
    )
