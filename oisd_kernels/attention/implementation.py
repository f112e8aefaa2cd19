"""The choice of an implementation, and the operations that each of them has.

"torch" runs on any device, "triton" on a GPU or in its interpreter, "cuda" has the kernels of csrc/
for a part. A module is imported when it is first used: Triton may be missing on CPU-only machines.

Letters: S student layers, N tokens, H query heads, J key heads, K head dimension, M sampled keys.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from oisd_kernels import checks
from oisd_kernels.attention import sampled_torch, torch_impl
from oisd_kernels.attention import sink as sinks
from oisd_kernels.attention.spec import (
    Alignment,
    Geometry,
    Layer,
    Plain,
    SampledStatistics,
)

IMPLEMENTATIONS = ("torch", "triton", "cuda", "reference")


def choose(
    op: str, impl: object, layers: Sequence[Tensor], softcap: float | None, sampled: bool = False
) -> str:
    """ "reference", "torch", "triton" or "cuda", for the queries of one layer or of two.

    "auto" is "triton" on a GPU where there is a tile for the head dimension and the dtype, and
    "torch" elsewhere. Raises ValueError where the choice cannot run; what
    "cuda" cannot do beyond that, `cuda_impl.check_supported` says when it is launched.
    """
    q = layers[0]
    if impl == "auto":
        impl = "torch"
        if q.is_cuda and _width(layers) <= _widest(layers, softcap):
            impl = "triton"
    if impl not in IMPLEMENTATIONS:
        here = ", ".join(f'"{name}"' for name in ("auto", *IMPLEMENTATIONS))
        raise checks.argument_error(op, "impl", f"be one of {here}", repr(impl))
    if sampled and impl == "cuda":
        remedy = 'use impl="auto", "triton" or "torch"'
        raise checks.argument_error(op, "impl", "be another beside key_index", repr(impl), remedy)
    if impl == "cuda" and not q.is_cuda:
        remedy = 'use impl="auto" or "torch"'
        raise checks.argument_error(
            op, "q", 'be on a CUDA device with impl="cuda"', q.device, remedy
        )
    if impl in ("triton", "cuda"):
        _check_triton(op, layers, softcap)
    return str(impl)


def _width(layers: Sequence[Tensor]) -> int:
    return max(q.shape[-1] for q in layers)


def _widest(layers: Sequence[Tensor], softcap: float | None) -> int:
    """The largest head dimension that Triton's kernels have a tile for; 0 without Triton."""
    try:
        from oisd_kernels.attention import triton_impl
    except ImportError:
        return 0
    dtype = reduce(torch.promote_types, (q.dtype for q in layers))
    return triton_impl.widest(layers[0], dtype, softcap)


def _check_triton(op: str, layers: Sequence[Tensor], softcap: float | None) -> None:
    q = layers[0]
    try:
        from oisd_kernels.attention import triton_impl
    except ImportError as error:
        wanted = "be one of those that can run here"
        remedy = f'{error}; install triton, or use impl="torch"'
        raise checks.argument_error(op, "impl", wanted, "'triton'", remedy) from error
    width, widest = _width(layers), _widest(layers, softcap)
    if width > widest:
        wanted = f'have a head dimension K of at most {widest} with impl="triton" here'
        got = f"K = {width} of {q.dtype}"
        raise checks.argument_error(op, "q", wanted, got, 'use impl="torch"')
    if not q.is_cuda and not torch.compiler.is_compiling():
        kernel = triton_impl.attention_forward_kernel
        if type(kernel).__name__ != "InterpretedFunction":
            remedy = "set TRITON_INTERPRET=1 before Triton is imported to try it on a CPU"
            raise checks.argument_error(op, "q", 'be on a GPU with impl="triton"', q.device, remedy)


def forward(
    impl: str,
    q: Tensor,  # [N, H, K]
    k: Tensor,  # [N, J, K]
    v: Tensor,  # [N, J, K]
    geometry: Geometry,
    scale: float,
    sink: Tensor | None = None,  # [H]
) -> tuple[Tensor, Tensor]:
    """out [N, H, K] in q's dtype and lse [H, N] of the keys; a row without keys has 0 and -inf."""
    if impl == "torch":
        return torch_impl.forward(q, k, v, geometry, scale, sink)
    if impl == "cuda":
        from oisd_kernels.attention import cuda_impl

        return cuda_impl.forward(q, k, v, geometry, scale, sink)
    from oisd_kernels.attention import triton_impl

    return triton_impl.forward(q, k, v, geometry, scale, sink)


