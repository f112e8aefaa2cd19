"""Each mistake gets one clear message, and no traceback, before any work is done or lost."""

import errno
import json
import re
import resource
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
from oisd.cli import main
from oisd.config import from_tables
from oisd.data import load_examples
from oisd.data.problems import require_fitting_reward
from oisd.evaluate import read_problems
from oisd.jsonl import DamagedFileError
from oisd.rewards import load_reward
from oisd.run import checkpoints
from oisd.run.folder import RunFolder, RunFolderError
from oisd.run.processes import Processes

SMALL = [
    "train",
    *("--rollout.prompts-per-step", "2", "--rollout.completions-per-prompt", "4"),
    *("--warmup.steps", "0", "--eval.source", "none", "--run.steps", "2", "--run.save-every", "1"),
    *("--run.output-dir", "run"),
]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("oisd.run.summary.plot_training", lambda *_: [])
    return tmp_path


def rows(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def save_model(folder, **size):
    arithmetic_model(**size).save_pretrained(folder)
    arithmetic_tokenizer().save_pretrained(folder)


CASES = {
    "layer 0": (
        ["--oisd.student-layers", "0"],
        2,
        r"oisd.student_layers must be layers counted from 1, got \[0\]",
    ),
    "layer of the teacher": (
        ["--oisd.student-layers", "6"],
        2,
        r"student_layers must lie in 1\.\.5 \(layer 6 is the teacher\), got 6",
    ),
    "a repeated layer": (["--oisd.student-layers", "2", "2"], 2, "distinct layers"),
    "empty data set": (["--data.source", "empty.jsonl"], 1, "empty.jsonl"),
    "missing file": (["--data.source", "nowhere.jsonl"], 2, "nowhere.jsonl"),
    "row without the field": (
        ["--data.source", "lacking.jsonl"],
        1,
        r"row 1.*'?answer'?.*answr",
    ),
    "prompt over the limit": (
        ["--data.max-prompt-tokens", "3"],
        1,
        r"6 tokens.*max_prompt_tokens",
    ),
    "vocabulary mismatch": (
        ["--model.path", "narrow"],
        1,
        r"vocabulary mismatch: .* up to 13, .* 12 embeddings",
    ),
    "model without weights": (
        ["--model.path", "nothing-here"],
        2,
        "model.path 'nothing-here' cannot",
    ),
    "reward that raises": (
        ["--reward.function", "bad_reward:raises"],
        1,
        r"bad_reward:raises.*ZeroDivisionError",
    ),
    "reward that hangs": (
        ["--reward.function", "bad_reward:hangs", "--reward.timeout", "1"],
        1,
        r"bad_reward:hangs.*took more than 1 s",
    ),
    "reward that does not exist": (
        ["--reward.function", "bad_reward:lacks"],
        2,
        r"reward.function.*no attribute 'lacks'",
    ),
    "run folder under a file": (["--run.output-dir", "file/run"], 1, "run.output_dir 'file/run'"),
    "value out of range": (["--grpo.clip-low", "1.5"], 2, r"grpo.clip_low must be in \[0, 1\)"),
    "groups of one": (["--rollout.completions-per-prompt", "1"], 2, "at least 2"),
    "more minibatches than prompts": (["--grpo.minibatches", "3"], 2, r"at most .*\(2\)"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_message(name, in_tmp_path, capsys):
    (in_tmp_path / "empty.jsonl").write_text("")
    (in_tmp_path / "file").write_text("")
    good = {"question": "1+1=", "answer": "2"}
    rows(in_tmp_path / "lacking.jsonl", good, {"question": "1+2=", "answr": "3"})
    save_model(in_tmp_path / "narrow", vocab_size=12, eos_token_id=11, pad_token_id=11)
    (in_tmp_path / "bad_reward.py").write_text(
        "import time\ndef raises(c, a): return 1 / 0\ndef hangs(c, a): time.sleep(60)\n"
    )
    arguments, status, message = CASES[name]
    try:
        assert main([*SMALL, *arguments]) == status
    except SystemExit as exit:  # tyro's own end, when a dataclass refuses a value
        assert exit.code == status
    printed = re.sub(r"[\s│]+", " ", capsys.readouterr().err)  # tyro draws a box
    assert re.search(message, printed, re.DOTALL), printed
    # Only a user's own function is shown with a traceback, its own.
    assert ("Traceback" in printed) == (name == "reward that raises")
    assert not list(in_tmp_path.glob("run/checkpoints/*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[oisd]\nthink_wieght = 1.0", r"unknown key oisd.think_wieght; did you mean 'think_we"),
        ("[osid]\nbeta = 0.5", r"unknown table \[osid\]; did you mean 'oisd'"),
        ("[run]\nsteps = 'many'", r"run.steps must be an integer, got 'many'"),
        ("[oisd]\nbeta = 1.0", r"oisd.beta must be in \(0, 1\)"),
        ("[run", "not valid TOML"),
    ],
    ids=["unknown-key", "unknown-table", "type", "range", "syntax"],
)  # fmt: skip
def test_recipe(text, message, in_tmp_path, capsys):
    (in_tmp_path / "recipe.toml").write_text(text)
    assert main(["train", "recipe.toml"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (in_tmp_path / "runs").exists()


def test_unknown_recipe_and_unknown_option(capsys):
    assert main(["train", "no-such-recipe"]) == 2
    assert "no-such-recipe" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*SMALL, "--oisd.think-wieght", "1"])
    assert "--oisd.think-weight" in capsys.readouterr().err


def test_folder_of_another_run_is_refused_by_the_settings_that_differ(in_tmp_path, capsys):
    assert main(SMALL) == 0
    before = (in_tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main([*SMALL, "--optimizer.learning-rate", "0.5"]) == 2
    assert "optimizer.learning_rate: 0.0002 != 0.5" in capsys.readouterr().err
    assert (in_tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert main([*SMALL, "--optimizer.learning-rate", "1e-3", "--run.restart", "True"]) == 0


def test_failed_start_does_not_bind_the_folder_to_its_settings(in_tmp_path):
    assert main([*SMALL, "--oisd.student-layers", "6"]) == 2
    assert main([*SMALL, "--oisd.student-layers", "5"]) == 0


def test_full_disk_keeps_the_checkpoint_before(in_tmp_path, monkeypatch, capsys):
    import torch

    save = torch.save

    def full(state, file):
        if state["step"] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    assert main(SMALL) == 1
    printed = capsys.readouterr().err
    assert "checkpoint step-2 could not be written" in printed and "disk full" in printed
    left = [p.name for p in (in_tmp_path / "run" / "checkpoints").iterdir()]
    assert left == ["step-1"]
    monkeypatch.setattr(torch, "save", save)
    assert main(SMALL) == 0
    steps = [json.loads(x)["step"] for x in (in_tmp_path / "run" / "metrics.jsonl").open()]
    assert steps == [1, 2]


@pytest.fixture
def no_large_files():
    """A disk that is full after a hundred kilobytes of each file, as the system itself says it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_weights_that_cannot_be_written_are_an_error_of_the_disk(in_tmp_path, no_large_files):
    with pytest.raises(OSError, match="File too large: 'here'") as error:
        checkpoints.save_model(
            arithmetic_model(), arithmetic_tokenizer(), Path("here"), Processes()
        )
    assert error.value.errno == errno.EFBIG


def test_a_run_whose_weights_cannot_be_written_says_so(in_tmp_path, no_large_files, capsys):
    assert main(SMALL) == 1
    printed = capsys.readouterr().err.splitlines()[-1]
    assert "oisd: checkpoint step-1 could not be written to run/checkpoints: " in printed
    assert "File too large" in printed and "earlier checkpoints are intact" in printed
    assert not list((in_tmp_path / "run" / "checkpoints").iterdir())


def test_metrics_that_cannot_be_written_are_named(in_tmp_path):
    folder = RunFolder(in_tmp_path)
    (in_tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    wanted = "metrics.jsonl could not be written: No space left on device; checkpoints are intact"
    with pytest.raises(RunFolderError, match=wanted):
        folder.log({"step": 1})
    with pytest.raises(RunFolderError, match="step-1.jsonl could not be written: No such file"):
        folder.write_completions(1, prompt=["1+1="])


@pytest.mark.parametrize("source", ["modular:terms=3", "countdown", "base:digits=2"])
def test_a_reward_that_no_worked_solution_earns_is_refused(source, in_tmp_path, capsys):
    given = ["train", "--model.path", "scratch:layers=2,width=16,heads=2", "--data.source", source]
    given += ["--eval.source", "none", "--oisd.student-layers", "1"]
    assert main([*given, "--reward.function", "exact"]) == 2
    printed = capsys.readouterr().err
    fitting = "countdown" if source == "countdown" else "final"
    assert f'oisd: reward.function must be "{fitting}" for {source}, on whose' in printed
    assert printed.count("\n") == 1 and not (in_tmp_path / "runs").exists()


def test_a_reward_that_fits_or_is_the_users_own_is_not_refused(in_tmp_path):
    (in_tmp_path / "own.py").write_text("def grade(c, a): return [0.0] * len(c)\n")
    for reward, source, steps in [
        ("final", "modular", 3), ("exact", "modular", 0), ("countdown", "countdown", 3),
        ("exact", "arithmetic", 3), ("own:grade", "modular", 3),
        ("exact", "multiplication:by=1", 3),
    ]:  # fmt: skip
        config = from_tables(
            {"data": {"source": source}, "reward": {"function": reward}, "warmup": {"steps": steps}}
        )
        graded = load_reward(reward)
        require_fitting_reward(graded, config, load_examples(source, limit=9))
        graded.close()


@pytest.mark.parametrize("line", ['{"id": "a"}', "3", '{"id": '], ids=["fields", "number", "half"])
def test_a_damaged_dump_of_an_evaluation_is_named(line, in_tmp_path):
    dump = in_tmp_path / "problems-0-of-1.jsonl"
    dump.write_text(f"{line}\n")
    with pytest.raises(DamagedFileError, match="problems-0-of-1.jsonl is damaged: wanted a"):
        read_problems(dump)


def test_disk_too_small_for_the_checkpoints_is_found_at_once(monkeypatch, capsys, in_tmp_path):
    import shutil

    usage = shutil.disk_usage(in_tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr("oisd.run.folder.shutil.disk_usage", lambda _: usage)
    assert main(SMALL) == 1
    assert "GiB free" in capsys.readouterr().err


def test_gold_answers_that_no_completion_can_match_are_announced(in_tmp_path):
    rows(
        in_tmp_path / "golds.jsonl",
        {"question": "1+1=", "answer": r"\begin{nonsense"},
        {"question": "1+2=", "answer": "3"},
    )
    with pytest.warns(UserWarning, match="1 of 2 gold answers.*nonsense"):
        main([*SMALL, "--data.source", "golds.jsonl", "--reward.function", "math"])


def test_overlong_prompts_can_be_dropped(in_tmp_path):
    rows(
        in_tmp_path / "mixed.jsonl",
        {"question": "1+1=", "answer": "2"},
        {"question": "1+1+1+1+1+1+1=", "answer": "7"},
    )
    arguments = ["--data.source", "mixed.jsonl", "--data.max-prompt-tokens", "6"]
    with pytest.warns(UserWarning, match="1 prompts are longer"):
        assert main([*SMALL, *arguments, "--data.overlong-prompts", "drop"]) == 0
    table = (in_tmp_path / "run" / "completions" / "step-1.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"] for line in table} == {"1+1="}


def save_gpt2(folder):
    size = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 24}
    config = AutoConfig.for_model("gpt2", vocab_size=14, eos_token_id=13, bos_token_id=12, **size)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    arithmetic_tokenizer().save_pretrained(folder)


def test_texts_beyond_learned_positions_are_refused_before_the_first_step(in_tmp_path, capsys):
    save_gpt2(in_tmp_path / "gpt2")
    model = ["--model.path", "gpt2", "--oisd.student-layers", "2"]
    assert main([*SMALL, *model, "--rollout.max-completion-tokens", "20"]) == 2
    printed = capsys.readouterr().err
    assert "a prompt of 6 tokens with rollout.max_completion_tokens = 20" in printed
    assert "24; lower rollout.max_completion_tokens to at most 19" in printed
    assert main(["eval", "gpt2", "--limit", "2", "--max-completion-tokens", "20"]) == 2
    assert "--max-completion-tokens = 20" in capsys.readouterr().err
    look = ["lens", "gpt2", "--prompt", "1+2=", "--completion-tokens"]
    assert main([*look, "21"]) == 2  # 4 + 21 are read, of 24 positions
    assert "--completion-tokens = 21" in capsys.readouterr().err


def test_a_models_dropout_is_replaced_with_a_word(in_tmp_path):
    save_gpt2(in_tmp_path / "gpt2")
    model = ["--model.path", "gpt2", "--oisd.student-layers", "2", "--grpo.kl-coef", "0.1"]
    model += ["--rollout.max-completion-tokens", "19", "--grpo.minibatches", "2"]
    with pytest.warns(UserWarning, match=r"model\.dropout = 0 replaces .*resid_pdrop 0\.1.*none"):
        assert main([*SMALL, *model]) == 0
    row = json.loads((in_tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(row["kl/ref"]) < 1e-6
    assert main([*SMALL, *model, "--run.restart", "True", "--model.dropout", "None"]) == 0
    row = json.loads((in_tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["kl/ref"] > 1e-4


def test_a_tokenizer_that_cannot_be_saved_is_found_before_the_first_step(monkeypatch, capsys):
    def refuse(*_, **__):
        raise ValueError("not to be written")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", refuse)
    assert main(SMALL) == 2
    assert "cannot be saved: " in capsys.readouterr().err
