"""Each option of each command changes something, or is refused: none is taken and not used."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
from oisd.cli import main
from oisd.config import TrainConfig
from oisd.lens import LayerLens
from oisd.options import AttentionRun, CheckRun, EvalRun, LookRun
from oisd.schema import option


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    for seed, name in enumerate(("m", "other")):
        arithmetic_model(seed + 1, hidden_size=16, intermediate_size=16).save_pretrained(
            folder / name
        )
        arithmetic_tokenizer().save_pretrained(folder / name)
    rows = [
        {"question": f"{i}+{i}=", "ask": f"{i}+9=", "answer": str(2 * i), "solution": "#8"}
        for i in range(1, 10)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "few.jsonl").write_text(json.dumps(rows[3]) + "\n")
    (folder / "sleepy.py").write_text(
        "import time\ndef slow(completions, answers):\n"
        "    time.sleep(3)\n    return [0.0] * len(completions)\n"
    )
    before = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    os.chdir(before)


@pytest.fixture(scope="module")
def known():
    """What a command did without the option that is looked at: it is the same for many options."""
    return {}


@pytest.fixture
def before(outcome, known):
    def run(*arguments):
        if arguments not in known:
            known[arguments] = outcome(*arguments)
        return known[arguments]

    return run


@pytest.fixture
def outcome(place, monkeypatch, capsys, tmp_path):
    """A command's exit status, what it writes, and what it asks of torch and of models."""
    from transformers import AutoModelForCausalLM

    from oisd.policy import Policy

    asked: list[object] = []

    def drawing(figure, path):
        ticks = [[t.get_text() for t in ax.get_xticklabels()] for ax in figure.axes]
        path.write_text(json.dumps(ticks))
        return path

    load, sample = AutoModelForCausalLM.from_pretrained, Policy.sample

    def loads(source, **settings):
        asked.append(settings.get("trust_remote_code"))
        asked.append(settings.get("attn_implementation"))
        return load(source, **settings)

    def samples(self, prompts, rows, **settings):
        asked.append([len(prompts), str(sorted(settings.items(), key=str)), str(self.dtype)])
        return sample(self, prompts, rows, **settings)

    class AskedLens(LayerLens):
        def __init__(self, model, **settings):
            asked.append(settings)
            super().__init__(model, **settings)

    monkeypatch.setattr("oisd.lens.run.LayerLens", AskedLens)
    monkeypatch.setattr("oisd.lens.plots.save_figure", drawing)
    monkeypatch.setattr("oisd.plots.save_figure", drawing)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads)
    monkeypatch.setattr(Policy, "sample", samples)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: asked.append(count))
    number = iter(range(1000))

    def run(*arguments):
        asked.clear()
        folder = tmp_path / str(next(number))
        command = [*map(str, arguments)]
        if "--output-dir" not in command:
            command += ["--output-dir", str(folder)]
        try:
            status = main(command)
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        files = {}
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.name not in ("settings.json", "index.html"):
                text = file.read_text(encoding="utf-8").replace(str(folder), "")
                files[file.name] = text
        return status, said.out.replace(str(folder), ""), said.err, files, list(asked)

    return run


TEXT = ["--prompt", "12+34=", "1+1="]
ROWS = ["--data", "rows.jsonl", "--limit", "2"]
# For each option its arguments, and what else the command is given.
LOOK = {
    "prompt": ([], ["--prompt", "12+34="]),
    "data": ([], ROWS),
    "split": (ROWS, ["--split", "test[:1]"]),
    "subset": (ROWS, ["--subset", "main"]),
    "prompt_field": (ROWS, ["--prompt-field", "ask"]),
    "answer_field": (ROWS, ["--answer-field", "none-such"]),
    "limit": (ROWS[:2], ["--limit", "3"]),
    "system_prompt": (TEXT, ["--system-prompt", "7"]),
    "chat_template": (TEXT, ["--chat-template", "True"]),
    "max_prompt_tokens": (TEXT, ["--max-prompt-tokens", "5"]),
    "completion_tokens": (TEXT, ["--completion-tokens", "3"]),
    "layer": (TEXT, ["--layer", "1"]),
    "compare": (TEXT, ["--compare", "other"]),
    "picture_tokens": (TEXT, ["--picture-tokens", "2"]),
    "divergence": (TEXT, ["--divergence", "reverse_kl"]),
    "lens_norm": (TEXT, ["--lens-norm", "none"]),
    "dtype": (TEXT, ["--dtype", "bfloat16"]),
    "attn_implementation": (TEXT, ["--attn-implementation", "eager"]),
    "trust_remote_code": (TEXT, ["--trust-remote-code", "True"]),
    "device": (TEXT, ["--device", "cuda:77"]),
    "threads": (TEXT, ["--threads", "1"]),
    "seed": ([*TEXT, "--completion-tokens", "4"], ["--seed", "5"]),
    "output_dir": (TEXT, ["--output-dir", "elsewhere"]),
}
EVAL_BASE = ["--data", "rows.jsonl", "--reward", "exact", "--samples", "2", "--limit", "4",
             "--max-completion-tokens", "3", "--batch-size", "4"]  # fmt: skip
