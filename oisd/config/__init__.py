"""Typed configuration of a training run: TOML tables into frozen dataclasses.

Standard library only, so that a recipe can be read and checked without importing torch. Each table
of a recipe is one dataclass below; a key that no dataclass has is refused with the nearest known
one. A value that is valid or not on its own is checked here; what depends on the model
(`student_layers` against its depth, say) is checked when the model is loaded.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from oisd.config.alignment import AlignmentConfig as AlignmentConfig
from oisd.schema import (
    ConfigError,
    above_0,
    at_least,
    is_scratch,
    merged,
    nearest,
    of_table,
    recipe_chain,
    require,
    require_device,
    require_no_misspelt_blank,
    scratch_sizes,
)
from oisd.schema import differences as differences
from oisd.schema import to_tables as to_tables


@dataclass(frozen=True)
class ModelConfig:
    """The policy: where its weights come from and the precision it runs in."""

    path: str = "arithmetic"
    """Hub id or folder of a causal LM, "arithmetic" for the built-in tiny Qwen3, or
    "scratch:layers=6,width=176,heads=4" for a blank one with a tokenizer made from the data."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward passes; trained parameters are float32 either way.
    In bfloat16 rollouts and evaluations come from a copy of the model in it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant)."""
    attn_implementation: str = "sdpa"
    """Attention implementation, as transformers names it: "sdpa" or "eager"."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository. Off by default."""
    dropout: float | None = 0.0
    """Replaces each dropout rate above 0 that the model ships; "none" keeps them. Rollouts run
    without dropout, so that it is noise in the ratios and in the KL term. Not LoRA's own."""
    lora_rank: int = 0
    """Rank r of LoRA adapters, which are then the only trained weights; 0 trains the model."""
    lora_alpha: float = 32.0
    """An adapter adds lora_alpha / r * B A to its layer's weight. Keep it when you change r."""
    lora_dropout: float = 0.0
    """Dropout on an adapter's input. Rollouts run without it, so that it widens the ratios."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers that get adapters ("q_proj", ...), or all except the head."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        if is_scratch(self.path):
            scratch_sizes(self.path)
        elif ":" in self.path:  # without one it may be the name of a folder elsewhere
            require_no_misspelt_blank(self.path)
        targets = list(self.lora_targets)
        rate = self.dropout
        require(rate is None or 0 <= rate < 1, "model.dropout", 'in [0, 1), or "none"', rate)
        at_least(0, self, "model.lora_rank")
        above_0(self, "model.lora_alpha")
        require(0 <= self.lora_dropout < 1, "model.lora_dropout", "in [0, 1)", self.lora_dropout)
        wanted = 'names of layers, each once, or "all-linear" alone'
        named = bool(targets) and all(targets) and len(set(targets)) == len(targets)
        named = named and (len(targets) == 1 or "all-linear" not in targets)
        require(named, "model.lora_targets", wanted, targets)
        wanted = "without the head (the lens reads only its weight and would miss an adapter)"
        head = any(target.split(".")[-1] in ("lm_head", "embed_out") for target in targets)
        require(not head, "model.lora_targets", wanted, targets)

    @property
    def is_blank(self) -> bool:
        """Whether the model has no weights yet, so that only a warm-up makes it earn anything."""
        return self.path == "arithmetic" or is_scratch(self.path)


@dataclass(frozen=True)
class WarmupConfig:
    """Supervised steps before reinforcement learning, for the built-in tasks' untrained models."""

    steps: int = 0
    """Maximum number of steps; 0 for no warm-up."""
    stop_at: float | None = None
    """Stop when the model gives the correct solutions this probability, on average. A worked
    solution counts as a whole: its probability is at most the accuracy of sampling, since another
    text may end in the right answer too."""
    batch_size: int = 64
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        at_least(0, self, "warmup.steps")
        stop = self.stop_at
        require(stop is None or 0 < stop < 1, "warmup.stop_at", "in (0, 1)", stop)
        at_least(1, self, "warmup.batch_size")
        above_0(self, "warmup.learning_rate")


