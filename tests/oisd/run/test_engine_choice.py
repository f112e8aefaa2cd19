"""The engine of a run: measured if it may be either, kept when the run is resumed."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from transformers.generation.continuous_batching import ContinuousBatchingManager

from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
from oisd.batch import Batch
from oisd.config import ConfigError, GRPOConfig, RolloutConfig, from_tables
from oisd.policy import Policy
from oisd.rollout import continuous
from oisd.run import engine_choice
from oisd.run.engine_choice import ROUNDS, EngineChoice, choose_engine
from oisd.run.processes import Processes
from oisd.trainer import Trainer
from tests.oisd.test_trainer import (
    assert_same_run,
    metrics,
    reward_module,
    tables,
    train,
    without_plots,
)
from tests.tiny_models import tiny_model

__all__ = ["reward_module", "without_plots"]  # fixtures, for each test here

PROMPTS = [[4, 7, 10, 8, 5, 11], [1, 10, 2, 11], [9, 9, 10, 1, 0, 11]] * 4
AUTO = RolloutConfig(engine="auto", max_completion_tokens=9, trial_tokens=4, batch_size=5)


known_version = pytest.mark.skipif(
    continuous.untested() is not None, reason=str(continuous.untested())
)


@pytest.fixture(scope="module")
def policy():
    model = arithmetic_model(0, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return Policy(model, arithmetic_tokenizer(), torch.float32)


def logprobs(policy: Policy, shift: float = 0.0):
    """Of a batch by one plain forward, `shift` off."""

    def of(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            out = policy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        every = out.logits.log_softmax(-1)
        return every.gather(2, batch.labels[..., None]).squeeze(2) + shift

    return of


def choose(policy, config=AUTO, shift=0.0, prompts=PROMPTS) -> EngineChoice:
    return choose_engine(policy, logprobs(policy, shift), prompts, config, Processes("cpu"))


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the trial believes an engine to take, by what it sampled with."""
    spent, now, seen = {"generate": 1.0, "continuous": 1.0}, [0.0], []
    sample = Policy.sample

    def watched(self, prompts, rows, *, engine="generate", **options):
        seen.append((engine, len(prompts), options["max_completion_tokens"]))
        now[0] += spent[engine]
        return sample(self, prompts, rows, engine=engine, **options)

    monkeypatch.setattr(Policy, "sample", watched)
    monkeypatch.setattr(engine_choice.time, "perf_counter", lambda: now[0])
    return spent, seen


@known_version
@pytest.mark.parametrize("faster", ["generate", "continuous"])
def test_auto_takes_the_faster_one(policy, clock, faster):
    spent, seen = clock
    spent[faster] = 0.5
    choice = choose(policy)
    assert choice.engine == faster and choice.reason == "the faster one in the trial"
    assert choice.seconds == {"generate": 1.0, "continuous": 1.0} | {faster: 0.5}
    # In turns, of twice the batch, with short completions.
    assert seen == [("generate", 10, 4), ("continuous", 10, 4)] * (1 + ROUNDS)
    assert 0 < choice.disagreement["continuous"] < 1e-5
    assert choice.completions == 10 and choice.tokens == 4 and choice.device == "cpu"


@known_version
def test_a_real_trial_measures_both(policy):
    choice = choose(policy)
    assert choice.seconds.keys() == {"generate", "continuous"}
    assert min(choice.seconds.values()) > 0
    assert choice.engine == min(choice.seconds, key=lambda name: choice.seconds[name])


@known_version
def test_an_engine_that_computes_another_model_is_not_taken(policy):
    choice = choose(policy, shift=0.01)
    assert choice.engine == "generate"
    assert "log-probs are 0.01 nats a token from the learner's" in choice.reason
    with pytest.raises(ConfigError, match=r'"continuous" does not work here: its log-probs are 0'):
        choose(policy, replace(AUTO, engine="continuous"), shift=0.01)


@known_version
def test_rounding_is_allowed_what_the_dtype_needs(policy):
    half = replace(policy, dtype=torch.bfloat16)
    config = replace(AUTO, engine="continuous")
    assert choose(half, config, shift=0.02).reason == "asked for"
    with pytest.raises(ConfigError, match="rounding explains 0.05"):
        choose(half, config, shift=0.2)


@known_version
def test_a_model_that_it_cannot_run_is_left_to_generate():
    policy = Policy(tiny_model("gemma2"), arithmetic_tokenizer(), torch.float32)
    choice = choose(policy)
    assert choice.engine == "generate" and "softcap" in choice.reason
    with pytest.raises(ConfigError, match='softcap.*; use "generate"'):
        choose(policy, replace(AUTO, engine="continuous"))


