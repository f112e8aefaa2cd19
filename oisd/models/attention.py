"""Where attention modules pass their queries and keys to transformers, and what happens there.

A tapped module sees its config through a proxy whose attention implementation is "oisd". That
function passes the call on to the implementation that the config itself names, or computes it with
`flash_attention` where the forward's `FusedPlan` says so, and records it. The config itself does
not change: masks are built as usual, other layers and models that share the config are unaffected,
and any implementation works, even FlashAttention's, which looks up its name in the config.

`attn_implementation="oisd"` for a whole model is `flash_attention` in every layer. Its mask
function turns padding and packed sequences into offsets, so that neither needs a mask; what offsets
cannot express (a cache, the user's own mask) goes to SDPA, or to eager attention if the scores have
a softcap or a sink.

The plan is an argument of the decoder's forward, so that layers which checkpointing runs again get
the plan of their own forward.

B batch, T positions, H query heads, J key heads, K head dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from oisd_kernels import AttentionAlignment, flash_attention
from oisd_kernels.attention.implementation import choose

IMPLEMENTATION = "oisd"
PLAN = "oisd_plan"  # the argument's name


class UnsupportedModelError(ValueError):
    """A model that Taps does not understand; the message says what was missing or different."""


class AttentionCall(NamedTuple):
    """What one attention module passed to the attention interface, and what it got back."""

    implementation: str
    q: Tensor  # [B, H, T, K]
    k: Tensor  # [B, J, T, K]
    v: Any  # [B, J, T, K], for the probe alone
    out: Any  # [B, T, H, K], for the probe alone
    scale: float
    softcap: float | None
    window: int | None
    sink: Tensor | None  # [H], with graph: the score of one more key, whose value is 0
    planned: bool  # whether the plan arrived
    lse: Tensor | None = None  # [H, B*T], where `flash_attention` computed it


class FusedPlan:
    """Which layers of one forward run `flash_attention`, with which alignments and offsets.

    wanted: "fused" raises if a layer cannot be fused; "auto" fuses on a GPU only, and leaves a
        layer that cannot be fused to the model's own attention.
    alignments: of the student layers; None for the teacher.
    """

    def __init__(
        self,
        wanted: str,
        alignments: Mapping[int, AttentionAlignment | None],
        arguments: Mapping[str, Any],
    ):
        self.wanted, self.alignments = wanted, alignments
        self.fused: set[int] = set()
        self.obstacle, self.cu_seqlens = "", None
        try:
            self.cu_seqlens = offsets_of_forward(arguments)
        except UnsupportedModelError as error:
            self.obstacle = str(error)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """out [B, T, H, K], lse [H, B*T], and q, k as they were used; None leaves it to the model.

        Raises UnsupportedModelError if the layer must be fused and cannot be.
        """
        if layer not in self.alignments or q.shape[2] != k.shape[2]:
            return None  # a cache: generation
        if (
            self.wanted == "auto"
            and choose("Taps", "auto", [v], options.get("softcap")) != "triton"
        ):
            return None
        obstacle = self.obstacle or _obstacle(k, v, options)
        if obstacle:
            if self.wanted == "auto":
                return None
            raise UnsupportedModelError(
                f'Taps: layer {layer} cannot have attention_kernel="fused": {obstacle}; use '
                f'"separate"'
            )
        q, k, v = as_attended(q, k, v)
        out, lse = _flash(q, k, v, options, self.cu_seqlens, self.alignments[layer])
        self.fused.add(layer)
        return out, lse, q, k


def _obstacle(k: Tensor, v: Tensor, options: Mapping[str, Any]) -> str:
    if options.get("dropout"):
        return "attention dropout is on"
    if v.shape[-1] > k.shape[-1]:
        return f"its values have {v.shape[-1]} columns, its keys only {k.shape[-1]}"
    return ""


def as_attended(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtype in which autocast runs attention."""
    kind = q.device.type
    if not torch.is_autocast_enabled(kind) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _flash(
    q: Tensor,  # [B, H, T, K]
    k: Tensor,  # [B, J, T, K]
    v: Tensor,
    options: Mapping[str, Any],
    cu_seqlens: Tensor | None,
    alignment: AttentionAlignment | None,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, K] and lse [H, B*T]."""
    batch, _, length, _ = q.shape
    if cu_seqlens is None:
        cu_seqlens = length * torch.arange(batch + 1, device=q.device, dtype=torch.int32)
    columns = v.shape[-1]
    v = F.pad(v, (0, k.shape[-1] - columns))
    out, lse = flash_attention(
        *(rearrange(x, "b h t k -> (b t) h k") for x in (q, k, v)),
        cu_seqlens=cu_seqlens,
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        scale=options.get("scaling"),
        sink=options.get("s_aux"),
        alignment=alignment,
    )
    return rearrange(out[..., :columns], "(b t) h k -> b t h k", b=batch), lse


# ---- padding and packing as offsets into the flattened [B * T] tokens -------------------------


def offsets_of_forward(arguments: Mapping[str, Any]) -> Tensor | None:
    """Offsets from a decoder's arguments: [sequences + 1] int32, or None for B whole rows.

    Padding becomes a sequence of its own. Raises UnsupportedModelError on a mask that is not one of
    padding, and on positions of more than two dimensions.
    """
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is None and isinstance(positions, Tensor):
        if positions.ndim != 2:
            raise UnsupportedModelError(f"position_ids have {positions.ndim} dimensions")
        return _offsets_of_positions(positions, arguments)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise UnsupportedModelError("attention_mask is not one of padding, [B, T]")
    real = mask != 0
    if real.device.type != "cpu":  # without a synchronisation: each row has before, tokens, after
        length = real.shape[1]
        place = torch.arange(length, device=real.device)
        first = torch.where(real, place, length).amin(1)
        first = torch.where(first == length, 0, first)
        last = torch.where(real, place + 1, 0).amax(1)
        row = length * torch.arange(len(real), device=real.device)
        rows = torch.stack([row, row + first, row + last], 1).flatten()
        return F.pad(rows, (0, 1), value=real.numel()).int()
    if bool(real.all()):
        return None
    if _has_holes(real):
        raise UnsupportedModelError("attention_mask hides tokens between others")
    return _offsets(F.pad(real.diff(dim=1), (1, 0), value=True))


def _offsets_of_positions(positions: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """As transformers reads them without a cache: a sequence begins where positions do not go on.

    Synchronises with the device.
    """
    begins = F.pad(positions.diff(dim=1) != 1, (1, 0), value=True)
    if not begins[:, 1:].any():
        return None
    if arguments.get("use_cache") is not False or arguments.get("past_key_values") is not None:
        raise UnsupportedModelError("position_ids of packed sequences come with a cache")
    for name in ("input_ids", "inputs_embeds"):
        if arguments.get(name) is not None:
            begins = begins.expand(len(arguments[name]), -1)
    return _offsets(begins)


def _has_holes(real: Tensor) -> bool:
    """Whether a row's tokens [B, T] have padding between them."""
    begins = real & ~F.pad(real[:, :-1], (1, 0))
    return bool((begins.sum(1) > 1).any())


