"""A model's parameters split over the processes of a run, by FSDP2.

Every process has one n-th of each parameter, of its gradient and of AdamW's state, in float32. A
layer is gathered in the dtype of the forward when it runs, forward and backward, and dropped after
it. Its gradient is summed over the processes in float32, and each keeps its part. Embedding, final
norm and head, and whatever else is in no layer, are gathered together from the forward to the end
of the backward: the losses read the head where it is.

Gathering needs all processes. So each has to run as many forwards and backwards as the others:
`rounds` says how many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import layer_norm


def shard(model: Any, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Split a model over all processes, in place; every process holds the same whole one.

    model: a transformers model or PEFT's wrapper, the one that forwards call.
    layers: of its decoder. One whose parameters another module has too is not split by itself.
    dtype: of the forward; parameters keep theirs.
    Raises ValueError for quantised weights.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f'"fsdp2" wants parameters that are floating-point numbers, got {name} of '
                f'{parameter.dtype}; use "none" with quantised weights'
            )
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    half = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    alone = [layer for layer in dict.fromkeys(layers) if not _shares(layer, model)]
    for module in [*alone, model]:
        sharded: FSDPModule = fully_shard(module, mesh=mesh, mp_policy=policy)
        # Losses are divided by what all processes have: gradients are sums, not means.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    if half is not None:
        # The residual stream is float32, as under autocast without shards.
        model.get_input_embeddings().register_forward_hook(_in_float32)
    if half is not None and device == "cpu":
        for norm in model.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.forward = partial(_layer_norm, norm)


def _shares(layer: nn.Module, model: nn.Module) -> bool:
    """Whether a parameter of the layer is in the model outside it as well."""

    def uses(module: nn.Module) -> Counter[int]:
        named = module.named_parameters(remove_duplicate=False)
        return Counter(id(parameter) for _, parameter in named)

    everywhere = uses(model)
    return any(everywhere[parameter] > count for parameter, count in uses(layer).items())


def _in_float32(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()


def _layer_norm(norm: nn.LayerNorm, input: Tensor) -> Tensor:
    """In float32, as CUDA's autocast does; that of a CPU leaves weights that are gathered in half
    precision as they are."""
    weight, bias = (None if x is None else x.float() for x in (norm.weight, norm.bias))
    return layer_norm(input.float(), norm.normalized_shape, weight, bias, norm.eps)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has split this model."""
    return isinstance(model, FSDPModule)


def release(model: nn.Module) -> None:
    """Drop what a forward without a backward has left gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def rounds(model: nn.Module, own: int) -> int:
    """How many forwards this process has to run, if it has `own` micro-batches: the most of all."""
    if not is_sharded(model):
        return own
    most = torch.tensor(own, device=next(model.parameters()).device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be in shards; all processes ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be in shards: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_part(part: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of something of a parameter's shape, as the parameter is split."""
    if not isinstance(parameter, DTensor):
        return part
    return _part(part, parameter, parameter.device_mesh)


def on_host(value: Tensor, parameter: Tensor) -> Tensor:
    """Something of a parameter's shape in the host's memory, as the parameter is split."""
    local = own_part(value).to("cpu")
    if not isinstance(parameter, DTensor) or local.dim() == 0:
        return local
    return _part(local, parameter, _host_mesh(dist.get_world_size()))


def blank_part(parameter: Tensor) -> Tensor:
    """Zeros of a parameter's shape in the host's memory, as the parameter is split."""
    return on_host(torch.zeros_like(own_part(parameter), device="cpu"), parameter)


def in_shards(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole value, or one as `blank_part` splits it, where and as the parameter is."""
    if isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        return as_part(own_part(value).to(parameter.device), parameter)
    value = value.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def backward_alone(model: nn.Module, loss: Tensor, among: Tensor) -> None:
    """The backward of one of several losses, whose graph is kept for another one.

    among: a loss of the same forward that every layer matters to.
    """
    if not isinstance(model, FSDPModule):
        loss.backward(retain_graph=True)
        return
    # What the forward gathered is read in the next backward too.
    model.set_reshard_after_backward(False, recurse=False)
    # A layer is gathered when its output gets a gradient, even one of 0.
    (loss + 0 * among).backward(retain_graph=True)
    model.set_reshard_after_backward(True, recurse=False)


@contextmanager
def same_batch(model: nn.Module) -> Iterator[None]:
    """Context for backwards in which all processes have the same loss: it counts once."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_gradient_divide_factor(float(dist.get_world_size()))
    yield
    for module in modules:
        module.set_gradient_divide_factor(1.0)


@cache
def _host_mesh(processes: int) -> DeviceMesh:
    return init_device_mesh("cpu", (processes,))


def _part(local: Tensor, parameter: DTensor, mesh: DeviceMesh) -> DTensor:
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(local, mesh, parameter.placements, shape=shape, stride=stride)
