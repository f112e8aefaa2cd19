"""The settings of a run, from a recipe and the options of `oisd check`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from oisd.config import TrainConfig, from_tables, load_recipe, to_tables
from oisd.options import CheckRun
from oisd.schema import ConfigError, option, recipe_path, require, require_device

# The setting of a run that each option replaces; without the option the recipe's stands.
KEYS = {
    "data": "data.source",
    "split": "data.split",
    "subset": "data.subset",
    "prompt_field": "data.prompt_field",
    "answer_field": "data.answer_field",
    "answer_pattern": "data.answer_pattern",
    "limit": "data.limit",
    "system_prompt": "data.system_prompt",
    "chat_template": "data.chat_template",
    "max_prompt_tokens": "data.max_prompt_tokens",
    "eval_data": "eval.source",
    "reward": "reward.function",
    "timeout": "reward.timeout",
    "max_completion_tokens": "rollout.max_completion_tokens",
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "engine": "rollout.engine",
    "dtype": "model.dtype",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
}
# For rows of problems, which need some.
OF_DATA = ("split", "subset", "prompt_field", "answer_field", "answer_pattern", "limit")


def settings_of(model: str, given: CheckRun) -> TrainConfig:
    """The run that is checked. Raises ConfigError for an option out of its range."""
    for name in ("prompts", "completions", "completion_tokens"):
        require(getattr(given, name) >= 1, option(name), "at least 1", getattr(given, name))
    threads = given.threads
    require(threads is None or threads >= 1, "--threads", "at least 1", threads)
    require(given.seed >= 0, "--seed", "at least 0", given.seed)
    require(given.layer is None or given.layer >= 1, "--layer", "at least 1", given.layer)
    require_device("--device", given.device)
    if given.data == "":
        raise ConfigError("--data is empty; give a file, a folder or a Hub id, or leave it out")
    if not has_data(given):
        for name in (*OF_DATA, "eval_data"):
            if getattr(given, name) is not None:
                raise ConfigError(f"{option(name)} is for --data or --recipe; give one of them")
    base = TrainConfig() if given.recipe is None else load_recipe(recipe_path(given.recipe))
    tables: dict[str, dict[str, Any]] = to_tables(base)
    for name, key in KEYS.items():
        value = getattr(given, name)
        if value is not None:
            table, setting = key.split(".")
            tables[table][setting] = value
    tables["model"]["path"] = model
    tables["run"] |= {"seed": given.seed, "device": given.device}
    if threads is not None:
        tables["run"]["threads"] = threads
    if given.layer is not None:
        tables["oisd"]["student_layers"] = [given.layer]
    return from_tables(tables, where="command line")


def options_named(texts: Iterable[str]) -> dict[str, str]:
    """The options of `oisd check` for those settings of a run that the texts name."""
    said = {word for text in texts for word in re.findall(r"[a-z]+\.[a-z_]+", text)}
    own = KEYS | {"layer": "oisd.student_layers"}
    return {key: option(name) for name, key in own.items() if key in said}


def has_data(given: CheckRun) -> bool:
    """Whether there are problems to look at: the built-in task must be asked for."""
    return given.data is not None or given.recipe is not None
