"""Blank models of any size, their tokenizers, and the warm-up on worked solutions."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oisd.arithmetic import supervised_batch
from oisd.config import ConfigError, ModelConfig, TrainConfig, WarmupConfig, from_tables
from oisd.data import Example
from oisd.data.tasks import task_examples
from oisd.plan import memory_plan, model_shape
from oisd.policy import load_policy
from oisd.schema import ScratchSizes, scratch_sizes
from oisd.scratch import scratch_model, scratch_tokenizer
from oisd.trainer import Trainer
from oisd.warmup import warm_up

TINY = "scratch:layers=2,width=16,heads=2"


def test_sizes_are_those_of_the_path():
    sizes = scratch_sizes("scratch:layers=8,width=192,heads=6,kv_heads=3,feed_forward=400")
    config = scratch_model(sizes, scratch_tokenizer(), seed=0).config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (8, 192, 400)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 3, 32)
    assert scratch_sizes("scratch") == ScratchSizes()
    assert ScratchSizes(width=192).inner_width == 512


@pytest.mark.parametrize(
    "path, message",
    [
        ("scratch:layer=8", "unknown setting 'layer'; did you mean 'layers'"),
        ("scratch:layers=0", "layers must be at least 1, got 0"),
        ("scratch:width=100,heads=3", "width must be a multiple of 2 x heads = 6"),
        ("scratch:width=96,heads=4,kv_heads=3", "kv_heads must divide heads = 4, got 3"),
        (
            "scratch:positions=64",
            "unknown setting 'positions'; known: feed_forward, heads, kv_heads",
        ),
        ("scratch:width=wide", "width must be a whole number, got 'wide'"),
    ],
)
def test_bad_sizes_are_refused_with_the_recipe(path, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(path=path)


def test_a_blank_model_reads_texts_of_any_length():
    """Rotary scores depend on distances alone: far behind in a text, as at its beginning."""
    policy = load_policy(ModelConfig(path=TINY), seed=3)
    ids = policy.tokenizer("12+34=46", return_tensors="pt").input_ids
    policy.require_positions([[1] * 40_000], 8192, "rollout.max_completion_tokens")
    with torch.no_grad():
        near, far = (
            policy.model(ids, position_ids=torch.arange(start, start + ids.shape[1])[None]).logits
            for start in (0, 40_000)
        )
    assert near.std() > 0.1
    torch.testing.assert_close(far, near, rtol=0, atol=2e-3)


def test_a_blank_model_has_no_adapters():
    tables = {"model": {"path": TINY, "lora_rank": 4}, "run": {"output_dir": "never"}}
    with pytest.raises(ConfigError, match="model.lora_rank must be 0 with a blank model"):
        Trainer(from_tables(tables))


TEXTS = ["Add 12 and 30: ×", "Add 7 and 5: ×", r"\boxed{42}"]


def test_words_of_the_task_are_tokens_and_others_are_spelled():
    tokenizer = scratch_tokenizer(TEXTS)

    def pieces(text):
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    assert pieces("Add 12×") == ["Add", " ", "1", "2", "×"]
    assert pieces("Adds\n") == ["Add", "s", "\n"]
    assert pieces(r"so \boxed{42}") == ["s", "o", " ", "\\boxed{", "4", "2", "}"]
    assert pieces("ä") == ["<unk>"]
    text = "What is 3*(4-1)?\nIt is \\boxed{9}, {x}."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    again = scratch_tokenizer(TEXTS[::-1])
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_checkpoint_is_an_ordinary_folder(tmp_path):
    policy = load_policy(ModelConfig(path=TINY), seed=3, examples=[Example("Add 1×", "1", "a")])
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer("Add 1×")["input_ids"] == policy.tokenizer("Add 1×")["input_ids"]
    assert all(map(torch.equal, model.parameters(), policy.model.parameters()))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_plan_counts_a_blank_model():
    shape = model_shape(TINY)
    own = scratch_model(scratch_sizes(TINY), scratch_tokenizer())
    assert shape.parameters == sum(p.numel() for p in own.parameters())
    assert memory_plan(TrainConfig(model=ModelConfig(path=TINY)), shape).peak > 0


def test_a_warm_up_batch_holds_the_worked_solution():
    examples = task_examples("multiplication", limit=4)
    tokenizer = scratch_tokenizer()
    batch = supervised_batch(examples, tokenizer, [2])
    labels = batch["labels"][0]
    text = tokenizer.decode(labels[labels != -100])
    assert text == examples[2].solution + "<eos>"
    assert tokenizer.decode(batch["input_ids"][0]) == examples[2].prompt + text


def test_the_warm_up_stops_at_the_probability_of_whole_solutions():
    examples = task_examples("modular:terms=3,modulus=2")  # 72 problems
    policy = load_policy(ModelConfig(path=TINY), seed=0)
    steps = []
    config = WarmupConfig(steps=400, stop_at=0.5, batch_size=32, learning_rate=1e-2)
    warm_up(policy, examples, config, seed=0, on_step=lambda step, loss: steps.append(loss))
    assert 8 <= len(steps) < 400
    batch = supervised_batch(examples, policy.tokenizer, range(len(examples)))
    labels = batch.pop("labels")
    with torch.no_grad():
        logprobs = policy.model(**batch).logits[:, :-1].float().log_softmax(-1)
    own = logprobs.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    probability = (own * (labels[:, 1:] != -100)).sum(1).exp().mean()
    assert 0.4 < probability < 0.8


def test_a_run_from_scratch_resumes_and_is_evaluated(tmp_path):
    tables = {
        "model": {"path": TINY},
        "data": {"source": "modular:terms=3,modulus=3", "max_prompt_tokens": 20},
        "rollout": {
            "prompts_per_step": 2, "completions_per_prompt": 4, "max_completion_tokens": 8,
        },
        "reward": {"function": "final"},
        "oisd": {"student_layers": [1]},
        "warmup": {"steps": 3, "batch_size": 4},
        "eval": {"source": "modular:terms=3,modulus=3", "limit": 4, "samples": 2},
        "run": {"output_dir": str(tmp_path / "run"), "steps": 2, "save_every": 1,
                "device": "cpu", "threads": 1, "completions_every": 1},
    }  # fmt: skip
    Trainer(from_tables(tables)).train()
    trainer = Trainer(from_tables(tables))
    assert trainer.resumed and trainer.step == 2
    assert len(trainer.policy.tokenizer) == len(scratch_tokenizer())
    rows = [json.loads(r) for r in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
