"""The fused distillation losses of Liger Kernel and TRL under their own names and signatures.

    from oisd_kernels.drop_in import LigerFusedLinearJSD, liger_fused_linear_jsd    # Liger 0.8
    from oisd_kernels.drop_in import ChunkedDivergenceFunction, chunked_divergence_loss   # TRL 1.16

Both state the generalised JSD of arXiv 2306.13649 with P the teacher and Q the student,

    beta * KL(P || M) + (1 - beta) * KL(Q || M),    M = beta * P + (1 - beta) * Q

which here is `distillation_divergence`, and let beta = 0 stand for KL(P || Q), beta = 1 for
KL(Q || P). As there, autocast rounds hidden states and heads to its dtype, the loss is float32 (and
float64 where an input is), gradient goes to the student alone, and ignored rows give none. What
differs: ignored rows are left out before any matmul, logits and accumulated gradients are always
float32, and a bad argument raises ValueError. So does a head that is a DTensor, except in
`chunked_divergence_loss`, which gathers it as TRL's does. To keep a tensor-parallel pair of heads
in parts, call `distillation_divergence`.

Letters: N tokens, D width, E the teacher's width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from oisd_kernels import checks
from oisd_kernels.lens.distillation import check_two_heads, distillation_divergence


class LigerFusedLinearJSD(torch.nn.Module):
    """Liger Kernel's module of that name: the mean generalised JSD over the rows that count.

    Args:
        jsd_beta: the teacher's share of the mixture, in [0, 1]; 0 is KL(teacher||student), 1 is
            KL(student||teacher).
        ignore_index: rows with this label are left out.
        temperature: divides both models' logits, above 0.
        accum_dtype: ignored; gradients are always accumulated in float32.

    Raises:
        ValueError: a value is not as above.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _divergence("LigerFusedLinearJSD", "jsd_beta", jsd_beta)
        checks.check_positive("LigerFusedLinearJSD", "temperature", temperature)
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """As `liger_fused_linear_jsd`."""
        return liger_fused_linear_jsd(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            shift_labels,
            self.jsd_beta,
            self.ignore_index,
            self.temperature,
            self.accum_dtype,
        )


