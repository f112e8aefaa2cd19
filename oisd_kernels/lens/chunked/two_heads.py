"""One chunked pass over two unembeddings: the divergence of a student from a teacher of its own.

`head_pass` for the case that the teacher's logits come through another weight, of another width.
With G = one 2*N*D*V matmul of the student's, T = one of the teacher's, the cost is

    G + T       values
    + G         gradient to `hidden`
    + G         gradient to `weight`

The gradient is computed in the forward but where `later` is set, which a loss per token needs for
the gradient to `weight`: the upstream gradient must be folded into the factors, so the backward
runs the pass again.

A logit scale s needs no arithmetic of its own: cap_c(s z) / tau = cap_(c/s)(z) / (tau/s). Where the
two heads then still differ in bias, softcap or temperature, their scores are made before the row
functions see them, in the memory of the logits, and the softcap's slope is kept beside.

With both heads in the same parts on the ranks of a group, V is this rank's share of the vocabulary;
the rows go through `rows_parallel`, and the gradient to `hidden` is the sum over the ranks.

Letters: N tokens, D width, E the teacher's width, V vocabulary, C tokens of a chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from oisd_kernels.checks import compute_dtype
from oisd_kernels.lens.chunked import chunks
from oisd_kernels.lens.chunked.head_loop import parallel_rows, row_functions
from oisd_kernels.lens.chunked.projection import Projection
from oisd_kernels.lens.chunked.rows_torch import RowMath


class TwoHeads(NamedTuple):
    """Outputs of the op. Dropped rows hold 0; gradients that were not asked for are empty."""

    loss: Tensor  # factor * divergence: [N], or its sum
    entropy: Tensor  # [N], of the student
    d_hidden: Tensor  # [N, D], the gradient of sum(loss); in the compute dtype for float16
    d_weight: Tensor  # [V, D], in the compute dtype
    d_bias: Tensor  # [V], in the compute dtype


@torch.library.custom_op("oisd_kernels::two_heads", mutates_args=())
def two_heads(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    teacher_hidden: Tensor,  # [N, E]
    teacher_weight: Tensor,  # [V, E]
    teacher_bias: Tensor | None,  # [V]
    factor: Tensor | None,  # [N]; None for ones
    divergence: str,
    beta: float,
    temperature: float,
    softcap: float | None,
    teacher_temperature: float,
    teacher_softcap: float | None,
    capacity: int,  # rows of logits in memory
    drop: bool,  # leave out rows whose factor is 0
    reduce: bool,  # loss is a sum
    hidden_grad: bool,
    weight_grad: bool,
    later: bool,  # the backward runs the pass again
    stats: bool,  # the entropy
    group: str = "",  # name of the process group that has the vocabulary in parts; "" for none
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _Call(
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, factor, divergence,
        beta, temperature, softcap, teacher_temperature, teacher_softcap, capacity, drop, reduce,
        hidden_grad, weight_grad, later, stats, group,
    )  # fmt: skip
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return _Run(call).result()


@two_heads.register_fake
def _(*call: Any) -> TwoHeads:
    return _allocate(_Call(*call))


def rows_of_a_token(softcap: float | None) -> int:
    """Rows of logits' size that a token needs: teacher, student, the slope of a softcap."""
    return 2 if softcap is None else 3


