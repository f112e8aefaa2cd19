"""Whatever a user brings about ends in a message: bad models, files and options, a closed pipe.

Draws run in this process, on models of a few hundred parameters. What would take long is replaced:
training stops before its first step.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import matplotlib
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
from oisd.cli import main
from oisd.config import TrainConfig
from oisd.options import AttentionRun, CheckRun, EvalRun, LookRun
from oisd.schema import option

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
GOOD_ROWS = b'{"question": "1+1=", "answer": "2"}\n{"question": "3+4=", "answer": "7"}\n'

FILES = {
    "good.jsonl": GOOD_ROWS,
    "good.json": b'[{"question": "1+1=", "answer": "2"}]',
    "utf16.jsonl": GOOD_ROWS.decode().encode("utf-16"),
    "latin.jsonl": '{"question": "é", "answer": "2"}'.encode("latin-1"),
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n",
    "pointer.jsonl": POINTER,
    "pointer.parquet": POINTER,
    "half.jsonl": GOOD_ROWS[:-9],
    "object.json": b'{"rows": {"question": "q"}}',
    "number.json": b"3",
    "deep.json": b"[" * 100_000,
    "list.jsonl": b"[1]\n",
    "other.jsonl": b'{"q": "1+1=", "a": null}\n',
    "types.jsonl": b'{"question": 5, "answer": {"a": [1]}}\n',
    "huge.jsonl": b'{"question": "1+1=", "answer": ' + b"9" * 5000 + b"}\n",
    "letters.jsonl": b'{"question": "what?", "answer": "42"}\n',
    "cut.parquet": b"PAR1" + b"\0" * 40,
    "recipe.toml": b"[run]\nsteps = 'x'\n",
    "latin.toml": "# é".encode("latin-1"),
    "rows.csv": b"question,answer\n1,2\n",
}
SOURCES = [
    *FILES, "empty-folder", "m", "arithmetic", "arithmetic:digits=0", "arithmetic:digits=99",
    "arithmetic:", "gsm8k:nowhere", "gsm8k:good.jsonl", "math500:m", "nobody/nothing", "", " ", "~",
    "\0", "x" * 5000, "../../..", "/proc/self/mem",
]  # fmt: skip
MODELS = [
    "m", "arithmetic", "two", "one", "empty-folder", "no-weights", "no-tokenizer", "cut", "pointer",
    "not-json", "sizes", "unknown", "narrow", "encoder-decoder", "good.jsonl", "nobody/nothing", "",
    "\0", "a b", "x" * 5000, "-x", "nan",
]  # fmt: skip
VALUES = ["", "-1", "0", "1", "2", "1.5", "nan", "inf", "-inf", "1e400", "None", "none",
          "True", "cpu", "cuda:99", "x", "é", "(", "(x)", "[1:", "train[:1]", "\0", "eager",
          "9" * 30, "x" * 500, "good.jsonl", "m", "/dev/null/x", "--", "nothing:here",
          "os:getcwd"]  # fmt: skip
# One that is valid and large would take long, which is no fault.
LARGE = {"samples", "batch_size", "max_completion_tokens", "completion_tokens", "steps",
         "prompts", "completions"}  # fmt: skip


def write_models(place: Path) -> None:
    def save(name, **size):
        model = arithmetic_model(hidden_size=16, intermediate_size=16, **size)
        model.save_pretrained(place / name)
        arithmetic_tokenizer().save_pretrained(place / name)
        return place / name

    save("m")
    save("two", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    save("one", num_hidden_layers=1, layer_types=["full_attention"])
    save("narrow", vocab_size=12, eos_token_id=11, pad_token_id=11)
    (save("no-weights") / "model.safetensors").unlink()
    for file in save("no-tokenizer").glob("tok*"):
        file.unlink()
    weights = save("cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (save("pointer") / "model.safetensors").write_bytes(POINTER)
    (save("not-json") / "config.json").write_text("{")
    for name, change in {
        "sizes": {"hidden_size": -3},
        "unknown": {"model_type": "no-such-type", "architectures": ["None"]},
        "encoder-decoder": {"model_type": "t5"},
    }.items():
        file = save(name) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    import torch
    from safetensors.torch import load_file, save_file

    weights = save("nan") / "model.safetensors"
    tensors = {name: torch.full_like(x, torch.nan) for name, x in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    (place / "empty-folder").mkdir()
    for name, content in FILES.items():
        (place / name).write_bytes(content)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    # What "../../.." and "~" name is the test's own too, not whatever the machine has there.
    top = tmp_path_factory.mktemp("place")
    folder, home = top / "its" / "own" / "folder", top / "home"
    folder.mkdir(parents=True)
    home.mkdir()
    (home / "good.jsonl").write_bytes(GOOD_ROWS)
    write_models(folder)
    before = Path.cwd()
    patch = pytest.MonkeyPatch()
    patch.setenv("MPLCONFIGDIR", matplotlib.get_configdir())  # its list of fonts takes seconds
    patch.setenv("HOME", str(home))
    # Pictures take longer than the rest of a draw.
    for name in ("oisd.lens.plots.save_figure", "oisd.plots.save_figure"):
        patch.setattr(name, lambda figure, path: (path.write_text(""), path)[1])
    patch.setattr("oisd.trainer.Trainer.train", lambda self: {})
    os.chdir(folder)
    yield folder
    os.chdir(before)
    patch.undo()


def names_of(kind, prefix=""):
    return [prefix + f.name for f in dataclasses.fields(kind)]


def drawn(names):
    """Up to three options, each with a value that may or may not fit it."""
    pairs = st.tuples(st.sampled_from([*names, "no_such_option"]), st.sampled_from(VALUES))
    return st.lists(pairs.filter(lambda p: not (p[0] in LARGE and p[1].isdigit())), max_size=3)


def ends_in_words(command: list[str], product=None) -> None:
    """The command ends with an exit status, and either with its product or a message."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            status = main(command)
        except SystemExit as end:  # an option that does not parse
            status = end.code
    said = err.getvalue()
    assert "Traceback" not in said and "its traceback is in" not in said, f"{command}: {said}"
    assert status in (0, 1, 2), f"{command}: {status}"
    if status == 0:
        assert product is None or product(out.getvalue()), f"{command} did nothing: {said}"
    else:
        assert said.strip(), f"{command}: {status} without a word"


