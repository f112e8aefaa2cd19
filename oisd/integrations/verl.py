"""OISD inside verl: its FSDP2 engine, whose actor loss has the two alignment terms.

    loss = verl's actor loss + think_weight * L_think + attention_weight * L_attn        (eq. 11)

Everything else is verl's: Ray, rollouts, rewards, advantages, mini- and micro-batches, checkpoints.
Two things turn it on:

    export VERL_ENGINE_VENDOR=oisd
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.fsdp_config._target_=oisd.integrations.verl.OISDEngineConfig
    +actor_rollout_ref.actor.fsdp_config.oisd.student_layers=[6]

Both terms are means over a response's tokens, then over the responses of the mini-batch (verl's
"seq-mean-token-mean"), whatever the actor's own `loss_agg_mode` is. `agg_loss` is linear in the
losses of the tokens, so its gradient is the weight of each: verl's division by the mini-batch and
its factor for data parallelism apply unchanged.

The terms are computed right before the unembedding runs, from what `oisd.Taps` captured: there
FSDP2 has the unembedding and the final norm whole, in its compute dtype, and the logits are not in
memory yet. The advantages are known by then, so that tokens of advantage 0 are dropped before any
arithmetic. verl's loss function is wrapped to add the result, so that one backward serves all.

Letters: B responses, R tokens of the longest, T positions, N positions of all sequences in a row,
D width, S student layers.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from oisd import losses
from oisd.config import AlignmentConfig, from_tables
from oisd.integrations.alignment import OF_THE_TRAINER, reduced_means, refused_in_words_of
from oisd.integrations.versions import Versions
from oisd.losses import Metrics, add_metrics
from oisd.models import Taps
from oisd.models.dropout import dropout_rates
from oisd.models.layout import unwrap
from oisd.schema import require

VENDOR = "oisd"
AGGREGATION = "seq-mean-token-mean"
TARGET = "oisd.integrations.verl.OISDEngineConfig"
VERSIONS = Versions("verl", "0.9.1", "0.10")
VERSIONS.check(VERSIONS.installed)

from verl.trainer.ppo.core_algos import agg_loss  # noqa: E402  # pyright: ignore
from verl.utils import tensordict_utils as tu  # noqa: E402  # pyright: ignore
from verl.utils.device import get_device_id, get_device_name  # noqa: E402  # pyright: ignore
from verl.utils.metric import AggregationType, Metric  # noqa: E402  # pyright: ignore
from verl.workers.config import FSDPEngineConfig  # noqa: E402  # pyright: ignore
from verl.workers.engine.base import EngineRegistry  # noqa: E402  # pyright: ignore
from verl.workers.engine.fsdp import FSDPEngineWithLMHead  # noqa: E402  # pyright: ignore
from verl.workers.utils.padding import no_padding_2_padding  # noqa: E402  # pyright: ignore

_REMEDIES = {
    "attention": "set +actor_rollout_ref.actor.fsdp_config.oisd.attention_weight=0",
    "attn_implementation": "set +actor_rollout_ref.model.override_config.attn_implementation=eager",
    "lens_norm": "set +actor_rollout_ref.actor.fsdp_config.oisd.lens_norm=final",
}
_PARAMETERS = {
    agg_loss: ["loss_mat", "loss_mask", "loss_agg_mode", "dp_size", "batch_num_tokens"]
    + ["global_batch_size", "loss_scale_factor"],
    no_padding_2_padding: ["tensor", "data"],
    FSDPEngineWithLMHead.__init__: ["self", "model_config", "engine_config", "optimizer_config"]
    + ["checkpoint_config"],
    FSDPEngineWithLMHead._build_model_optimizer: ["self"],
    FSDPEngineWithLMHead.forward_step: ["self", "micro_batch", "loss_function", "forward_only"],
    FSDPEngineWithLMHead.forward_backward_batch: ["self", "data", "loss_function", "forward_only"],
}


def moved() -> list[str]:
    """What this file relies on and the installed verl no longer has; empty if all is in place."""
    wrong = []
    for function, wanted in _PARAMETERS.items():
        found = [*inspect.signature(function).parameters]
        if found != wanted:
            wrong.append(f"{function.__qualname__} must take {wanted}, got {found}")
    taken = {option.name for option in fields(FSDPEngineConfig)}
    if "oisd" in taken or not {"strategy", "ulysses_sequence_parallel_size", "seed"} <= taken:
        wrong.append(f"FSDPEngineConfig has other fields than expected: {sorted(taken)}")
    return wrong


VERSIONS.refuse(moved())


@dataclass
class OISDEngineConfig(FSDPEngineConfig):
    """verl's FSDPEngineConfig and, as `oisd`, the options of `oisd.config.AlignmentConfig`.

    Options that are absent or null keep their defaults. Raises oisd.config.ConfigError, a
    ValueError, for unknown options (naming the nearest) and values out of range, and ValueError if
    VERL_ENGINE_VENDOR does not select the engine that reads them.
    """

    oisd: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alignment()
        vendor = os.environ.get("VERL_ENGINE_VENDOR")
        if vendor != VENDOR:
            raise ValueError(
                f"OISDEngineConfig: VERL_ENGINE_VENDOR must be {VENDOR!r}, got {vendor!r}; export "
                f"this environment variable before Ray starts, on every node"
            )

    def alignment(self) -> AlignmentConfig:
        """The options of OISD."""
        given = {name: value for name, value in self.oisd.items() if value is not None}
        wanted = "left out, as `oisd train` alone has it"
        for name in ("share_every", *OF_THE_TRAINER):
            require(name not in given, f"actor.fsdp_config.oisd.{name}", wanted, given.get(name))
        return from_tables({"oisd": given}, where="actor.fsdp_config").oisd


def _refuse(model_config: Any, engine_config: Any) -> None:
    """Raises ValueError for a set-up that makes the terms wrong, or that was never tested."""
    hf_config = model_config.hf_config
    modal = [name for name in ("vision_config", "audio_config") if getattr(hf_config, name, None)]
    sequence_parallel = engine_config.ulysses_sequence_parallel_size
    wrong = None
    if engine_config.strategy != "fsdp2":
        wrong = f"actor.strategy must be 'fsdp2', got {engine_config.strategy!r}"
    elif model_config.model_type != "language_model":
        wrong = f"the model must be a 'language_model', got {model_config.model_type!r}"
    elif modal:
        wrong = f"multimodal models are not supported, got a config with {modal[0]}"
    elif model_config.use_fused_kernels or engine_config.use_fused_kernels:
        wrong = "fused kernels bypass the unembedding; set model.use_fused_kernels=False"
    elif sequence_parallel > 1:
        wrong = (
            f"ulysses_sequence_parallel_size must be 1, got {sequence_parallel}; the divergences "
            f"need whole sequences"
        )
    elif model_config.enable_activation_offload:
        wrong = (
            "activation offloading was never tried; set model.enable_activation_offload=False "
            "(gradient checkpointing is supported)"
        )
    if wrong:
        raise ValueError(f"OISDEngine: {wrong}")


def _warn_of_dropout(model: nn.Module) -> None:
    """verl puts the model into training mode for the update, but not for log-probabilities."""
    if rates := dropout_rates(model):
        named = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        before = "+actor_rollout_ref.model.override_config."
        settings = " ".join(f"{before}{name}=0.0" for name in rates if " " not in name)
        warnings.warn(
            f"OISDEngine: the model's dropout ({named}) is on in the update but not in the "
            f"rollouts: noise in each ratio and in the KL term; set {settings or 'it to 0'}",
            stacklevel=3,
        )


class Responses(NamedTuple):
    """The responses of a micro-batch, token by token."""

    mask: Tensor  # [B, R] bool: the tokens whose losses count
    advantages: Tensor  # [B, R]
    position: Tensor  # [B, R], among the N, of the token that predicts this one
    offsets: Tensor  # [B+1], where the sequences begin among the N
    padded: bool  # whether the model sees [B, T] with right padding, else [1, N or more]
    divisors: dict[str, Any]  # agg_loss's arguments about the whole mini-batch

    def token_weights(self, mask: Tensor) -> Tensor:
        """[B, R] the weight of each token in verl's aggregation of losses over `mask`."""
        with torch.enable_grad():
            zeros = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
            total = agg_loss(zeros, mask, AGGREGATION, **self.divisors)
            return torch.autograd.grad(total, zeros)[0]

    def places(self, width: int) -> Tensor:
        """[B, R] `position` among the positions of the model's output [B, width] laid flat."""
        if not self.padded:
            return self.position
        rows = torch.arange(len(self.position), device=self.position.device)
        return self.position + (rows * width - self.offsets[:-1])[:, None]


