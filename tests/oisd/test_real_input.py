"""Word problems in the Hub's own schemas, a chat template, the math reward: from files to metrics.

The tokenizer is a byte-level BPE trained on the sample itself, the model a blank tiny Qwen3.
"""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from oisd.arithmetic import arithmetic_model
from oisd.cli import main
from oisd.data import PAPER_SYSTEM_PROMPT
from tests import DATA

SAMPLES = DATA
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SCHEMAS = {
    "gsm8k": ["--data.answer-pattern", r"####\s*(.+)$"],
    "deepmath": ["--data.answer-field", "final_answer"],
}
FORMATS = ["jsonl", "parquet", "folder"]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(
        [str(file) for file in SAMPLES.glob("*.jsonl")],
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", chat_template=CHAT
    )
    fast.save_pretrained(folder)
    arithmetic_model(
        vocab_size=len(fast), eos_token_id=1, pad_token_id=0, max_position_embeddings=2048
    ).save_pretrained(folder)
    return folder


def source(schema: str, kind: str, folder: Path) -> str:
    from datasets import load_dataset

    file = SAMPLES / f"{schema}_sample.jsonl"
    if kind == "jsonl":
        return str(file)
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "hf"))
    if kind == "parquet":
        rows.to_parquet(folder / "rows.parquet")
        return str(folder / "rows.parquet")
    rows.save_to_disk(folder / "rows")
    return str(folder / "rows")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_trains_and_evaluates(schema, kind, chat_model, tmp_path, monkeypatch):
    monkeypatch.setattr("oisd.run.summary.plot_training", lambda *_: [])
    data = source(schema, kind, tmp_path)
    run = tmp_path / "run"
    status = main(
        [
            *("train", "--model.path", str(chat_model), "--data.source", data, *SCHEMAS[schema]),
            *("--data.system-prompt", PAPER_SYSTEM_PROMPT, "--data.max-prompt-tokens", "1024"),
            *("--reward.function", "math", "--warmup.steps", "0", "--eval.source", "none"),
            *("--rollout.prompts-per-step", "2", "--rollout.completions-per-prompt", "4"),
            *("--run.steps", "1", "--run.output-dir", str(run), "--run.save-every", "1"),
            *("--rollout.max-completion-tokens", "8", "--grpo.skip-zero-advantage", "False"),
        ]
    )
    assert status == 0
    (row,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # A blank model solves nothing; that the lines below hold is what the pipeline is asked for.
    assert row["reward"] == 0 and row["completion_length"] > 1 and row["entropy/policy"] > 3
    table = [json.loads(x) for x in (run / "completions" / "step-1.jsonl").read_text().splitlines()]
    assert len(table) == 8
    for entry in table:
        assert entry["prompt"].startswith(f"<|system|>{PAPER_SYSTEM_PROMPT}<|end|><|user|>")
        assert entry["prompt"].endswith("<|assistant|>")
    golds = [json.loads(x) for x in (SAMPLES / f"{schema}_sample.jsonl").open(encoding="utf-8")]
    field = "answer" if schema == "gsm8k" else "final_answer"
    answers = {str(gold[field]).split("####")[-1].strip() for gold in golds}
    assert {entry["answer"] for entry in table} <= answers

    if kind == "jsonl":
        options = [option.replace("--data.", "--") for option in SCHEMAS[schema]]
        out = tmp_path / "eval"
        status = main(
            [
                *("eval", str(run / "checkpoints" / "step-1"), "--data", data, *options),
                *("--limit", "3", "--samples", "2", "--max-completion-tokens", "4"),
                *("--output-dir", str(out), "--split", "train"),
            ]
        )
        assert status == 0
        assert json.loads((out / "summary.json").read_text())["problems"] == 3


def test_reward_is_earned_by_the_last_box_of_a_chat_completion(chat_model, tmp_path, monkeypatch):
    """The reward sees the completion alone, without special tokens, and the mapped answer."""
    seen = []

    def graded(self, completions, answers):
        seen.append((completions, answers))
        return [0.0, 1.0] * (len(completions) // 2)

    monkeypatch.setattr("oisd.run.summary.plot_training", lambda *_: [])
    monkeypatch.setattr("oisd.rewards.MathReward.__call__", graded)
    status = main(
        [
            *("train", "--model.path", str(chat_model), "--reward.function", "math"),
            *("--data.source", str(SAMPLES / "gsm8k_sample.jsonl"), *SCHEMAS["gsm8k"]),
            *("--data.max-prompt-tokens", "1024", "--warmup.steps", "0", "--eval.source", "none"),
            *("--rollout.prompts-per-step", "2", "--rollout.completions-per-prompt", "4"),
            *("--run.steps", "1", "--run.output-dir", str(tmp_path / "run")),
        ]
    )
    assert status == 0
    ((completions, answers),) = seen
    assert len(completions) == 8 and len(set(answers[:4])) == 1 and len(set(answers)) == 2
    assert not any("<|" in completion for completion in completions)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["reward"] == 0.5 and row["frac_zero_std"] == 0
    assert row["grad_norm"] > 0 and row["js/think_pos"] > 0
