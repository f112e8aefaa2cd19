"""The documents and the recipe for TRL, run with a tiny model."""

from __future__ import annotations

import json
import re
import runpy
import socket
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed
import trl
import trl.rewards

from oisd.arithmetic import arithmetic_tokenizer
from oisd.integrations import trl as adapter
from oisd.integrations.trl import OISDConfig
from tests import ROOT
from tests.oisd.integrations.trl_runs import PROMPTS, config, digits_reward, tiny_policy


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found
    return found


def save_policy(folder: Path) -> str:
    tiny_policy().save_pretrained(folder)
    arithmetic_tokenizer().save_pretrained(folder)
    return str(folder)


def test_your_own_loop_runs_and_is_short(capsys):
    (code,) = blocks("your-own-loop.md", "python")
    exec(compile(code, "docs/your-own-loop.md", "exec"), {})
    assert "js/attention_pos" in capsys.readouterr().out
    loop = code[code.index("predicts =") :]
    assert len([line for line in loop.splitlines() if line.strip()]) <= 25


def test_the_tensor_parallel_block_runs(tmp_path, monkeypatch):
    """As torchrun starts it, on one process; test_vocab_parallel.py has several."""
    (code,) = blocks("tensor-parallelism.md", "python")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    own = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=port)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {}
    try:
        exec(compile(code, "docs/tensor-parallelism.md", "exec"), names)
    finally:
        torch.distributed.destroy_process_group()
    assert names["hidden"].grad.norm() > 1e-3


def apply_diff(code: str, diff: str) -> str:
    """`code` with each run of removed lines replaced by the added lines that follow it."""
    hunks = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.MULTILINE)
    assert len(hunks) == 2 and all(h.count("\n") == 1 for hunk in hunks for h in hunk)
    for removed, added in hunks:
        assert code.count(removed[1:]) == 1
        code = code.replace(removed[1:], added[1:])
    return code


def test_the_two_line_diff(tmp_path, monkeypatch):
    """Applied to the documented script, which then runs: its model and data are replaced."""
    (code,), (diff,) = blocks("trl.md", "python"), blocks("trl.md", "diff")
    code = apply_diff(code, diff)
    rows = datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    monkeypatch.setattr(adapter, "math_reward", digits_reward)
    code = code.replace("Qwen/Qwen3-4B", save_policy(tmp_path / "model"))
    code = code.replace("[6]", "[2]")
    small = config(str(tmp_path))
    names = ("max_steps", "use_cpu", "bf16", "max_completion_length", "num_generations")
    for name in (*names, "per_device_train_batch_size", "report_to", "logging_steps"):
        code = code.replace("student_layers", f"{name}={getattr(small, name)!r}, student_layers")
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(compile(code, "docs/trl.md", "exec"), space)
    assert type(space["trainer"]).__name__ == "OISDTrainer"
    assert space["trainer"].state.log_history[0]["js/think_pos"] > 0


def test_one_line_of_trls_own_minimal_script(tmp_path, monkeypatch):
    """The quick start of the installed TRL's README: its model, data and machine are replaced."""
    readme = metadata("trl")
    text = readme["Description"] or str(readme.get_payload())
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "GRPO" in c)
    line = "from trl import GRPOTrainer\n"
    assert code.count(line) == 1
    code = code.replace(line, "from oisd.integrations.trl import OISDTrainer as GRPOTrainer\n")
    small = tiny_policy(num_hidden_layers=7)  # OISD's default layer is the sixth
    small.save_pretrained(tmp_path / "model")
    arithmetic_tokenizer().save_pretrained(tmp_path / "model")
    code, models = re.subn(r'model="[^"]+"', f"model={str(tmp_path / 'model')!r}", code)
    assert models == 1
    rows = datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    monkeypatch.setattr(trl.rewards, "accuracy_reward", digits_reward)
    monkeypatch.setattr(adapter, "OISDConfig", Small)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(compile(code, "TRL's README", "exec"), space)
    assert type(space["trainer"]).__name__ == "OISDTrainer"
    row = space["trainer"].state.log_history[0]
    assert row["js/think_pos"] > 0 and row["js/attention_pos"] > 0


class Small(OISDConfig):
    """What the trainer makes without `args`, for one step on a CPU."""

    def __init__(self, folder: str) -> None:
        super().__init__(
            folder, max_steps=1, use_cpu=True, bf16=False, per_device_train_batch_size=8,
            num_generations=4, max_completion_length=6, logging_steps=1, report_to=[],
            save_strategy="no",
        )  # fmt: skip


def test_the_script_of_the_document_is_trls_own_without_the_diff_but_for_the_grader():
    (code,) = blocks("trl.md", "python")
    assert code.count("oisd") == 1 and "from oisd.integrations.trl import math_reward\n" in code
    for name in re.findall(r"^from trl import (.*)$", code, re.MULTILINE)[0].split(", "):
        assert hasattr(trl, name)


@pytest.mark.parametrize(
    "extra", [[], ["--use_peft", "--lora_target_modules", "q_proj", "up_proj"]]
)
def test_the_recipe_trains(extra, tmp_path, monkeypatch, capsys):
    problems = tmp_path / "problems.jsonl"
    rows = [{"question": prompt, "answer": "7"} for prompt in PROMPTS]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {
        "model_name_or_path": save_policy(tmp_path / "model"),
        "dataset_name": problems,
        "conversation": "false",
        "reward": "exact",
        "output_dir": tmp_path / "out",
        "student_layers": 2,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        "logging_steps": 1,
        "dtype": "float32",
        "jsd_beta": 0.4,
    }
    words = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["trl_oisd.py", *words, *extra])
    runpy.run_path(str(ROOT / "recipes" / "trl_oisd.py"), run_name="__main__")
    assert "'loss/think'" in capsys.readouterr().out
    saved = "adapter_model.safetensors" if extra else "model.safetensors"
    assert (tmp_path / "out" / saved).exists()


def test_the_recipe_makes_conversations():
    recipe = runpy.run_path(str(ROOT / "recipes" / "trl_oisd.py"))
    arguments = recipe["Arguments"](dataset_name="arithmetic:digits=1", limit=3)
    found = recipe["problems"](arguments, seed=0)
    assert len(found) == 3
    assert [message["role"] for message in found[0]["prompt"]] == ["system", "user"]
    reward = recipe["graded"]("exact")
    answer = [{"role": "assistant", "content": found[0]["answer"]}]
    wrong = [{"role": "assistant", "content": "no"}]
    assert reward(completions=[answer, wrong], answer=[found[0]["answer"]] * 2) == [1.0, 0.0]