def responses_of(data: Any) -> Responses:
    """The responses in verl's no-padding TensorDict, as its engines and `ppo_loss` take it.

    Raises ValueError where it has no advantages, or has images or a teacher's top-k.
    """
    for key in ("advantages", "response_mask", "input_ids"):
        if key not in data:
            raise ValueError(f"OISDEngine: the batch must have {key}; only actors are supported")
    if any(data.get("multi_modal_inputs", None) or []):
        raise ValueError("OISDEngine: multimodal batches are not supported")
    for key in ("use_fused_kernels", "distillation_use_topk"):
        if tu.get_non_tensor_data(data=data, key=key, default=False):
            raise ValueError(f"OISDEngine: {key} must be False, got True")
    ids = data["input_ids"]
    position = torch.arange(ids.values().shape[0], device=ids.device)
    found = data.select("response_mask", "advantages").to_padded_tensor()
    divisors = {key: data[key] for key in ("dp_size", "batch_num_tokens", "global_batch_size")}
    return Responses(
        found["response_mask"].bool(),
        found["advantages"].float(),
        no_padding_2_padding(position, data),
        ids.offsets(),
        not tu.get_non_tensor_data(data=data, key="use_remove_padding", default=True),
        divisors,
    )


def think_term(taps: Taps, found: Responses, align: AlignmentConfig) -> tuple[Tensor, Metrics]:
    """Logit alignment over the tokens of advantage other than 0."""
    live = found.mask & (found.advantages != 0)
    head, final = taps.unembedding, taps.final_hidden()
    if isinstance(head.weight, DTensor):
        raise RuntimeError("OISDEngine: the unembedding is sharded while the model runs")
    places = found.places(final.shape[1])[live]
    return losses.think_loss(
        taps.student_hidden().flatten(1, 2)[:, places].to(head.weight.dtype),
        final.detach().flatten(0, 1)[places].to(head.weight.dtype),
        head.weight,
        found.advantages[live],
        align,
        token_weight=found.token_weights(found.mask)[live],
        bias=head.bias,
        logit_softcap=head.logit_softcap,
    )


