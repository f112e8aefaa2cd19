"""Typed configuration of a training run: TOML tables into frozen dataclasses.

Standard library only, so that a recipe can be read and checked without importing torch. Each table
of a recipe is one dataclass below; a key that no dataclass has is refused with the nearest one that
exists. The values are checked here where they can be checked alone; what depends on the model
(`student_layers` against its depth, say) is checked when the model is loaded.
"""

from __future__ import annotations

import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from oisd.schema import ConfigError, nearest, of_table, require_device
from oisd.schema import fields as _fields
from oisd.schema import require as _require


@dataclass(frozen=True)
class ModelConfig:
    """The policy: where its weights come from and in which precision it runs."""

    path: str = "arithmetic"
    """Hub id or folder of a causal LM, or "arithmetic" for the built-in tiny Qwen3."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward and backward passes; the parameters stay float32 either way."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant)."""
    attn_implementation: str = "sdpa"
    """Attention of the layers, as transformers names it: "sdpa" or "eager"."""
    trust_remote_code: bool = False
    """Run Python code that a model repository ships. Off unless asked for."""
    lora_rank: int = 0
    """Rank r of LoRA adapters, the only weights trained then; 0 to train the model itself."""
    lora_alpha: float = 32.0
    """An adapter adds lora_alpha / r * B A to its layer's weight. The same at every rank."""
    lora_dropout: float = 0.0
    """Of what enters an adapter. Rollouts are without it, so that it widens the ratios."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers with adapters ("q_proj", ...), or all but the head."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        targets = list(self.lora_targets)
        _require(self.lora_rank >= 0, "model.lora_rank", "at least 0", self.lora_rank)
        _require(self.lora_alpha > 0, "model.lora_alpha", "above 0", self.lora_alpha)
        _require(0 <= self.lora_dropout < 1, "model.lora_dropout", "in [0, 1)", self.lora_dropout)
        wanted = 'names of layers, each once, or "all-linear" alone'
        named = bool(targets) and all(targets) and len(set(targets)) == len(targets)
        named = named and (len(targets) == 1 or "all-linear" not in targets)
        _require(named, "model.lora_targets", wanted, targets)
        wanted = "without the head (the lens reads its weight alone, an adapter it would not see)"
        head = any(target.split(".")[-1] in ("lm_head", "embed_out") for target in targets)
        _require(not head, "model.lora_targets", wanted, targets)


@dataclass(frozen=True)
class WarmupConfig:
    """Supervised steps before reinforcement learning; for the arithmetic task's blank model."""

    steps: int = 0
    """At most so many; 0 for no warm-up."""
    stop_at: float | None = None
    """Stop when the model gives the right answers this probability, on average."""
    batch_size: int = 64
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "warmup.steps", "at least 0", self.steps)
        _require(
            self.stop_at is None or 0 < self.stop_at < 1,
            "warmup.stop_at",
            "in (0, 1)",
            self.stop_at,
        )
        _require(self.batch_size > 0, "warmup.batch_size", "at least 1", self.batch_size)
        _require(self.learning_rate > 0, "warmup.learning_rate", "above 0", self.learning_rate)


