"""What a run finds out about its model before the first step: `check.json` in its folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from oisd.config import ConfigError, TrainConfig
from oisd.models.guards import Guard, cheap_guards
from oisd.models.layout import unwrap
from oisd.models.refusals import WITHOUT_ATTENTION, Remedy
from oisd.policy import Policy


def clearest(policy: Policy) -> AbstractContextManager[Any]:
    """Where guards see most: in float32 if all parameters are, otherwise in the run's arithmetic.

    FlashAttention's own kernels know no float32.
    """
    model: Any = unwrap(policy.model)
    whole = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    flash = "flash" in str(getattr(model.config, "_attn_implementation", ""))
    return nullcontext() if whole and not flash else policy.autocast()


def as_setting(remedy: Remedy) -> str:
    """What helps with a model, as a setting of a run; `Taps` names its own arguments."""
    if remedy == WITHOUT_ATTENTION:
        return "set oisd.attention_weight = 0"
    table = "model" if remedy.option in ("attn_implementation", "dropout") else "oisd"
    return remedy.as_setting(f"{table}.{remedy.option}")


def guard_model(policy: Policy, config: TrainConfig, folder: Path | None) -> None:
    """Run the cheap guards on the model of a run; write check.json; warn of what does not hold, and
    of dropout that was replaced.

    folder: the run's, on its first process, which also warns; None elsewhere.
    Raises ConfigError for a fault that would corrupt the update or the rollouts.
    """
    if folder is not None:
        policy.warn_of_dropout(config.model)
    with clearest(policy):
        guards = cheap_guards(policy.model)
    if folder is not None:
        write_guards(guards, folder / "check.json")
    for guard in guards:
        if guard.corrupts and _matters(guard, config):
            raise ConfigError(f"model.path {config.model.path!r}: {guard}")
    if folder is None:
        return
    noise = config.model.dropout != 0 or config.model.lora_dropout > 0  # which was asked for
    for guard in guards:
        if not (guard.holds or (noise and guard.name == "dropout")):
            warnings.warn(f"model.path {config.model.path!r}: {guard}", stacklevel=3)


def write_guards(guards: Iterable[Guard], file: Path) -> None:
    """Write guards as JSON, with the versions that they were found under."""
    found = {
        "transformers": version("transformers"),
        "torch": torch.__version__,
        "guards": [guard.as_row() for guard in guards],
    }
    file.write_text(json.dumps(found, indent=1), encoding="utf-8")


def _matters(guard: Guard, config: TrainConfig) -> bool:
    """Whether a run with these settings meets the fault; noise in training mode is no fault."""
    if guard.name == "right padding":
        return config.run.tokens_per_microbatch > 1  # with 1, each row is updated alone
    if guard.name == "left padding":
        return config.rollout.batch_size > 1 and config.rollout.engine != "continuous"
    return guard.name != "dropout"
