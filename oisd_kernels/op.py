"""A custom op whose arguments are the fields of one record.

The record is a NamedTuple: its fields, in order, are the op's arguments, their annotations and
defaults its schema. So an argument list stands once, in the record, and travels as one value from
the public function through the op and its autograd to the launch.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

_Record = TypeVar("_Record", bound=tuple)

DOUBLE_BACKWARD = (
    "oisd_kernels: the gradient of a fused op cannot itself be differentiated "
    '(create_graph=True); use impl="reference"'
)

TRANSFORMS = (
    "oisd_kernels: a fused op has a backward alone: no transform of torch.func (grad, jvp, vmap) "
    'passes through it, and no forward-mode derivative; use impl="reference"'
)


def untransformed(record: _Record) -> _Record:
    """The record; RuntimeError for a tensor of a torch.func transform, or one with a tangent.

    Left to torch, they end in an error about autograd.Function, or in a derivative of 0.
    """
    if not torch.compiler.is_compiling():  # a trace has no such tensors
        for x in record:
            if isinstance(x, Tensor) and (
                is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None
            ):
                raise RuntimeError(TRANSFORMS)
    return record


def refuse_double_backward() -> None:
    """Raises RuntimeError in a backward that is itself recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(DOUBLE_BACKWARD)


def custom_op(
    name: str,
    call: type,  # NamedTuple of Tensor | None, float, int, bool, str and lists of them
    result: type,  # NamedTuple of Tensor
    run: Callable[[Any], tuple[Tensor, ...]],
    allocate: Callable[[Any], tuple[Tensor, ...]],
    save: Callable[[Any, Any, Any], None] | None = None,
    backward: Callable[[Any, Any], Mapping[str, Tensor | None]] | None = None,
) -> Any:
    """The op "oisd_kernels::name", called as `op(*untransformed(record))`.

    run: computes the results of a record, without recording and outside autocast.
    allocate: tensors of the results' shapes and dtypes, for `torch.compile`.
    save: `save(ctx, record, results)`, says which results have no gradient and calls `keep`.
    backward: `backward(ctx, upstream)` returns gradients by field. `upstream` is a `result` that
        holds None where nothing flows, `ctx.wanted` a `call` of booleans. Gradients are cast to
        their input's dtype; those that nobody wants are dropped. It cannot be differentiated.
    """

    def kernel(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        record = call(*arguments)
        device = next(x.device.type for x in record if isinstance(x, Tensor))
        if not torch.amp.is_autocast_available(device):
            device = "cpu"  # "meta", on which allocations are counted, has no autocast
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return _returned(run(record))

    def fake(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        if forward_ad._current_level >= 0:  # a compiled `jvp`, whose tangents do not show here
            raise RuntimeError(TRANSFORMS)
        return _returned(allocate(call(*arguments)))

    kernel.__signature__ = _signature(call, result)
    op = torch.library.custom_op(f"oisd_kernels::{name}", kernel, mutates_args=())
    op.register_fake(fake)
    if save is not None and backward is not None:
        _register_autograd(op, call, result, save, backward)
    return op


def keep(ctx: Any, *records: Any) -> None:
    """Keeps records, or tuples, for the backward, where `kept(ctx)` returns them."""
    fields = [x for record in records for x in record]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in fields))
    ctx.records = [without_tensors(record) for record in records]


def kept(ctx: Any) -> list[Any]:
    saved = iter(ctx.saved_tensors)
    records = []
    for record in ctx.records:
        tensors = [next(saved) for _ in record]
        fields = (x if y is None else y for x, y in zip(record, tensors, strict=True))
        records.append(_like(record, fields))
    return records


def without_tensors(record: Any) -> Any:
    return _like(record, (None if isinstance(x, Tensor) else x for x in record))


def _like(record: Any, fields: Iterable[Any]) -> Any:
    return record._make(fields) if hasattr(record, "_make") else tuple(fields)


def _register_autograd(
    op: Any,
    call: Any,
    result: Any,
    save: Callable[[Any, Any, Any], None],
    backward: Callable[[Any, Any], Mapping[str, Tensor | None]],
) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # zeros may be as large as the unembedding
        ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in inputs]
        save(ctx, call(*inputs), result(*((output,) if isinstance(output, Tensor) else output)))

    def gradients(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if all(g is None for g in upstream):
            return (None,) * len(call._fields)
        # The dispatcher drops trailing arguments that have their default.
        wanted = (*ctx.needs_input_grad, *[False] * len(call._fields))
        ctx.wanted = call(*wanted[: len(call._fields)])
        got = backward(ctx, result(*upstream))
        return tuple(
            x.to(dtype) if wanted and (x := got.get(name)) is not None else None
            for name, wanted, dtype in zip(call._fields, ctx.wanted, ctx.dtypes, strict=True)
        )

    op.register_autograd(gradients, setup_context=setup_context)


def _returned(results: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """As an op returns them: one alone is no tuple."""
    return results[0] if len(results) == 1 else tuple(results)


def _signature(call: Any, result: Any) -> inspect.Signature:
    hints = get_type_hints(call)
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=call._field_defaults.get(name, inspect.Parameter.empty),
            annotation=hints[name],
        )
        for name in call._fields
    ]
    tensors = len(result._fields)
    returned = Tensor if tensors == 1 else tuple[(Tensor,) * tensors]
    return inspect.Signature(parameters, return_annotation=returned)
