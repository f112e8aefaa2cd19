"""Recipes: what is refused, in which words, and what survives a round trip."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib
import typing
from typing import Any

import pytest
import tomli_w

from oisd.cli import parse_train
from oisd.config import (
    AlignmentConfig,
    ConfigError,
    GRPOConfig,
    TrainConfig,
    differences,
    from_tables,
    load_recipe,
    to_tables,
)
from tests import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
TABLES = typing.get_type_hints(TrainConfig)
KEYS = [(table, f.name) for table, kind in TABLES.items() for f in dataclasses.fields(kind)]
KEY_IDS = [f"{table}.{key}" for table, key in KEYS]

# A value other than the default for every key; a test below checks that none is missing.
OTHER: dict[str, dict[str, Any]] = {
    "model": {
        "path": "Qwen/Qwen3-4B",
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.1,
        "dropout": 0.2,
        "lora_targets": ("q_proj", "up_proj"),
        "attn_implementation": "eager",
        "trust_remote_code": True,
    },
    "data": {
        "source": "problems.jsonl",
        "split": "validation",
        "subset": "main",
        "prompt_field": "problem",
        "answer_field": "solution",
        "answer_pattern": "#### (.*)",
        "limit": 7,
        "system_prompt": "Reason \\boxed{}.\nTwo lines, \u2028 and é.",
        "chat_template": False,
        "max_prompt_tokens": 5,
        "overlong_prompts": "drop",
    },
    "rollout": {
        "prompts_per_step": 4,
        "completions_per_prompt": 2,
        "max_completion_tokens": 9,
        "temperature": 0.6,
        "top_p": 0.95,
        "batch_size": 3,
        "engine": "auto",
        "offload": True,
        "trial_tokens": 16,
    },
    "reward": {"function": "exact", "timeout": 0.5},
    "grpo": {
        "advantage": "rloo",
        "aggregation": "dr-grpo",
        "clip_low": 0.1,
        "clip_high": 0.28,
        "dual_clip": None,
        "scale_by_std": False,
        "kl_coef": 0.01,
        "tis_cap": 2.0,
        "minibatches": 4,
        "skip_zero_advantage": False,
    },
    "oisd": {
        "student_layers": (3, 5),
        "think_weight": 0.5,
        "attention_weight": 0.2,
        "think_share": 0.1,
        "attention_share": 0.3,
        "think_schedule": "linear",
        "attention_schedule": "cosine",
        "share_every": 5,
        "advantage": "shuffled",
        "advantage_clip": 1.0,
        "lens_temperature": 2.0,
        "lens_norm": "none",
        "divergence": "reverse_kl",
        "beta": 0.25,
        "attention_kernel": "separate",
        "attention_steps": 32,
        "key_window": 64,
        "key_stride": 16,
        "attention_student": (2, 5),
        "attention_teacher": 7,
    },
    "optimizer": {
        "learning_rate": 3e-7,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup_steps": 3,
        "max_grad_norm": 0.5,
    },
    "warmup": {"steps": 10, "stop_at": 0.5, "batch_size": 8, "learning_rate": 1e-3},
    "eval": {
        "source": "aime.jsonl",
        "split": "train",
        "subset": "hard",
        "prompt_field": "p",
        "answer_field": "a",
        "answer_pattern": "(.*)",
        "limit": 5,
        "samples": 32,
        "temperature": 0.0,
        "top_p": 0.9,
        "every": 10,
    },
    "run": {
        "output_dir": "elsewhere",
        "steps": 5,
        "seed": 2**62 + 1,
        "tokens_per_microbatch": 100,
        "save_every": 0,
        "keep_checkpoints": 1,
        "completions_every": 0,
        "trackers": ["wandb"],
        "grad_norm_every": 2,
        "device": "cpu",
        "sharding": "fsdp2",
        "threads": 3,
        "restart": True,
    },
}


def hint_of(table: str, key: str) -> Any:
    return typing.get_type_hints(TABLES[table])[key]


OPTIONAL = [
    (table, key) for table, key in KEYS if type(None) in typing.get_args(hint_of(table, key))
]


# These exclude an alignment, which the others have: see test_internal_policy.py.
INTERNAL = {("grpo", "internal_layer"), ("grpo", "internal_steps")}


def other_config() -> TrainConfig:
    return TrainConfig(**{table: TABLES[table](**values) for table, values in OTHER.items()})


def internal_config() -> TrainConfig:
    return TrainConfig(
        grpo=GRPOConfig(internal_layer=2, internal_steps=3),
        oisd=AlignmentConfig(think_weight=0.0, attention_weight=0.0),
    )


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("table, key", KEYS, ids=KEY_IDS)
def test_a_misspelt_key_is_refused_with_the_right_one(table, key):
    wrong = f"{key}_"
    with pytest.raises(ConfigError) as error:
        from_tables({table: {wrong: 1}}, where="recipe.toml")
    assert str(error.value) == f"recipe.toml: unknown key {table}.{wrong}; did you mean {key!r}?"


@pytest.mark.parametrize("table", TABLES)
def test_a_misspelt_table_is_refused_with_the_right_one(table):
    with pytest.raises(ConfigError) as error:
        from_tables({f"{table}s": {}})
    assert f"unknown table [{table}s]; did you mean {table!r}?" in str(error.value)


def test_what_is_like_nothing_is_answered_by_all_there_is():
    with pytest.raises(ConfigError) as error:
        from_tables({"reward": {"xyzzyx": 1}})
    assert "known: function, timeout" in str(error.value)
    with pytest.raises(ConfigError, match="known: data, eval, grpo, model"):
        from_tables({"xyzzyx": {}})


def test_a_key_outside_of_any_table_is_refused():
    with pytest.raises(ConfigError, match="run must be a table, got 3"):
        from_tables({"run": 3})


# ---------------------------------------------------------------- types


def wrong_values(hint: Any) -> list[tuple[Any, str]]:
    """Values that TOML can hold and the type cannot, with what is wanted instead."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        choices = "one of " + ", ".join(repr(choice) for choice in arguments)
        return [("nonsense", choices), (1, choices), ([], choices)]
    if type(None) in arguments:
        return wrong_values(next(a for a in arguments if a is not type(None)))
    if typing.get_origin(hint) is tuple:
        wrong_items = [1, 2] if arguments[0] is str else ["a", "b"]
        return [(3, "a list"), ("ab", "a list"), (wrong_items, "a"), ([True, True], "a")]
    return {
        int: [("1", "an integer"), (1.0, "an integer"), (True, "an integer"), ([], "an integer")],
        float: [("1", "a number"), (True, "a number"), ([1.0], "a number")],
        str: [(3, "a string"), (True, "a string"), ([], "a string")],
        bool: [(1, "true or false"), ("true", "true or false")],
    }[hint]


