"""Taps on any Hugging Face causal language model: hidden states, queries and keys.

No architecture is known by name: `oisd.models.layout` finds the parts. Layers are counted from 1,
so that layer l is Hugging Face's `hidden_states[l]`; layer L is the teacher.

Under non-reentrant gradient checkpointing a layer runs twice, and the first run has the graph.
Captures are taken only while the decoder's forward runs; recomputation happens outside it.

B batch, T positions, D width, V vocabulary, S student layers, L layers, H query heads, J key heads,
K head dimension, N tokens that are not padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from oisd.models.attention import AttentionCall, FusedPlan, UnsupportedModelError, tapped
from oisd.models.layout import (
    check_attention,
    find_layout,
    first_tensor,
    head_parameters,
    is_partitioned,
    planned,
    refuse_variants,
    takes_plans,
    unwrap,
    without_hooks,
)
from oisd_kernels import AttentionAlignment

__all__ = ["AttentionPair", "Taps", "Unembedding", "UnsupportedModelError", "pack_padded"]


class Unembedding(NamedTuple):
    """logits = softcap(hidden @ weight.T + bias), softcap(x) = c * tanh(x / c)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    logit_softcap: float | None


class AttentionPair(NamedTuple):
    """One student layer's attention and the last layer's, in attention_divergence's layout."""

    q: Tensor  # [B, T, H, K], after the rotary embedding, with graph
    k: Tensor  # [B, T, J, K]
    q_teacher: Tensor  # [B, T, H, K], detached
    k_teacher: Tensor  # [B, T, J, K]
    scale: float
    scale_teacher: float
    softcap: float | None
    window: int | None  # the smaller of the two layers' windows; keys i-w < j <= i
    # Where the student layer ran `flash_attention`: the loss's gradient is computed in that layer's
    # backward. It handles padding itself, so the rest of the pair must stay dense.
    alignment: AttentionAlignment | None = None
    lse_teacher: Tensor | None = None  # [H, B*T], if it is known over the same keys
    sink: Tensor | None = None  # [H], with graph: the learned score of one more key
    sink_teacher: Tensor | None = None  # [H], detached


