"""Where a causal language model keeps what Taps needs: found by a probe, not by its name.

* A forward of four tokens finds the layout. The final norm is the child of the decoder that turns
  the last layer's output into `last_hidden_state`; the head's output must be
  `last_hidden_state @ weight.T + bias`; what the model does to logits afterwards (scale, softcap)
  is read from its answer to a known ramp put in place of the head's output. A model that does
  anything else is refused.
* `oisd.models.attention` takes the queries and keys.

B batch, T positions, D width, V vocabulary, H query heads, J key heads, K head dimension.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from oisd.models.attention import PLAN, AttentionCall, FusedPlan, UnsupportedModelError, tapped

# Where configs keep the factor of the logits; the probe tells whether it multiplies or divides.
_SCALE_NAMES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
_SOFTCAP_NAMES = ("final_logit_softcapping", "logits_soft_cap")
_POSITIONS = re.compile("wpe|embed_positions|positions_embed|position_embeddings?|pos_emb.*")


class Layout(NamedTuple):
    """The parts of a model from its layers to its logits, and what it does to the logits."""

    model: Any
    decoder: Any
    layers: nn.ModuleList
    norm: nn.Module
    scale: float
    softcap: float | None


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside the wrappers of PEFT, DDP and torch.compile."""
    while not isinstance(model, PreTrainedModel):
        adapters = getattr(model, "peft_config", {})
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
            raise UnsupportedModelError("Taps: prompt learning prepends positions; use LoRA")
        if hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # pyright: ignore
        else:
            inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise UnsupportedModelError(
                f"Taps: model must be a transformers PreTrainedModel or a wrapper of one, "
                f"got {type(model).__name__}"
            )
        model = inner
    return model


def learned_positions(model: Any) -> int | None:
    """The longest text that the model has positions for; None where they are computed.

    Positions are an embedding or a table of their own, or (MPT) fixed in the config.
    """
    limits = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name.rsplit(".", 1)[-1]):
            # The first rows may belong to padding.
            padding = -1 if module.padding_idx is None else module.padding_idx
            limits.append(module.num_embeddings - getattr(module, "offset", padding + 1))
    for name, table in model.named_buffers():
        if name.rsplit(".", 1)[-1] in ("embed_positions", "pos_encoding"):
            limits.append(table.shape[0])
    if model.config.model_type == "mpt":
        limits.append(model.config.max_seq_len)
    return min(limits, default=None)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has partitioned the parameter, so that it is whole only in its module."""
    return hasattr(parameter, "ds_id")


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Context in which the module and its children run without their hooks."""
    names = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    kept = [(m, name, getattr(m, name)) for m in module.modules() for name in names]
    try:
        for inner, name, hooks in kept:
            setattr(inner, name, type(hooks)())
        yield
    finally:
        for inner, name, hooks in kept:
            setattr(inner, name, hooks)


def _is_packed(weight: Tensor) -> bool:
    """Whether the entries are codes: bitsandbytes may store 4-bit ones in a float dtype."""
    coded = getattr(weight, "quant_state", None) is not None
    return coded or weight.dim() != 2 or not weight.is_floating_point()


def head_parameters(model: Any) -> tuple[Tensor, Tensor | None]:
    """The head's weight [V, D] and bias.

    Raises UnsupportedModelError for an adapter, which `weight` leaves out, and a quantised weight.
    """
    head = model.get_output_embeddings()
    # PEFT's modules_to_save trains a copy of the whole head; `weight` is then the active copy's.
    whole = getattr(head, "modules_to_save", None)
    plain = list(whole.values()) if isinstance(whole, nn.ModuleDict) else [head]
    weight = getattr(head, "weight", None)
    if any(True for module in plain for _ in module.children()) or not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"Taps: the output embeddings must be one linear layer without adapters, got "
            f"{type(head).__name__}; leave the head out of the adapter's target modules, or list "
            f"it in modules_to_save"
        )
    if not is_partitioned(weight) and _is_packed(weight):
        raise UnsupportedModelError(
            f"Taps: the output embeddings must not be quantised, got {type(head).__name__} with a "
            f"weight of {weight.dtype} {[*weight.shape]}; leave them out (llm_int8_skip_modules of "
            f"bitsandbytes)"
        )
    return weight, getattr(head, "bias", None)


