"""A run looks at its model before its first step; it refuses what would corrupt it, in words."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from oisd.arithmetic import arithmetic_tokenizer
from oisd.cli import main
from oisd.config import ConfigError, from_tables
from oisd.models.guards import Guard
from oisd.policy import Policy
from oisd.rewards import ExactReward
from oisd.run import model_guards
from oisd.run.model_guards import clearest, guard_model
from oisd.trainer import Trainer
from tests.oisd.models.test_guards import OTHERS, is_mended, other_model
from tests.tiny_models import tiny_model

SMALL = ["--run.steps", "2", "--rollout.prompts-per-step", "4", "--warmup.steps", "0",
         "--rollout.completions-per-prompt", "2", "--eval.source", "none",
         "--rollout.max-completion-tokens", "4", "--optimizer.learning-rate", "0.01"]  # fmt: skip


def small_config(folder, **tables):
    return from_tables(
        {
            "rollout": {"prompts_per_step": 4, "completions_per_prompt": 2}
            | {"max_completion_tokens": 4} | tables.get("rollout", {}),
            "oisd": {"student_layers": [3]},
            "reward": {"function": "exact"},
            "optimizer": {"learning_rate": 0.01},
            "run": {"output_dir": str(folder), "steps": 2, "device": "cpu"}
            | tables.get("run", {}),
        }
    )  # fmt: skip


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_a_run_writes_what_it_found_and_computes_the_same(tmp_path, monkeypatch):
    def odd(self, completions, answers):  # which a blank model earns now and then
        return [float(len(text) % 2) for text in completions]

    monkeypatch.setattr(ExactReward, "__call__", odd)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    trainer = Trainer(small_config(tmp_path / "with"))
    assert torch.equal(torch.get_rng_state(), state)
    trainer.train()
    found = json.loads((tmp_path / "with" / "check.json").read_text())
    assert [g["name"] for g in found["guards"]] == [
        "finite", "causality", "right padding", "left padding", "dropout",
    ]  # fmt: skip
    assert all(g["holds"] for g in found["guards"]) and found["transformers"]
    monkeypatch.setattr("oisd.trainer.guard_model", lambda *_: None)
    Trainer(small_config(tmp_path / "without")).train()
    rows = metrics(tmp_path / "with")
    assert rows == metrics(tmp_path / "without") and rows[0]["grad_norm"] > 0


@pytest.fixture(scope="module")
def doge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doge")
    assert OTHERS["doge"]["vocab_size"] >= len(arithmetic_tokenizer())
    model = other_model("doge")
    model.generation_config.eos_token_id = 13
    model.save_pretrained(folder)
    arithmetic_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.skipif(is_mended() is not False, reason="known to see the future in 5.10")
def test_train_refuses_attention_that_sees_the_future(doge, tmp_path, capsys):
    run = ["train", "--model.path", str(doge), *SMALL, "--run.output-dir", str(tmp_path / "run"),
           "--oisd.attention-weight", "0"]  # fmt: skip
    assert main(run) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("oisd: model.path") and "causality" in said
    assert 'attn_implementation = "eager", under which they agree' in said
    found = json.loads((tmp_path / "run" / "check.json").read_text())["guards"]
    assert [g["name"] for g in found if not g["holds"]][0] == "causality"
    assert main([*run, "--model.attn-implementation", "eager"]) == 0


def guard(name, value, bound=1e-3):
    return Guard(name, value, bound, "they differ", "change it")


@pytest.mark.parametrize(
    ("found", "settings", "refused"),
    [
        (guard("causality", 0.5), {}, True),
        (guard("causality", 2e-3), {}, False),  # near the bound: a warning
        (guard("causality", float("nan")), {}, False),
        (guard("right padding", 0.5), {}, True),
        (guard("right padding", 0.5), {"run": {"tokens_per_microbatch": 1}}, False),
        (guard("left padding", 0.5), {}, True),
        (guard("left padding", 0.5), {"rollout": {"batch_size": 1}}, False),
        (guard("left padding", 0.5), {"rollout": {"engine": "continuous"}}, False),
        (guard("left padding", 0.5), {"rollout": {"engine": "auto"}}, True),
        (guard("dropout", 0.5), {}, False),
        (guard("finite", 3, 0), {}, True),
    ],
)
def test_what_a_run_refuses_and_what_it_warns_of(found, settings, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(model_guards, "cheap_guards", lambda model: [found])
    policy = Policy(tiny_model("qwen3"), arithmetic_tokenizer(), torch.float32)
    config = small_config(tmp_path, **settings)
    if refused:
        with pytest.raises(ConfigError, match=f"{found.name}: they differ.*Change it"):
            guard_model(policy, config, tmp_path)
    else:
        with pytest.warns(UserWarning, match=found.name):
            guard_model(policy, config, tmp_path)
    assert (tmp_path / "check.json").exists()
    if not refused:  # other processes say nothing, and write nothing
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            guard_model(policy, config, None)


def test_noise_that_was_asked_for_is_no_news(tmp_path, monkeypatch):
    monkeypatch.setattr(model_guards, "cheap_guards", lambda model: [guard("dropout", 0.5)])
    policy = Policy(tiny_model("qwen3"), arithmetic_tokenizer(), torch.float32)
    config = small_config(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard_model(policy, replace(config, model=replace(config.model, dropout=None)), tmp_path)
    assert not json.loads((tmp_path / "check.json").read_text())["guards"][0]["holds"]


def test_the_arithmetic_in_which_guards_look():
    policy = Policy(tiny_model("qwen3"), arithmetic_tokenizer(), torch.bfloat16)
    with clearest(policy):
        assert not torch.is_autocast_enabled("cpu")
    frozen = replace(policy, model=tiny_model("qwen3"))
    frozen.model.get_decoder().layers[0].mlp.to(torch.bfloat16)
    with clearest(frozen):
        assert torch.is_autocast_enabled("cpu")
