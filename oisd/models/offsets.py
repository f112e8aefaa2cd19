"""Padding and packing as offsets into the flattened [B * T] tokens, as FlashAttention takes them.

From the arguments of a decoder's forward (`offsets_of_forward`), and from a mask function of
transformers (`offsets_mask`), whose conditions are taken to be padding and packing. `pack_padded`
leaves padding out of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from oisd.models.refusals import UnsupportedModelError


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
    # transformers called the cache `past_key_values` before 5.23.
    cached = any(arguments.get(name) is not None for name in ("cache", "past_key_values"))
    if cached or arguments.get("use_cache") is not False:
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


def pack_padded(attention_mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Drops padding, left or right: (*packed, cu_seqlens), FlashAttention's convention.

    attention_mask: [B, T], 0 for padding.
    tensors: [B, T, ...] each; packed to [N, ...], with graph.
    cu_seqlens: [B+1] int32, where row b's tokens are cu_seqlens[b] : cu_seqlens[b+1].
    Raises ValueError on shapes that do not agree. Synchronises with the device once.
    """
    if attention_mask.ndim != 2:
        raise ValueError(
            f"pack_padded: attention_mask must be [B, T], got {[*attention_mask.shape]}"
        )
    for tensor in tensors:
        if tensor.shape[:2] != attention_mask.shape:
            raise ValueError(
                f"pack_padded: tensors must be [B, T, ...] with [B, T] = "
                f"{[*attention_mask.shape]}, got {[*tensor.shape]}"
            )
    keep = attention_mask != 0
    rows = keep.flatten().nonzero().squeeze(-1)
    cu_seqlens = F.pad(keep.sum(1).cumsum(0), (1, 0)).int()
    return (*(rearrange(x, "b t ... -> (b t) ...")[rows] for x in tensors), cu_seqlens)


def unpack_padded(attention_mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Undoes `pack_padded`: [N, ...] -> [B, T, ...], 0 where the mask is, with graph.

    attention_mask: [B, T], the one used for packing.
    Raises ValueError on shapes that do not agree. Synchronises with the device once.
    """
    rows = (attention_mask != 0).flatten().nonzero().squeeze(-1)
    for tensor in tensors:
        if len(tensor) != len(rows):
            raise ValueError(
                f"unpack_padded: tensors must be [N, ...] with N = {len(rows)}, the mask's tokens, "
                f"got {[*tensor.shape]}"
            )
    size, batch = attention_mask.numel(), len(attention_mask)
    wide = (x.new_zeros(size, *x.shape[1:]).index_copy(0, rows, x) for x in tensors)
    return tuple(rearrange(x, "(b t) ... -> b t ...", b=batch) for x in wide)