EVAL = {
    "benchmark": ["--benchmark", "gsm8k:rows.jsonl"],
    "data": ["--data", "few.jsonl"],
    "split": ["--split", "test[:2]"],
    "subset": ["--subset", "main"],
    "prompt_field": ["--prompt-field", "ask"],
    "answer_field": ["--answer-field", "solution"],
    "answer_pattern": ["--answer-pattern", "(.)"],
    "limit": ["--limit", "3"],
    "system_prompt": ["--system-prompt", "7"],
    "chat_template": ["--chat-template", "True"],
    "max_prompt_tokens": ["--max-prompt-tokens", "2"],
    "reward": ["--reward", "boxed_string"],
    "timeout": ["--reward", "sleepy:slow", "--timeout", "0.2"],
    "samples": ["--samples", "3"],
    "max_completion_tokens": ["--max-completion-tokens", "2"],
    "temperature": ["--temperature", "0.3"],
    "top_p": ["--top-p", "0.5"],
    "batch_size": ["--batch-size", "2"],
    "engine": ["--engine", "continuous"],
    "dtype": ["--dtype", "bfloat16"],
    "attn_implementation": ["--attn-implementation", "eager"],
    "trust_remote_code": ["--trust-remote-code", "True"],
    "device": ["--device", "cuda:77"],
    "threads": ["--threads", "1"],
    "seed": ["--seed", "5"],
    "output_dir": ["--output-dir", "elsewhere"],
}
CHECK_BASE = ["--data", "rows.jsonl", "--limit", "4", "--reward", "exact", "--prompts", "2",
              "--completions", "2", "--completion-tokens", "4", "--max-completion-tokens", "4",
              "--layer", "3"]  # fmt: skip
AS_EVAL = ("data", "subset", "prompt_field", "answer_field", "limit", "system_prompt",
           "chat_template", "max_prompt_tokens", "reward", "timeout", "temperature", "top_p",
           "engine", "dtype", "attn_implementation", "trust_remote_code", "device", "threads",
           "seed", "output_dir")  # fmt: skip
CHECK = {name: EVAL[name] for name in AS_EVAL} | {
    "recipe": ["--recipe", "arithmetic"],
    "split": ["--split", "train[:2]"],
    "answer_pattern": ["--answer-pattern", "(1)"],
    "eval_data": ["--eval-data", "few.jsonl"],
    "max_completion_tokens": ["--max-completion-tokens", "3"],
    "prompts": ["--prompts", "3"],
    "completions": ["--completions", "3"],
    "completion_tokens": ["--completion-tokens", "3"],
    "layer": ["--layer", "2"],
}


def names(kind):
    return {f.name for f in dataclasses.fields(kind)}


def test_the_lists_have_every_option():
    assert set(LOOK) == names(LookRun) == names(AttentionRun)
    assert set(EVAL) == names(EvalRun)
    assert set(CHECK) == names(CheckRun)


def differs(first, after, given):
    status, _, said, *_ = after
    assert "traceback" not in said, said
    if status != 0:  # refused, by this option's name or by its value
        assert status in (1, 2) and said.strip()
        return
    assert (first[0], first[1], first[3], first[4]) != (status, after[1], after[3], after[4]), (
        f"{given} changes nothing"
    )


@pytest.mark.parametrize("name", LOOK)
@pytest.mark.parametrize("command", ["lens", "attention"])
def test_lens_and_attention(command, name, before, outcome, place):
    base, given = LOOK[name]
    first, after = before(command, "m", *base), outcome(command, "m", *base, *given)
    differs(first, after, given)
    if name in ("compare", "picture_tokens", "divergence", "layer"):
        assert after[0] == 0
    if name == "output_dir":
        assert (place / "elsewhere" / f"{command}.json").exists()


@pytest.mark.parametrize("name", ["split", "subset", "prompt_field", "answer_field", "limit"])
@pytest.mark.parametrize("command", ["lens", "attention"])
def test_options_of_data_are_refused_beside_prompt(command, name, outcome):
    status, _, said, *_ = outcome(command, "m", *TEXT, option(name), "3")
    assert status == 2 and f"{option(name)} is for --data" in said


