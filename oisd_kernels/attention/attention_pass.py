"""The attention divergence as one custom op over packed tensors, with its gradient.

The forward finds both logsumexps where they are not given, then the divergence and each row's
statistic; the backward is one more pass over the scores. Nothing between them grows with the square
of a length. The teacher's scores of a block serve all S student layers.

Letters: S student layers, N tokens, H query heads, J key heads, K head dimension, M sampled keys.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oisd_kernels.attention.checks import functions
from oisd_kernels.attention.sampled_torch import (
    SampledTeacher,
    sampled_backward,
    sampled_divergence,
)
from oisd_kernels.attention.spec import Alignment, Geometry, Teacher
from oisd_kernels.checks import compute_dtype


class AttentionPass(NamedTuple):
    """Outputs of the op; all but the first carry no gradient, and are empty where not needed."""

    loss: Tensor  # [S, N]: weight * divergence; rows of weight 0 hold 0
    lse: Tensor  # [S, H, N]
    lse_teacher: Tensor  # [H, N]
    statistic: Tensor  # [S, H, N]


class _Call(NamedTuple):
    """The arguments of `attention_pass`."""

    q: Tensor
    k: Tensor
    q_teacher: Tensor
    k_teacher: Tensor
    weight: Tensor | None
    cu_seqlens: Tensor
    key_index: Tensor | None
    lse: Tensor | None
    lse_teacher: Tensor | None
    length: int | None
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    scale_teacher: float
    divergence: str
    beta: float
    impl: str

    def geometry(self) -> Geometry:
        sequences = self.cu_seqlens.numel() - 1
        return Geometry(
            self.cu_seqlens, sequences, self.length, self.causal, self.window, self.softcap
        )

    def sampled_teacher(self) -> SampledTeacher:
        return SampledTeacher(self.q_teacher, self.k_teacher, self.scale_teacher)


_TENSORS = _Call._fields.index("length")


@torch.library.custom_op("oisd_kernels::attention_pass", mutates_args=())
def attention_pass(
    q: Tensor,  # [S, N, H, K]
    k: Tensor,  # [S, N, J, K]
    q_teacher: Tensor,  # [N, H, Kt]
    k_teacher: Tensor,  # [N, Jt, Kt]
    weight: Tensor | None,  # [S, N]; None for ones
    cu_seqlens: Tensor,  # [B + 1] int32
    key_index: Tensor | None,  # [N, M]
    lse: Tensor | None,  # [S, H, N]
    lse_teacher: Tensor | None,  # [H, N]
    length: int | None,  # of the longest sequence, where the host knows it
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    scale_teacher: float,
    divergence: str,
    beta: float,
    impl: str,  # "torch" or "triton"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _Call(
        q, k, q_teacher, k_teacher, weight, cu_seqlens, key_index, lse, lse_teacher, length, causal,
        window, softcap, scale, scale_teacher, divergence, beta, impl,
    )  # fmt: skip
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        keep = None if weight is None else (weight != 0).any(0)
        out = _allocate(call)
        if key_index is not None:
            return _sampled(call, out, key_index, keep)
        run, geometry = functions(impl), call.geometry()
        # The torch functions compute the rows that count; the kernels skip tiles without one.
        some = {"keep": keep} if impl == "torch" else {}
        if lse is None:
            layers = zip(q.unbind(0), k.unbind(0), strict=True)
            found = [run.logsumexp(*one, geometry, scale, **some) for one in layers]
            out = out._replace(lse=torch.stack(found))
        if lse_teacher is None:
            found = run.logsumexp(q_teacher, k_teacher, geometry, scale_teacher, **some)
            out = out._replace(lse_teacher=found)
        teacher = Teacher(
            q_teacher, k_teacher, out.lse_teacher if lse_teacher is None else lse_teacher,
            scale_teacher,
        )  # fmt: skip
        value, statistic = run.statistics(
            q, k, out.lse if lse is None else lse, scale, teacher, keep, divergence, beta, geometry
        )  # fmt: skip
        if divergence != "forward_kl":
            out = out._replace(statistic=statistic)
        return out._replace(loss=_weighted(weight, value))


def _sampled(
    call: _Call, out: AttentionPass, key_index: Tensor, keep: Tensor | None
) -> AttentionPass:
    q, k, geometry = call.q, call.k, call.geometry()
    settings = key_index, keep, call.divergence, call.beta, geometry
    if call.impl == "torch":
        layers = q.unbind(0), k.unbind(0)
        value = sampled_divergence(*layers, call.scale, call.sampled_teacher(), *settings)
        return out._replace(loss=_weighted(call.weight, value))
    found = _sampled_kernels().statistics(q, k, call.scale, call.sampled_teacher(), *settings)
    statistic = out.statistic if call.divergence == "forward_kl" else found.statistic
    value = _weighted(call.weight, found.value)
    return AttentionPass(value, found.lse, found.lse_teacher, statistic)


def _sampled_kernels() -> ModuleType:
    from oisd_kernels.attention import sampled_triton  # triton may be missing on CPU-only machines

    return sampled_triton


@attention_pass.register_fake
def _(
    q, k, q_teacher, k_teacher, weight, cu_seqlens, key_index, lse, lse_teacher, length, causal,
    window, softcap, scale, scale_teacher, divergence, beta, impl,
):  # fmt: skip
    return _allocate(
        _Call(
            q, k, q_teacher, k_teacher, weight, cu_seqlens, key_index, lse, lse_teacher, length,
            causal, window, softcap, scale, scale_teacher, divergence, beta, impl,
        )
    )  # fmt: skip


def _allocate(call: _Call) -> AttentionPass:
    layers, tokens, heads, _ = call.q.shape
    compute = compute_dtype(call.q, call.k, call.q_teacher, call.k_teacher)

    def zeros(*shape: int, wanted: bool = True) -> Tensor:
        return call.q.new_zeros(shape if wanted else [0] * len(shape), dtype=compute)

    # Over sampled keys the torch functions keep nothing.
    full = call.key_index is None or call.impl != "torch"
    return AttentionPass(
        zeros(layers, tokens),
        zeros(layers, heads, tokens, wanted=full and call.lse is None),
        zeros(heads, tokens, wanted=full and call.lse_teacher is None),
        zeros(layers, heads, tokens, wanted=full and call.divergence != "forward_kl"),
    )


def _weighted(weight: Tensor | None, value: Tensor) -> Tensor:
    # 0 * NaN is NaN: a row that one layer keeps may be dropped by another.
    return value if weight is None else torch.where(weight == 0, 0, weight.to(value.dtype) * value)


@torch.library.custom_op("oisd_kernels::attention_pass_backward", mutates_args=())
def attention_pass_backward(
    upstream: Tensor,  # [S, N]
    statistic: Tensor,  # [S, H, N]
    q: Tensor,
    k: Tensor,
    q_teacher: Tensor,
    k_teacher: Tensor,
    weight: Tensor | None,
    cu_seqlens: Tensor,
    key_index: Tensor | None,
    lse: Tensor | None,
    lse_teacher: Tensor | None,
    length: int | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    scale_teacher: float,
    divergence: str,
    beta: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    call = _Call(
        q, k, q_teacher, k_teacher, weight, cu_seqlens, key_index, lse, lse_teacher, length, causal,
        window, softcap, scale, scale_teacher, divergence, beta, impl,
    )  # fmt: skip
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        row_weight = _weighted(weight, upstream) / q.shape[2]
        found = [_layer_gradient(call, layer, row_weight, statistic) for layer in range(len(q))]
        return torch.stack([dq for dq, _ in found]), torch.stack([dk for _, dk in found])


@attention_pass_backward.register_fake
def _(upstream, statistic, q, k, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _layer_gradient(
    call: _Call, layer: int, row_weight: Tensor, statistic: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, geometry = call.q[layer], call.k[layer], call.geometry()
    if call.key_index is not None and call.impl == "torch":
        return sampled_backward(
            q, k, call.scale, call.sampled_teacher(), call.key_index, row_weight[layer],
            call.divergence, call.beta, geometry,
        )  # fmt: skip
    assert call.lse is not None and call.lse_teacher is not None
    teacher = Teacher(call.q_teacher, call.k_teacher, call.lse_teacher, call.scale_teacher)
    one = statistic if call.divergence == "forward_kl" else statistic[layer]
    alignment = Alignment(teacher, row_weight[layer], one, call.divergence, call.beta)
    if call.key_index is not None:
        return _sampled_kernels().backward(
            q, k, call.scale, call.lse[layer], alignment, call.key_index, geometry
        )
    run = functions(call.impl)
    dq, dk, _ = run.backward(q, k, geometry, call.scale, call.lse[layer], alignment=alignment)
    return dq, dk


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, out = _Call(*inputs), AttentionPass(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*out[1:])
    call = call._replace(
        lse=out.lse if call.lse is None else call.lse,
        lse_teacher=out.lse_teacher if call.lse_teacher is None else call.lse_teacher,
    )
    ctx.save_for_backward(out.statistic, *call[:_TENSORS])
    ctx.options = call[_TENSORS:]


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    nothing = [None] * (len(_Call._fields) - 2)
    if upstream is None:
        return None, None, *nothing
    statistic, *tensors = ctx.saved_tensors
    dq, dk = attention_pass_backward(upstream, statistic, *tensors, *ctx.options)
    wanted = ctx.needs_input_grad
    return dq if wanted[0] else None, dk if wanted[1] else None, *nothing


def refuse_double_backward() -> None:
    """Raises in a backward that is itself recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "oisd_kernels: the gradient of a fused attention op cannot itself be differentiated "
            '(create_graph=True); use impl="reference"'
        )


attention_pass.register_autograd(_backward, setup_context=_setup_context)
