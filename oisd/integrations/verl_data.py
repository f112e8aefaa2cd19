"""Problems of a recipe and their reward in the form that verl takes; does not need verl itself.

    python -m oisd.integrations.verl_data recipes/qwen3-4b.toml data/qwen3-4b

writes train.parquet and, if the recipe evaluates, test.parquet: the rows that `oisd train` would
take itself. `compute_score` is verl's `reward.custom_reward_function` for them.
"""

from __future__ import annotations

import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from oisd.config import ProblemsConfig, RewardConfig, TrainConfig, load_recipe
from oisd.data import Example, Message
from oisd.data.problems import load_problems
from oisd.rewards import (
    MathReward,
    ReasoningGymReward,
    RewardFunction,
    is_reasoning_reward,
    load_reward,
)

_grading = threading.Lock()


def write_data(config: TrainConfig, folder: str | Path) -> list[Path]:
    """Write the problems of `config.data` and `config.eval` to Parquet files; return the paths."""
    parts: dict[str, ProblemsConfig] = {"train": config.data}
    if config.eval.source is not None:
        parts["test"] = config.eval
    written = []
    for name, part in parts.items():
        assert part.source is not None
        examples = load_problems(part.source, part, config.run.seed)
        path = Path(folder) / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        given = config.data.system_prompt, config.reward
        rows = [_row(example, part.source, *given) for example in examples]
        Dataset.from_list(rows).to_parquet(str(path))
        written.append(path)
    return written


def _row(
    example: Example, source: str, system_prompt: str | None, reward: RewardConfig
) -> dict[str, Any]:
    prompt = example.prompt
    turns = [Message("user", prompt)] if isinstance(prompt, str) else [*prompt]
    if system_prompt and all(turn.role != "system" for turn in turns):
        turns.insert(0, Message("system", system_prompt))
    return {
        "data_source": source,
        "prompt": [turn._asdict() for turn in turns],
        "reward_model": {"style": "rule", "ground_truth": example.answer},
        "extra_info": {"id": example.id, "reward": reward.function, "timeout": reward.timeout},
    }


@lru_cache(maxsize=4)
def _grader(name: str, timeout_s: float) -> RewardFunction:
    # verl grades in its own processes (reward.num_workers), each of which gets one worker.
    if name in ("math", "math_verify"):
        return MathReward(timeout_s, workers=1)
    if is_reasoning_reward(name):
        return ReasoningGymReward(name, timeout_s, workers=1)
    return load_reward(name, timeout_s)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any
) -> float:
    r"""What the response earns by the recipe's `reward.function`; verl's signature.

    extra_info: as `write_data` writes it; without a reward in it, `oisd.rewards.math_reward`.

    verl calls it from several threads, which wait for each other.
    """
    given = extra_info or {}
    with _grading:
        grader = _grader(given.get("reward", "math"), given.get("timeout", 5.0))
        return grader([solution_str], [ground_truth])[0]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m oisd.integrations.verl_data RECIPE.toml FOLDER")
    for path in write_data(load_recipe(sys.argv[1]), sys.argv[2]):
        print(path)