def liger_fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Liger Kernel's function of that name: a scalar, in nats a row.

    Args:
        student_input: [N, D]. Receives gradient.
        student_weight: [V, D]. Receives gradient where it requires it.
        teacher_input: [N, E]. Receives none.
        teacher_weight: [V, E]. Receives none, but where it is `student_weight`.
        shift_labels: [N], integers; all that matters is which are `ignore_index`. The mean is over
            the others, and 0 if there is none.
        jsd_beta, ignore_index, temperature, accum_dtype: as in `LigerFusedLinearJSD`.

    Raises:
        ValueError: a shape, dtype, device or value is not as above.
    """
    op = "liger_fused_linear_jsd"
    if accum_dtype is not None and not isinstance(accum_dtype, torch.dtype):
        raise checks.argument_error(op, "accum_dtype", "be a torch.dtype or None", accum_dtype)
    tensors = {
        "student_input": student_input,
        "student_weight": student_weight,
        "no bias": None,
        "teacher_input": teacher_input,
        "teacher_weight": teacher_weight,
        "no teacher bias": None,
    }
    check_two_heads(op, tensors, {"temperature": temperature}, {})
    tokens, device = len(student_input), student_input.device
    token_weight = None
    if shift_labels is not None:
        checks.check_tensor(
            op, "shift_labels", shift_labels, "[N]", (tokens,), device=device,
            dtypes=checks.OFFSET_DTYPES,
        )  # fmt: skip
        token_weight = (shift_labels != ignore_index).float()
    return distillation_divergence(
        *_autocast(device, student_input, student_weight, teacher_input, teacher_weight),
        token_weight=token_weight,
        temperature=temperature,
        reduction="mean",
        **_divergence(op, "jsd_beta", jsd_beta),
    )


class ChunkedDivergenceFunction:
    """Stands in for TRL's autograd function of that name, of which only `apply` is used.

    `trl.trainer.distillation_trainer.ChunkedDivergenceFunction = ChunkedDivergenceFunction`, before
    training, makes TRL's DistillationTrainer run on it.
    """

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Per-token divergence and student entropy, each [N], in nats; the entropy has no gradient.

        Args:
            student_hidden: [N, D]. Receives gradient.
            student_weight, student_bias: [V, D], [V]. Receive gradient where they require it.
            teacher_hidden, teacher_weight, teacher_bias: [N, E], [V, E], [V]. Receive none.
            beta: the teacher's share of the mixture, in [0, 1]; 0 is KL(teacher||student), 1 is
                KL(student||teacher).
            temperature: divides the logits, above 0, after scale and softcap.
            student_logit_scale, teacher_logit_scale: multiply the logits, above 0.
            student_final_logit_softcapping, teacher_final_logit_softcapping: c of
                c * tanh(logits / c), above 0.

        Raises:
            ValueError: a shape, dtype, device or value is not as above.
        """
        op = "ChunkedDivergenceFunction"
        tensors = {
            "student_hidden": student_hidden,
            "student_weight": student_weight,
            "student_bias": student_bias,
            "teacher_hidden": teacher_hidden,
            "teacher_weight": teacher_weight,
            "teacher_bias": teacher_bias,
        }
        positive = {
            "temperature": temperature,
            "student_logit_scale": student_logit_scale,
            "teacher_logit_scale": teacher_logit_scale,
        }
        softcaps = {
            "student_final_logit_softcapping": student_final_logit_softcapping,
            "teacher_final_logit_softcapping": teacher_final_logit_softcapping,
        }
        return _two_heads(op, tensors, positive, softcaps, beta)


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's `_chunked_divergence_loss`: the loss of its DistillationTrainer.

    Args:
        student_hidden_states: [..., D]. Receives gradient.
        teacher_hidden_states: [..., E]. Receives none.
        student_lm_head_weight, student_lm_head_bias: [V, D], [V]. Receive gradient where they
            require it. A DTensor is gathered, once, and its gradient is the mean over the ranks of
            its mesh, as FSDP2's is.
        teacher_lm_head_weight, teacher_lm_head_bias: [V, E], [V]. Receive none.
        completion_mask: [...], any dtype; positions of 0 are left out before any matmul.
        num_items_in_batch: what the sum is divided by; None for the number of positions that
            count, at least 1.
        The others: as in `ChunkedDivergenceFunction.apply`.

    Returns:
        (loss, sum of the student's entropies in nats, number of positions that count), scalars.

    Raises:
        ValueError: a shape, dtype, device or value is not as above.
    """
    op = "chunked_divergence_loss"
    names = ("student_hidden_states", "teacher_hidden_states", "completion_mask")
    given = (student_hidden_states, teacher_hidden_states, completion_mask)
    for name, x in zip(names, given, strict=True):
        if not isinstance(x, Tensor):
            raise checks.argument_error(op, name, "be a torch.Tensor", type(x).__name__)
        if checks.is_dtensor(x):
            got, remedy = f"a {type(x).__name__}", checks.how_to_gather(name, x)
            raise checks.argument_error(op, name, "be a plain tensor", got, remedy)
    for name, x in zip(names[:2], given, strict=False):
        if x.dim() == 0:
            raise checks.argument_error(op, name, "have at least one dimension", list(x.shape))
    leading = student_hidden_states.shape[:-1]
    theirs = teacher_hidden_states.shape[:-1], completion_mask.shape
    for name, shape in zip(names[1:], theirs, strict=True):
        if shape != leading:
            wanted = f"have leading shape {list(leading)}, as student_hidden_states"
            raise checks.argument_error(op, name, wanted, list(shape))
    student = student_hidden_states.reshape(-1, student_hidden_states.shape[-1])
    teacher = teacher_hidden_states.reshape(-1, teacher_hidden_states.shape[-1])
    weight, bias = _gathered(student_lm_head_weight, student_lm_head_bias, student.dtype)
    teacher_weight, teacher_bias = _gathered(
        teacher_lm_head_weight, teacher_lm_head_bias, teacher.dtype
    )
    if teacher_lm_head_weight is student_lm_head_weight:
        teacher_weight = weight
    tensors = {
        "student_hidden_states": student,
        "student_lm_head_weight": weight,
        "student_lm_head_bias": bias,
        "teacher_hidden_states": teacher,
        "teacher_lm_head_weight": teacher_weight,
        "teacher_lm_head_bias": teacher_bias,
    }
    positive = {
        "temperature": temperature,
        "student_logit_scale": student_logit_scale,
        "teacher_logit_scale": teacher_logit_scale,
    }
    softcaps = {
        "student_final_logit_softcapping": student_final_logit_softcapping,
        "teacher_final_logit_softcapping": teacher_final_logit_softcapping,
    }
    valid = completion_mask.flatten() != 0
    loss, entropy = _two_heads(
        op, tensors, positive, softcaps, beta, token_weight=valid.float(), reduction="sum"
    )
    count = valid.sum()
    if num_items_in_batch is None:
        loss = loss / count.clamp_min(1)
    else:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        loss = loss / num_items_in_batch
    return loss, entropy.sum(), count


def _two_heads(
    op: str,
    tensors: dict[str, Any],
    positive: dict[str, Any],
    softcaps: dict[str, Any],
    beta: Any,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`distillation_divergence` with the entropy, of arguments under the names of `op`.

    `tensors` as in `check_two_heads`; `positive` the temperature and both logit scales.
    """
    check_two_heads(op, tensors, positive, softcaps)
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = tensors.values()
    temperature, logit_scale, teacher_logit_scale = positive.values()
    logit_softcap, teacher_logit_softcap = softcaps.values()
    return distillation_divergence(
        *_autocast(hidden.device, hidden, weight, teacher_hidden, teacher_weight),
        bias=bias,
        teacher_bias=teacher_bias,
        temperature=temperature,
        logit_scale=logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        logit_softcap=logit_softcap,
        teacher_logit_softcap=teacher_logit_softcap,
        return_entropy=True,
        **_divergence(op, "beta", beta),
        **options,
    )


def _divergence(op: str, argument: str, beta: Any) -> dict[str, Any]:
    """Their beta, in [0, 1], in our terms."""
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta <= 1:
        raise checks.argument_error(op, argument, "lie in [0, 1]", repr(beta))
    if beta in (0, 1):
        return {"divergence": "reverse_kl" if beta else "forward_kl"}
    return {"divergence": "jsd", "beta": beta}


def _autocast(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Rounded to autocast's dtype where it is on; one tensor given twice stays one."""
    if not torch.is_autocast_enabled(device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device.type)
    rounded = {id(x): x if x.dtype == torch.float64 else x.to(dtype) for x in tensors}
    return [rounded[id(x)] for x in tensors]


def _gathered(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """A head that FSDP2 has sharded, whole and in the hidden states' dtype; others as they are.

    Each rank's gradient to it is of its own tokens; FSDP2 means those of its parameters over the
    ranks, which `full_tensor` does not do unless it is told. Of tensor-parallel ranks, whose tokens
    are the same, it is the mean as well.
    """
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor, Partial

        if isinstance(weight, DTensor):
            mean = [Partial("avg")] * weight.device_mesh.ndim
            weight = weight.full_tensor(grad_placements=mean).to(dtype)
            if isinstance(bias, DTensor):
                bias = bias.full_tensor(grad_placements=mean)
    return weight, bias
