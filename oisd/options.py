"""Options of `oisd eval`, `check`, `lens`, `attention` and `report`.

Standard library only, so that `--help` does not wait for torch. Apart from `oisd.config`, because
`oisd train` does not need them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EvalRun:
    """Settings of `oisd eval`; the defaults follow the paper's protocol."""

    benchmark: tuple[str, ...] = ()
    """Any of amc23, math500, aime24, aime25, gsm8k, math: from the Hub, or name:folder for a local
    copy. They replace --data."""
    data: str = "arithmetic"
    """JSONL, JSON or Parquet file, `datasets` folder, Hub id, or a task that makes its problems:
    "arithmetic:digits=2", "multiplication:digits=3", "reasoning-gym:chain_sum"."""
    split: str = "test"
    subset: str | None = None
    """Configuration name on the Hub ("main" for GSM8K)."""
    prompt_field: str | None = None
    """Column of the problem; by default the benchmark's own, otherwise "question"."""
    answer_field: str | None = None
    """Column of the answer; by default the benchmark's own, otherwise "answer"."""
    answer_pattern: str | None = None
    """Regular expression whose one group is the answer within the answer field, or "boxed"."""
    limit: int | None = None
    """Evaluate on this many problems, drawn with `seed`."""
    system_prompt: str | None = None
    """By default the paper's for benchmarks ("" for none), and none for --data."""
    chat_template: bool | None = None
    max_prompt_tokens: int = 1024
    reward: str = "math"
    """"math" (last \\boxed{}, compared exactly), "boxed_string", "exact", "final" (what follows the
    last "="), "countdown", "reasoning-gym", or "module:function"."""
    timeout: float = 5.0
    """Seconds that grading one answer may take."""
    samples: int | None = None
    """Completions per problem, K of Avg@K and n of Pass@K; by default the benchmark's own, 16 or
    32. The paper's Pass@K uses 300."""
    max_completion_tokens: int = 8192
    """The paper uses 8192 for Qwen3 and 3072 for OctoThinker."""
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 256
    """Completions generated at once."""
    engine: Literal["generate", "continuous"] = "generate"
    """transformers' `generate` or its continuous batching."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    output_dir: str | None = None
    """Folder for the completions, the summary and the plot, or for one such folder per benchmark;
    by default under runs/eval."""

    # These may change when an evaluation is resumed: they do not change a result. Without an
    # annotation, because tyro 0.9 takes a ClassVar for an option.
    _free = ("benchmark", "timeout", "batch_size", "device", "threads", "output_dir")


@dataclass(frozen=True)
class LookRun:
    """Settings of `oisd lens`: your own texts (`--prompt`), or problems."""

    prompt: tuple[str, ...] = ()
    """Texts; with a chat template, each becomes a user's message."""
    data: str | None = None
    """Name of a data set, file, `datasets` folder or Hub id, as for `oisd train`. The options up to
    --limit are for it alone."""
    split: str = "test"
    subset: str | None = None
    prompt_field: str | None = None
    answer_field: str | None = None
    limit: int = 32
    """Read this many problems, drawn with `seed`."""
    system_prompt: str | None = None
    chat_template: bool | None = None
    """Apply the tokenizer's chat template; by default if it has one."""
    max_prompt_tokens: int = 1024
    completion_tokens: int = 0
    """Let the (first) model continue each text by this many tokens, and include them."""
    layer: int | None = None
    """The student layer in the attention pictures; by default the boundary layer."""
    compare: str | None = None
    """A second checkpoint, to read the same tokens."""
    picture_tokens: int = 24
    """Number of tokens in the pictures, the last ones of the first text."""
    divergence: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd"
    lens_norm: Literal["final", "none"] = "final"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model's forward passes; what is measured is computed in float32."""
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    output_dir: str | None = None
    """Folder for the pictures; by default under runs/lens."""


@dataclass(frozen=True)
class AttentionRun(LookRun):
    """Settings of `oisd attention`, as those of `oisd lens`."""

    output_dir: str | None = None
    """Folder for the picture; by default under runs/attention."""


@dataclass(frozen=True)
class CheckRun:
    """Settings of `oisd check`; what is left out is the recipe's, or else that of `oisd train`."""

    recipe: str | None = None
    """The run that is meant: a recipe that comes with oisd, or a TOML file."""
    data: str | None = None
    """JSONL, JSON or Parquet file, `datasets` folder, Hub id, or "arithmetic:digits=2"; by default
    the recipe's. Without either, nothing is said about data."""
    split: str | None = None
    subset: str | None = None
    prompt_field: str | None = None
    answer_field: str | None = None
    answer_pattern: str | None = None
    limit: int | None = None
    """Look at this many problems, drawn with `seed`; by default at all."""
    eval_data: str | None = None
    """Problems of the evaluation, which must not be among those of --data."""
    system_prompt: str | None = None
    chat_template: bool | None = None
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    reward: str | None = None
    timeout: float | None = None
    """Seconds that grading one answer may take."""
    prompts: int = 4
    """Sample completions of this many prompts,"""
    completions: int = 4
    """and this many of each,"""
    completion_tokens: int = 48
    """of at most this many tokens, so that the check stays short."""
    temperature: float | None = None
    top_p: float | None = None
    engine: Literal["generate", "continuous", "auto"] | None = None
    layer: int | None = None
    """The layer to align; by default the recipe's."""
    dtype: Literal["float32", "bfloat16"] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool | None = None
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    output_dir: str | None = None
    """Folder for check.json; by default under runs/check."""


@dataclass(frozen=True)
class ReportRun:
    """Settings of `oisd report`."""

    output: str | None = None
    """The page; by default report.html in the folder of the one run, or runs/report.html."""
    inside: bool = False
    """Load each group's first and last checkpoint, and show lens and attention before and after."""
    inside_texts: int = 8
    """Number of texts of the run's own that --inside looks at."""
    device: str = "auto"
    threads: int | None = None