@dataclass(frozen=True)
class DataConfig:
    """Problems with verifiable answers, and how a prompt is made of one."""

    source: str = "arithmetic"
    """"deepmath-5k", "deepmath", "dapo", "gsm8k", "math", or "name:path" for a copy of one of them
    here; JSONL, JSON or Parquet file, `datasets` folder, Hub id, or "arithmetic:digits=2"."""
    split: str = "train"
    subset: str | None = None
    """Configuration name on the Hub ("main" for GSM8K)."""
    prompt_field: str | None = None
    """By default the named set's, otherwise "question"; `answer_field` alike, "answer"."""
    answer_field: str | None = None
    answer_pattern: str | None = None
    """Regular expression whose one group is the answer within the answer field, or "boxed"."""
    limit: int | None = None
    """Take this many rows, drawn with `run.seed`."""
    system_prompt: str | None = None
    chat_template: bool | None = None
    """Apply the tokenizer's chat template; by default when it has one."""
    max_prompt_tokens: int = 1024
    overlong_prompts: Literal["error", "drop"] = "error"

    def __post_init__(self) -> None:
        _require(self.limit is None or self.limit > 0, "data.limit", "at least 1", self.limit)
        _require(
            self.max_prompt_tokens > 0,
            "data.max_prompt_tokens",
            "at least 1",
            self.max_prompt_tokens,
        )


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of completions from the current policy."""

    prompts_per_step: int = 128
    completions_per_prompt: int = 8
    max_completion_tokens: int = 8192
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 256
    """Completions generated at once, on each process."""
    engine: Literal["generate", "continuous", "auto"] = "generate"
    """transformers' `generate`, its continuous batching, or the one of the two that is faster in a
    trial before the first step (engine.json in the run's folder). They sample alike but for the
    last digits, so that "auto" gives up that a seed fixes a new run, though not its resumption."""
    trial_tokens: int = 256
    """Longest completion in the trial of "auto", at most `max_completion_tokens`."""

    def __post_init__(self) -> None:
        names = ("prompts_per_step", "max_completion_tokens", "batch_size", "trial_tokens")
        for name in names:
            _require(getattr(self, name) > 0, f"rollout.{name}", "at least 1", getattr(self, name))
        _require(
            self.completions_per_prompt > 1,
            "rollout.completions_per_prompt",
            "at least 2 (advantages compare the completions of a prompt)",
            self.completions_per_prompt,
        )
        _require(
            self.temperature > 0,
            "rollout.temperature",
            "above 0 (greedy rollouts have no advantages)",
            self.temperature,
        )
        _require(0 < self.top_p <= 1, "rollout.top_p", "in (0, 1]", self.top_p)


@dataclass(frozen=True)
class RewardConfig:
    """What a completion earns."""

    function: str = "math"
    """"math" (last \\boxed{} by math-verify), "boxed_string", "exact", or "module:function"."""
    timeout: float = 5.0
    """Seconds a grade may take; for "module:function", a whole batch."""

    def __post_init__(self) -> None:
        _require(self.timeout > 0, "reward.timeout", "above 0 seconds", self.timeout)


# For rollouts by another engine; the paper has no such weight.
AUTO_TIS_CAP = 2.0


@dataclass(frozen=True)
class GRPOConfig:
    """The policy loss of the final layer (GRPO and its usual variants)."""

    advantage: Literal["grpo", "rloo", "reinforce++"] = "grpo"
    """A completion's reward against those of its group (GRPO), against the others' of its group
    (RLOO), or against those of all tokens of the batch (Reinforce++)."""
    aggregation: Literal["token-mean", "sequence-mean", "dr-grpo"] = "token-mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 10.0
    """Bound on ratio for negative advantages, above 1; none for no bound."""
    scale_by_std: bool = True
    """Divide a group's advantages by its standard deviation (Dr. GRPO does not); "grpo" alone."""
    kl_coef: float = 0.0
    """Weight of the k3 estimate of KL(policy || initial policy)."""
    tis_cap: float | Literal["auto"] | None = "auto"
    """Cap of the truncated importance weight min(policy / sampler, cap) of each token, in this loss
    and in the alignment's; none for no such weight. "auto": 2 for rollouts by continuous batching,
    none for `generate`, which runs the same forward as the update."""
    minibatches: int = 1
    """Optimizer steps per rollout batch."""
    internal_layer: int | None = None
    """BuPO (arXiv 2512.19673): for the first `internal_steps` steps the loss is that of the policy
    of this layer, softmax(W h_l) without the final norm. The model samples as ever, and tokens have
    no importance weight; layers above get no gradient. Not beside an alignment or `kl_coef`."""
    internal_steps: int = 0
    skip_zero_advantage: bool = True
    """Leave completions of advantage 0 out of the update; their gradient is 0 without a KL term."""

    def __post_init__(self) -> None:
        _require(0 <= self.clip_low < 1, "grpo.clip_low", "in [0, 1)", self.clip_low)
        _require(self.clip_high >= 0, "grpo.clip_high", "at least 0", self.clip_high)
        _require(
            self.dual_clip is None or self.dual_clip > 1,
            "grpo.dual_clip",
            "above 1",
            self.dual_clip,
        )
        _require(self.kl_coef >= 0, "grpo.kl_coef", "at least 0", self.kl_coef)
        cap = self.tis_cap
        known = cap is None or cap == "auto" or (not isinstance(cap, str) and cap > 0)
        _require(known, "grpo.tis_cap", 'above 0, "auto" or "none"', cap)
        _require(self.minibatches > 0, "grpo.minibatches", "at least 1", self.minibatches)
        layer, steps = self.internal_layer, self.internal_steps
        _require(layer is None or layer > 0, "grpo.internal_layer", "at least 1", layer)
        _require(steps >= 0, "grpo.internal_steps", "at least 0", steps)
        together = "given together with grpo.internal_layer"
        _require((layer is None) == (steps == 0), "grpo.internal_steps", together, steps)
        alone = "0 with grpo.internal_layer: the reference model has no such policy"
        _require(layer is None or self.kl_coef == 0, "grpo.kl_coef", alone, self.kl_coef)

    def importance_cap(self, engine: str) -> float | None:
        """`tis_cap` for rollouts by that engine."""
        if self.tis_cap == "auto":
            return AUTO_TIS_CAP if engine == "continuous" else None
        return self.tis_cap


@dataclass(frozen=True)
class AlignmentConfig:
    """The internal self-distillation: an intermediate layer learns from the final one."""

    student_layers: tuple[int, ...] = (6,)
    """Layers that learn, counted from 1 (`hidden_states[l]` of transformers)."""
    think_weight: float = 1.0
    """Weight of the logit-lens divergence (lambda_think of eq. 11); 0 turns it off."""
    attention_weight: float = 0.1
    """Weight of the attention divergence (lambda_attn of eq. 11); 0 turns it off."""
    advantage_clip: float | None = None
    """Clip the signed advantage to [-c, c]; the paper states no c, so none by default."""
    lens_temperature: float = 1.0
    lens_norm: Literal["final", "none"] = "final"
    """Norm of the logit lens: the model's own final norm (OISD) or none (BuPO)."""
    divergence: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd"
    beta: float = 0.5
    """The teacher's share of the mixture in the Jensen-Shannon divergence."""
    attention_kernel: Literal["auto", "fused", "separate", "reference"] = "auto"
    """How the attention loss is computed: in the student layers' own attention ("fused"), beside it
    ("separate"), with whole maps in memory ("reference"). "auto" fuses on a GPU where a layer
    allows it, and is "separate" elsewhere and with sampled keys."""
    attention_steps: int | None = None
    """Decoding steps per rollout in the attention loss, drawn at random; all by default."""
    key_window: int | None = None
    """With `key_stride`: nearest keys in the attention loss; all keys by default."""
    key_stride: int | None = None
    """With `key_window`: every how many positions a farther key is taken."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "student_layers", tuple(self.student_layers))
        layers = self.student_layers
        _require(
            all(layer >= 1 for layer in layers),
            "oisd.student_layers",
            "layers counted from 1",
            list(layers),
        )
        _require(
            len(set(layers)) == len(layers), "oisd.student_layers", "distinct layers", list(layers)
        )
        if self.think_weight or self.attention_weight:
            _require(len(layers) > 0, "oisd.student_layers", "at least one layer", list(layers))
        for name in ("think_weight", "attention_weight"):
            _require(getattr(self, name) >= 0, f"oisd.{name}", "at least 0", getattr(self, name))
        for name in ("advantage_clip", "lens_temperature"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"oisd.{name}", "above 0", value)
        wanted = 'in (0, 1); for a pure KL use divergence = "forward_kl" or "reverse_kl"'
        _require(0 < self.beta < 1, "oisd.beta", wanted, self.beta)
        _require(
            (self.key_window is None) == (self.key_stride is None),
            "oisd.key_window and oisd.key_stride",
            "given together",
            (self.key_window, self.key_stride),
        )
        _require(
            self.attention_kernel != "fused" or self.key_window is None,
            "oisd.attention_kernel",
            "another than 'fused' with sampled keys (oisd.key_window)",
            self.attention_kernel,
        )
        for name in ("attention_steps", "key_window", "key_stride"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"oisd.{name}", "at least 1", value)

    @property
    def active(self) -> bool:
        """Whether any alignment loss is on."""
        return bool(self.think_weight or self.attention_weight)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        _require(self.learning_rate > 0, "optimizer.learning_rate", "above 0", self.learning_rate)
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optimizer.betas",
            "two numbers in [0, 1)",
            list(self.betas),
        )
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", "at least 0", self.warmup_steps)
        _require(self.eps > 0, "optimizer.eps", "above 0", self.eps)
        _require(self.weight_decay >= 0, "optimizer.weight_decay", "at least 0", self.weight_decay)
        _require(self.max_grad_norm > 0, "optimizer.max_grad_norm", "above 0", self.max_grad_norm)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during and after training."""

    source: str | None = None
    """Problems to evaluate on, as `data.source`; none for no evaluation."""
    split: str = "test"
    subset: str | None = None
    prompt_field: str | None = None
    answer_field: str | None = None
    answer_pattern: str | None = None
    limit: int | None = None
    samples: int = 16
    """Completions per problem: n of Pass@K, K of Avg@K."""
    temperature: float = 1.0
    top_p: float = 1.0
    every: int = 0
    """Evaluate every so many steps, besides before the first and after the last; 0 for not."""

    def __post_init__(self) -> None:
        _require(self.limit is None or self.limit > 0, "eval.limit", "at least 1", self.limit)
        _require(self.samples > 0, "eval.samples", "at least 1", self.samples)
        _require(self.temperature >= 0, "eval.temperature", "at least 0", self.temperature)
        _require(0 < self.top_p <= 1, "eval.top_p", "in (0, 1]", self.top_p)
        _require(self.every >= 0, "eval.every", "at least 0", self.every)


@dataclass(frozen=True)
class RunConfig:
    """Length, place and bookkeeping of the run."""

    output_dir: str = "runs/oisd"
    steps: int = 300
    seed: int = 0
    tokens_per_microbatch: int = 16384
    """Padded tokens of one forward and backward pass, on each process."""
    save_every: int = 50
    keep_checkpoints: int = 2
    completions_every: int = 10
    """Every how many steps a table of sampled completions is written."""
    grad_norm_every: int = 0
    """Every how many steps each loss's own gradient norm is measured; 0 for never."""
    device: str = "auto"
    threads: int | None = None
    """CPU threads of torch; torch's own choice by default."""
    restart: bool = False
    """Begin anew in a folder that holds a run, deleting it."""

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "completions_every", "grad_norm_every"):
            _require(getattr(self, name) >= 0, f"run.{name}", "at least 0", getattr(self, name))
        for name in ("tokens_per_microbatch", "keep_checkpoints"):
            _require(getattr(self, name) > 0, f"run.{name}", "at least 1", getattr(self, name))
        require_device("run.device", self.device)
        _require(0 <= self.seed < 2**63, "run.seed", "in [0, 2^63)", self.seed)
        _require(self.threads is None or self.threads > 0, "run.threads", "above 0", self.threads)


