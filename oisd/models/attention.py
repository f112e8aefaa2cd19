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

from oisd.models.offsets import offsets_mask, offsets_of_forward
from oisd.models.refusals import Remedy, UnsupportedModelError
from oisd_kernels import AttentionAlignment, flash_attention
from oisd_kernels.attention.implementation import choose

IMPLEMENTATION = "oisd"
PLAN = "oisd_plan"  # the argument's name


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
    bias: Tensor | None = None  # [B, H, T], added to each key's scores; see oisd.models.inline


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
                f'Taps: layer {layer} cannot have attention_kernel="fused": {obstacle}',
                Remedy("attention_kernel", "separate"),
                *([Remedy("dropout", 0)] if options.get("dropout") else []),
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
