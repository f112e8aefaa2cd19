"""OISD inside TRL: `OISDTrainer` is TRL's GRPOTrainer whose loss has the two alignment terms.

    loss = GRPOTrainer's loss + think_weight * L_think + attention_weight * L_attn        (eq. 11)

Everything else is TRL's: generation and vLLM, rewards, accumulation, checkpoints, PEFT, accelerate.
Both terms are means over a completion's tokens, then over the completions of the optimizer step, on
all processes; so whatever TRL's `loss_type` divides by, they do not depend on how the step was
split. A completion without a token that counts (truncated and masked) has a share of 0.

The terms are computed inside the wrapped model's forward, while FSDP2 still has the unembedding and
the final norm whole (ZeRO-3 gathers them), from what `oisd.Taps` captured there. `compute_loss`
says for which rollouts, so that tokens of advantage 0 are dropped before any arithmetic, and adds
the result. TRL's own pass over the unembedding returns log-probabilities and entropies but no
logits, so the final layer's logits of the tokens that count are computed once more.

Letters: B rollouts, P prompt and C completion positions, T = P + C.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import ProcessorMixin

from oisd.config import AlignmentConfig, ConfigError
from oisd.integrations.alignment import (
    OF_THE_TRAINER,
    Rollouts,
    alignment_losses,
    gathered,
    reduced_means,
    refused_in_words_of,
)
from oisd.integrations.model_guards import guard_model
from oisd.integrations.trl_rewards import math_reward as math_reward
from oisd.integrations.trl_rewards import reasoning_gym_reward as reasoning_gym_reward
from oisd.integrations.trl_shares import Shares
from oisd.integrations.versions import Versions
from oisd.losses import Mean, Metrics, add_metrics
from oisd.models import Taps
from oisd.models.dropout import dropout_rates, set_dropout
from oisd.run.alarms import Alarms, Reading, Settings, measured
from oisd.weights import TERMS, weight_of

VERSIONS = Versions("trl", "1.16", "2")
VERSIONS.check(VERSIONS.installed)

from trl import GRPOConfig, GRPOTrainer  # noqa: E402  # pyright: ignore

_LOGGER = get_logger(__name__)
_LOOK_AT = Settings(
    equal="look at reward_funcs, the column of answers, and log_completions=True",
    finished="look at max_completion_length, and at whether the model ends its answers",
    gap="look at the model's dtype in vLLM and vllm_importance_sampling_correction",
    entropy_low="look at learning_rate, epsilon_high and how hard the problems are",
    entropy_high="look at learning_rate, beta and think_weight",
    timeouts="look at the load of the machine",
    weight="look at {}_weight",
    larger_weight="raise {0}_weight to about {1} for 10 %",
    gold="look at the column of gold answers, and at math_reward's column=",
)

LensNorm = Literal["final", "none"]
Divergence = Literal["jsd", "forward_kl", "reverse_kl"]


def _option(name: str, text: str) -> Any:
    """A field with the default that AlignmentConfig gives `name`, and its help."""
    default: Any = getattr(AlignmentConfig(), name)
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class OISDConfig(GRPOConfig):
    """TRL's GRPOConfig and the options of OISD, named as in `oisd.config.AlignmentConfig`.

    Only its `beta` has another name, `jsd_beta`: TRL's `beta` is the coefficient of the KL term.
    There is no `attention_kernel`: the divergence is always computed beside the attention. A fused
    backward would have to run while the taps are open, but TRL's runs after the forward is over.
    Weights that are annealed or keep a share, and controls of the advantage, are `oisd train`'s.
    Raises ValueError for values out of range.
    """

    student_layers: list[int] = _option(
        "student_layers", "Layers that learn from the final one, counted from 1."
    )
    think_weight: float = _option(
        "think_weight", "Weight of the logit-lens divergence (eq. 7); 0 turns it off."
    )
    attention_weight: float = _option(
        "attention_weight", "Weight of the attention divergence (eq. 10); 0 turns it off."
    )
    share_every: int = _option(
        "share_every",
        "Measure the share of each term's weighted gradient in GRPO's every n steps; 0 for never.",
    )
    advantage_clip: float | None = _option(
        "advantage_clip", "Clip the signed advantage to [-c, c] in both terms; off by default."
    )
    lens_temperature: float = _option(
        "lens_temperature", "Divides the logits of student and teacher in the logit lens."
    )
    lens_norm: LensNorm = _option(
        "lens_norm", "Norm of the logit lens: the model's final norm (OISD) or none (BuPO)."
    )
    divergence: Divergence = _option(
        "divergence", "JSD, forward KL(teacher || student), or reverse KL(student || teacher)."
    )
    jsd_beta: float = _option(
        "beta",
        "The teacher's share of the mixture in the Jensen-Shannon divergence, in (0, 1). Not TRL's "
        "`beta`, the weight of the KL term.",
    )
    attention_steps: int | None = _option(
        "attention_steps", "Decoding steps per completion in the attention loss; all by default."
    )
    key_window: int | None = _option(
        "key_window", "With key_stride: nearest keys in the attention loss; all by default."
    )
    key_stride: int | None = _option(
        "key_stride", "With key_window: take every n-th position of the keys farther away."
    )
    attention_student: list[int] | None = _option(
        "attention_student",
        "For each student layer, the layer whose attention learns; by default the nearest at or "
        "below it that attends by softmax.",
    )
    attention_teacher: int | None = _option(
        "attention_teacher",
        "The layer whose attention is learned from; by default the last that attends by softmax.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("lens_norm", LensNorm), ("divergence", Divergence)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"OISDConfig: {name} must be one of {get_args(choices)}, "
                    f"got {getattr(self, name)!r}"
                )
        self.alignment()

    def alignment(self) -> AlignmentConfig:
        """The options of OISD alone."""
        names = {option.name: option.name for option in fields(AlignmentConfig)}
        names["beta"] = "jsd_beta"
        for name in ("attention_kernel", *OF_THE_TRAINER):
            del names[name]
        try:
            return AlignmentConfig(**{own: getattr(self, name) for own, name in names.items()})
        except ConfigError as error:
            text = str(error).replace("oisd.beta", "jsd_beta").replace("oisd.", "")
            raise ValueError(f"OISDConfig: {text}") from error


def moved() -> list[str]:
    """What this file relies on and the installed TRL no longer has; empty if all is in place."""
    wrong = []
    wanted = ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    found = [*inspect.signature(GRPOTrainer.compute_loss).parameters]
    if found != wanted:
        wrong.append(f"GRPOTrainer.compute_loss must take {wanted}, got {found}")
    if not getattr(GRPOTrainer, "loss_is_scaled_for_ga", False):
        wrong.append("GRPOTrainer.compute_loss must divide by the accumulation steps itself")
    taken = {option.name for option in fields(GRPOConfig)}.intersection(OISDConfig.__annotations__)
    if taken:
        wrong.append(f"GRPOConfig must leave these names to OISDConfig: {sorted(taken)}")
    return wrong


VERSIONS.refuse(moved())


def rollouts_of(inputs: Mapping[str, Any]) -> Rollouts:
    """The rollouts in the inputs of TRL's `compute_loss`.

    Raises RuntimeError if one is missing, ValueError if there are images.
    """
    try:
        prompt, completion = inputs["prompt_mask"], inputs["completion_mask"]
        advantages = inputs["advantages"]
    except KeyError as error:
        raise RuntimeError(
            f"OISDTrainer: TRL's inputs have no {error}; {VERSIONS.remedy}"
        ) from error
    if "pixel_values" in inputs:
        raise ValueError("OISDTrainer: images are not supported, got pixel_values in the batch")
    counts = (completion * inputs.get("tool_mask", 1)).bool()
    # The position before a token predicts it, the last position nothing.
    before = torch.zeros_like(prompt[:, 1:], dtype=torch.bool)
    predicts = torch.cat([before, counts, torch.zeros_like(counts[:, :1])], dim=1)
    signed = torch.zeros_like(predicts, dtype=torch.float32)
    # Subclasses of GRPOTrainer may have one per token.
    signed[:, prompt.shape[1] - 1 : -1] = (
        advantages[:, None] if advantages.dim() == 1 else advantages
    )
    attended = torch.cat([prompt, completion], dim=1)
    return Rollouts(predicts, attended, signed.masked_fill(~predicts, 0.0))


@dataclass
class _Asked:
    """What `compute_loss` asks of the model's forward, and its answer."""

    rollouts: Rollouts
    losses: dict[str, Tensor] | None = None
    metrics: Metrics | None = None


class OISDTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with the losses of OISD; takes its arguments, `args` an OISDConfig.

    The terms are left out of evaluation, whose loss is GRPO's. Logged beside TRL's metrics:
    loss/grpo, loss/think, loss/attention (before their weights), js/think_pos, js/think_neg,
    js/attention_pos, js/attention_neg, entropy/student, entropy/teacher, agreement/top1, and every
    `share_every` steps share/think, share/attention.

    Raises ValueError for what OISD cannot do: image processors, reentrant checkpointing, FSDP
    version 1, context parallelism, a quantised unembedding or one with an adapter, and
    models that `oisd.Taps` does not understand.
    """

    # For the model card.
    _tag_names = ["trl", "grpo", "oisd"]
    _name = "OISD"
    _paper = {
        "title": "OISD: On-Policy Internal Self-Distillation of Language Models",
        "id": "2605.29089",
        "citation": (
            "@article{liu2026oisd,\n"
            "    title  = {{OISD}: On-Policy Internal Self-Distillation of Language Models},\n"
            "    author = {Liu, Xinyu and Jacob, Darryl Cherian and Zhou, Yang and "
            "Wang, Jindong and He, Pan},\n"
            "    year   = 2026,\n"
            "    eprint = {arXiv:2605.29089},\n"
            "}"
        ),
    }
    args: OISDConfig
    model: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: OISDConfig | None = None,
        *more: Any,
        **options: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or "model"
            args = OISDConfig(f"{name.split('/')[-1]}-OISD")
        if not isinstance(args, OISDConfig):
            raise ValueError(
                f"OISDTrainer: args must be an OISDConfig, got {type(args).__name__}; import it "
                f"from oisd.integrations.trl"
            )
        super().__init__(model, reward_funcs, args, *more, **options)
        _settle_dropout(_base(self.model), args.disable_dropout)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # not whole, or not in place
            guard_model(_base(self.model))
        self.alignment = args.alignment()
        self._taps: Taps | None = None
        self._asked: _Asked | None = None
        self._open_metrics: Metrics = {}
        self._alarms, self._alarmed = self._new_run_alarms(), None
        self._shares = Shares(self, self.alignment)
        self._step_noise = torch.Generator(self.accelerator.device)
        self._step_noise.manual_seed(args.seed + 1 + self.accelerator.process_index)
        if self.alignment.active:
            self._refuse()
            self._base = _base(self.model)
            self._align_in_forward(self._base)
            if not self.is_fsdp_enabled:  # under FSDP some processes may not have the weights yet
                # Before DeepSpeed adds its hooks: it would take the probe's order of modules for
                # that of the training forward, and prefetch by it.
                with gathered(*self.model.parameters()):
                    self._make_taps()

    def _refuse(self) -> None:
        """Raises ValueError for a set-up that makes the terms wrong, or that was never tested."""
        checkpointing: Any = self.args.gradient_checkpointing_kwargs or {}
        parallel = getattr(self.args, "parallelism_config", None)
        head = _base(self.model).get_output_embeddings()
        wrong = None
        if isinstance(self.processing_class, ProcessorMixin):
            wrong = "multimodal models are not supported; use a text model and its tokenizer"
        elif self.args.gradient_checkpointing and checkpointing.get("use_reentrant"):
            wrong = 'use gradient_checkpointing_kwargs={"use_reentrant": False}'
            if self.is_deepspeed_enabled and hasattr(self.model, "peft_config"):
                wrong = "TRL makes checkpointing of adapters reentrant in ZeRO-3; turn it off"
        elif self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            wrong = "FSDP version 1 is not supported; set fsdp_version: 2"
        elif any((getattr(parallel, name, 1) or 1) > 1 for name in ("cp_size", "sp_size")):
            wrong = "context and sequence parallelism are not supported; set their sizes to 1"
        elif not head.weight.is_floating_point():
            wrong = "the unembedding is quantised; leave it out (llm_int8_skip_modules)"
        if wrong:
            raise ValueError(f"OISDTrainer: {wrong}")

    def _make_taps(self) -> Taps:
        """The taps, made once; that runs the model on four tokens."""
        if self._taps is not None:
            return self._taps
        align = self.alignment
        words = {"attention": "set attention_weight=0"}
        with self.accelerator.autocast(), refused_in_words_of(words):
            self._taps = Taps(
                self._base,
                student_layers=align.student_layers,
                attention=align.attention_weight > 0,
                lens_norm=align.lens_norm,
                attention_student=align.attention_student,
                attention_teacher=align.attention_teacher,
            )
        if self._taps.attention_words:
            self.accelerator.print(self._taps.attention_words)
        return self._taps

    def _align_in_forward(self, base: Any) -> None:
        """Let the model's forward compute the terms when `compute_loss` has asked for them.

        A hook would not run: PEFT calls `forward` itself. TRL replaces `forward` in the same way.
        """
        inner = base.forward

        @functools.wraps(type(base).forward)  # `generate` reads the signature
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            asked = self._asked
            if asked is None or not torch.is_grad_enabled():
                return inner(*args, **kwargs)
            with self._make_taps() as taps:
                output = inner(*args, **kwargs)
                asked.losses, asked.metrics = alignment_losses(
                    taps,
                    asked.rollouts,
                    self.alignment,
                    operand=self._operand(),
                    noise=self._step_noise,
                )
            return output

        base.forward = types.MethodType(forward, base)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """GRPOTrainer's loss, and in training the weighted terms of OISD."""
        if not (self.alignment.active and self.model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        asked = _Asked(rollouts_of(inputs))
        if isinstance(self._base, FSDPModule):
            # Its forward is FSDP's outermost, which must not run within itself. Inside PEFT's
            # wrapper it may and must, because the wrapper gathers the final norm.
            self._make_taps()
        self._asked = asked
        try:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._asked = None
        if asked.losses is None or asked.metrics is None:
            raise RuntimeError(
                f"OISDTrainer: trl {VERSIONS.installed} did not call the model's forward; "
                f"{VERSIONS.remedy}"
            )
        # TRL's micro-batches hold equally many rollouts, so a step's mean is the mean of theirs.
        steps = self.current_gradient_accumulation_steps
        one = torch.ones((), device=loss.device)
        metrics = asked.metrics | {"loss/grpo": Mean(loss.detach(), one / steps)}
        self._shares.add(asked.losses, steps)
        for name, term in asked.losses.items():
            metrics[f"loss/{name}"] = Mean(term.detach(), one)
            loss = loss + getattr(self.alignment, f"{name}_weight") / steps * term
        self._open_metrics = add_metrics(self._open_metrics, metrics)
        if self.accelerator.sync_gradients:
            self._log_metrics()
        return loss

    def training_step(self, *given: Any, **options: Any) -> Tensor:
        """TRL's; after the last backward of an optimizer step, share/<term> where it is due."""
        loss = super().training_step(*given, **options)
        if self.accelerator.sync_gradients:
            for name, share in self._shares.finish().items():
                self._metrics["train"][name].append(share)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, and the alarms that its metrics raise: a line each, and alarm/<name> as 1."""
        if self.model.training:
            if self._alarmed is not self.state:  # a new run, or one that is resumed
                self._alarmed, self._alarms = self.state, self._new_run_alarms()
                for row in self.state.log_history:
                    self._new_alarms(row, int(row["step"]))
            means = {n: _mean_measured(found) for n, found in self._metrics["train"].items()}
            for name, line in self._new_alarms(means, self.state.global_step).items():
                self._metrics["train"][f"alarm/{name}"].append(1.0)
                _LOGGER.warning(f"step {self.state.global_step}: alarm: {line}")
        super().log(logs, start_time)

    def _new_run_alarms(self) -> Alarms:
        return Alarms(_LOOK_AT, {term: weight_of(self.alignment, term) for term in TERMS})

    def _new_alarms(self, row: Mapping[str, Any], step: int) -> dict[str, str]:
        """What a row of TRL's log raises for the first time; it may cover several steps."""
        value = measured(row)
        if value("reward") is None:  # a row of an evaluation, or of a run's end
            return {}
        cut_off = value("completions/clipped_ratio")
        return self._alarms.new(
            Reading(
                step,
                reward=value("reward"),
                equal=value("frac_reward_zero_std"),
                finished=None if cut_off is None else 1 - cut_off,
                gap=value("sampling/sampling_logp_difference/mean"),
                entropy=value("entropy"),
                timeouts=value("frac_timeouts"),
                shares={t: share for t in TERMS if (share := value(f"share/{t}")) is not None},
                gold=value("frac_gold"),
            )
        )

    def _operand(self) -> torch.dtype | None:
        """The dtype in which TRL's own pass reads the unembedding; None for that of its weight."""
        device = self.accelerator.device.type
        if self.args.cast_lm_head_to_fp32 or not torch.is_autocast_enabled(device):
            return None
        return torch.get_autocast_dtype(device)

    def _log_metrics(self) -> None:
        """Give TRL the means over an optimizer step; waits for the device once."""
        reduce = functools.partial(self.accelerator.reduce, reduction="sum")
        for name, mean in reduced_means(self._open_metrics, reduce).items():
            self._metrics["train"][name].append(mean)
        self._open_metrics = {}


def _mean_measured(values: Sequence[float]) -> float | None:
    """As TRL logs it: the mean of those that are not NaN."""
    found = [value for value in values if not math.isnan(value)]
    return sum(found) / len(found) if found else None


def _settle_dropout(model: Any, disable: bool) -> None:
    """Turn off the rates that TRL's `disable_dropout` leaves on, or warn that there are any.

    TRL turns off dropout modules alone; many attentions read their rate from the config.
    """
    if disable:
        set_dropout(model, 0.0)
    elif rates := dropout_rates(model):
        named = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        warnings.warn(
            f"OISDTrainer: the model's dropout ({named}) is on in training but not in the "
            f"rollouts: noise in each ratio and in the KL term; pass disable_dropout=True in "
            f"OISDConfig",
            stacklevel=3,
        )


def _base(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper, where TRL replaces `forward` too."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