def attention_term(
    taps: Taps, found: Responses, align: AlignmentConfig, noise: torch.Generator
) -> tuple[Tensor, Metrics]:
    """Attention alignment: dense where the model sees padding, else packed.

    noise: on the CPU; draws the decoding steps if `align.attention_steps` limits them.
    """
    steps = found.mask
    if align.attention_steps is not None:
        uniform = torch.rand(steps.shape, generator=noise)
        steps = losses.sampled_steps(steps, uniform.to(steps.device), align.attention_steps)
    width = taps.final_hidden().shape[1]
    places, weights = found.places(width)[steps], found.token_weights(steps)[steps]
    pairs, cu_seqlens = taps.attention(), None
    shape: tuple[int, ...] = (len(steps), width)
    if not found.padded:
        # verl may have padded the row of all sequences at its end.
        shape = (int(found.offsets[-1]),)
        cu_seqlens = found.offsets.int()
        pairs = [
            pair._replace(
                q=pair.q[0, : shape[0]],
                k=pair.k[0, : shape[0]],
                q_teacher=pair.q_teacher[0, : shape[0]],
                k_teacher=pair.k_teacher[0, : shape[0]],
            )
            for pair in pairs
        ]
    zeros = torch.zeros(shape, device=weights.device)
    return losses.attention_loss(
        pairs,
        zeros.flatten().index_copy(0, places, found.advantages[steps]).view(shape),
        align,
        token_weight=zeros.flatten().index_copy(0, places, weights).view(shape),
        cu_seqlens=cu_seqlens,
        key_index=_key_index(found, align, width),
    )


