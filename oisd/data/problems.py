"""A run's problems: read by its settings, encoded for its model, their answers checked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

from oisd.config import ConfigError, DataConfig, TrainConfig
from oisd.data import check_source, encode_prompts, load_examples
from oisd.data.examples import Example
from oisd.data.sums import is_arithmetic
from oisd.data.tasks import is_task
from oisd.rewards import MathReward, UserReward, check_reward, fitting_rewards
from oisd.schema import naming, require_no_misspelt_blank

_LOOKED_AT = 8  # worked solutions that are graded before a run
_SETTINGS = ("split", "subset", "prompt_field", "answer_field", "answer_pattern", "limit")


def check_names(config: TrainConfig) -> None:
    """Raise ConfigError or DataError for names that a run would refuse before any work.

    Names and settings of built-in tasks, reasoning-gym, named data sets, rewards and blank models.
    """
    require_no_misspelt_blank(config.model.path)
    with naming("reward.function"):
        check_reward(config.reward.function)
    for settings in (config.data, config.eval):
        if settings.source is not None:
            given = {name: getattr(settings, name) for name in _SETTINGS if name != "limit"}
            check_source(settings.source, **given)


def load_problems(source: str, settings: Any, seed: int) -> list[Example]:
    """`load_examples` with the settings of a command, those of them that it has.

    settings: a DataConfig, an EvalConfig or the options of `oisd eval` and `oisd lens`.
    seed: draws `settings.limit` rows.
    """
    given = {name: getattr(settings, name) for name in _SETTINGS if hasattr(settings, name)}
    return load_examples(source, seed=seed, **given)


def require_fitting_reward(reward: Any, config: TrainConfig, examples: Sequence[Example]) -> None:
    """Raise ConfigError where a built-in task's warm-up would train on what earns nothing.

    A model that writes an answer in another way than the warm-up is for a reward of the user's own.
    """
    source, name = config.data.source, config.reward.function
    if not config.warmup.steps or isinstance(reward, UserReward):
        return
    if not (is_arithmetic(source) or is_task(source)):
        return
    texts = [example.solution or example.answer for example in examples[:_LOOKED_AT]]
    answers = [example.answer for example in examples[:_LOOKED_AT]]
    if any(reward(texts, answers)):
        return
    fitting = " or ".join(f'"{other}"' for other in fitting_rewards(texts, answers))
    raise ConfigError(
        f"reward.function must be {fitting} for {source}, on whose worked solutions the warm-up "
        f"trains: {name!r} gives {texts[0]!r} nothing, where the answer is {answers[0]!r}"
    )


def encode_problems(
    tokenizer: Any,
    data: DataConfig,
    examples: Sequence[Example],
    overlong: Literal["error", "drop"],
) -> tuple[list[Example], list[list[int]]]:
    """The examples with their prompts' token ids, without those dropped as too long."""
    encoded = encode_prompts(
        tokenizer,
        examples,
        system_prompt=data.system_prompt,
        chat_template=data.chat_template,
        max_prompt_tokens=data.max_prompt_tokens,
        overlong=overlong,
    )
    if encoded.dropped:
        warnings.warn(
            f"{len(encoded.dropped)} prompts are longer than data.max_prompt_tokens = "
            f"{data.max_prompt_tokens} and were dropped",
            stacklevel=3,
        )
    return encoded.examples, encoded.token_ids


def warn_of_answers(reward: Any, examples: Sequence[Example]) -> None:
    """Warn of gold answers that the math grader cannot read: every completion would earn 0."""
    if isinstance(reward, MathReward):
        answers = [example.answer for example in examples]
        problems = reward.check_answers(answers)
        if problems:
            warnings.warn(
                f"{len(problems)} of {len(answers)} gold answers looked at do not grade as equal "
                f"to themselves, so no completion can earn their reward: {problems[:3]}",
                stacklevel=3,
            )