draws = settings(
    max_examples=60,
    phases=[Phase.explicit, Phase.generate],  # the first failure says enough
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)


def flat(options):
    return [word for name, value in options for word in (option(name), value)]


def table_options(options):
    return [w for name, value in options for w in ("--" + name.replace("_", "-"), value)]


TRAIN_NAMES = [
    f"{table.name}.{f.name}"
    for table in dataclasses.fields(TrainConfig)
    for f in dataclasses.fields(table.default_factory())  # pyright: ignore
]


@draws
@given(st.data())
def test_lens_and_attention(place, data):
    command = data.draw(st.sampled_from(["lens", "attention"]))
    kind = {"lens": LookRun, "attention": AttentionRun}[command]
    given = [command, data.draw(st.sampled_from(MODELS))]
    source = data.draw(st.sampled_from(SOURCES))
    given += data.draw(st.sampled_from([["--prompt", "1+2="], ["--data", source, "--limit", "2"]]))
    folder = place / "looks" / str(time.monotonic_ns())
    given += ["--output-dir", str(folder), *flat(data.draw(drawn(names_of(kind))))]
    ends_in_words(given, lambda out: f"oisd {command}:" in out)


@draws
@given(st.data())
def test_eval(place, data):
    given = ["eval", data.draw(st.sampled_from(MODELS))]
    given += ["--data", data.draw(st.sampled_from(SOURCES)), "--limit", "2", "--reward", "exact"]
    given += ["--samples", "1", "--max-completion-tokens", "2", "--threads", "1"]
    given += ["--output-dir", str(place / "evals" / str(time.monotonic_ns()))]
    given += flat(data.draw(drawn(names_of(EvalRun))))
    ends_in_words(given, lambda out: "oisd eval:" in out)


@draws
@given(st.data())
def test_check(place, data):
    given = ["check", data.draw(st.sampled_from(MODELS)), "--reward", "exact", "--threads", "1"]
    given += ["--prompts", "1", "--completions", "2", "--completion-tokens", "2"]
    if data.draw(st.booleans()):
        given += ["--data", data.draw(st.sampled_from(SOURCES)), "--limit", "2"]
    given += ["--output-dir", str(place / "checks" / str(time.monotonic_ns()))]
    given += flat(data.draw(drawn(names_of(CheckRun))))
    ends_in_words(given, lambda out: "oisd check:" in out)


@draws
@given(st.data())
def test_train(place, data):
    folder = place / "runs" / str(time.monotonic_ns())
    given = ["train", *data.draw(st.sampled_from([[], ["recipe.toml"], ["latin.toml"], ["m"]]))]
    given += ["--model.path", data.draw(st.sampled_from(MODELS)), "--run.output-dir", str(folder)]
    given += ["--data.source", data.draw(st.sampled_from(SOURCES)), "--run.threads", "1"]
    given += ["--eval.source", "none", *table_options(data.draw(drawn(TRAIN_NAMES)))]
    ends_in_words(given)


@draws
@given(st.data())
def test_plan(place, data):
    given = ["plan", "--model.path", data.draw(st.sampled_from(MODELS))]
    given += table_options(data.draw(drawn(TRAIN_NAMES)))
    ends_in_words(given, lambda out: "peak" in out)