def _key_index(found: Responses, align: AlignmentConfig, width: int) -> Tensor | None:
    """[B, T, M] or [N, M] the paper's sampled keys; None for all."""
    if align.key_window is None or align.key_stride is None:
        return None
    offsets, window, stride = found.offsets, align.key_window, align.key_stride
    if found.padded:
        return losses.sampled_keys(len(found.mask), width, window, stride, offsets.device)
    lengths = offsets.diff()
    rows = torch.arange(int(offsets[-1]), device=offsets.device)
    rows = rows - offsets[:-1].repeat_interleave(lengths)
    return losses.sampled_keys(1, int(lengths.max()), window, stride, offsets.device)[0, rows]


@dataclass
class _Asked:
    """What `forward_step` asks of the model's forward, and its answer."""

    responses: Responses
    terms: dict[str, Tensor] | None = None


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device=["cuda", "cpu"], vendor=VENDOR
)
class OISDEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine of language models; where it trains, with the losses of OISD.

    An engine that only runs forward, like the reference model's, is verl's own. verl's metrics are
    joined by loss/think, loss/attention (before their weights), js/think_pos, js/think_neg,
    js/attention_pos, js/attention_neg, entropy/student, entropy/teacher, agreement/top1: means over
    the mini-batch on all processes, under "actor/" in verl's logs.

    Raises ValueError for what OISD cannot do: FSDP version 1, fused kernels, Ulysses sequence
    parallelism, activation offloading, multimodal and value models, reentrant checkpointing, an
    adapter on the unembedding, and models that `oisd.Taps` does not understand.
    """

    def __init__(
        self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any
    ) -> None:
        self._align = AlignmentConfig(think_weight=0.0, attention_weight=0.0)
        self._taps: Taps | None = None
        self._metrics: Metrics = {}
        if not engine_config.forward_only:
            if not isinstance(engine_config, OISDEngineConfig):
                raise ValueError(
                    f"OISDEngine: actor.fsdp_config must be an OISDEngineConfig, got "
                    f"{type(engine_config).__name__}; set actor_rollout_ref.actor.fsdp_config."
                    f"_target_={TARGET}, or unset VERL_ENGINE_VENDOR"
                )
            self._align = engine_config.alignment()
        if self._align.active:
            _refuse(model_config, engine_config)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self._noise = torch.Generator().manual_seed(engine_config.seed + 1 + self.rank)

    def _build_model_optimizer(self) -> None:
        super()._build_model_optimizer()
        if not self.engine_config.forward_only:
            _warn_of_dropout(unwrap(self.module))
        if self._align.active:
            with self._autocast(), refused_in_words_of(_REMEDIES):
                self._taps = self._make_taps()
            if self._taps.attention_words and self.rank == 0:
                print(self._taps.attention_words)

    def _make_taps(self) -> Taps:
        """The taps; this runs the model on four tokens, on all processes, sharded as it is."""
        base, align = unwrap(self.module), self._align

        def make() -> Taps:
            return Taps(
                base,
                student_layers=align.student_layers,
                attention=align.attention_weight > 0,
                lens_norm=align.lens_norm,
                attention_student=align.attention_student,
                attention_teacher=align.attention_teacher,
            )

        if base is self.module:
            return make()
        # PEFT's wrapper is FSDP2's root: the final norm is whole only while it runs.
        made: list[Taps] = []

        def once(*_: Any) -> None:
            handle.remove()
            made.append(make())

        decoder: Any = base.get_decoder()
        handle = decoder.register_forward_pre_hook(once)
        with torch.no_grad():
            one = torch.ones(1, 1, dtype=torch.long, device=get_device_id())
            self.module(input_ids=one, use_cache=False)
        return made[0]

    def _autocast(self) -> Any:
        """The precision in which verl runs the model."""
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(get_device_name(), dtype=self._autocast_dtype)

    def forward_backward_batch(
        self, data: Any, loss_function: Callable[..., Any], forward_only: bool = False
    ) -> Any:
        """verl's, and the metrics of OISD over the mini-batch on all processes."""
        self._metrics = {}
        output = super().forward_backward_batch(data, loss_function, forward_only)
        if self._metrics:
            output["metrics"] |= self._reduced_metrics()
        return output

    def forward_step(
        self, micro_batch: Any, loss_function: Callable[..., Any], forward_only: bool
    ) -> Any:
        """verl's; in training its loss has the weighted terms of OISD."""
        taps = self._taps
        if taps is None or forward_only:
            return super().forward_step(micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        asked = _Asked(responses_of(micro_batch))
        with taps, self._aligning(taps, asked):
            joint = functools.partial(self._joint_loss, asked, loss_function)
            return super().forward_step(micro_batch, joint, forward_only)

    @contextmanager
    def _aligning(self, taps: Taps, asked: _Asked) -> Iterator[None]:
        """Compute the terms of the forward within, just before the unembedding runs."""

        def compute(module: nn.Module, args: Any) -> None:
            # The operations choose their precision themselves.
            with torch.autocast(get_device_name(), enabled=False):
                asked.terms = self._terms(taps, asked.responses)

        # FSDP2's own hook, which gathers the unembedding, is there already and comes first.
        head: Any = unwrap(self.module).get_output_embeddings()
        handle = head.register_forward_pre_hook(compute)
        try:
            yield
        finally:
            handle.remove()

    def _terms(self, taps: Taps, found: Responses) -> dict[str, Tensor]:
        """The terms that have a weight, unweighted; keeps their metrics."""
        terms: dict[str, Tensor] = {}
        metrics: Metrics = {}
        if self._align.think_weight:
            terms["think"], more = think_term(taps, found, self._align)
            metrics |= more
        if self._align.attention_weight:
            terms["attention"], more = attention_term(taps, found, self._align, self._noise)
            metrics |= more
        self._metrics = add_metrics(self._metrics, metrics)
        return terms

    def _joint_loss(
        self,
        asked: _Asked,
        loss_function: Callable[..., Any],
        *,
        model_output: Any,
        data: Any,
        dp_group: Any = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        loss, metrics = loss_function(model_output=model_output, data=data, dp_group=dp_group)
        if asked.terms is None:
            raise RuntimeError("OISDEngine: the model's forward did not call its unembedding")
        for name, term in asked.terms.items():
            loss = loss + getattr(self._align, f"{name}_weight") * term
            # As verl's own losses: shares of the mini-batch, times the number of processes.
            metrics[f"loss/{name}"] = Metric(AggregationType.SUM, term)
        return loss, metrics

    def _reduced_metrics(self) -> dict[str, list[float]]:
        """The means so far, over all processes."""

        def reduce(sums: Tensor) -> Tensor:
            torch.distributed.all_reduce(sums, group=self.get_data_parallel_group())
            return sums

        return {name: [mean] for name, mean in reduced_means(self._metrics, reduce).items()}