def _offsets(begins: Tensor) -> Tensor:
    """Offsets of the sequences that begin where `begins` [B, T] is true; synchronises."""
    starts = begins.flatten().nonzero().flatten()
    return F.pad(starts, (0, 1), value=begins.numel()).int()


def offsets_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """transformers' mask of the implementation "oisd": offsets, None for whole rows, or [B,1,T,T].

    It is a whole mask if queries continue a cache, and if offsets cannot describe it.
    """

    def full() -> Tensor | None:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            device=device, **{**options, "allow_is_causal_skip": False},
        )  # fmt: skip

    if q_length != kv_length or options.get("use_vmap"):
        return full()
    batch = torch.arange(batch_size, device=device)[:, None]
    own = torch.arange(q_length, device=device)[None]
    after, before = own[:, 1:], own[:, :-1]
    shape = batch_size, q_length - 1
    if q_length > 1 and bool(mask_function(batch, 0, before, after).expand(shape).any()):
        return full()  # not causal
    goes_on = mask_function(batch, 0, after, before).expand(shape) if q_length > 1 else None
    begins = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    if goes_on is not None:
        begins[:, 1:] = ~goes_on
    if attention_mask is not None:
        real = attention_mask[:, -q_length:] != 0
        if _has_holes(real):
            return full()
        begins[:, 1:] |= real.diff(dim=1)
    return _offsets(begins) if bool(begins[:, 1:].any()) else None


