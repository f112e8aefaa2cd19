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
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import ProcessorMixin

from oisd.config import AlignmentConfig, ConfigError
from oisd.integrations.alignment import Rollouts, alignment_losses, gathered
from oisd.losses import Mean, Metrics, add_metrics
from oisd.models import Taps

OLDEST, TOO_NEW = "1.16", "2"
REMEDY = f"pip install 'trl>={OLDEST},<{TOO_NEW}'"


def check_version(found: str | None) -> None:
    """Raises ImportError, with the remedy, unless this is a version of TRL that will do."""
    got = "it is not installed" if found is None else f"got {found}"
    if found is None or not Version(OLDEST) <= Version(found) < Version(TOO_NEW):
        raise ImportError(
            f"oisd.integrations.trl: needs trl >= {OLDEST}, < {TOO_NEW}, {got}; {REMEDY}"
        )


def _installed() -> str | None:
    try:
        return version("trl")
    except PackageNotFoundError:
        return None


check_version(_installed())

from trl import GRPOConfig, GRPOTrainer  # noqa: E402  # pyright: ignore

LensNorm = Literal["final", "none"]
Divergence = Literal["jsd", "forward_kl", "reverse_kl"]
_DEFAULT = AlignmentConfig()


@dataclass
class OISDConfig(GRPOConfig):
    """TRL's GRPOConfig and the options of OISD, named as in `oisd.config.AlignmentConfig`.

    The one other name is `jsd_beta` for its `beta`, which in TRL is the coefficient of the KL term.
    There is no `attention_kernel`: the divergence is always computed beside the attention, because
    a fused backward would have to run within the taps, and TRL's runs after the forward is left.
    Raises ValueError for values out of range.
    """

    student_layers: list[int] = field(
        default_factory=lambda: list(_DEFAULT.student_layers),
        metadata={"help": "Layers that learn from the final one, counted from 1."},
    )
    think_weight: float = field(
        default=_DEFAULT.think_weight,
        metadata={"help": "Weight of the logit-lens divergence (eq. 7); 0 turns it off."},
    )
    attention_weight: float = field(
        default=_DEFAULT.attention_weight,
        metadata={"help": "Weight of the attention divergence (eq. 10); 0 turns it off."},
    )
    advantage_clip: float | None = field(
        default=_DEFAULT.advantage_clip,
        metadata={"help": "Clip the signed advantage to [-c, c] in both; not clipped by default."},
    )
    lens_temperature: float = field(
        default=_DEFAULT.lens_temperature,
        metadata={"help": "Divides the logits of student and teacher in the logit lens."},
    )
    lens_norm: LensNorm = field(
        default=_DEFAULT.lens_norm,
        metadata={"help": "Norm of the logit lens: the model's final norm (OISD) or none (BuPO)."},
    )
    divergence: Divergence = field(
        default=_DEFAULT.divergence,
        metadata={"help": "KL directions are forward = KL(teacher || student), and reverse."},
    )
    jsd_beta: float = field(
        default=_DEFAULT.beta,
        metadata={
            "help": "The teacher's share of the mixture in the Jensen-Shannon divergence, in (0, "
            "1). Not TRL's `beta`, the weight of the KL term."
        },
    )
    attention_steps: int | None = field(
        default=_DEFAULT.attention_steps,
        metadata={"help": "Decoding steps per completion in the attention loss; all by default."},
    )
    key_window: int | None = field(
        default=_DEFAULT.key_window,
        metadata={"help": "With key_stride: nearest keys in the attention loss; all by default."},
    )
    key_stride: int | None = field(
        default=_DEFAULT.key_stride,
        metadata={"help": "With key_window: every how many positions a farther key is taken."},
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
        del names["attention_kernel"]
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


if moved():
    raise ImportError(
        f"oisd.integrations.trl: trl {_installed()} has moved what it relies on: "
        f"{'; '.join(moved())}; {REMEDY}, in its oldest version"
    )


def rollouts_of(inputs: Mapping[str, Any]) -> Rollouts:
    """The rollouts in the inputs of TRL's `compute_loss`.

    Raises RuntimeError if these have other names than expected, ValueError if there are images.
    """
    try:
        prompt, completion = inputs["prompt_mask"], inputs["completion_mask"]
        advantages = inputs["advantages"]
    except KeyError as error:
        raise RuntimeError(f"OISDTrainer: TRL's inputs have no {error}; {REMEDY}") from error
    if "pixel_values" in inputs:
        raise ValueError("OISDTrainer: images are not supported, got pixel_values in the batch")
    counts = (completion * inputs.get("tool_mask", 1)).bool()
    # The position before a token predicts it, the last position nothing.
    before = torch.zeros_like(prompt[:, 1:], dtype=torch.bool)
    predicts = torch.cat([before, counts, torch.zeros_like(counts[:, :1])], dim=1)
    signed = torch.zeros_like(predicts, dtype=torch.float32)
    # Subclasses of GRPOTrainer may have one a token.
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
    js/attention_pos, js/attention_neg, entropy/student, entropy/teacher, agreement/top1.

    Raises ValueError for what OISD cannot do: processors of images, reentrant checkpointing, FSDP
    version 1, context parallelism, a quantised unembedding or one with an adapter, and
    models that `oisd.Taps` does not understand.
    """

    # Of the model card.
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
        self.alignment = args.alignment()
        self._taps: Taps | None = None
        self._asked: _Asked | None = None
        self._open_metrics: Metrics = {}
        self._step_noise = torch.Generator(self.accelerator.device)
        self._step_noise.manual_seed(args.seed + 1 + self.accelerator.process_index)
        if self.alignment.active:
            self._refuse()
            self._base = _base(self.model)
            self._align_in_forward(self._base)
            if not self.is_fsdp_enabled:  # else not all processes may have the weights yet
                # Before DeepSpeed's hooks are there: it would take the order of the probe's modules
                # for the training forward's, and prefetch by it.
                with gathered(*self.model.parameters()):
                    self._make_taps()

    def _refuse(self) -> None:
        """Raises ValueError for a set-up in which the terms would be wrong, or were never tried."""
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
        with self.accelerator.autocast():
            self._taps = Taps(
                self._base,
                student_layers=align.student_layers,
                attention=align.attention_weight > 0,
                lens_norm=align.lens_norm,
            )
        return self._taps

    def _align_in_forward(self, base: Any) -> None:
        """Let the model's forward compute the terms when `compute_loss` has asked for them.

        A hook would not do: PEFT calls `forward` itself. TRL puts its own forward in the same way.
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
            # Its forward is FSDP's outermost, within which it must not be called again. Inside a
            # wrapper of PEFT it may, and must be, for the wrapper gathers the final norm.
            self._make_taps()
        self._asked = asked
        try:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._asked = None
        if asked.losses is None or asked.metrics is None:
            raise RuntimeError(
                f"OISDTrainer: trl {_installed()} did not call the model's forward; {REMEDY}"
            )
        # TRL's micro-batches have equally many rollouts, so the mean over a step is this one's.
        steps = self.current_gradient_accumulation_steps
        one = torch.ones((), device=loss.device)
        metrics = asked.metrics | {"loss/grpo": Mean(loss.detach(), one / steps)}
        for name, term in asked.losses.items():
            metrics[f"loss/{name}"] = Mean(term.detach(), one)
            loss = loss + getattr(self.alignment, f"{name}_weight") / steps * term
        self._open_metrics = add_metrics(self._open_metrics, metrics)
        if self.accelerator.sync_gradients:
            self._log_metrics()
        return loss

    def _operand(self) -> torch.dtype | None:
        """The dtype in which TRL's own pass reads the unembedding; None for that of its weight."""
        device = self.accelerator.device.type
        if self.args.cast_lm_head_to_fp32 or not torch.is_autocast_enabled(device):
            return None
        return torch.get_autocast_dtype(device)

    def _log_metrics(self) -> None:
        """Give TRL the means over an optimizer step; one reduction and one wait for the device."""
        names = sorted(self._open_metrics)
        pairs = [(self._open_metrics[n].total, self._open_metrics[n].count) for n in names]
        local = torch.stack([torch.stack(pair).float() for pair in pairs])
        sums: Any = self.accelerator.reduce(local, reduction="sum")
        for name, (total, count) in zip(names, sums.tolist(), strict=True):
            if count:
                self._metrics["train"][name].append(total / count)
        self._open_metrics = {}


def _base(model: Any) -> Any:
    """The transformers model inside PEFT's, which is where TRL puts its forward too."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
