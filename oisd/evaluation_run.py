"""`oisd eval`: a model, a data source, a folder that an interrupted evaluation goes on from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress as Bar

from oisd.config import ConfigError, ModelConfig
from oisd.data import encode_prompts, load_examples
from oisd.evaluate import evaluate, in_order, read_problems
from oisd.plots import plot_pass_at_k
from oisd.policy import load_policy
from oisd.processes import Processes
from oisd.rewards import load_reward


@dataclass(frozen=True)
class EvalRun:
    """Settings of an evaluation; the defaults are the paper's protocol."""

    data: str = "arithmetic"
    """JSONL, JSON or Parquet file, `datasets` folder, Hub id, or "arithmetic:digits=2"."""
    split: str = "test"
    subset: str | None = None
    """Configuration name on the Hub ("main" for GSM8K)."""
    prompt_field: str = "question"
    answer_field: str = "answer"
    answer_pattern: str | None = None
    """Regular expression whose one group is the answer within the answer field."""
    limit: int | None = None
    """Evaluate on so many problems, drawn with `seed`."""
    system_prompt: str | None = None
    chat_template: bool | None = None
    max_prompt_tokens: int = 1024
    reward: str = "math"
    """"math" (last \\boxed{} by math-verify), "exact", or "module:function"."""
    timeout: float = 5.0
    """Seconds a grade may take."""
    samples: int = 16
    """Completions per problem: K of Avg@K, n of Pass@K."""
    max_completion_tokens: int = 8192
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 256
    """Completions generated at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    output_dir: str | None = None
    """Folder of the dump, the summary and the plot; by default under runs/eval."""

    # Which settings may differ when an evaluation goes on: they do not change a result.
    _free: tuple[str, ...] = field(
        default=("timeout", "batch_size", "device", "threads", "output_dir"), init=False, repr=False
    )


def run(model: str, config: EvalRun) -> dict[str, Any]:
    """Evaluate, write the files, and return the summary (on the first process; {} on others).

    Raises ConfigError where the folder holds an evaluation with other settings, DataError for
    problems that cannot be used, and what loading the model raises.
    """
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    processes = Processes(config.device)
    name = Path(model).resolve().name if Path(model).exists() else model.replace("/", "--")
    data = Path(config.data).stem if Path(config.data).exists() else config.data
    data = data.replace("/", "--").replace(":", "-")
    folder = Path(config.output_dir or f"runs/eval/{name}/{data}")
    if processes.is_first:
        _prepare(folder, model, config)
    processes.barrier()
    reward = load_reward(config.reward, config.timeout)
    examples = load_examples(
        config.data,
        split=config.split,
        subset=config.subset,
        prompt_field=config.prompt_field,
        answer_field=config.answer_field,
        answer_pattern=config.answer_pattern,
        limit=config.limit,
        seed=config.seed,
    )
    policy = load_policy(
        ModelConfig(
            path=model,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        ),
        seed=config.seed,
        device=processes.device,
    )
    prompts = encode_prompts(
        policy.tokenizer,
        examples,
        system_prompt=config.system_prompt,
        chat_template=config.chat_template,
        max_prompt_tokens=config.max_prompt_tokens,
    )
    try:
        with Bar(disable=not processes.is_first) as bar:
            task = bar.add_task("evaluating", total=len(processes.share(examples)))
            mine = evaluate(
                policy,
                examples,
                prompts.token_ids,
                reward,
                samples=config.samples,
                max_completion_tokens=config.max_completion_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=config.seed,
                batch_size=config.batch_size,
                rank=processes.rank,
                world_size=processes.size,
                dump=folder / f"problems-{processes.rank}-of-{processes.size}.jsonl",
                on_progress=lambda done: bar.update(task, completed=done),
            )
        result = in_order(processes.gather(mine), examples)
    finally:
        reward.close()
        processes.close()
    if not processes.is_first:
        return {}
    summary = {"model": model, "data": config.data, **result.summary(), "output_dir": str(folder)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    plot_pass_at_k(
        {name: result.pass_curve()},
        folder / "pass_at_k.png",
        {name: summary["pass_at_k_interval"]},
    )
    return summary


def _prepare(folder: Path, model: str, config: EvalRun) -> None:
    """Make the folder, or find that it holds this very evaluation."""
    settings = {"model": model} | {
        k: v for k, v in asdict(config).items() if k not in (*config._free, "_free")
    }
    file = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            theirs = json.loads(file.read_text(encoding="utf-8"))
            changed = [
                f"{k}: {theirs.get(k)!r} != {v!r}"
                for k, v in settings.items()
                if theirs.get(k) != v
            ]
            if changed:
                raise ConfigError(
                    f"{folder} holds an evaluation with other settings (there != here): "
                    f"{'; '.join(changed)}; choose another --output-dir"
                )
        file.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"output_dir {str(folder)!r} cannot be written: {error.strerror or error}"
        ) from error
    for dump in folder.glob("problems-*.jsonl"):
        read_problems(dump)  # mends a line that a kill cut short