def _softcap(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _close(x: Tensor, ref: Tensor, slack: float = 0) -> bool:
    """Equal to a few roundings of the coarser dtype, at the scale of the largest element."""
    bound = 16 * max(torch.finfo(x.dtype).eps, torch.finfo(ref.dtype).eps) + slack
    x, ref = x.float(), ref.to(x.device).float()
    return x.shape == ref.shape and bool((x - ref).abs().max() <= bound * ref.abs().max())


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _ramp(like: Tensor) -> Tensor:
    return torch.linspace(-64, 64, like.shape[-1]).to(like).expand_as(like)


class _Seen(NamedTuple):
    input: Tensor
    output: Tensor


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode without side effects: a probe must change neither results nor the random state.

    Autocast must not cache the weights that a probe casts: they have no graph, and the caller's own
    forward would use them.

    bitsandbytes' layers stay in training mode (they have no dropout): on some CPUs they rearrange
    their codes in the first forward in eval mode, and pass on no gradient from then on.
    """
    training = {module: module.training for module in model.modules()}
    cached = torch.is_autocast_cache_enabled()
    model.eval()
    for module in training:
        if type(module).__module__.startswith("bitsandbytes."):
            module.training = True
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for module, mode in training.items():
            module.training = mode


def _probe_ids(model: Any) -> Tensor:
    return torch.arange(1, 5, device=model.get_input_embeddings().weight.device)[None]


@torch.no_grad()
def _probe(model: Any) -> dict[nn.Module, _Seen]:
    """What each watched module took and returned in one forward of four tokens.

    Watched are the decoder, its children, its layers and the head. The head's `input` is what its
    output should be; the model's own `output` is its logits for a ramp in place of the head's.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    seen: dict[nn.Module, _Seen] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        out, given = first_tensor(out), next(iter([*args, *kwargs.values()]), None)
        if module is not head:
            seen[module] = _Seen(given if isinstance(given, Tensor) else torch.empty(0), out)
        elif decoder in seen:
            # Not later: under FSDP2 the weight is whole only while its module runs.
            weight, bias = head_parameters(model)
            final = seen[decoder].output.to(weight.dtype)
            seen[head] = _Seen(F.linear(final, weight, bias), out)
            return _ramp(out)

    ids = _probe_ids(model)
    layers = [m for child in decoder.children() if isinstance(child, nn.ModuleList) for m in child]
    with _eval_mode(model), ExitStack() as stack:
        for module in {decoder, *decoder.children(), *layers, head}:
            # Before FSDP2's own hook, which releases the weights of a head that it wraps.
            hook = module.register_forward_hook(watch, with_kwargs=True, prepend=module is head)
            stack.callback(hook.remove)
        seen[model] = _Seen(ids, model(input_ids=ids, use_cache=False, return_dict=True).logits)
    return seen


def find_layout(model: Any) -> Layout:
    """The parts of `model` between its last layer and its logits, each verified by the probe."""

    def refuse(what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"Taps: {type(model).__name__} is not understood: {what}")

    decoder, head = model.get_decoder(), model.get_output_embeddings()
    config = getattr(decoder, "config", None)  # some have a linear layer of this name
    whole = config is not None and isinstance(head, nn.Module)
    if model.config.is_encoder_decoder or decoder is model or not whole:
        raise refuse("it must have a decoder (get_decoder) and a head (get_output_embeddings)")
    head_parameters(model)
    depth = decoder.config.get_text_config().num_hidden_layers
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise refuse(f"the decoder must have one ModuleList of {depth} layers, got {len(lists)}")

    seen = _probe(model)
    if head not in seen or lists[0][-1] not in seen:
        raise refuse("its forward does not call its decoder, last layer and output embeddings")
    last, final = seen[lists[0][-1]].output, seen[decoder].output
    called = [child for child in decoder.children() if child in seen]
    norms = [child for child in called if torch.equal(seen[child].input, last)]
    norms = [child for child in norms if torch.equal(seen[child].output, final)]
    if len(norms) != 1:
        raise refuse(
            f"one child of the decoder must be the final norm, which turns the last layer's output "
            f"into last_hidden_state; found {len(norms)}"
        )
    if not _close(seen[head].output, seen[head].input):
        raise refuse("the head's output is not last_hidden_state @ weight.T + bias")

    logits, ramp = seen[model].output, _ramp(seen[head].output).float()
    if logits.shape != ramp.shape:
        raise refuse(f"the logits have shape {[*logits.shape]}, the head's output {[*ramp.shape]}")
    config = model.config.get_text_config()
    named = [getattr(config, name, None) for name in _SCALE_NAMES]
    scales = [float(value) for value in named if isinstance(value, (int, float)) and value]
    scales += [1.0, *(1 / value for value in scales)]
    caps = [*(getattr(config, name, None) or None for name in _SOFTCAP_NAMES), None]
    scale, cap = min(
        itertools.product(scales, caps),
        key=lambda c: float((_softcap(c[0] * ramp, c[1]) - logits).abs().max()),
    )
    if not _close(logits, _softcap(scale * ramp, cap)):
        raise refuse(
            f"it turns the head's output {ramp[0, 0, -1]:.4g} into the logit "
            f"{logits[0, 0, -1]:.4g}, which no scale or softcap of its config explains"
        )
    return Layout(model, decoder, lists[0], norms[0], scale, cap)


def refuse_variants(layer: int, call: AttentionCall) -> None:
    """Raises UnsupportedModelError unless the call is a softmax over keys and one sink a head."""
    heads = call.q.shape[1]
    if call.sink is not None and call.sink.shape != (heads,):
        raise UnsupportedModelError(
            f"Taps: layer {layer}'s attention sink must be one number a head, [{heads}], got "
            f"{[*call.sink.shape]}; use attention=False"
        )
    ignored = ""
    if call.softcap is not None:
        ignored = f"the softcap {call.softcap} of layer {layer}'s attention scores"
    elif call.sink is not None:
        ignored = f"the learned sink of layer {layer}'s attention"
    if ignored and "sdpa" in call.implementation:
        raise UnsupportedModelError(
            f'Taps: SDPA ignores {ignored}; call model.set_attn_implementation("eager"), or use '
            f"attention=False"
        )


def _is_causal_softmax(call: AttentionCall) -> bool:
    """Whether `out` is causal softmax attention by the call's own q, k, v and arguments."""
    group = call.q.shape[1] // call.k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (call.k, call.v))
    scores = _softcap(call.scale * call.q.float() @ k.mT, call.softcap)
    largest = float(scores.abs().max())
    distance = torch.arange(scores.shape[-1], device=k.device)
    distance = distance[:, None] - distance
    keep = (distance >= 0) & (distance < (call.window or len(distance)))
    scores = scores.masked_fill(~keep, -torch.inf)
    if call.sink is None:
        weights = scores.softmax(-1)
    else:
        own = call.sink.float()[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, own], -1).softmax(-1)[..., :-1]
    out = (weights @ v).transpose(1, 2)
    # Eager attention rounds its scores, at least to TF32, which shifts them by up to eps * |score|.
    eps = max(torch.finfo(call.out.dtype).eps, 2**-11)
    return _close(call.out, out, slack=min(2 * eps * largest, 8.0))