@dataclass(frozen=True)
class ProblemsConfig:
    """Which rows of a data source are read, and which of their columns."""

    source: str | None = None
    split: str = "train"
    subset: str | None = None
    """Configuration name on the Hub ("main" for GSM8K)."""
    prompt_field: str | None = None
    """Column of the problem; by default a named set's own, otherwise "question"."""
    answer_field: str | None = None
    """Column of the answer; by default a named set's own, otherwise "answer"."""
    answer_pattern: str | None = None
    """Regular expression whose one group is the answer within the answer field, or "boxed"."""
    limit: int | None = None
    """Take this many rows, drawn with `run.seed`."""


@dataclass(frozen=True)
class DataConfig(ProblemsConfig):
    """Problems with verifiable answers, and how a prompt is built from one."""

    source: str = "arithmetic"
    """"deepmath-5k", "deepmath", "dapo", "gsm8k", "math", "name:path" for a local copy of one, a
    JSONL, JSON or Parquet file, a `datasets` folder, a Hub id, or a task that makes its problems:
    "arithmetic:digits=2", "multiplication:digits=3", "reasoning-gym:chain_sum?min_terms=3"."""
    system_prompt: str | None = None
    chat_template: bool | None = None
    """Apply the tokenizer's chat template; by default if it has one."""
    max_prompt_tokens: int = 1024
    overlong_prompts: Literal["error", "drop"] = "error"

    def __post_init__(self) -> None:
        at_least(1, self, "data.limit", "data.max_prompt_tokens")


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
    """transformers' `generate`, its continuous batching, or the faster of the two in a trial before
    the first step (engine.json in the run folder). Their samples differ only by rounding; but with
    "auto" a seed no longer reproduces a new run, although a resumed run still continues exactly."""
    offload: bool = False
    """Keep the optimizer's state in the host's memory. A step reads it from there, a part at a
    time: slower, and 8 bytes less on the card for each trained parameter."""
    trial_tokens: int = 256
    """Longest completion in the trial of "auto", at most `max_completion_tokens`."""

    def __post_init__(self) -> None:
        at_least(1, self, "rollout.prompts_per_step", "rollout.max_completion_tokens")
        at_least(1, self, "rollout.batch_size", "rollout.trial_tokens")
        count = self.completions_per_prompt
        wanted = "at least 2 (advantages compare the completions of a prompt)"
        require(count > 1, "rollout.completions_per_prompt", wanted, count)
        wanted = "above 0 (greedy rollouts have no advantages)"
        require(self.temperature > 0, "rollout.temperature", wanted, self.temperature)
        require(0 < self.top_p <= 1, "rollout.top_p", "in (0, 1]", self.top_p)


@dataclass(frozen=True)
class RewardConfig:
    """What a completion earns."""

    function: str = "math"
    """"math" (last \\boxed{}, compared exactly), "boxed_string", "exact", "final" (what follows the
    last "="), "countdown", "reasoning-gym", or "module:function"."""
    timeout: float = 5.0
    """Seconds that grading one answer may take; for "module:function", a whole batch."""

    def __post_init__(self) -> None:
        require(self.timeout > 0, "reward.timeout", "above 0 seconds", self.timeout)


# For rollouts by another engine; the paper has no such weight.
AUTO_TIS_CAP = 2.0