AttentionMaskInterface.register(IMPLEMENTATION, offsets_mask)


# ---- the attention function ------------------------------------------------------------------


class _TappedConfig:
    """An attention module's config, except that its attention implementation is ours."""

    _attn_implementation = IMPLEMENTATION

    def __init__(self, original: Any, layer: int, record: Callable[[AttentionCall], None]):
        self.original, self.layer, self.record = original, layer, record

    def __getattr__(self, name: str) -> Any:
        if name == "original" or name.startswith("__"):  # not set yet while being copied
            raise AttributeError(name)
        return getattr(self.original, name)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function "oisd".

    In a tapped module: what the plan or the original config asks for, and a record of it.
    """
    plan: FusedPlan | None = kwargs.pop(PLAN, None)
    proxy = module.config
    if not isinstance(proxy, _TappedConfig):
        return _model_attention(module, query, key, value, attention_mask, kwargs)
    implementation = proxy.original._attn_implementation or "eager"
    fused = None if plan is None else plan.attend(proxy.layer, query, key, value, kwargs)
    lse = weights = None
    if fused is not None:
        implementation = IMPLEMENTATION
        out, lse, query, key = fused
    else:
        # The implementation may read its own name from the config.
        module.config = proxy.original
        try:
            attend = _attention_function(module, implementation)
            out, weights = attend(module, query, key, value, attention_mask, **kwargs)
        finally:
            module.config = proxy
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    softcap, window, sink = (kwargs.get(name) for name in ("softcap", "sliding_window", "s_aux"))
    if sink is not None:
        sink = sink.clone()  # FSDP2 frees the parameter's own memory after the layer
    proxy.record(
        AttentionCall(
            implementation, query, key, value, out, scale, softcap, window, sink,
            plan is not None, None if lse is None else lse.detach(),
        )
    )  # fmt: skip
    return out, weights


def _model_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """In a model whose own implementation is "oisd"; `attention_mask` is from `offsets_mask`."""
    obstacle = _obstacle(key, value, kwargs)
    if obstacle:
        raise UnsupportedModelError(
            f'{type(module).__name__} cannot have attn_implementation="oisd": {obstacle}'
        )
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    offsets = attention_mask is None or attention_mask.ndim == 1
    if offsets and causal and query.shape[2] == key.shape[2]:
        q, k, v = as_attended(query, key, value)
        return _flash(q, k, v, kwargs, attention_mask, None)[0], None
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        attend = _attention_function(module, "sdpa")
    else:  # SDPA would ignore softcap and sink; eager attention adds its mask to the scores
        attend = _attention_function(module, "eager")
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            hidden = ~attention_mask
            attention_mask = query.new_zeros(hidden.shape).masked_fill(hidden, lowest)
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _attention)


def _attention_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function `module` itself would have called; some model files have their own table."""
    for cls in type(module).__mro__:  # FSDP2 puts classes of its own in front
        source = sys.modules.get(cls.__module__)
        if hasattr(source, "ALL_ATTENTION_FUNCTIONS"):
            if implementation == "eager":
                return source.eager_attention_forward  # pyright: ignore
            return source.ALL_ATTENTION_FUNCTIONS[implementation]  # pyright: ignore
    raise UnsupportedModelError(f"Taps: {type(module).__name__} has no attention functions")


@contextmanager
def tapped(
    layer: nn.Module, record: Callable[[AttentionCall], None], number: int = 0
) -> Iterator[None]:
    """Records each call of the attention interface from a module inside `layer`, the number-th."""
    modules = [m for m in layer.modules() if hasattr(vars(m).get("config"), "_attn_implementation")]
    originals = [m.config for m in modules]
    for module in modules:
        module.config = _TappedConfig(module.config, number, record)  # pyright: ignore
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.config = original
