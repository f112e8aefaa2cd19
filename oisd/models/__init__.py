"""Taps on any Hugging Face causal language model: hidden states, queries and keys.

No architecture is known by name: `oisd.models.layout` finds the parts. Layers are counted from 1,
so that layer l is Hugging Face's `hidden_states[l]`; layer L is the teacher. Where a model runs
some layers several times, a layer means its last run. One that does not run on text, because it
attends to images alone, has the hidden states of the layer before it.

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
from einops import rearrange
from torch import Tensor, nn

from oisd.models.attending import (
    Probe,
    check_choice,
    choose_pairs,
    reading,
    refuse_lone_sinks,
    words_on_shared_weights,
)
from oisd.models.attention import AttentionCall, FusedPlan
from oisd.models.inline import with_bias
from oisd.models.layout import (
    first_tensor,
    head_parameters,
    is_partitioned,
    last_logits_only,
    planned,
    refuse_variants,
    takes_plans,
)
from oisd.models.offsets import pack_padded
from oisd.models.offsets import unpack_padded as unpack_padded
from oisd.models.refusals import Remedy, UnsupportedModelError
from oisd.models.tail import scaled
from oisd_kernels import AttentionAlignment

__all__ = [
    "AttentionPair",
    "Taps",
    "Unembedding",
    "UnsupportedModelError",
    "last_logits_only",
    "pack_padded",
]


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
            options = last_logits_only(model, ids)
            model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
            student, final = taps.student_hidden(), taps.final_hidden()

    Make it once (that costs a few short forwards), enter it as often as you like; several
    may be open, on one model or on many. A forward replaces the captures of the one before it;
    leaving the context drops them. `enabled = False` pauses capturing, for generation say. The
    backward may run inside the context or after it.

    model: a transformers causal language model, or a wrapper of one: PEFT, DDP, torch.compile; or
        the `oisd.models.attending.Probe` of one, which spares the short forwards.
    student_layers: numbers in 1..L-1, without repeats; may be empty.
    attention: whether to keep queries and keys; this does not change the model's outputs.
    lens_norm: "final" applies the final norm before the unembedding (the logit lens), and whatever
        else the model does there on each token alone; "none" does not (BuPO).
    freeze_norm: whether the student branch gives the parameters of these steps no gradient.
    attention_kernel: "separate" leaves the attention to the model. "fused": the student layers and
        the last one run `oisd_kernels.flash_attention`, and each pair of `attention()` has an
        alignment, whose loss needs no backward pass of its own. "auto" does so on a GPU, and is
        "separate" for a layer that cannot (dropout, a window wider than the last layer's, a mask
        that is not padding, a head dimension over 256), where "fused" raises. With gradient
        checkpointing, the backward of a fused forward must run inside the context.
    divergence, beta: of the alignments.
    attention_student: for each student layer, the layer whose attention is compared; by default the
        nearest at or below it that attends by softmax, which is the layer itself unless the model
        is a hybrid.
    attention_teacher: the layer whose attention is the teacher's; by default the last that attends
        by softmax. The paper knows no hybrids: the choice of layers in them extends it.

    `attention_layers` has the pairs (student, teacher) that are compared, one for each student
    layer, and `attention_words` a sentence about them where they are not the paper's, else "".

    Raises ValueError on arguments out of range, UnsupportedModelError on a model whose layout or
    attention is not understood, and RuntimeError in a forward under reentrant checkpointing.
    """

    def __init__(
        self,
        model: nn.Module | Probe,
        student_layers: Sequence[int] = (6,),
        attention: bool = True,
        lens_norm: str = "final",
        *,
        freeze_norm: bool = True,
        attention_kernel: str = "separate",
        divergence: str = "jsd",
        beta: float = 0.5,
        attention_student: Sequence[int] | None = None,
        attention_teacher: int | None = None,
    ):
        if attention_kernel not in ("auto", "fused", "separate"):
            raise ValueError(
                f'Taps: attention_kernel must be "auto", "fused" or "separate", got '
                f"{attention_kernel!r}"
            )
        if lens_norm not in ("final", "none"):
            raise ValueError(f'Taps: lens_norm must be "final" or "none", got {lens_norm!r}')
        probe = model if isinstance(model, Probe) else Probe(model)
        self._layout = probe.layout
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
        if lens_norm == "none" and self.student_layers and not self._layout.plain:
            raise UnsupportedModelError(
                f"Taps: the layers of {type(self._layout.model).__name__} return several streams, "
                f"which its head cannot read as they are",
                Remedy("lens_norm", "final"),
            )
        # A layer that does not run on text (cross-attention to images) changes nothing there.
        ran = [n for n, runs in enumerate(self._layout.runs, 1) if runs]
        self._read_from = {n: max((m for m in ran if m <= n), default=0) for n in student_layers}
        if 0 in self._read_from.values():
            raise UnsupportedModelError(
                f"Taps: student_layers must have a layer that runs on text at or below them, got "
                f"{[*student_layers]} where the first is {min(ran)}"
            )
        self.enabled = True
        self._lens_norm, self._freeze_norm, self._attention = lens_norm, freeze_norm, attention
        chosen = attention_student, attention_teacher
        if chosen != (None, None):
            if not attention:
                raise ValueError(
                    f"Taps: attention must be True with attention_student and attention_teacher, "
                    f"got {chosen}"
                )
            try:
                check_choice(self.num_layers, self.student_layers, *chosen)
            except ValueError as error:
                raise ValueError(f"Taps: {error}") from None
        self._kernel, self._divergence, self._beta = attention_kernel, divergence, beta
        self._find_attention(probe, *chosen)
        self._open: ExitStack | None = None
        self._capturing = self._wants_grad = False
        self.clear()

    def _find_attention(
        self, probe: Probe, student: Sequence[int] | None, teacher: int | None
    ) -> None:
        """Which layers the attention term compares, and how they compute it."""
        self.attention_layers: tuple[tuple[int, int], ...] = ()
        self.attention_words = ""
        self._attending: dict[int, bool] = {}  # each layer that is read: whether it is inline
        self._biased: set[int] = set()
        self._fusable: tuple[int, ...] = ()
        # Without a student there is nothing to compare the teacher's attention with.
        if not self._attention or not self.student_layers:
            return
        found = probe.attention
        pairs = choose_pairs(found, self.student_layers, student, teacher)
        refuse_lone_sinks(found, pairs, self._divergence)
        shared = words_on_shared_weights(self._layout, pairs)
        self.attention_layers = pairs.layers
        self.attention_words = " ".join(words for words in (pairs.words, shared) if words)
        read = dict.fromkeys((pairs.layers[0][1], *(own for own, _ in pairs.layers)))
        self._attending = {layer: found[layer].inline for layer in read}
        calls = {layer: found[layer].calls[0] for layer in read}
        for layer, call in calls.items():
            if call.bias is not None and bool(call.bias.diff(dim=-1).any()):
                self._biased.add(layer)
        self._windows = {layer: call.window for layer, call in calls.items()}
        self._fusable = self._choose_fusable()

    def _choose_fusable(self) -> tuple[int, ...]:
        """The layers that can compute their alignment in their own backward."""
        if self._kernel == "separate":
            return ()
        teacher, *students = self._attending
        widths = {layer: window or math.inf for layer, window in self._windows.items()}
        narrow = [n for n in students if widths[n] <= widths[teacher]]
        inline = any(self._attending.values())
        takes = not inline and takes_plans(self._layout, tuple(self._attending))
        fusable = tuple(narrow) if takes else ()
        if self._kernel == "fused" and len(fusable) < len(students):
            raise UnsupportedModelError(
                f'Taps: attention_kernel="fused" must have student layers whose window is no wider '
                f"than the last layer's, in a model that hands its arguments on to its attention, "
                f"got layers {students} of which {[*fusable]} can",
                Remedy("attention_kernel", "auto"),
            )
        return fusable

    def _plan(self, arguments: Mapping[str, Any]) -> FusedPlan:
        if not self.enabled:
            return FusedPlan(self._kernel, {}, arguments)
        alignments = {n: AttentionAlignment(self._divergence, self._beta) for n in self._fusable}
        teacher = {next(iter(self._attending)): None}
        self._current_plan = FusedPlan(self._kernel, {**alignments, **teacher}, arguments)
        return self._current_plan

    def clear(self) -> None:
        """Drops the captures."""
        self._current_plan: FusedPlan | None = None
        self._hidden: dict[int, Tensor] = {}  # layer L's is the one after the final norm
        self._kept: dict[nn.Module, dict[str, Tensor]] = {}  # the tail's, where ZeRO-3 splits them
        self._calls: dict[int, AttentionCall] = {}

    def __enter__(self) -> Taps:
        if self._open is not None:
            raise RuntimeError("Taps: already open; make a second Taps for a nested context")
        decoder, layers, tail = self._layout.decoder, self._layout.layers, self._layout.tail
        with ExitStack() as stack:
            begin = decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(begin.remove)
            final = tail.source.register_forward_hook(self._keep_hidden(self.num_layers))
            stack.callback(final.remove)
            # After the one above, which may be the decoder's too.
            stack.callback(decoder.register_forward_hook(self._end, always_call=True).remove)
            for module in tail.modules:
                if any(is_partitioned(p) for p in module.parameters()):
                    # Before DeepSpeed's own hook, which releases them.
                    keep = module.register_forward_hook(self._keep_parameters, prepend=True)
                    stack.callback(keep.remove)
            for layer in set(self._read_from.values()):
                hook = layers[layer - 1].register_forward_hook(self._keep_hidden(layer))
                stack.callback(hook.remove)
            for layer, inline in self._attending.items():
                stack.enter_context(
                    reading(
                        self._layout,
                        layer,
                        inline,
                        self._keep_call(layer),
                        active=lambda: self._capturing,
                        with_bias=layer in self._biased,
                    )
                )
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

    def _begin(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.enabled:
            self.clear()
        self._capturing, self._wants_grad = self.enabled, torch.is_grad_enabled()
        if self.enabled and isinstance(kwargs.get("logits_to_keep"), int):
            # Gemma 4 would run its last layers on the last positions alone; logits are cut anyway.
            return args, {**kwargs, "logits_to_keep": 0}
        return None

    def _end(self, *_: Any) -> None:
        self._capturing = False

    def _keep_hidden(self, layer: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self._capturing:
                self._refuse_reentrant()
                self._hidden[layer] = first_tensor(output)

        return keep

    def _keep_parameters(self, module: nn.Module, *_: Any) -> None:
        if self.enabled:
            parameters = module.named_parameters()
            self._kept[module] = {name: p.detach().clone() for name, p in parameters}

    def _keep_call(self, layer: int) -> Callable[[AttentionCall], None]:
        def keep(call: AttentionCall) -> None:
            if self._capturing:
                self._refuse_reentrant()
                refuse_variants(layer, call)
                if self._attending[layer]:  # its window is known from the probe alone
                    call = call._replace(window=self._windows[layer])
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
        return scaled(hidden, self._layout.scale)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers."""
        return [*self._layout.layers]

    @property
    def unembedding(self) -> Unembedding:
        """The head, with its gradient: maps the hidden states given here to the model's logits.

        Raises UnsupportedModelError if the head has an adapter.
        """
        weight, bias = head_parameters(self._layout.model, self._layout.head)
        return Unembedding(
            weight, bias if bias is None else self._scaled(bias), self._layout.softcap
        )

    def _require_captures(self) -> None:
        if self.num_layers not in self._hidden:
            raise RuntimeError(
                "Taps: nothing captured; run the model inside the context (with enabled = True) "
                "and read before leaving it"
            )
        unseen = [n for n, inline in self._attending.items() if inline and n not in self._calls]
        if unseen:
            raise RuntimeError(
                f"Taps: the attention of layer {unseen[0]}, which the layer computes itself, was "
                f"not seen in the forward, as if by torch.compile; do not compile this model, or "
                f"use attention=False"
            )
        unseen = [n for n in self._read_from.values() if n not in self._hidden]
        if unseen:
            raise RuntimeError(
                f"Taps: layer {unseen[0]} was not seen in the forward, as if torch.compile had "
                f"compiled the model before; compile it after opening the taps"
            )

    def final_hidden(self) -> Tensor:
        """What the head reads, times the model's logit scale, with graph: [B, T, D].

        Raises RuntimeError before a forward.
        """
        self._require_captures()
        tail = self._layout.tail
        hidden = self._hidden[self.num_layers]
        return self._scaled(tail.read(hidden, frozen=False, start=tail.computed))

    def student_hidden(self) -> Tensor:
        """The student layers' hidden states, ready for the unembedding: [S, B, T, D].

        After the final norm if lens_norm is "final"; times the model's logit scale, if it has one.
        Raises RuntimeError before a forward and without student layers.
        """
        self._require_captures()
        if not self.student_layers:
            raise RuntimeError("Taps: student_layers is empty, so there is no student_hidden")
        return self._scaled(torch.stack([self._read(layer) for layer in self.student_layers]))

    def _read(self, layer: int) -> Tensor:
        """What the head reads for a student layer, by the lens that was asked for."""
        hidden, tail = self._hidden[self._read_from[layer]], self._layout.tail
        if self._lens_norm == "none":
            return scaled(hidden, tail.factor)
        if self._kept and not self._freeze_norm:
            raise RuntimeError(
                "Taps: under ZeRO-3 the final norm's parameters get no gradient from the student "
                "branch; use freeze_norm=True"
            )
        return tail.read(hidden, frozen=self._freeze_norm, kept=self._kept)

    def attention(self) -> list[AttentionPair]:
        """The student layers' queries and keys with the last layer's, one pair per student layer.

        Of a hybrid, one pair per layer that is compared: two student layers may have the same.
        Padding is still included, see pack_padded. Where the layers' windows differ, take both
        distributions over the smaller one.
        Raises RuntimeError before a forward, with attention=False, if there are more keys than
        queries because the forward continued a KV cache, and in a compiled model whose layers
        compute their attention themselves.
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
        return [self._pair(*layers) for layers in dict.fromkeys(self.attention_layers)]

    def _pair(self, layer: int, last: int) -> AttentionPair:
        student, teacher = self._calls[layer], self._calls[last]
        alignment, plan = None, self._current_plan
        if plan is not None and layer in plan.fused:
            alignment = plan.alignments[layer]
        windows = [call.window for call in (student, teacher) if call.window is not None]
        q_teacher, k_teacher = _queries_and_keys(teacher)
        return AttentionPair(
            *_queries_and_keys(student),
            q_teacher.detach(),
            k_teacher.detach(),
            student.scale,
            teacher.scale,
            student.softcap,
            min(windows, default=None),
            alignment,
            teacher.lse if student.window == teacher.window else None,
            student.sink,
            None if teacher.sink is None else teacher.sink.detach(),
        )


def _queries_and_keys(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """[B, T, H, K] and [B, T, J, K]; what the layer adds to its scores is in further columns."""
    q, k = rearrange(call.q, "b h t k -> b t h k"), rearrange(call.k, "b j t k -> b t j k")
    return (q, k) if call.bias is None else with_bias(q, k, call.bias, call.scale)
