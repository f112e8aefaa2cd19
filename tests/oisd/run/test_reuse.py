"""Results that lie in a folder are shown or gone on with only for what they are of."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
from oisd.cli import main
from oisd.run import provenance
from tests import ROOT

REWARD = """
def digits(texts, answers):
    return [float(len(text) % 3) for text in texts]
"""


def save_model(folder: Path, seed: int) -> None:
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    arithmetic_model(seed, num_key_value_heads=1, head_dim=16, **size).save_pretrained(folder)
    arithmetic_tokenizer().save_pretrained(folder)


def save_problems(file: Path, answers=("3", "5", "7", "9")) -> None:
    rows = [{"question": f"1+{i}=", "answer": answer} for i, answer in enumerate(answers, 2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("oisd.run.summary.plot_training", lambda *_: [])
    monkeypatch.setattr("oisd.evaluate.run.plot_pass_at_k", lambda *_: None)
    save_model(tmp_path / "model", seed=0)
    save_problems(tmp_path / "sums.jsonl")
    save_problems(tmp_path / "other.jsonl", ("2", "4"))
    (tmp_path / "counts.py").write_text(REWARD)
    return tmp_path


EVAL = [
    *("eval", "model", "--data", "sums.jsonl", "--samples", "2", "--reward", "counts:digits"),
    *("--max-completion-tokens", "3", "--output-dir", "out", "--device", "cpu"),
]
TRAIN = [
    *("train", "--model.path", "model", "--data.source", "sums.jsonl", "--warmup.steps", "0"),
    *("--rollout.prompts-per-step", "2", "--rollout.completions-per-prompt", "2"),
    *("--rollout.max-completion-tokens", "3", "--reward.function", "counts:digits"),
    *("--run.save-every", "1", "--run.output-dir", "run", "--oisd.student-layers", "1"),
    *(
        "--optimizer.schedule",
        "constant",
        "--run.device",
        "cpu",
        "--eval.source",
        "other.jsonl",
        "--eval.samples",
        "1",
    ),
]


def train(steps: int) -> int:
    return main([*TRAIN, "--run.steps", str(steps)])


def other_weights(folder: Path) -> None:
    save_model(folder / "model", seed=1)


def other_answers(folder: Path) -> None:
    save_problems(folder / "sums.jsonl", ("3", "5", "7", "8"))


def other_reward(folder: Path) -> None:
    (folder / "counts.py").write_text(REWARD.replace("% 3", "% 2"))


def no_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


CHANGES = {
    "weights": (other_weights, "the model 'model': model.safetensors has other content"),
    "answers": (other_answers, "the problems of --data"),
    "reward": (other_reward, "the source of the reward 'counts:digits'"),
    "no weights": (no_weights, "model.safetensors is gone"),
}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "half"])
@pytest.mark.parametrize("name", CHANGES)
def test_an_evaluation_of_something_else_is_refused_by_name(name, finished, folder, capsys):
    assert main(EVAL) == 0
    dump = folder / "out" / "problems-0-of-1.jsonl"
    if not finished:
        dump.write_text("".join(dump.read_text().splitlines(keepends=True)[:2]))
        (folder / "out" / "summary.json").unlink()
    before = dump.read_bytes()
    change, words = CHANGES[name]
    change(folder)
    capsys.readouterr()
    assert main(EVAL) == 2
    printed = capsys.readouterr()
    assert not printed.out and words in printed.err
    assert "choose another --output-dir, or delete out" in printed.err
    assert dump.read_bytes() == before
    if name != "no weights":
        assert main([*EVAL[:-3], "elsewhere", *EVAL[-2:]]) == 0


def test_the_same_again_is_not_sampled_again(folder, capsys):
    assert main(EVAL) == 0
    first = capsys.readouterr().out.partition("oisd eval")[2]
    dump = (folder / "out" / "problems-0-of-1.jsonl").read_bytes()
    os.utime(folder / "model" / "model.safetensors")
    (folder / "model" / "README.md").write_text("a card")
    assert main(EVAL) == 0
    assert first and capsys.readouterr().out.partition("oisd eval")[2] == first
    assert (folder / "out" / "problems-0-of-1.jsonl").read_bytes() == dump


def test_other_versions_are_a_warning(folder, monkeypatch):
    assert main(EVAL) == 0
    monkeypatch.setattr(provenance, "versions", lambda: {"torch": "0.1"})
    with pytest.warns(UserWarning, match=r"out was begun with other versions: .*torch .* -> 0\.1"):
        assert main(EVAL) == 0


def test_results_without_a_record_are_refused(folder, capsys):
    assert main(EVAL) == 0
    file = folder / "out" / "settings.json"
    settings = json.loads(file.read_text())
    del settings["sources"]
    for text, words in (
        (json.dumps(settings), "without a record of the weights, problems and reward"),
        ("{", "settings.json is not JSON"),
    ):
        file.write_text(text)
        assert main(EVAL) == 2
        printed = capsys.readouterr().err
        assert words in printed and "or delete out" in printed
    file.unlink()
    assert main(EVAL) == 2


def test_a_commit_of_the_hub_that_moved_on_is_refused(folder, monkeypatch, capsys):
    """Before the model is loaded there may be no copy, and afterwards a newer one."""
    commits = iter([None, "a" * 40, "a" * 40, "a" * 40, "b" * 40])
    monkeypatch.setattr(provenance, "_cached_commit", lambda _: next(commits))
    from oisd.policy import load_for_command

    load = lambda path, *rest: load_for_command("model", *rest)  # noqa: E731
    monkeypatch.setattr("oisd.evaluate.run.load_for_command", load)
    hub = ["eval", "somebody/model", *EVAL[2:]]
    assert main(hub) == 0
    assert main(hub) == 0
    dump = folder / "out" / "problems-0-of-1.jsonl"
    dump.write_text(dump.read_text().splitlines(keepends=True)[0])
    assert main(hub) == 2
    assert re.search("at commit bbb.*, was at aaa", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["weights", "answers", "evaluation", "reward"])
def test_a_run_is_resumed_with_what_it_began_with(name, folder, capsys):
    assert train(steps=1) == 0
    metrics = (folder / "run" / "metrics.jsonl").read_bytes()
    if name == "evaluation":
        save_problems(folder / "other.jsonl", ("2", "5"))
        words = "the problems of eval.source"
    else:
        change, words = CHANGES[name]
        change(folder)
    assert train(steps=2) == 2
    printed = capsys.readouterr().err
    assert words.replace("--data", "data.source") in printed
    assert "--run.output-dir" in printed and "--run.restart" in printed
    assert (folder / "run" / "metrics.jsonl").read_bytes() == metrics
    assert main([*TRAIN, "--run.steps", "1", "--run.restart", "True"]) == 0


def test_a_run_needs_neither_its_base_nor_an_old_record(folder):
    assert train(steps=1) == 0
    (folder / "run" / "sources.json").unlink()
    with pytest.warns(UserWarning, match="run has no record of its base model"):
        assert train(steps=2) == 0
    assert (folder / "run" / "sources.json").exists()
    (folder / "model").rename(folder / "moved")  # a checkpoint holds all weights
    assert train(steps=3) == 0


def test_several_processes_are_refused_together(folder):
    """The first one decides; the others end too, instead of waiting for it."""
    assert main(EVAL) == 0
    other_weights(folder)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    path = os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launch, "2", "-m", "oisd.cli", *EVAL], capture_output=True, text=True, timeout=200,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "model.safetensors has other content" in done.stderr


def test_a_run_keeps_the_layers_that_its_attention_term_compares(folder, monkeypatch, capsys):
    assert main([*TRAIN, "--run.steps", "1"]) == 0
    kept = json.loads((folder / "run" / "attention.json").read_text())
    assert kept == {"layers": [[1, 2]], "words": ""}
    capsys.readouterr()
    (folder / "run" / "attention.json").write_text(json.dumps({"layers": [[1, 1]], "words": "x"}))
    assert main([*TRAIN, "--run.steps", "2"]) == 2
    assert "compares the layers (student, teacher) [[1, 1]]" in capsys.readouterr().err
    (folder / "run" / "attention.json").unlink()  # as of a run of oisd 0.2
    assert main([*TRAIN, "--run.steps", "2"]) == 0
    assert json.loads((folder / "run" / "attention.json").read_text()) == kept
