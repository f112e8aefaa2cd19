"""The recipes: what each is, where each setting is from, and how one is based on another."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from benchmarks.study.protocol import STUDY, Cell
from oisd.config import ConfigError, TrainConfig, differences, load_recipe, to_tables
from oisd.schema import recipe_chain
from tests import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(recipe):
    config = load_recipe(recipe)
    assert config.run.output_dir != TrainConfig().run.output_dir


PAPER = {
    "qwen3-4b": (1.0, 0.1), "qwen3-4b-grpo": (0.0, 0.0), "qwen3-4b-think": (1.0, 0.0),
    "qwen3-4b-attention": (0.0, 0.1), "qwen3-8b": (1.0, 0.1), "qwen3-8b-grpo": (0.0, 0.0),
    "octothinker-3b": (1.0, 0.1), "octothinker-3b-grpo": (0.0, 0.0),
    "octothinker-8b": (1.0, 0.1), "octothinker-8b-grpo": (0.0, 0.0),
    "qwen3-4b-bupo": (0.0, 0.0), "qwen3-8b-bupo": (0.0, 0.0),
    "octothinker-3b-bupo": (0.0, 0.0), "octothinker-8b-bupo": (0.0, 0.0),
    "qwen3-4b-rloo": (0.0, 0.0), "qwen3-4b-reinforce-plus-plus": (0.0, 0.0),
}  # fmt: skip
LAYERS = {"qwen3-4b": 6, "qwen3-8b": 6, "octothinker-3b": 27, "octothinker-8b": 31}


@pytest.mark.parametrize("name", PAPER)
def test_rows_of_the_papers_table_1(name):
    config = load_recipe(ROOT / "recipes" / f"{name}.toml")
    assert (config.oisd.think_weight, config.oisd.attention_weight) == PAPER[name]
    model = re.match(r"\w+-\d+b", name)[0]
    assert config.oisd.student_layers == (LAYERS[model],)
    assert config.rollout.max_completion_tokens == (3072 if "octo" in name else 8192)
    assert (config.data.source, config.rollout.prompts_per_step) == ("deepmath-5k", 128)
    # An arm differs from its model's OISD only in the two weights, the folder and its policy loss.
    found = differences(load_recipe(ROOT / "recipes" / f"{model}.toml"), config)
    allowed = {"oisd.think_weight", "oisd.attention_weight", "run.output_dir"}
    assert config.run.sharding == ("fsdp2" if "8b" in name else "none")
    other = {"qwen3-4b-rloo": "rloo", "qwen3-4b-reinforce-plus-plus": "reinforce++"}
    assert config.grpo.advantage == other.get(name, "grpo")
    internal = (LAYERS[model], 30) if name.endswith("bupo") else (None, 0)
    assert (config.grpo.internal_layer, config.grpo.internal_steps) == internal
    allowed |= {"grpo.advantage", "grpo.internal_layer", "grpo.internal_steps"}
    assert {d.split(":")[0] for d in found} <= allowed


@pytest.mark.parametrize("name", PAPER)
def test_recipes_say_where_each_setting_is_from(name):
    files = [file for file, _ in recipe_chain(ROOT / "recipes" / f"{name}.toml")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    settings = [line for line in lines if " = " in line and not line.startswith(("#", "path"))]
    settings = [line for line in settings if not line.startswith("base")]
    assert len(settings) > 25
    for line in settings:
        stated = re.search(r"#.*(paper|BuPO|ours|not stated|GRPO: off)", line)
        assert stated or line.startswith("output_dir"), line


def test_there_is_a_recipe():
    assert "arithmetic" in {path.stem for path in RECIPES}


# ---------------------------------------------------------------- bases

GRPO = {"think_weight": 0.0, "attention_weight": 0.0}
BUPO = {"oisd": GRPO, "grpo": {"internal_layer": 6, "internal_steps": 30}}


def octothinker(size: str, layer: int) -> dict[str, dict[str, Any]]:
    return {
        "model": {"path": f"OctoThinker/OctoThinker-{size}-Long-Base"},
        "data": {"chat_template": False},
        "rollout": {"max_completion_tokens": 3072, "batch_size": 64},
        "oisd": {"student_layers": (layer,)},
    }


CHAIN_SUM = "reasoning-gym:chain_sum?min_terms=3&max_terms=3&min_digits=1&max_digits=1"

# What each recipe is: its base here, and the settings, apart from the folder, that differ from it.
FROM: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "arithmetic-grpo": ("arithmetic", {"oisd": GRPO}),
    "scratch-chain-sum": (
        "scratch-modular", {
            "data": {"source": CHAIN_SUM, "limit": 1500},
            "rollout": {"max_completion_tokens": 8},
            "reward": {"function": "reasoning-gym"},
            "warmup": {"stop_at": 0.25},
            "eval": {"source": CHAIN_SUM},
        },
    ),
    "scratch-multiplication": (
        "scratch-modular", {
            "data": {"source": "multiplication:digits=2,by=2"},
            "rollout": {"prompts_per_step": 32},
            "optimizer": {"learning_rate": 4e-4},
            "run": {"steps": 60},
            "warmup": {"stop_at": 0.2},
            "eval": {"source": "multiplication:digits=2,by=2"},
        },
    ),
    "scratch-running": (
        "scratch-modular", {
            "data": {"source": "running_sum:terms=8,digits=1"},
            "oisd": {"think_weight": 1.0, "attention_weight": 0.1, "share_every": 5},
            "warmup": {"stop_at": 0.35},
            "eval": {
                "source": "running_sum:terms=8,digits=1", "limit": 128, "samples": 8, "every": 10,
            },
            "run": {"save_every": 20},
        },
    ),
    "qwen3-4b-grpo": ("qwen3-4b", {"oisd": GRPO}),
    "qwen3-4b-think": ("qwen3-4b", {"oisd": {"attention_weight": 0.0}}),
    "qwen3-4b-attention": ("qwen3-4b", {"oisd": {"think_weight": 0.0}}),
    "qwen3-4b-rloo": ("qwen3-4b", {"oisd": GRPO, "grpo": {"advantage": "rloo"}}),
    "qwen3-4b-reinforce-plus-plus": (
        "qwen3-4b", {"oisd": GRPO, "grpo": {"advantage": "reinforce++"}}
    ),
    "qwen3-4b-bupo": ("qwen3-4b", BUPO),
    "qwen3-8b": (
        "qwen3-4b", {"model": {"path": "Qwen/Qwen3-8B"}, "run": {"sharding": "fsdp2"}}
    ),
    "qwen3-8b-grpo": ("qwen3-8b", {"oisd": GRPO}),
    "qwen3-8b-bupo": ("qwen3-8b", BUPO),
    "qwen3-8b-lora": (
        "qwen3-8b", {"model": {"lora_rank": 16}, "optimizer": {"learning_rate": 1e-5},
                     "run": {"sharding": "none"}}
    ),
    "octothinker-3b": ("qwen3-4b", octothinker("3B", 27)),
    "octothinker-3b-grpo": ("octothinker-3b", {"oisd": GRPO}),
    "octothinker-3b-bupo": (
        "octothinker-3b", {"oisd": GRPO, "grpo": {"internal_layer": 27, "internal_steps": 30}}
    ),
    "octothinker-8b": (
        "qwen3-4b", {**octothinker("8B", 31), "run": {"sharding": "fsdp2"}}
    ),
    "octothinker-8b-grpo": ("octothinker-8b", {"oisd": GRPO}),
    "octothinker-8b-bupo": (
        "octothinker-8b", {"oisd": GRPO, "grpo": {"internal_layer": 31, "internal_steps": 30}}
    ),
}  # fmt: skip
# The three that have no base: what differs from the defaults.
WHOLE: dict[str, dict[str, dict[str, Any]]] = {
    "arithmetic": {
        "data": {"source": "arithmetic:digits=2", "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 32, "max_completion_tokens": 6},
        "reward": {"function": "exact"},
        "grpo": {"minibatches": 2},
        "oisd": {"student_layers": (3,)},
        "optimizer": {"learning_rate": 2e-4, "schedule": "cosine"},
        "warmup": {"steps": 400, "stop_at": 0.75},
        "eval": {"source": "arithmetic:digits=2", "limit": 256, "every": 100},
        "run": {
            "steps": 400, "save_every": 100, "grad_norm_every": 5, "tokens_per_microbatch": 8192,
            "threads": 1, "device": "cpu",
        },
    },
    "scratch-modular": {
        "model": {"path": "scratch:layers=6,width=168,heads=4"},
        "data": {"source": "modular:terms=12,modulus=7", "max_prompt_tokens": 64},
        "rollout": {"prompts_per_step": 16, "max_completion_tokens": 32},
        "reward": {"function": "final"},
        "grpo": {"minibatches": 2},
        "oisd": {"student_layers": (3,)} | GRPO,
        "optimizer": {"learning_rate": 1e-4, "schedule": "cosine"},
        "warmup": {"steps": 1500, "stop_at": 0.1, "batch_size": 32, "learning_rate": 2e-3},
        "eval": {
            "source": "modular:terms=12,modulus=7", "limit": 96, "samples": 4, "every": 20,
        },
        "run": {
            "steps": 40, "save_every": 0, "tokens_per_microbatch": 8192, "threads": 1,
            "device": "cpu",
        },
    },
    "qwen3-4b": {
        "model": {"path": "Qwen/Qwen3-4B", "dtype": "bfloat16", "gradient_checkpointing": True},
        "data": {
            "source": "deepmath-5k", "overlong_prompts": "drop",
            "system_prompt": "Please reason step by step, and put your final answer within "
            "\\boxed{}.",
        },
        "rollout": {"batch_size": 24, "engine": "auto"},
        "grpo": {"minibatches": 4},
        "optimizer": {"weight_decay": 0.01},
        "eval": {"source": "math500"},
        "run": {"save_every": 20},
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_what_each_recipe_is(recipe):
    if recipe.stem in WHOLE:
        config, changes = TrainConfig(), WHOLE[recipe.stem]
    else:
        base, changes = FROM[recipe.stem]
        config = load_recipe(ROOT / "recipes" / f"{base}.toml")
    run = changes.get("run", {}) | {"output_dir": f"runs/{recipe.stem}"}
    parts = {
        table: dataclasses.replace(getattr(config, table), **values)
        for table, values in {**changes, "run": run}.items()
    }
    assert load_recipe(recipe) == dataclasses.replace(config, **parts)


# What a user of a recipe wants otherwise than the study; "auto" is "separate" on a CPU.
STUDYS_OWN = {"oisd.attention_kernel", "warmup.steps", "model.path", "run.output_dir", "run.seed",
              "run.keep_checkpoints", "run.completions_every", "run.trackers"}  # fmt: skip


def test_a_recipe_of_the_study_is_its_run():
    recipe = load_recipe(ROOT / "recipes" / "scratch-running.toml")
    study = STUDY.run(Cell("running", "paper", 11), "start", "out")
    assert {line.split(":")[0] for line in differences(recipe, study)} == STUDYS_OWN
    start = STUDY.warm_up("running", 11, "start")
    assert (recipe.warmup, recipe.model) == (start.warmup, start.model)


def write(folder, **recipes: str) -> None:
    for name, text in recipes.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")


def test_a_base_is_a_recipe_of_oisd_or_a_file_beside(tmp_path):
    write(
        tmp_path,
        child='base = "middle.toml"\n[oisd]\nthink_weight = 2.0\n[run]\nsteps = 3\n',
        middle='base = "qwen3-4b"\n[oisd]\nstudent_layers = [9]\n[grpo]\ndual_clip = "none"\n',
    )
    config, own = load_recipe(tmp_path / "child.toml"), load_recipe(ROOT / "recipes/qwen3-4b.toml")
    assert [line.split(":")[0] for line in differences(own, config)] == [
        "grpo.dual_clip", "oisd.student_layers", "oisd.think_weight", "run.steps"
    ]  # fmt: skip
    assert (config.oisd.student_layers, config.grpo.dual_clip) == ((9,), None)
    assert "base" not in to_tables(config)


def test_a_base_is_found_from_any_working_directory(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "qwen3-4b").write_text("not a recipe")
    write(tmp_path, child='base = "qwen3-4b"\n')
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe("../child.toml") == load_recipe(ROOT / "recipes/qwen3-4b.toml")


@pytest.mark.parametrize(
    "text, message",
    [
        ('base = "qwen3-4"', "base 'qwen3-4' is not a recipe that comes with oisd; did you mean "
                             "'qwen3-4b'?"),
        ('base = "xyzzyx"', "base 'xyzzyx' is not a recipe .*known: arithmetic, arithmetic-grpo"),
        ('base = "othr.toml"', "base 'othr.toml' is not a file beside it; did you mean "
                               "'other.toml'?"),
        ("base = 3", "base must be the name of a recipe, got 3"),
        ('base = "child.toml"', "circle, got child.toml -> child.toml"),
        ('base = "other.toml"', "circle, got child.toml -> other.toml -> child.toml"),
        ('bass = "qwen3-4b"', r"unknown table \[bass\]"),
        ('base = "wrong.toml"\n[run]\nsteps = 3', r"wrong.toml: unknown key run.stebs"),
        ('base = "qwen3-4b"\nrun = 3', "child.toml: run must be a table, got 3"),
    ],
    ids=["near", "far", "no-file", "number", "itself", "circle", "misspelt", "in-base", "no-table"],
)  # fmt: skip
def test_a_bad_base_is_named(tmp_path, text, message):
    write(tmp_path, child=text, other='base = "child.toml"', wrong="[run]\nstebs = 3\n")
    with pytest.raises(ConfigError, match=message) as error:
        load_recipe(tmp_path / "child.toml")
    assert str(error.value).count("\n") == 0