@dataclass(frozen=True)
class GRPOConfig:
    """The policy loss of the final layer (GRPO and its usual variants)."""

    advantage: Literal["grpo", "rloo", "reinforce++"] = "grpo"
    """Compare a completion's reward with those of its group (GRPO), of the others in its group
    (RLOO), or of all tokens in the batch (Reinforce++)."""
    aggregation: Literal["token-mean", "sequence-mean", "dr-grpo"] = "token-mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 10.0
    """Bound on the ratio where the advantage is negative, above 1; "none" for no bound."""
    scale_by_std: bool = True
    """With "grpo", divide a group's advantages by their standard deviation; Dr. GRPO does not."""
    kl_coef: float = 0.0
    """Weight of the k3 estimate of KL(policy || initial policy)."""
    tis_cap: float | Literal["auto"] | None = "auto"
    """Cap of each token's truncated importance weight min(policy / sampler, cap), in this loss and
    in the alignment's; "none" for no such weight. "auto": 2 for rollouts by continuous batching or
    from the copy in bfloat16, none for `generate` in float32, which runs the update's forward."""
    minibatches: int = 1
    """Optimizer steps per rollout batch."""
    internal_layer: int | None = None
    """BuPO (arXiv 2512.19673): for the first `internal_steps` steps, the loss is that of this
    layer's policy, softmax(W h_l) without the final norm. The final layer still samples, tokens
    have no importance weight, layers above get no gradient. Excludes alignment and `kl_coef`."""
    internal_steps: int = 0
    skip_zero_advantage: bool = True
    """Leave completions of advantage 0 out of the update; without KL their gradient is 0."""

    def __post_init__(self) -> None:
        require(0 <= self.clip_low < 1, "grpo.clip_low", "in [0, 1)", self.clip_low)
        at_least(0, self, "grpo.clip_high", "grpo.kl_coef", "grpo.internal_steps")
        clip = self.dual_clip
        require(clip is None or clip > 1, "grpo.dual_clip", "above 1", clip)
        cap = self.tis_cap
        known = cap is None or cap == "auto" or (not isinstance(cap, str) and cap > 0)
        require(known, "grpo.tis_cap", 'above 0, "auto" or "none"', cap)
        at_least(1, self, "grpo.minibatches", "grpo.internal_layer")
        layer, steps = self.internal_layer, self.internal_steps
        together = "given together with grpo.internal_layer"
        require((layer is None) == (steps == 0), "grpo.internal_steps", together, steps)
        alone = "0 with grpo.internal_layer: the reference model has no such policy"
        require(layer is None or self.kl_coef == 0, "grpo.kl_coef", alone, self.kl_coef)

    def importance_cap(self, engine: str, copied: bool = False) -> float | None:
        """`tis_cap` for rollouts by that engine; copied: from a copy of the model."""
        if self.tis_cap == "auto":
            return AUTO_TIS_CAP if copied or engine == "continuous" else None
        return self.tis_cap


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
        pair = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        require(pair, "optimizer.betas", "two numbers in [0, 1)", list(self.betas))
        above_0(self, "optimizer.learning_rate", "optimizer.eps", "optimizer.max_grad_norm")
        at_least(0, self, "optimizer.warmup_steps", "optimizer.weight_decay")


@dataclass(frozen=True)
class EvalConfig(ProblemsConfig):
    """Evaluation during and after training."""

    source: str | None = None
    """Problems to evaluate on, as in `data.source`; "none" for no evaluation."""
    split: str = "test"
    samples: int = 16
    """Completions per problem: n of Pass@K, K of Avg@K."""
    temperature: float = 1.0
    top_p: float = 1.0
    every: int = 0
    """Evaluate every n steps as well as before the first and after the last; 0 for those only."""

    def __post_init__(self) -> None:
        at_least(1, self, "eval.limit", "eval.samples")
        at_least(0, self, "eval.temperature", "eval.every")
        require(0 < self.top_p <= 1, "eval.top_p", "in (0, 1]", self.top_p)


TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class RunConfig:
    """Length, folder and bookkeeping of the run."""

    output_dir: str = "runs/oisd"
    steps: int = 300
    seed: int = 0
    tokens_per_microbatch: int = 16384
    """Tokens of one forward and backward pass, padding included, on each process."""
    save_every: int = 50
    keep_checkpoints: int = 2
    completions_every: int = 10
    """Write a table of sampled completions every n steps."""
    grad_norm_every: int = 0
    """Measure the gradient norm of each loss on its own every n steps; 0 for never."""
    device: str = "auto"
    sharding: Literal["none", "fsdp2"] = "none"
    """"none" keeps the whole model on each of several processes; "fsdp2" splits parameters,
    gradients and AdamW's state over them (PyTorch's FSDP2). May change when a run is resumed."""
    threads: int | None = None
    """CPU threads of torch; by default torch's own choice."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl: any of "tensorboard", "wandb", "trackio"; may be
    empty. An id in trackers.json lets a resumed run continue there."""
    restart: bool = False
    """Start over in a folder that holds a run, and delete that run."""

    def __post_init__(self) -> None:
        at_least(0, self, "run.steps", "run.save_every", "run.completions_every")
        at_least(0, self, "run.grad_norm_every")
        at_least(1, self, "run.tokens_per_microbatch", "run.keep_checkpoints")
        require_device("run.device", self.device)
        require(0 <= self.seed < 2**63, "run.seed", "in [0, 2^63)", self.seed)
        above_0(self, "run.threads")
        object.__setattr__(self, "trackers", tuple(self.trackers))
        for name in self.trackers:
            if name not in TRACKERS:
                known = nearest(name, TRACKERS)
                raise ConfigError(f"run.trackers must be names of trackers, got {name!r}{known}")
        once = len(set(self.trackers)) == len(self.trackers)
        require(once, "run.trackers", "names, each once", list(self.trackers))


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
        prompts, parts = self.rollout.prompts_per_step, self.grpo.minibatches
        wanted = f"at most rollout.prompts_per_step ({prompts})"
        require(prompts >= parts, "grpo.minibatches", wanted, parts)
        layer = self.grpo.internal_layer
        wanted = '"none" beside an alignment; set oisd.think_weight and oisd.attention_weight to 0'
        require(layer is None or not self.oisd.active, "grpo.internal_layer", wanted, layer)
        require_grader("reward.function", self.reward.function, self.data.source)
        require_grader("reward.function", self.reward.function, self.eval.source)


def require_grader(key: str, reward: str, source: str | None) -> None:
    """Raise ConfigError where only one of grader and problems is that of reasoning-gym.

    key: the setting of the reward, for the message. A function of the user's own may grade any.
    """
    if source is None:
        return
    own, theirs = (name.partition(":")[0] == "reasoning-gym" for name in (reward, source))
    wanted = "another one for problems that are not of reasoning-gym:..."
    require(theirs or not own, key, wanted, f"{reward} with {source}")
    wanted = "'reasoning-gym' for its problems, whose answers are records for its graders"
    require(own or not theirs or ":" in reward, key, wanted, f"{reward} with {source}")


def load_recipe(path: str | Path) -> TrainConfig:
    """Read a TOML recipe, on top of the one that its `base` names, if it has one.

    base: a recipe that comes with oisd ("qwen3-4b"), or a TOML file by its path from this file's
        folder ("mine.toml"), which may have a base itself.
    Raises ConfigError for a file that is missing or is not TOML, for an unknown table, key or base
    (names the nearest known one), for bases in a circle, and for a value of the wrong type or out
    of its range.
    """
    config, tables = TrainConfig(), {}
    for file, own in recipe_chain(Path(path)):  # from the last base on: each names its own mistakes
        tables = merged(tables, own)
        config = from_tables(tables, where=str(file))
    return config


def from_tables(tables: dict[str, Any], where: str = "configuration") -> TrainConfig:
    """Build a TrainConfig from nested dictionaries; refuses unknown keys and wrong types."""
    sections = typing.get_type_hints(TrainConfig)
    built = {}
    for name, table in tables.items():
        if name not in sections:
            raise ConfigError(f"{where}: unknown table [{name}]{nearest(name, sections)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: {name} must be a table, got {table!r}")
        built[name] = of_table(sections[name], name, table, where)
    return TrainConfig(**built)
