"""Divergence between a student's and a teacher's next-token distributions, each with its own head.

    q = softmax(cap(logit_scale * (hidden @ weight.T + bias)) / temperature)            student
    p = softmax(cap'(teacher_logit_scale * (teacher_hidden @ teacher_weight.T
                                            + teacher_bias)) / temperature)   teacher, detached
    loss = token_weight * divergence(p, q)

cap(z) = c * tanh(z / c) where logit_softcap = c is given, else z; cap' with teacher_logit_softcap.
The divergences are those of `oisd_kernels.reference`. A head that student and teacher share is
projected through once, as in `logit_lens_divergence`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from oisd_kernels import checks, reference
from oisd_kernels.lens import vocab_parallel
from oisd_kernels.lens.chunked.head_pass import head_pass
from oisd_kernels.lens.chunked.record import HeadCall, HeadResult
from oisd_kernels.lens.token_weight import row_count, row_weight
from oisd_kernels.op import untransformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "distillation_divergence"
IMPLEMENTATIONS = ("auto", "chunked", "reference")


@overload
def distillation_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    return_entropy: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def distillation_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    return_entropy: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...


def distillation_divergence(  # pyright: ignore[reportInconsistentOverload]  # shorter
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    reduction: str = "none",
    return_entropy: bool = False,
    impl: str = "auto",
    max_bytes: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Signed, weighted divergence of a student from a teacher with another head, per token.

    Args:
        hidden: [N, D], the student's last hidden states. Receives gradient.
        weight: [V, D], the student's unembedding. Receives gradient where it requires it.
        teacher_hidden: [N, E], the teacher's last hidden states. Receives none.
        teacher_weight: [V, E], the teacher's unembedding. Receives none, but where it is `weight`.
        bias: [V], the student's; receives gradient as `weight` does.
        teacher_bias: [V].
        token_weight: [N], signed, any float dtype; receives no gradient. Rows of weight 0 are
            dropped before any matmul.
        divergence: "jsd", "forward_kl" = KL(teacher||student), "reverse_kl" = KL(student||teacher).
            A KL that is infinite, as where a bias of -inf masks what the other one can give, is a
            number as large as floats go; the gradient of the forward one is q - p there too.
        beta: the teacher's share of the mixture of "jsd", in (0, 1).
        temperature: divides both models' logits, above 0.
        logit_scale, teacher_logit_scale: multiply the logits first, above 0.
        logit_softcap, teacher_logit_softcap: c of c * tanh(logits / c), after the scale; at
            least 0.01, and 0.01 of the temperature.
        reduction: "none"; "sum"; "mean", which divides by the number of rows of weight other than 0
            (the result is 0 if there is none).
        return_entropy: also return the student's entropy.
        impl: "chunked", which "auto" takes: a chunk of tokens at a time; 4 matmuls with both
            gradients, 3 without that to `weight`, 6 with it for reduction="none", whose backward
            runs again. Its gradient cannot be differentiated. Waits once for the device where there
            is a `token_weight`. "reference": all logits in memory, plain autograd.
        max_bytes: workspace budget of "chunked" in bytes, beside inputs, outputs and their
            gradients; default 1.25 GiB on CUDA, 96 MiB on a CPU, or one token where that is more.
        tp_group: the process group that has both vocabularies in the same parts; the heads and
            their biases are then this rank's rows of each, see `logit_lens_divergence`, of which
            the rest holds here too. DTensors with Shard(0) over a mesh dimension named "tp" need no
            `tp_group`; the meshes of student and teacher may be two, of the same ranks. One head in
            parts beside a whole one, or in other parts, is an error.

    Returns:
        token_weight * divergence in nats, [N], or a scalar. float32; float64 if an input is. With
        `return_entropy`, (loss, entropy): the entropy [N] of q in nats, without gradient, 0 for a
        dropped row.

    All float dtypes may be mixed; the computation is in the dtype of the result, autocast or not.

    Raises:
        ValueError: a shape, dtype, device or value is not as above.

    Source: generalised JSD, arXiv 2306.13649, section 3; with one head, the logit lens.
    """
    positive = {
        "temperature": temperature,
        "logit_scale": logit_scale,
        "teacher_logit_scale": teacher_logit_scale,
    }
    softcaps = {"logit_softcap": logit_softcap, "teacher_logit_softcap": teacher_logit_softcap}
    _check_rows(OP, {"hidden": hidden, "teacher_hidden": teacher_hidden})
    _check_options(OP, positive, softcaps)
    if token_weight is not None:
        sizes = (len(hidden),)
        checks.check_tensor(OP, "token_weight", token_weight, "[N]", sizes, device=hidden.device)
    checks.check_divergence(OP, divergence, beta)
    checks.check_choice(OP, "reduction", reduction, checks.REDUCTIONS)
    checks.check_flag(OP, "return_entropy", return_entropy)
    checks.check_count(OP, "max_bytes", max_bytes)
    checks.check_choice(OP, "impl", impl, IMPLEMENTATIONS)
    part, teacher = vocab_parallel.two_parts(
        OP, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, tp_group
    )
    part.check_impl(OP, impl)
    if impl == "reference":
        return reference.distillation_divergence(
            hidden, part.weight, teacher_hidden, teacher.weight, bias=part.bias,
            teacher_bias=teacher.bias, token_weight=token_weight, divergence=divergence, beta=beta,
            temperature=temperature, logit_scale=logit_scale,
            teacher_logit_scale=teacher_logit_scale, logit_softcap=logit_softcap,
            teacher_logit_softcap=teacher_logit_softcap, reduction=reduction,
            return_entropy=return_entropy,
        )  # fmt: skip
    # cap_c(s z) / tau = cap_(c/s)(z) / (tau/s)
    taus = temperature / logit_scale, temperature / teacher_logit_scale
    softcap = None if logit_softcap is None else logit_softcap / logit_scale
    teacher_softcap = teacher_logit_softcap
    if teacher_softcap is not None:
        teacher_softcap = teacher_softcap / teacher_logit_scale
    shared = part.weight is teacher.weight and part.bias is teacher.bias
    shared = shared and softcap == teacher_softcap and taus[0] == taus[1]
    teacher = teacher.detach()
    heads = part.weight, part.bias, teacher.weight, teacher.bias
    compute = checks.compute_dtype(hidden, teacher_hidden, *heads)
    factor = row_weight(token_weight, hidden[None], compute)
    call = HeadCall(
        hidden[None], teacher_hidden.detach(), part.weight, part.bias,
        teacher_weight=None if shared else teacher.weight,
        teacher_bias=None if shared else teacher.bias, teacher_temperature=taus[1],
        teacher_softcap=teacher_softcap, factor=factor, divergence=divergence, beta=beta,
        temperature=taus[0], softcap=softcap, reduce=reduction != "none", stats=return_entropy,
    ).complete(OP, part, max_bytes, True)  # fmt: skip
    out = HeadResult(*head_pass(*untransformed(call)))
    loss = out.loss if call.reduce else out.loss[0]
    if reduction == "mean":
        loss = loss / row_count(factor, hidden)
    return (loss, out.student_entropy[0]) if return_entropy else loss