class Taps:
    """Context manager that keeps what OISD needs from each forward of a causal language model.

        taps = Taps(model, student_layers=[6])
        with taps:
            model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
            student, final = taps.student_hidden(), taps.final_hidden()

    Make it once (that costs two forwards of four tokens), enter it as often as you like; several
    may be open, on one model or on many. A forward replaces the captures of the one before it;
    leaving the context drops them. `enabled = False` pauses capturing, for generation say. The
    backward may run inside the context or after it.

    model: a transformers causal language model, or a wrapper of one: PEFT, DDP, torch.compile.
    student_layers: numbers in 1..L-1, without repeats; may be empty.
    attention: whether to keep queries and keys; this does not change the model's outputs.
    lens_norm: "final" applies the final norm before the unembedding (the logit lens), "none" does
        not (BuPO).
    freeze_norm: whether the student branch gives the final norm's own parameters no gradient.
    attention_kernel: "separate" leaves the attention to the model. "fused": the student layers and
        the last one run `oisd_kernels.flash_attention`, and each pair of `attention()` has an
        alignment, whose loss needs no backward pass of its own. "auto" does so on a GPU, and is
        "separate" for a layer that cannot (dropout, a window wider than the last layer's, a mask
        that is not padding, a head dimension over 256), where "fused" raises. With gradient
        checkpointing, the backward of a fused forward must run inside the context.
    divergence, beta: of the alignments.

    Raises ValueError on arguments out of range, UnsupportedModelError on a model whose layout or
    attention is not understood, and RuntimeError in a forward under reentrant checkpointing.
    """

    def __init__(
        self,
        model: nn.Module,
        student_layers: Sequence[int] = (6,),
        attention: bool = True,
        lens_norm: str = "final",
        *,
        freeze_norm: bool = True,
        attention_kernel: str = "separate",
        divergence: str = "jsd",
        beta: float = 0.5,
    ):
        if attention_kernel not in ("auto", "fused", "separate"):
            raise ValueError(
                f'Taps: attention_kernel must be "auto", "fused" or "separate", got '
                f"{attention_kernel!r}"
            )
        if lens_norm not in ("final", "none"):
            raise ValueError(f'Taps: lens_norm must be "final" or "none", got {lens_norm!r}')
        self._layout = find_layout(unwrap(model))
        self.num_layers = len(self._layout.layers)
        self.student_layers = tuple(student_layers)
        for layer in self.student_layers:
            if isinstance(layer, bool) or layer not in range(1, self.num_layers):
                raise ValueError(
                    f"Taps: student_layers must lie in 1..{self.num_layers - 1} (layer "
                    f"{self.num_layers} is the teacher), got {layer}"
                )
        if len(set(self.student_layers)) < len(self.student_layers):
            raise ValueError(f"Taps: student_layers must not repeat, got {[*student_layers]}")
        self.enabled = True
        self._lens_norm, self._freeze_norm, self._attention = lens_norm, freeze_norm, attention
        # Without a student there is nothing to compare the teacher's attention with.
        attending = attention and bool(self.student_layers)
        self._attending = (self.num_layers, *self.student_layers) if attending else ()
        self._kernel, self._divergence, self._beta = attention_kernel, divergence, beta
        calls = check_attention(self._layout, self._attending) if attending else {}
        self._refuse_lone_sinks(calls)
        self._fusable = self._choose_fusable(calls)
        self._open: ExitStack | None = None
        self._capturing = self._wants_grad = False
        self.clear()

    def _refuse_lone_sinks(self, calls: dict[int, AttentionCall]) -> None:
        """A KL is infinite where its first layer alone has a sink."""
        for layer in self.student_layers if calls else ():
            own, last = (calls[n].sink is not None for n in (layer, self.num_layers))
            if own != last and self._divergence == ("reverse_kl" if own else "forward_kl"):
                raise UnsupportedModelError(
                    f"Taps: layers {layer} and {self.num_layers} must both have an attention sink "
                    f"or neither, as {self._divergence} is infinite otherwise, got one at layer "
                    f'{layer if own else self.num_layers} alone; use divergence="jsd"'
                )

    def _choose_fusable(self, calls: dict[int, AttentionCall]) -> tuple[int, ...]:
        """The student layers that can compute their alignment in their own backward."""
        if self._kernel == "separate" or not calls:
            return ()
        widths = {layer: call.window or math.inf for layer, call in calls.items()}
        narrow = [n for n in self.student_layers if widths[n] <= widths[self.num_layers]]
        fusable = tuple(narrow) if takes_plans(self._layout, self._attending) else ()
        if self._kernel == "fused" and len(fusable) < len(self.student_layers):
            raise UnsupportedModelError(
                f'Taps: attention_kernel="fused" must have student layers whose window is no wider '
                f"than the last layer's, in a model that hands its arguments on to its attention, "
                f'got layers {[*self.student_layers]} of which {[*fusable]} can; use "auto"'
            )
        return fusable

    def _plan(self, arguments: Mapping[str, Any]) -> FusedPlan:
        if not self.enabled:
            return FusedPlan(self._kernel, {}, arguments)
        alignments = {n: AttentionAlignment(self._divergence, self._beta) for n in self._fusable}
        teacher = {self.num_layers: None}
        self._current_plan = FusedPlan(self._kernel, {**alignments, **teacher}, arguments)
        return self._current_plan

    def clear(self) -> None:
        """Drops the captures."""
        self._current_plan: FusedPlan | None = None
        self._hidden: dict[int, Tensor] = {}  # layer L's is the one after the final norm
        self._norm_parameters: dict[str, Tensor] | None = None  # kept where ZeRO-3 splits them
        self._calls: dict[int, AttentionCall] = {}

    def __enter__(self) -> Taps:
        if self._open is not None:
            raise RuntimeError("Taps: already open; make a second Taps for a nested context")
        _, decoder, layers, norm = self._layout[:4]
        with ExitStack() as stack:
            stack.callback(decoder.register_forward_pre_hook(self._begin).remove)
            stack.callback(decoder.register_forward_hook(self._end, always_call=True).remove)
            stack.callback(norm.register_forward_hook(self._keep_hidden(self.num_layers)).remove)
            if any(is_partitioned(p) for p in norm.parameters()):
                # Before DeepSpeed's own hook, which releases them.
                keep_norm = norm.register_forward_hook(self._keep_norm, prepend=True)
                stack.callback(keep_norm.remove)
            for layer in self.student_layers:
                hook = layers[layer - 1].register_forward_hook(self._keep_hidden(layer))
                stack.callback(hook.remove)
            for layer in self._attending:
                stack.enter_context(tapped(layers[layer - 1], self._keep_call(layer), layer))
            if self._fusable:
                stack.enter_context(planned(self._layout, self._plan))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            self._open.close()
        self._open, self._capturing = None, False
        self.clear()

    # Captures are taken between _begin and _end only: a layer that checkpointing runs again in the
    # backward must not replace the capture that has the graph.

    def _begin(self, *_: Any) -> None:
        if self.enabled:
            self.clear()
        self._capturing, self._wants_grad = self.enabled, torch.is_grad_enabled()

    def _end(self, *_: Any) -> None:
        self._capturing = False

    def _keep_hidden(self, layer: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self._capturing:
                self._refuse_reentrant()
                self._hidden[layer] = first_tensor(output)

        return keep

    def _keep_norm(self, norm: nn.Module, *_: Any) -> None:
        if self._capturing:
            self._norm_parameters = {
                name: p.detach().clone() for name, p in norm.named_parameters()
            }

    def _keep_call(self, layer: int) -> Callable[[AttentionCall], None]:
        def keep(call: AttentionCall) -> None:
            if self._capturing:
                self._refuse_reentrant()
                refuse_variants(layer, call)
                self._calls[layer] = call._replace(v=None, out=None)

        return keep

    def _refuse_reentrant(self) -> None:
        if self._wants_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "Taps: reentrant gradient checkpointing runs the layers without a graph, so that "
                "captures would have no gradient; call model.gradient_checkpointing_enable("
                'gradient_checkpointing_kwargs={"use_reentrant": False})'
            )

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self._layout.scale == 1 else hidden * self._layout.scale

    @property
    def unembedding(self) -> Unembedding:
        """The head, with its gradient: maps the hidden states given here to the model's logits.

        Raises UnsupportedModelError if the head has an adapter.
        """
        weight, bias = head_parameters(self._layout.model)
        return Unembedding(
            weight, bias if bias is None else self._scaled(bias), self._layout.softcap
        )

    def _require_captures(self) -> None:
        if self.num_layers not in self._hidden:
            raise RuntimeError(
                "Taps: nothing captured; run the model inside the context (with enabled = True) "
                "and read before leaving it"
            )

    def final_hidden(self) -> Tensor:
        """What the head reads, times the model's logit scale, with graph: [B, T, D].

        Raises RuntimeError before a forward.
        """
        self._require_captures()
        return self._scaled(self._hidden[self.num_layers])

    def student_hidden(self) -> Tensor:
        """The student layers' hidden states, ready for the unembedding: [S, B, T, D].

        After the final norm if lens_norm is "final"; times the model's logit scale, if it has one.
        Raises RuntimeError before a forward and without student layers.
        """
        self._require_captures()
        if not self.student_layers:
            raise RuntimeError("Taps: student_layers is empty, so there is no student_hidden")
        hidden = [self._hidden[layer] for layer in self.student_layers]
        if self._lens_norm == "final":
            hidden = [self._normed(h) for h in hidden]
        return self._scaled(torch.stack(hidden))

    def _normed(self, hidden: Tensor) -> Tensor:
        norm, kept = self._layout.norm, self._norm_parameters
        if kept is None:
            frozen = {name: p.detach() for name, p in norm.named_parameters()}
            parameters = frozen if self._freeze_norm else {}
            return torch.func.functional_call(norm, parameters, (hidden,))
        if not self._freeze_norm:
            raise RuntimeError(
                "Taps: under ZeRO-3 the final norm's parameters get no gradient from the student "
                "branch; use freeze_norm=True"
            )
        with without_hooks(norm):  # DeepSpeed's would fetch the parameters again
            return torch.func.functional_call(norm, kept, (hidden,))

    def attention(self) -> list[AttentionPair]:
        """The student layers' queries and keys with the last layer's, one pair per student layer.

        Padding is still included, see pack_padded. Where the layers' windows differ, take both
        distributions over the smaller one.
        Raises RuntimeError before a forward, with attention=False, and if there are more keys than
        queries because the forward continued a KV cache.
        """
        self._require_captures()
        if not self._attention:
            raise RuntimeError("Taps: made with attention=False, so there is no attention")
        for call in self._calls.values():
            if call.q.shape[2] != call.k.shape[2]:
                raise RuntimeError(
                    f"Taps: attention needs as many keys as queries, got {call.k.shape[2]} and "
                    f"{call.q.shape[2]}; run the whole sequence with use_cache=False"
                )
        return [self._pair(layer) for layer in self.student_layers]

    def _pair(self, layer: int) -> AttentionPair:
        student, teacher = self._calls[layer], self._calls[self.num_layers]
        alignment, plan = None, self._current_plan
        if plan is not None and layer in plan.fused:
            alignment = plan.alignments[layer]
        windows = [call.window for call in (student, teacher) if call.window is not None]
        return AttentionPair(
            rearrange(student.q, "b h t k -> b t h k"),
            rearrange(student.k, "b j t k -> b t j k"),
            rearrange(teacher.q.detach(), "b h t k -> b t h k"),
            rearrange(teacher.k.detach(), "b j t k -> b t j k"),
            student.scale,
            teacher.scale,
            student.softcap,
            min(windows, default=None),
            alignment,
            teacher.lse if student.window == teacher.window else None,
            student.sink,
            None if teacher.sink is None else teacher.sink.detach(),
        )


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
