"""A custom op whose arguments are the fields of one record.

The record is a NamedTuple: its fields, in order, are the op's arguments, their annotations and
defaults its schema. So an argument list stands once, in the record, and travels as one value from
the public function through the op and its autograd to the launch.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

DOUBLE_BACKWARD = (
    "oisd_kernels: the gradient of a fused op cannot itself be differentiated "
    '(create_graph=True); use impl="reference"'
)


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
) -> Any:
    """The op "oisd_kernels::name", called as `op(*record)`.

    run: computes the results of a record, without recording and outside autocast.
    allocate: tensors of the results' shapes and dtypes, for `torch.compile`.
    """

    def kernel(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        record = call(*arguments)
        device = next(x.device.type for x in record if isinstance(x, Tensor))
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return _returned(run(record))

    def fake(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        return _returned(allocate(call(*arguments)))

    kernel.__signature__ = _signature(call, result)
    op = torch.library.custom_op(f"oisd_kernels::{name}", kernel, mutates_args=())
    op.register_fake(fake)
    return op


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