@pytest.mark.parametrize("version", ["5.9.2", "5.25.0.dev0", "6.0.0rc1"])
def test_a_version_that_is_not_known_is_left_to_generate(policy, monkeypatch, version):
    monkeypatch.setattr(continuous.transformers, "__version__", version)
    why = (
        f"transformers {version} may have changed its continuous batching, which is tested with "
        "5.10 to 5.24"
    )
    assert why in continuous.why_not(policy.model, 8)
    choice = choose(policy)
    assert choice.engine == "generate" and why in choice.reason
    with pytest.raises(ConfigError, match=re.escape(why) + '; use "generate"'):
        choose(policy, replace(AUTO, engine="continuous"))


FAILURES = {
    "another argument": "__init__",
    "another loop": "_run_generation_loop",
    "inside the loop": "_create_batch_processor",
}


@known_version
@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize("kind", [AttributeError, TypeError])
def test_another_interface_is_left_to_generate(policy, monkeypatch, where, kind):
    def changed(*_, **__):
        raise kind("there is no such thing")

    monkeypatch.setattr(ContinuousBatchingManager, FAILURES[where], changed)
    choice = choose(policy)
    assert choice.engine == "generate"
    assert f"continuous batching of transformers {transformers.__version__} failed" in choice.reason
    assert f"{kind.__name__}: there is no such thing; tested with 5.10 to 5.24" in choice.reason
    assert policy.model.config._attn_implementation == "sdpa"


def test_a_process_without_prompts_follows_the_others(policy, monkeypatch):
    config = replace(AUTO, engine="continuous")
    assert choose(policy, config, prompts=[]).engine == "continuous"
    there = {"seconds": {"generate": 1.0, "continuous": 2.0}, "disagreement": {}, "error": None}
    monkeypatch.setattr(Processes, "gather", lambda self, own: [own, there])
    choice = choose(policy, prompts=[])
    assert choice.engine == "generate" and choice.seconds == there["seconds"]


@known_version
def test_the_slowest_process_decides(policy, clock, monkeypatch):
    clock[0]["continuous"] = 0.5
    there = {"seconds": {"generate": 1.0, "continuous": 3.0}, "disagreement": {}, "error": None}
    monkeypatch.setattr(Processes, "gather", lambda self, own: [own, there])
    assert choose(policy).engine == "generate"


def test_the_file_reads_as_it_was_written(tmp_path):
    choice = EngineChoice("generate", "why", {"generate": 1.5}, {"generate": 1e-6}, 4, 5, "cpu")
    choice.write(tmp_path / "engine.json")
    assert EngineChoice.read(tmp_path / "engine.json") == choice
    (tmp_path / "half.json").write_text('{"engine": "gen')
    assert EngineChoice.read(tmp_path / "half.json") is None
    assert EngineChoice.read(tmp_path / "none.json") is None


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize("faster", [pytest.param("generate", marks=pytest.mark.slow), "continuous"])
def test_a_run_goes_on_with_the_engine_that_it_began_with(faster, tmp_path, monkeypatch):
    changes = {"rollout": {"engine": "auto"}, "run": {"steps": 2, "save_every": 1}}
    changes["eval"] = {"source": "none"}
    asked = []

    def choose(*_):
        asked.append(1)
        return EngineChoice(faster if len(asked) < 3 else "another", "said so")

    monkeypatch.setattr("oisd.trainer.choose_engine", choose)
    train(tmp_path / "whole", **changes)
    changes["run"] = {"steps": 1, "save_every": 1}
    train(tmp_path / "parts", **changes)
    assert len(asked) == 2
    changes["run"] = {"steps": 2, "save_every": 1}
    train(tmp_path / "parts", **changes)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", step=2)
    assert len(asked) == 2
    assert json.loads((tmp_path / "parts" / "engine.json").read_text())["engine"] == faster
    row = metrics(tmp_path / "whole")[-1]
    if faster == "continuous":  # weights of 1 but for rounding, none of them near the cap of 2
        assert row["tis/weight"] == pytest.approx(1, abs=1e-4) and row["tis/truncated"] == 0
    else:
        assert "tis/weight" not in row


@known_version
def test_a_run_measures_by_itself(tmp_path):
    trainer = Trainer(
        from_tables(
            tables(
                tmp_path / "run",
                rollout={"engine": "auto"},
                run={"steps": 1},
                eval={"source": "none"},
            )
        )
    )
    trainer.train()
    found = json.loads((tmp_path / "run" / "engine.json").read_text())
    assert found["engine"] == trainer.engine == min(found["seconds"], key=found["seconds"].get)
    assert found["completions"] == 48 and found["tokens"] == 5
    assert 0 < found["disagreement"]["continuous"] < 1e-4


@pytest.mark.parametrize(
    "cap, engine, wanted",
    [("auto", "continuous", 2.0), ("auto", "generate", None), (None, "continuous", None),
     (1.5, "generate", 1.5), (1.5, "continuous", 1.5)],
)  # fmt: skip
def test_the_correction_is_on_where_engines_differ(cap, engine, wanted):
    assert GRPOConfig(tis_cap=cap).importance_cap(engine) == wanted