def check_attention(layout: Layout, layers: Sequence[int]) -> dict[int, AttentionCall]:
    """A call of each of these layers, the teacher first.

    Raises UnsupportedModelError unless each layer's attention is one causal softmax.
    """
    model = layout.model
    calls: dict[int, list[AttentionCall]] = {layer: [] for layer in layers}
    with torch.no_grad(), _eval_mode(model), ExitStack() as stack:
        for layer in layers:
            stack.enter_context(tapped(layout.layers[layer - 1], calls[layer].append))
        model(input_ids=_probe_ids(model), use_cache=False)

    kinds = getattr(layout.decoder.config.get_text_config(), "layer_types", None)
    for layer in layers:
        kind = kinds[layer - 1] if kinds else "full_attention"
        if len(calls[layer]) != 1 or kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"Taps: layer {layer} must attend once through transformers' AttentionInterface "
                f"over all or a window of keys, got {len(calls[layer])} calls, {kind}"
            )
        call, teacher = calls[layer][0], calls[layers[0]][0]
        refuse_variants(layer, call)
        if kind == "sliding_attention" and call.window is None:
            raise UnsupportedModelError(f"Taps: layer {layer} does not say how wide its window is")
        if not _is_causal_softmax(call):
            raise UnsupportedModelError(
                f"Taps: layer {layer}'s attention ({call.implementation}) is not the causal "
                f"softmax of its queries and keys; use attention=False"
            )
        if call.q.shape[1] != teacher.q.shape[1] or call.softcap != teacher.softcap:
            raise UnsupportedModelError(
                f"Taps: layer {layer} must have the last layer's number of heads and softcap, "
                f"got {call.q.shape[1]}, {call.softcap} and {teacher.q.shape[1]}, {teacher.softcap}"
            )
    return {layer: calls[layer][0] for layer in layers}


@contextmanager
def planned(layout: Layout, make: Callable[[Mapping[str, Any]], FusedPlan]) -> Iterator[None]:
    """Context in which each forward of the decoder passes on a plan, made from its arguments."""
    signature = inspect.signature(layout.decoder.forward)

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
        return args, {**kwargs, PLAN: make(arguments)}

    hook = layout.decoder.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def takes_plans(layout: Layout, layers: Sequence[int]) -> bool:
    """Whether an extra argument of the decoder reaches these layers' attention."""
    calls: list[AttentionCall] = []
    with torch.no_grad(), _eval_mode(layout.model), ExitStack() as stack:
        for layer in layers:
            stack.enter_context(tapped(layout.layers[layer - 1], calls.append))
        stack.enter_context(planned(layout, lambda _: FusedPlan("auto", {}, {})))
        try:
            layout.model(input_ids=_probe_ids(layout.model), use_cache=False)
        except TypeError:  # the decoder does not accept the argument
            return False
    return all(call.planned for call in calls)