def logsumexp(
    impl: str, q: Tensor, k: Tensor, geometry: Geometry, scale: float, keep: Tensor | None
) -> Tensor:
    """lse [H, N] of the scaled and capped scores of the visible keys.

    keep: [N] bool, the rows that are wanted. "torch" leaves out the others, which hold -inf; the
    kernels find all.
    """
    if impl == "torch":
        return torch_impl.logsumexp(q, k, geometry, scale, keep)
    if impl == "cuda":
        from oisd_kernels.attention import cuda_impl

        return cuda_impl.logsumexp(q, k, geometry, scale)
    from oisd_kernels.attention import triton_impl

    return triton_impl.logsumexp(q, k, geometry, scale)


def statistics(
    impl: str,
    student: Layer,  # of S layers, in front
    teacher: Layer,
    keep: Tensor | None,  # [N] bool
    divergence: str,
    beta: float,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Mean over heads of the divergence [S, N] (0 where not kept), and the statistic [S, H, N].

    The statistic is the `Alignment`'s; the forward KL's is empty.
    """
    arguments = sinks.whole(student), sinks.whole(teacher), keep, divergence, beta, geometry
    if impl == "torch":
        value, statistic = torch_impl.statistics(*arguments)
    elif impl == "cuda":
        from oisd_kernels.attention import cuda_impl

        value, statistic = cuda_impl.statistics(*arguments)
    else:
        from oisd_kernels.attention import triton_impl

        value, statistic = triton_impl.statistics(*arguments)
    return sinks.add_terms(value, student, teacher, keep, divergence, beta), statistic


def backward(
    impl: str,
    student: Layer,
    geometry: Geometry,
    plain: Plain | None,
    alignment: Alignment | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, dsink of attention (plain), of its divergence (alignment), or of both.

    P is computed once for both. dv is None without `plain`, dsink without a sink.
    """
    pull = None if alignment is None else sinks.whole_alignment(student, alignment)
    if plain is not None and student.sink is not None:
        plain = plain._replace(delta=_delta(impl, plain, student.lse.dtype))
    arguments = sinks.whole(student), geometry, plain, pull
    if impl == "torch":
        dq, dk, dv = torch_impl.backward(*arguments)
    elif impl == "cuda":
        from oisd_kernels.attention import cuda_impl

        dq, dk, dv = cuda_impl.backward(*arguments)
    else:
        from oisd_kernels.attention import triton_impl

        dq, dk, dv = triton_impl.backward(*arguments)
    if student.sink is None:
        return dq, dk, dv, None
    return dq, dk, dv, sinks.gradient(student, plain and plain.delta, alignment)


def _delta(impl: str, plain: Plain, dtype: torch.dtype) -> Tensor:
    """rowsum(dO * O) - dLse [H, N]."""
    if impl != "triton":  # csrc/ computes it on the way, and does not return it
        return torch_impl.delta(plain, dtype)
    from oisd_kernels.attention import triton_impl

    return triton_impl.delta(plain, dtype)


def sampled_statistics(
    impl: str,
    student: Layer,  # of S layers, in front; no lse is read
    teacher: Layer,
    key_index: Tensor,  # [N, M]
    keep: Tensor | None,  # [N] bool
    divergence: str,
    beta: float,
    geometry: Geometry,
) -> SampledStatistics:
    arguments = key_index, keep, divergence, beta, geometry
    if impl == "torch":
        return sampled_torch.statistics(student, teacher, *arguments)
    from oisd_kernels.attention import sampled_triton

    found = sampled_triton.statistics(student, teacher, *arguments)
    if student.sink is None and teacher.sink is None:
        return found
    seeing = found.lse_teacher[0] > -math.inf
    student, teacher = student._replace(lse=found.lse), teacher._replace(lse=found.lse_teacher)
    keep = seeing if keep is None else keep & seeing
    value = sinks.add_terms(found.value, student, teacher, keep, divergence, beta)
    return found._replace(value=value)


def sampled_backward(
    impl: str, student: Layer, alignment: Alignment, key_index: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dq, dk, dsink; both layers with what `sampled_statistics` found of them."""
    if impl == "torch":
        return sampled_torch.backward(student, alignment, key_index, geometry)
    from oisd_kernels.attention import sampled_triton

    if student.sink is None and alignment.teacher.sink is None:
        return *sampled_triton.backward(student, alignment, key_index, geometry), None
    # A row without a key has no gradient, not even to a sink that only one layer has.
    seeing = alignment.teacher.lse[0] > -math.inf
    alignment = alignment._replace(row_weight=torch.where(seeing, alignment.row_weight, 0))
    pull = sinks.whole_alignment(student, alignment)
    dq, dk = sampled_triton.backward(sinks.whole(student), pull, key_index, geometry)
    dsink = None if student.sink is None else sinks.gradient(student, None, alignment)
    return dq, dk, dsink