@pytest.mark.parametrize("table, key", KEYS, ids=KEY_IDS)
def test_wrong_types_are_refused(table, key):
    for value, wanted in wrong_values(hint_of(table, key)):
        with pytest.raises(ConfigError) as error:
            from_tables({table: {key: value}}, where="recipe.toml")
        message = str(error.value)
        assert message.startswith(f"recipe.toml: {table}.{key} must be {wanted}"), message
        assert message.endswith(f"got {value!r}")


def test_whole_numbers_stand_for_floats():
    config = from_tables({"grpo": {"kl_coef": 1}, "optimizer": {"betas": [0, 0.5]}})
    assert type(config.grpo.kl_coef) is float
    assert config.optimizer.betas == (0.0, 0.5)


# ---------------------------------------------------------------- ranges

RANGES = {
    "model.lora_rank": ([-1], [0, 4]),
    "model.lora_alpha": ([0.0, -1.0, float("nan")], [0.5]),
    "model.dropout": ([-0.1, 1.0], [0.0, 0.5, "none"]),
    "model.lora_dropout": ([-0.1, 1.0], [0.0, 0.5]),
    "model.lora_targets": (
        [[], [""], ["q_proj", "q_proj"], ["q_proj", "all-linear"], ["q_proj", "model.lm_head"]],
        [["q_proj"], ["self_attn.q_proj", "k_proj"], ["all-linear"]],
    ),
    "data.limit": ([0, -1], [1]),
    "data.max_prompt_tokens": ([0], [1]),
    "rollout.prompts_per_step": ([0], [1]),
    "rollout.max_completion_tokens": ([0], [1]),
    "rollout.batch_size": ([0], [1]),
    "rollout.completions_per_prompt": ([0, 1], [2]),
    "rollout.temperature": ([0.0, -1.0, float("nan")], [0.01, 2.0]),
    "rollout.top_p": ([0.0, 1.01, float("nan")], [0.01, 1.0]),
    "reward.timeout": ([0.0, -1.0], [0.1]),
    "grpo.clip_low": ([-0.1, 1.0], [0.0, 0.99]),
    "grpo.clip_high": ([-0.1], [0.0, 3.0]),
    "grpo.dual_clip": ([1.0, 0.0], [1.01, "none"]),
    "grpo.kl_coef": ([-0.1, float("nan")], [0.0]),
    "rollout.trial_tokens": ([0], [1]),
    "grpo.tis_cap": ([0.0, -1.0], [0.1, "auto", "none"]),
    "grpo.minibatches": ([0, 129], [1, 128]),
    "oisd.student_layers": ([[0], [-1], [3, 3], []], [[1], [9, 2]]),
    "oisd.think_weight": ([-1.0, float("nan")], [0.0]),
    "oisd.attention_weight": ([-1.0, float("nan")], [0.0]),
    "oisd.think_share": ([0.0, -0.1, 10.1, float("nan")], [0.001, 10.0, "none"]),
    "oisd.attention_share": ([0.0, 11.0], [0.1, 10.0, "none"]),
    "oisd.share_every": ([-1], [0, 1]),
    "oisd.advantage_clip": ([0.0, -1.0], [0.1, "none"]),
    "oisd.lens_temperature": ([0.0, -1.0], [0.1]),
    "oisd.beta": ([0.0, 1.0], [0.01, 0.99]),
    "oisd.attention_steps": ([0], [1, "none"]),
    "oisd.attention_student": ([[0], [1, 2], []], [[1], "none"]),
    "oisd.attention_teacher": ([1, 0], [2, "none"]),
    "optimizer.learning_rate": ([0.0, -1.0, float("nan")], [1e-9]),
    "optimizer.betas": ([[0.9], [0.9, 1.0], [-0.1, 0.5], [0.1] * 3], [[0.0, 0.0]]),
    "optimizer.warmup_steps": ([-1], [0]),
    "optimizer.max_grad_norm": ([0.0, -1.0], [0.1]),
    "warmup.steps": ([-1], [0]),
    "warmup.stop_at": ([0.0, 1.0], [0.5, "none"]),
    "warmup.batch_size": ([0], [1]),
    "warmup.learning_rate": ([0.0], [1e-9]),
    "eval.limit": ([0], [1]),
    "eval.samples": ([0], [1]),
    "eval.temperature": ([-0.1], [0.0]),
    "eval.top_p": ([0.0, 1.1], [1.0]),
    "eval.every": ([-1], [0]),
    "run.steps": ([-1], [0]),
    "run.save_every": ([-1], [0]),
    "run.completions_every": ([-1], [0]),
    "run.grad_norm_every": ([-1], [0]),
    "run.tokens_per_microbatch": ([0], [1]),
    "run.keep_checkpoints": ([0], [1]),
    "run.seed": ([-1, 2**63], [0, 2**63 - 1]),
    "run.threads": ([0], [1, "none"]),
    "run.trackers": ([["wandb", "wandb"], ["wanbd"]], [[], ["trackio", "wandb"]]),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges(name):
    table, key = name.split(".")
    bad, good = RANGES[name]
    assert bad and good
    for value in bad:
        with pytest.raises(ConfigError, match=f"{table}.{key} must be .*, got "):
            from_tables({table: {key: value}})
    for value in good:
        found = getattr(getattr(from_tables({table: {key: value}}), table), key)
        wanted = tuple(value) if isinstance(value, list) else value
        assert found == (None if value == "none" else wanted)


@pytest.mark.parametrize("term", ["think", "attention"])
def test_a_share_needs_its_term_and_measurements(term):
    with pytest.raises(ConfigError, match=f'oisd.{term}_share must be "none" with oisd.{term}_w'):
        AlignmentConfig(**{f"{term}_share": 0.1, f"{term}_weight": 0.0})
    with pytest.raises(ConfigError, match=f"share_every must be at least 1 with oisd.{term}_sh"):
        AlignmentConfig(**{f"{term}_share": 0.1}, share_every=0)
    assert not AlignmentConfig().follows_share and not AlignmentConfig().anneals
    assert AlignmentConfig(**{f"{term}_share": 0.1}).follows_share
    assert AlignmentConfig(**{f"{term}_schedule": "linear"}).anneals


@pytest.mark.parametrize("alone", ["key_window", "key_stride"])
def test_sampled_keys_need_both_numbers(alone):
    with pytest.raises(ConfigError, match="given together"):
        AlignmentConfig(**{alone: 4})
    for key in ("key_window", "key_stride"):
        with pytest.raises(ConfigError, match=f"oisd.{key} must be at least 1"):
            AlignmentConfig(**{"key_window": 4, "key_stride": 4, key: 0})


def test_no_layers_without_an_alignment():
    config = AlignmentConfig(student_layers=(), think_weight=0.0, attention_weight=0.0)
    assert not config.active
    assert AlignmentConfig().active


# ---------------------------------------------------------------- files


def test_other_values_are_all_other_and_all_there():
    given = {(table, key) for table, values in OTHER.items() for key in values}
    assert given | INTERNAL == set(KEYS) and not given & INTERNAL
    changed = {
        line.split(":")[0]
        for config in (other_config(), internal_config())
        for line in differences(TrainConfig(), config)
    }
    assert changed == set(KEY_IDS)


@pytest.mark.parametrize(
    "config",
    [TrainConfig(), other_config(), internal_config()],
    ids=["defaults", "others", "internal"],
)
def test_round_trip_through_toml(config, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(tomli_w.dumps(to_tables(config)), encoding="utf-8")
    assert load_recipe(file) == config
    assert differences(load_recipe(file), config) == []


@pytest.mark.parametrize("table, key", OPTIONAL, ids=[f"{t}.{k}" for t, k in OPTIONAL])
def test_none_survives_a_round_trip(table, key):
    nothing = dict.fromkeys(["key_window", "key_stride"] if "key_" in key else [key])
    values = {**OTHER, table: {**OTHER[table], **nothing}}
    config = TrainConfig(**{name: TABLES[name](**values[name]) for name in values})
    again = from_tables(tomllib.loads(tomli_w.dumps(to_tables(config))))
    assert getattr(getattr(again, table), key) is None
    assert again == config


def test_no_dual_clip_is_written_in_words():
    config = TrainConfig(grpo=GRPOConfig(dual_clip=None))
    assert to_tables(config)["grpo"]["dual_clip"] == "none"
    assert to_tables(TrainConfig(grpo=GRPOConfig(tis_cap=None)))["grpo"]["tis_cap"] == "none"
    assert "advantage_clip" not in to_tables(config)["oisd"]
    assert from_tables({"grpo": {"dual_clip": "none"}}).grpo.dual_clip is None


def test_differences_name_the_setting():
    config = TrainConfig(grpo=GRPOConfig(clip_high=0.28))
    assert differences(TrainConfig(), config) == ["grpo.clip_high: 0.2 != 0.28"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read: No such file"),
        (b"[run\n", "is not valid TOML"),
        (b"\xff\xfe[", "is not valid TOML: wanted UTF-8 or UTF-16"),
        ("# \xe9\n".encode("latin-1"), "is not valid TOML: wanted UTF-8 or .* byte 0xe9 at 2"),
        (b"[run]\nsteps = 1\nsteps = 2\n", "is not valid TOML"),
        (b"[rum]\n", "unknown table"),
        (b"[run]\nsteps = -1\n", "run.steps must be at least 0, got -1"),
    ],
    ids=["missing", "broken", "not-text", "latin-1", "twice", "unknown-table", "out-of-range"],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    file = tmp_path / "recipe.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_recipe(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_recipes_as_editors_save_them(encoding, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_bytes('[data]\r\nsystem_prompt = "é"\r\n'.encode(encoding))
    assert load_recipe(file).data.system_prompt == "é"


@pytest.mark.parametrize("word", ["none", "None"])
@pytest.mark.parametrize("table, key", OPTIONAL, ids=[f"{t}.{k}" for t, k in OPTIONAL])
def test_each_optional_setting_takes_none_however_it_is_spelled(table, key, word, tmp_path):
    """In a recipe, and on the command line in both of its ways and under both of its names."""
    file = tmp_path / "recipe.toml"
    file.write_text(f'[{table}]\n{key} = "{word}"\n')
    assert getattr(getattr(load_recipe(file), table), key) is None
    for name in (key, key.replace("_", "-")):
        for words in ([f"--{table}.{name}", word], [f"--{table}.{name}={word}"]):
            assert getattr(getattr(parse_train(words), table), key) is None, words


def test_none_stays_a_word_where_it_is_one():
    words = ["--oisd.lens-norm", "none", "--data.source", "none", "--run.output-dir=none"]
    config = parse_train(words)
    assert (config.oisd.lens_norm, config.data.source, config.run.output_dir) == ("none",) * 3


def test_reading_a_recipe_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from oisd.config import load_recipe; load_recipe(sys.argv[1]);"
        "print(sorted({'torch', 'transformers', 'numpy', 'tyro'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(RECIPES[0])],
        capture_output=True, text=True, cwd=ROOT, check=True, timeout=60,
    )  # fmt: skip
    assert found.stdout.strip() == "[]"