@pytest.mark.parametrize("name", EVAL)
def test_eval(name, before, outcome, place):
    first = before("eval", "m", *EVAL_BASE)
    assert first[0] == 0, first[2]
    after = outcome("eval", "m", *EVAL_BASE, *EVAL[name])
    differs(first, after, EVAL[name])
    if name == "timeout":
        assert after[0] == 1 and "more than 0.2 s" in after[2]
    if name == "output_dir":
        assert (place / "elsewhere" / "summary.json").exists()


@pytest.mark.parametrize("name", CHECK)
def test_check(name, before, outcome, place):
    first = before("check", "m", *CHECK_BASE)
    assert first[0] == 0, first[2]
    after = outcome("check", "m", *CHECK_BASE, *CHECK[name])
    differs(first, after, CHECK[name])
    if name == "timeout":
        assert "more than 0.2 s" in after[1]
    if name == "output_dir":
        assert (place / "elsewhere" / "check.json").exists()


@pytest.mark.parametrize("name", ["split", "limit", "answer_pattern", "eval_data"])
def test_options_of_data_are_refused_without_data(name, outcome):
    status, _, said, *_ = outcome("check", "m", option(name), "3")
    assert status == 2 and f"{option(name)} is for --data or --recipe" in said


@pytest.mark.parametrize(
    ("command", "folder"),
    [("eval", "runs/eval"), ("check", "runs/check"), ("lens", "runs/lens"),
     ("attention", "runs/attention"), ("compare", "runs/compare"), ("train", "runs/oisd")],
)  # fmt: skip
def test_help_names_the_folder_that_is_used(command, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    try:
        assert main([command, "--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
    said = capsys.readouterr().out
    if command == "train":  # of its recipe
        folder = "runs/arithmetic"
    assert folder in said
    others = {f"runs/{name}" for name in ("eval", "check", "lens", "attention", "compare")}
    others -= {folder}
    assert not any(other in said for other in others)


# ---- train -----------------------------------------------------------------------------------

# Some settings matter only beside others.
TRAININGS = [
    ["--grpo.kl-coef", "0.1", "--warmup.steps", "2", "--oisd.attention-kernel", "separate"],
    ["--model.lora-rank", "2", "--rollout.engine", "auto", "--eval.source", "arithmetic"],
    ["--grpo.internal-layer", "3", "--grpo.internal-steps", "1", "--oisd.think-weight", "0",
     "--oisd.attention-weight", "0"],
    ["--oisd.key-window", "2", "--oisd.key-stride", "2", "--oisd.attention-steps", "2",
     "--oisd.attention-student", "1", "--oisd.attention-teacher", "3"],
]  # fmt: skip


def test_train_reads_every_setting(tmp_path, monkeypatch):
    """Outside the checks of its own file: a setting that nothing else reads has no effect."""
    monkeypatch.setattr("oisd.run.summary.plot_training", lambda *_: [])
    read: set[str] = set()
    for section in dataclasses.fields(TrainConfig):
        kind = type(getattr(TrainConfig(), section.name))

        def get(self, name, section=section.name):
            caller = sys._getframe(1).f_code
            if caller.co_name not in ("__post_init__", "_asdict_inner", "at_least", "above_0") and (
                not caller.co_filename.endswith(("schema.py", "dataclasses.py"))
            ):
                read.add(f"{section}.{name}")
            return object.__getattribute__(self, name)

        monkeypatch.setattr(kind, "__getattribute__", get)
    arithmetic_model(1).save_pretrained(tmp_path / "m")
    arithmetic_tokenizer().save_pretrained(tmp_path / "m")
    for number, given in enumerate(TRAININGS):
        if "--model.lora-rank" in given:  # a blank model gets no adapters
            given = [*given, "--model.path", str(tmp_path / "m")]
        small = ["--run.steps", "1", "--rollout.prompts-per-step", "2", "--eval.limit", "2",
                 "--rollout.completions-per-prompt", "2", "--run.save-every", "1",
                 "--eval.samples", "1", "--warmup.steps", "0",
                 "--run.output-dir", str(tmp_path / str(number))]  # fmt: skip
        assert main(["train", *small, *given]) == 0
    settings = {
        f"{section.name}.{f.name}"
        for section in dataclasses.fields(TrainConfig)
        for f in dataclasses.fields(getattr(TrainConfig(), section.name))
    }
    assert settings - read == set()
