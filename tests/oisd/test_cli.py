"""The command line as a user meets it."""

import json
import subprocess
import sys
import tomllib

import pytest

from oisd.cli import main, parse_train
from oisd.config import ConfigError, from_tables, load_recipe
from oisd.data.problems import check_names

RUN = [
    "train",
    *("--warmup.steps", "30", "--run.steps", "2", "--eval.limit", "6", "--eval.samples", "2"),
    *("--rollout.prompts-per-step", "2"),
]
EVAL = ["--data", "arithmetic", "--reward", "exact", "--limit", "9", "--samples", "4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main([*RUN, "--run.output-dir", str(folder)]) == 0
    return folder


def test_no_arguments_and_help(capsys):
    assert main([]) == 2
    assert "oisd train" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "oisd eval MODEL" in capsys.readouterr().out
    assert main(["trane"]) == 2


@pytest.mark.parametrize(
    "command, words",
    [
        ("train", ["--oisd.think-weight", "lambda_think", "--show"]),
        ("plan", ["--rollout.batch-size", "--show"]),
        ("eval", ["--benchmark", "--max-completion-tokens"]),
        ("lens", ["--prompt", "--picture-tokens"]),
        ("attention", ["--prompt", "--layer"]),
        ("report", ["--inside", "--output"]),
    ],
)
def test_help_comes_without_torch(command, words):
    code = (
        "import sys\nfrom oisd.cli import main\n"
        "try: main([sys.argv[1], '--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    call = [sys.executable, "-c", code, command]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for word in words:
        assert word in done.stdout


@pytest.mark.parametrize("command", ["train", "plan"])
def test_show_prints_a_recipe_that_reads_back_the_same(command, tmp_path, capsys):
    given = ["qwen3-4b-bupo", "--grpo.dual-clip", "None", "--oisd.student-layers", "3", "5"]
    assert main([command, *given, "--show"]) == 0
    file = tmp_path / "whole.toml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    assert "base" not in tomllib.loads(file.read_text(encoding="utf-8"))
    assert load_recipe(file) == parse_train(given) == parse_train([str(file)])
    assert parse_train(given).oisd.student_layers == (3, 5)


def test_show_trains_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*RUN, "--show", "--run.output-dir", str(folder)]) == 0
    assert f'output_dir = "{folder}"' in capsys.readouterr().out
    assert not folder.exists()
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--show", "--grpo.clip-low", "1.5"])


