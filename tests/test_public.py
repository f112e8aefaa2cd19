"""What users have written down: names, signatures, options, files of a run. They do not change.

`python -m tests.test_public` writes the snapshot anew, after a change that is meant.
"""

import contextlib
import importlib
import inspect
import io
import json
import re
from typing import Any

import pytest

from tests import DATA

SNAPSHOT = DATA / "public.json"
MODULES = (
    "oisd",
    "oisd.config",
    "oisd.evaluate",
    "oisd.losses",
    "oisd.models",
    "oisd.rewards",
    "oisd_kernels",
    "oisd_kernels.drop_in",
    "oisd_kernels.reference",
)
CALLS = {
    "oisd": ("Taps", "Trainer", "load_recipe"),
    "oisd.evaluate": ("avg_at_k", "pass_at_k"),
    "oisd.losses": ("grpo_loss", "think_loss", "attention_loss", "grpo_and_think_loss"),
    "oisd.rewards": ("math_reward", "boxed_string_reward", "exact_reward", "load_reward"),
    "oisd_kernels": (
        "AttentionAlignment",
        "PolicyTerms",
        "attention_divergence",
        "distillation_divergence",
        "flash_attention",
        "linear_logprob",
        "logit_lens_divergence",
        "policy_head",
    ),
    "oisd_kernels.drop_in": (
        "ChunkedDivergenceFunction",
        "LigerFusedLinearJSD",
        "chunked_divergence_loss",
        "liger_fused_linear_jsd",
    ),
    "oisd_kernels.reference": ("attention_divergence", "linear_logprob", "logit_lens_divergence"),
}
COMMANDS = ("train", "plan", "check", "eval", "compare", "lens", "attention", "report")


def parameters(function: Any) -> list[str]:
    """Each parameter with its default, without its annotation."""
    return [
        str(p.replace(annotation=inspect.Parameter.empty))
        for p in inspect.signature(function).parameters.values()
    ]


def signatures() -> dict[str, list[str]]:
    return {
        f"{module}.{name}": parameters(getattr(importlib.import_module(module), name))
        for module, names in CALLS.items()
        for name in names
    }


def names() -> dict[str, list[str]]:
    """Public names of each module: those of `__all__`, or those that it defines itself."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        own = getattr(module, "__all__", None) or [
            key
            for key, value in vars(module).items()
            if not key.startswith("_") and getattr(value, "__module__", "").startswith(name)
        ]
        found[name] = sorted(own)
    return found


def options(command: str) -> list[str]:
    """The options that `oisd COMMAND --help` lists."""
    from oisd.cli import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", text.getvalue())))


def defaults() -> dict[str, Any]:
    from oisd.config import TrainConfig, to_tables

    return to_tables(TrainConfig())


def snapshot() -> dict[str, Any]:
    return {
        "names": names(),
        "signatures": signatures(),
        "options": {command: options(command) for command in COMMANDS},
        "defaults": defaults(),
    }


@pytest.fixture(scope="module")
def before() -> dict[str, Any]:
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES)
def test_no_public_name_has_gone(before, module):
    assert set(before["names"][module]) <= set(names()[module]) | set(
        vars(importlib.import_module(module))
    )


def test_signatures_are_as_they_were(before):
    assert signatures() == before["signatures"]


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_as_they_were(before, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert options(command) == before["options"][command]


def test_defaults_are_as_they_were(before):
    assert json.loads(json.dumps(defaults())) == before["defaults"]


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(snapshot(), indent=1) + "\n", encoding="utf-8")
