"""One forward of four tokens, watched: what the layers, the modules after them and the head did.

It changes neither results nor the random state. Modes are restored, autocast caches nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oisd.models.head import HeadForm, gain_of, ramp
from oisd.models.tail import Call, call_of


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Eval mode, in which a probe changes neither results nor the random state: `in_mode`."""
    return in_mode(model, training=False)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or eval mode for every module, and afterwards its own again.

    Autocast must not cache the weights that a probe casts: they have no graph, and the caller's own
    forward would use them.

    bitsandbytes' layers stay in training mode (they have no dropout): on some CPUs they rearrange
    their codes in the first forward in eval mode, and pass on no gradient from then on.
    """
    before = {module: module.training for module in model.modules()}
    cached = torch.is_autocast_cache_enabled()
    model.train(training)
    for module in before:
        if type(module).__module__.startswith("bitsandbytes."):
            module.training = True
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for module, mode in before.items():
            module.training = mode


def probe_ids(model: Any) -> Tensor:
    return torch.arange(1, 5, device=model.get_input_embeddings().weight.device)[None]


class Probe(NamedTuple):
    """What one forward of four tokens showed."""

    model: Any
    layers: dict[nn.Module, list[Any]]  # what each layer returned, each time
    calls: list[Call]  # of modules after the last layer
    given: Tensor  # the head's input
    head: HeadForm | None
    ramp: Tensor  # put in place of the head's output
    logits: Tensor  # the model's answer
    decoded: Tensor | None  # what the decoder returned


@torch.no_grad()
def run_probe(
    model: Any, decoder: nn.Module, lists: list[nn.ModuleList], numbers: list[float]
) -> Probe | None:
    """None if the forward calls no layer or no head."""
    head = model.get_output_embeddings()
    layers = {layer: [] for each in lists for layer in each}
    inside = {m for layer in (*layers, head) for m in layer.modules()}
    seen: dict[str, Any] = {}
    calls: list[Call] = []
    given: dict[nn.Module, list[Any]] = {}  # before hooks of others change it

    def keep_layer(layer: nn.Module, _: Any, out: Any) -> None:
        layers[layer].append(out)
        calls.clear()
        seen.clear()

    def keep_given(module: nn.Module, args: Any, kwargs: Any) -> None:
        given[module] = [x for x in [*args, *kwargs.values()] if x is not None]

    def keep_call(module: nn.Module, _: Any, out: Any) -> None:
        found = given.pop(module, None)
        if any(layers.values()) and found and (call := call_of(module, found, out)):
            calls.append(call)

    def keep_decoded(_: nn.Module, __: Any, out: Any) -> None:
        seen["decoded"] = first_tensor(out)

    def keep_head(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        read = next((x for x in [*args, *kwargs.values()] if isinstance(x, Tensor)), None)
        if not any(layers.values()) or read is None or not isinstance(out, Tensor):
            return None
        # Not later: under FSDP2 the weight is whole only while its module runs.
        seen["given"], seen["head"] = read, gain_of(head, read, out, numbers)
        seen["ramp"] = ramp(out)
        return seen["ramp"]

    ids = probe_ids(model)
    with eval_mode(model), ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep_layer).remove)
        for module in model.modules():
            if module not in inside and module is not model:
                before = module.register_forward_pre_hook(
                    keep_given, with_kwargs=True, prepend=True
                )
                stack.callback(before.remove)
                # Before FSDP2's own hook, which releases the weights.
                stack.callback(module.register_forward_hook(keep_call, prepend=True).remove)
        hook = head.register_forward_hook(keep_head, with_kwargs=True, prepend=True)
        stack.callback(hook.remove)
        stack.callback(decoder.register_forward_hook(keep_decoded).remove)
        logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
    if "given" not in seen:
        return None
    found = seen["given"], seen["head"], seen["ramp"], logits, seen.get("decoded")
    return Probe(model, {layer: out for layer, out in layers.items() if out}, calls, *found)


def lists_of(model: nn.Module, depth: int | None) -> list[nn.ModuleList]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    inner = {m for each in lists for layer in each for m in layer.modules()}
    return [each for each in lists if each not in inner]


def decoder_of(model: Any, layers: nn.ModuleList) -> nn.Module | None:
    """The decoder that the model names, if it has the layers, or else the module that has them."""
    named = model.get_decoder()
    if named is not model and isinstance(named, nn.Module) and layers in set(named.modules()):
        return named
    holders = (m for m in model.modules() if any(child is layers for child in m.children()))
    return next((m for m in holders if m is not model), None)


def depth_of(model: Any) -> int | None:
    decoder = model.get_decoder()
    for config in (getattr(decoder, "config", None), model.config):
        find = getattr(config, "get_text_config", None)
        if find is not None:
            depth = getattr(find(), "num_hidden_layers", None)
            if isinstance(depth, int):
                return depth
    return None


def lists_that_run(model: Any, depth: int | None) -> tuple[list[nn.ModuleList], str]:
    """Where no list has as many modules as the config has layers: the last list that a text runs.

    Each of its modules must run once, and `depth` be a multiple of their number (a module may count
    as two layers). Empty with the reason, in words, if there is none.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    inner = {m for each in lists for layer in each for m in layer.modules()}
    lists = [each for each in lists if each not in inner]
    order: list[nn.Module] = []
    with torch.no_grad(), eval_mode(model), ExitStack() as stack:
        for layer in {layer for each in lists for layer in each}:
            stack.callback(layer.register_forward_hook(lambda m, *_: order.append(m)).remove)
        model(input_ids=probe_ids(model), use_cache=False)
    runs = Counter(order)
    last = [each for each in lists if order and order[-1] in set(each)]
    once = [each for each in last if all(runs[layer] == 1 for layer in each)]
    if depth is None or (once and depth % len(once[0]) == 0):
        return once, ""
    several = sum(count > 1 for count in runs.values())
    if several and len(order) >= depth:
        return [], (
            f"; it runs {several} modules several times each, so that the number of a layer would "
            f"mean one of {depth} passes"
        )
    return [], ""