TYPOS = {
    "setting of a task": (
        ["--data.source", "modular:terms=x"], "terms must be a whole number, got 'x'"
    ),
    "name of a setting": (["--data.source", "modular:term=3"], "did you mean 'terms'?"),
    "out of range": (["--eval.source", "running_sum:digits=10"], "digits must lie in 1 to 9"),
    "task": (["--data.source", "modulr:terms=3"], "did you mean 'modular'?"),
    "task without settings": (["--data.source", "modulr"], "did you mean 'modular'?"),
    "data set": (["--eval.source", "gsm8"], "called 'gsm8'; did you mean 'gsm8k'?"),
    "split": (["--data.split", "tset"], "split must be \"train\" or \"test\", got 'tset'"),
    "split of a set": (["--eval.source", "math500", "--eval.split", "train"], "it has test."),
    "unused field": (["--data.answer-field", "gold"], "has no answer_field, got 'gold'"),
    "pattern": (["--data.source", "x/y", "--data.answer-pattern", "("],
                "answer_pattern '(' is not a regular expression"),
    "reward": (["--reward.function", "exat"], "did you mean 'exact'?"),
    "option of a reward": (
        ["--data.source", "reasoning-gym:gcd", "--eval.source", "none",
         "--reward.function", "reasoning-gym:shapd"], "did you mean 'shaped'?"
    ),
    "blank model": (["--model.path", "aritmetic"], "did you mean 'arithmetic'?"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, message", TYPOS.values(), ids=TYPOS)
def test_show_refuses_a_misspelt_name_as_training_does(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    said = []
    for given in (["train", "--show"], ["plan", "--show"], ["train"]):
        assert main([*given, *arguments]) == 2
        found = capsys.readouterr()
        said.append(found.err)
        assert message in found.err and not found.out and found.err.count("\n") == 1
    assert said[0] == said[1]
    assert said[0] == said[2] or "--model.path" in arguments  # which is read after the data


@pytest.mark.parametrize(
    "path, meant", [("scrach:layers=3", "scratch:"), ("arithmetic:digits=2", "arithmetic'")]
)
def test_a_blank_model_is_known_by_its_name_before_its_settings(path, meant):
    with pytest.raises(ConfigError, match=f"did you mean '{meant}"):
        from_tables({"model": {"path": path}})
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--show", "--model.path", path])


def test_the_name_of_a_folder_or_of_a_model_elsewhere_is_no_misspelt_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("scratches", "modulars"):
        (tmp_path / name).mkdir()
        found = from_tables({"model": {"path": name}, "data": {"source": name}})
        check_names(found)
    check_names(from_tables({"model": {"path": "me/scratch1"}, "data": {"source": "me/modulars"}}))


def test_overrides_go_over_the_recipe():
    config = parse_train(["arithmetic", "--oisd.student-layers", "2", "4", "--run.seed", "7"])
    assert config.oisd.student_layers == (2, 4) and config.run.seed == 7
    assert config.model.path == "arithmetic"
    assert parse_train([]).rollout.max_completion_tokens == 6
    assert parse_train(["--grpo.dual-clip", "None"]).grpo.dual_clip is None


def test_grpo_twin_differs_in_nothing_but_the_weights_and_the_folder():
    from oisd.config import differences

    found = differences(parse_train([]), parse_train(["arithmetic-grpo"]))
    assert {d.split(":")[0] for d in found} == {
        "oisd.think_weight", "oisd.attention_weight", "run.output_dir"
    }  # fmt: skip


def test_train_prints_a_summary_and_again_only_reports(trained, capsys):
    before = (trained / "metrics.jsonl").read_bytes()
    assert main([*RUN, "--run.output-dir", str(trained)]) == 0
    printed = capsys.readouterr().out
    for words in ("reward, first to last", "evaluation, before to after", "plots", "step-2"):
        assert words in printed
    assert (trained / "metrics.jsonl").read_bytes() == before
    assert load_recipe(trained / "config.toml").run.steps == 2


def test_eval_of_a_checkpoint(trained, tmp_path, capsys):
    out = tmp_path / "eval"
    command = ["eval", str(trained / "checkpoints" / "step-2"), *EVAL, "--output-dir", str(out)]
    command += ["--max-completion-tokens", "6", "--device", "cpu"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Avg@4" in printed and "Pass@4" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["problems"] == 9 and summary["samples"] == 4
    low, high = summary["avg_at_k_interval"]
    assert low <= summary["avg_at_k"] <= high
    (dump,) = out.glob("problems-*.jsonl")
    rows = [json.loads(line) for line in dump.read_text().splitlines()]
    assert len(rows) == 9 and all(len(row["completions"]) == 4 for row in rows)
    mean = sum(sum(row["rewards"]) for row in rows) / 36
    assert summary["avg_at_k"] == pytest.approx(mean)
    assert (out / "pass_at_k.png").stat().st_size > 0

    # A second call takes what is there, and mends a line that was cut short.
    whole = dump.read_text()
    dump.write_text(whole[: len(whole) // 2])
    assert main(command) == 0
    again = {json.loads(line)["id"]: line for line in dump.read_text().splitlines()}
    assert again == {json.loads(line)["id"]: line for line in whole.splitlines()}

    assert main([*command, "--temperature", "0.5"]) == 2
    assert "temperature: 1.0 != 0.5" in capsys.readouterr().err


def test_eval_without_model(capsys):
    assert main(["eval"]) == 2
    assert "MODEL is missing" in capsys.readouterr().err