@draws
@given(st.data())
def test_compare(place, data):
    folder = place / "bench" / str(time.monotonic_ns()) / "math500"
    folder.mkdir(parents=True)
    known = st.dictionaries(
        st.sampled_from(["benchmark", "samples", "avg_at_k", "problem_means", "graders"]),
        st.sampled_from(["math500", 3, None, [], {}, "x"]),
    )
    content = data.draw(
        st.one_of(known.map(json.dumps), st.sampled_from(["", "[]", "3", "{", "é"]))
    )
    (folder / "summary.json").write_text(content)
    names = [
        str(folder.parent),
        "empty-folder",
        "good.jsonl",
        "",
        "--help",
        "--output-dir",
        "-x",
        "\0",
    ]
    given = ["compare", *data.draw(st.lists(st.sampled_from(names), max_size=3))]
    ends_in_words(given, bool)


@draws
@given(st.binary(max_size=60), st.sampled_from([".json", ".jsonl", ".parquet"]))
def test_any_bytes_as_a_data_file(place, content, suffix):
    file = place / f"bytes{suffix}"
    file.write_bytes(content)
    folder = str(place / "evals" / str(time.monotonic_ns()))
    ends_in_words(["eval", "m", "--data", file.name, "--output-dir", folder, "--reward", "exact"])


# ---- the process itself ----------------------------------------------------------------------

CODE = "import sys\nfrom oisd.cli import main\nsys.exit(main())"


@pytest.mark.parametrize("command", ["train", "eval", "attention", "compare"])
def test_a_closed_pipe_is_no_error(command):
    reader, writer = os.pipe()
    os.close(reader)
    call = [sys.executable, "-c", CODE, command, "--help"]
    done = subprocess.run(call, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(writer)
    assert done.stderr == "" and done.returncode in (0, 141)


@pytest.mark.parametrize("word, meant", [("trian", "train"), ("evla", "eval"), ("Train", "train")])
def test_an_unknown_command_is_answered_by_the_nearest(word, meant, capsys):
    assert main([word]) == 2
    assert capsys.readouterr().err == (f"oisd: unknown command {word!r}; did you mean {meant!r}?\n")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", "again to resume from the last checkpoint"),
        ("eval", "again to resume after the last problem"),
        ("lens", "start over"),
        ("plan", "again"),
    ],
)
def test_interrupted(command, words, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"oisd.cli._{command}", interrupt)
    assert main([command]) == 130
    assert re.search(f"oisd: interrupted; .*{words}", capsys.readouterr().err)


def test_our_own_defects(monkeypatch, capsys):
    def fails(_):
        raise KeyError("somewhere\nelse")

    monkeypatch.setattr("oisd.cli._plan", fails)
    assert main(["plan"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    file = Path(re.search(r"traceback is in (\S+) ", said)[1])
    assert "KeyError" in said and "in fails" in file.read_text()
    file.unlink()
    with pytest.raises(KeyError):
        main(["plan", "--debug"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("of 9 GiB"), "out of memory: of 9 GiB"),
        (PermissionError(13, "Permission denied", "x"), "PermissionError.*'x'"),
        (ModuleNotFoundError("No module named 'peft'"), "package is missing.*peft"),
    ],
)
def test_what_the_machine_lacks(error, words, monkeypatch, capsys):
    def fails(_):
        raise error

    monkeypatch.setattr("oisd.cli._eval", fails)
    assert main(["eval"]) == 1
    said = capsys.readouterr().err
    assert re.search(words, said) and said.count("\n") == 1 and "traceback" not in said


LENS_AND_PLAN = """
import os, sys
from oisd.cli import main
assert main(["lens", "m", "--data", "r.parquet", "--output-dir", "quiet"]) == 0
sys.stdout.flush()
os.dup2(int(sys.argv[1]), 1)
sys.exit(main(["plan"]))
"""


def test_no_bars_of_other_libraries_and_a_table_into_a_closed_pipe(place):
    """A Parquet file, a saved model: what `datasets` and transformers show of them stays away.

    Then, as `oisd plan | head`: rich would take it for a failure.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question": ["1+1="], "answer": ["2"]}), place / "r.parquet")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", LENS_AND_PLAN, str(writer)], pass_fds=[writer], timeout=200,
        capture_output=True, text=True,
        env=os.environ | {"HF_DATASETS_CACHE": str(place / "cache")},
    )  # fmt: skip
    os.close(writer)
    assert done.stderr == "" and done.returncode == 141
    assert done.stdout.strip().splitlines()[0].strip() == "oisd lens: m"


def test_ctrl_c_of_a_process(place):
    code = CODE.replace("main())", "main())").replace(
        "from oisd.cli", "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from oisd.cli"
    )  # fmt: skip
    call = [sys.executable, "-c", code, "train", "--model.path", "m", "--run.steps", "100000"]
    small = ["--warmup.steps", "0", "--eval.source", "none", "--rollout.prompts-per-step", "2"]
    process = subprocess.Popen(
        [*call, *small, "--run.output-dir", "interrupted"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        # Not in the first step: Python drops an interrupt that comes while it ends an import.
        rows = place / "interrupted" / "metrics.jsonl"
        for _ in range(600):
            if (rows.exists() and rows.read_text().count("\n") > 2) or process.poll() is not None:
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in said
    assert "resume from the last checkpoint" in said