@dataclass(frozen=True)
class TrainConfig:
    """A whole run; each field is a table of the recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    oisd: AlignmentConfig = field(default_factory=AlignmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _require(
            self.rollout.prompts_per_step >= self.grpo.minibatches,
            "grpo.minibatches",
            f"at most rollout.prompts_per_step ({self.rollout.prompts_per_step})",
            self.grpo.minibatches,
        )
        _require(
            self.grpo.internal_layer is None or not self.oisd.active,
            "grpo.internal_layer",
            '"none" beside an alignment; set oisd.think_weight and oisd.attention_weight to 0',
            self.grpo.internal_layer,
        )


def load_recipe(path: str | Path) -> TrainConfig:
    """Read a TOML recipe.

    Raises ConfigError for a file that is missing or is not TOML, for an unknown table or key (names
    the nearest known one), and for a value of the wrong type or out of its range.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid TOML: {error}") from error
    return from_tables(tables, where=str(path))


def from_tables(tables: dict[str, Any], where: str = "configuration") -> TrainConfig:
    """Build a TrainConfig of nested dictionaries, refusing unknown keys and wrong types."""
    sections = {f.name: typing.get_type_hints(TrainConfig)[f.name] for f in _fields(TrainConfig)}
    built = {}
    for name, table in tables.items():
        if name not in sections:
            raise ConfigError(f"{where}: unknown table [{name}]{nearest(name, sections)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: {name} must be a table, got {table!r}")
        built[name] = of_table(sections[name], name, table, where)
    return TrainConfig(**built)


def to_tables(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Nested dictionaries ready for TOML, which has no null: a value of None is left out.

    Nothing is lost, since every field that may be None and is not by default would be: such a
    field is written as "none" and read back as None.
    """
    tables: dict[str, dict[str, Any]] = {}
    for section in _fields(config):
        values = getattr(config, section.name)
        table = {}
        for f in _fields(values):
            value = getattr(values, f.name)
            if value is None and f.default is not None:
                value = "none"
            if value is not None:
                table[f.name] = list(value) if isinstance(value, tuple) else value
        tables[section.name] = table
    return tables


def differences(a: TrainConfig, b: TrainConfig) -> list[str]:
    """The settings in which two configurations differ, as "table.key: a != b"."""
    found = []
    for section in _fields(a):
        left, right = getattr(a, section.name), getattr(b, section.name)
        for f in _fields(left):
            x, y = getattr(left, f.name), getattr(right, f.name)
            if x != y:
                found.append(f"{section.name}.{f.name}: {x!r} != {y!r}")
    return found