def check_two_heads(
    op: str,
    tensors: Mapping[str, Any],
    positive: Mapping[str, Any],
    softcaps: Mapping[str, Any],
) -> None:
    """The arguments of two heads under the names of `op`.

    `tensors` in the order hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, of
    `positive` the temperature first.
    """
    (hidden, rows), (head, weight), (bias, b), *teacher = tensors.items()
    (teacher_hidden, teacher_rows), (teacher_head, teacher_weight), (teacher_bias, c) = teacher
    _check_rows(op, {hidden: rows, teacher_hidden: teacher_rows})
    device, width = rows.device, rows.shape[1]
    checks.check_tensor(op, head, weight, "[V, D]", (None, width), device=device)
    if len(weight) == 0:
        raise checks.argument_error(op, head, "have at least one row", list(weight.shape))
    sizes = len(weight), teacher_rows.shape[1]
    remedy = "student and teacher must share the vocabulary"
    checks.check_tensor(
        op, teacher_head, teacher_weight, "[V, E]", sizes, device=device, remedy=remedy
    )
    for name, x in ((bias, b), (teacher_bias, c)):
        if x is not None:
            checks.check_tensor(op, name, x, "[V]", sizes[:1], device=device)
    _check_options(op, positive, softcaps)


def _check_rows(op: str, tensors: Mapping[str, Any]) -> None:
    """Hidden states of the student and of the teacher."""
    (name, rows), (teacher_name, teacher_rows) = tensors.items()
    checks.check_tensor(op, name, rows, "[N, D]", (None, None))
    sizes = len(rows), None
    checks.check_tensor(op, teacher_name, teacher_rows, "[N, E]", sizes, device=rows.device)


def _check_options(op: str, positive: Mapping[str, Any], softcaps: Mapping[str, Any]) -> None:
    """Of `positive` the temperature comes first."""
    for name, value in positive.items():
        checks.check_positive(op, name, value)
    temperature = next(iter(positive.values()))
    for name, value in softcaps.items():
        checks.check_softcap(op, name, value, temperature)