class _Call(NamedTuple):
    """The arguments of `two_heads`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    factor: Tensor | None
    divergence: str
    beta: float
    temperature: float
    softcap: float | None
    teacher_temperature: float
    teacher_softcap: float | None
    capacity: int
    drop: bool
    reduce: bool
    hidden_grad: bool
    weight_grad: bool
    later: bool
    stats: bool
    group: str = ""


_TENSORS = _Call._fields.index("factor") + 1


class _Run:
    """The state of one pass: what the rows go through, the outputs, the buffer of logits."""

    def __init__(self, call: _Call):
        self.call = call
        self.out = _allocate(call)
        self.compute = self.out.entropy.dtype
        # Where a part starts matters to labels and likeliest tokens, which nobody asks for here.
        self.parallel = parallel_rows(call.group, 0) if call.group else None
        self.functions: Any = self.parallel or row_functions(call.weight.device)
        self.project = Projection(call.weight, {call.hidden.dtype}, self.compute)
        self.teacher = Projection(call.teacher_weight, {call.teacher_hidden.dtype}, self.compute)
        self.bias, self.teacher_bias = (
            None if x is None else x.to(self.compute) for x in (call.bias, call.teacher_bias)
        )
        self.alike = (
            call.bias is None
            and call.teacher_bias is None
            and call.softcap == call.teacher_softcap
            and call.temperature == call.teacher_temperature
        )
        self.row_math = RowMath(call.divergence, call.beta, call.temperature, call.softcap)
        if not self.alike:  # the rows are scores when the row functions get them
            self.row_math = self.row_math._replace(temperature=1.0, softcap=None)

    def result(self) -> TwoHeads:
        call, out = self.call, self.out
        dropping = call.factor[None] if call.drop and call.factor is not None else None
        vocabulary, rows = len(call.weight), rows_of_a_token(call.softcap)
        # The plan counts two rows a token.
        plan = chunks.plan(1, len(call.hidden), dropping, False, 2 * (call.capacity // rows))
        most = max((c.tokens.stop - c.tokens.start for c in plan.chunks), default=0)
        shape = rows * most, chunks.padded(vocabulary)
        buffer = call.weight.new_empty(shape, dtype=self.compute)[:, :vocabulary]
        loss = out.entropy.new_zeros(len(call.hidden))
        for chunk in plan.chunks:
            where = plan.token_of_row[chunk.rows] if plan.token_index is not None else chunk.tokens
            count = chunk.tokens.stop - chunk.tokens.start
            self.chunk(where, buffer[: rows * count].split(count), loss)
        return out._replace(loss=loss.sum() if call.reduce else loss)

    def chunk(self, where: Any, buffers: tuple[Tensor, ...], loss: Tensor) -> None:
        call, out = self.call, self.out
        z_teacher, z, *slope = buffers
        self.teacher.logits(call.teacher_hidden[where].to(self.teacher.operand), z_teacher)
        states = call.hidden[where].to(self.project.operand)  # [C, D]
        self.project.logits(states, z)
        factor = z.new_ones(len(z)) if call.factor is None else call.factor[where]
        row_factor = factor
        if not self.alike:
            _scores(z_teacher, self.teacher_bias, call.teacher_temperature, call.teacher_softcap)
            _scores(z, self.bias, call.temperature, call.softcap, *slope)
            row_factor = factor / call.temperature
        final = self.functions.final_rows(z_teacher, None, None, self.row_math, False, False)
        got = self.functions.student_rows(
            z,
            z_teacher,
            final,
            None,
            torch.arange(len(z), device=z.device),
            row_factor,
            self.row_math,
            call.hidden_grad or call.weight_grad,
            call.stats,
            self.project.operand,
        )
        loss[where] = factor * got.divergence
        if call.stats:
            out.entropy[where] = got.entropy
        if got.d_logits is None:
            return
        if not self.alike and slope:
            got.d_logits.mul_(slope[0])
        if call.weight_grad:
            self.project.add_to_weight(out.d_weight, got.d_logits, got.scale, states)
            if self.bias is not None:
                self.project.add_to_bias(out.d_bias, got.d_logits, got.scale)
        if call.hidden_grad:
            gradient = self.project.to_hidden(got.d_logits)
            gradient = gradient if got.scale.numel() == 0 else gradient * got.scale[:, None]
            if self.parallel is not None:
                self.parallel.sum(gradient)
            out.d_hidden[where] = gradient.to(out.d_hidden.dtype)


def _scores(
    z: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    slope: Tensor | None = None,
) -> None:
    """Logits to scores, in place; `slope` receives the derivative of the softcap."""
    if bias is not None:
        z.add_(bias)
    if softcap is not None:
        z.div_(softcap).tanh_()
        if slope is not None:
            torch.mul(z, z, out=slope).neg_().add_(1)
        z.mul_(softcap)
    if temperature != 1.0:
        z.div_(temperature)


def _allocate(call: _Call) -> TwoHeads:
    hidden, weight = call.hidden, call.weight
    compute = compute_dtype(*call[:6])
    tokens, width = hidden.shape

    def zeros(*shape: int, wanted: bool = True, dtype: torch.dtype = compute) -> Tensor:
        return hidden.new_zeros(shape if wanted else (0,), dtype=dtype)

    # Minute gradients would vanish in float16 before the upstream gradient lifts them.
    rows = compute if hidden.dtype == torch.float16 else hidden.dtype
    return TwoHeads(
        loss=zeros() if call.reduce else zeros(tokens),
        entropy=zeros(tokens),
        d_hidden=zeros(tokens, width, wanted=call.hidden_grad, dtype=rows),
        d_weight=zeros(*weight.shape, wanted=call.weight_grad),
        d_bias=zeros(len(weight), wanted=call.weight_grad and call.bias is not None),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, out = _Call(*inputs), TwoHeads(*output)
    ctx.set_materialize_grads(False)  # zeros for d_weight would be as large as it
    ctx.mark_non_differentiable(*out[1:])
    tensors = call[:_TENSORS] if call.later else (None,) * _TENSORS
    ctx.save_for_backward(*tensors, out.d_hidden, out.d_weight, out.d_bias)
    ctx.options = call[_TENSORS:]
    ctx.dtypes = tuple(None if x is None else x.dtype for x in call[:3])


def _backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "oisd_kernels: the gradient of a fused loss cannot itself be differentiated "
            '(create_graph=True); use impl="reference"'
        )
    saved = ctx.saved_tensors
    call = _Call(*saved[:_TENSORS], *ctx.options)
    nothing = [None] * (len(_Call._fields) - 3)
    wanted = ctx.needs_input_grad[:3]
    if g is None:
        return None, None, None, *nothing
    grads = saved[_TENSORS:]
    if call.later:
        factor = g if call.factor is None else g * call.factor
        again = call._replace(
            factor=factor, reduce=False, hidden_grad=wanted[0], later=False, stats=False,
            weight_grad=wanted[1] or wanted[2],
        )  # fmt: skip
        grads = two_heads(*again)[2:]
    else:
        rows = g if g.dim() == 0 else g[:, None]
        grads = (grads[0] * rows, *(x * g if x.numel() else x for x in grads[1:]))
    cast = (
        x.to(dtype) if want else None
        for x, dtype, want in zip(grads, ctx.dtypes, wanted, strict=True)
    )
    return *cast, *nothing


two_heads.register_autograd(_backward, setup_context=_setup_context)
