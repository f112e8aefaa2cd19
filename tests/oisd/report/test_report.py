"""`oisd report`: numbers against metrics.jsonl, groups, escaping, bad input, the layers."""

import json
import math
import re
import shutil
import statistics
import subprocess

import numpy as np
import pytest

from oisd.cli import main
from oisd.config import TrainConfig
from oisd.report import curves
from oisd.report.curves import BUCKETS, Curve
from oisd.report.numbers import mean_interval
from oisd.report.runs import grouped, read_runs
from oisd.report.words import method_words
from tests.oisd.report.folders import HOSTILE, config, problem, rows, write, write_evaluation
from tests.oisd.report.reading import Page


def report(tmp_path, *folders, options=()):
    out = tmp_path / "out" / "report.html"
    assert main(["report", *map(str, folders), "--output", str(out), *options]) == 0
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def two_groups(tmp_path_factory):
    """Three seeds of OISD and two of GRPO, with everything that a page shows."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write(folder / f"oisd-seed-{s}", rows(seed=s), run={"seed": s, "save_every": 5 + s})
        for s in range(3)
    ]
    off = {"think_weight": 0.0, "attention_weight": 0.0}
    runs += [
        write(folder / f"grpo-s{s}", rows(seed=s + 5), oisd=off, run={"seed": s}) for s in range(2)
    ]
    return runs, *report(folder, *runs)


def test_is_one_file_that_loads_nothing(two_groups):
    _, text, page = two_groups
    assert page.loads() == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert "@import" not in text and "http" not in text
    assert not re.search(r"url\((?!#)", text)
    charts = [found for tag, found in page.tags if tag == "svg"]
    assert len(charts) >= 8
    assert all(found["role"] == "img" and "step" in found["aria-label"] for found in charts)


def test_runs_of_one_setting_are_one_group(two_groups):
    _, _, page = two_groups
    assert page.tables["Settings that differ"] == [
        ["", "A: oisd", "B: grpo"],
        ["oisd.think_weight", "1", "0"],
        ["oisd.attention_weight", "0.1", "0"],
    ]
    facts = {row[0]: row[1:] for row in page.tables["What ran"]}
    assert facts["runs"][0].splitlines()[1] == "oisd-seed-1: seed 1, 40 of 40 steps"
    assert facts["method"][1] == "GRPO alone, without alignment."


def test_numbers_of_runs_are_those_of_their_files(two_groups):
    folders, _, page = two_groups
    head, *lines = page.tables["Runs"]
    assert len(lines) == 5
    for folder, line in zip(folders, lines, strict=True):
        cells = dict(zip(head, line, strict=True))
        found = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
        evaluated = [row["eval/avg_at_k"] for row in found if "eval/avg_at_k" in row]
        rewards = [row["reward"] for row in found if "reward" in row]
        assert cells["run"].endswith(folder.name)
        assert float(cells["Avg@K first"]) == pytest.approx(evaluated[0], rel=1e-3)
        assert float(cells["Avg@K last"].split()[0]) == pytest.approx(evaluated[-1], rel=1e-3)
        last = statistics.fmean(rewards[-10:])
        assert float(cells["reward, last steps"]) == pytest.approx(last, rel=1e-3)
        assert cells["Avg@K last"].endswith(" [0.25, 0.875]")


def test_numbers_of_groups_have_intervals_from_three_seeds_on(two_groups):
    _, _, page = two_groups
    head, ours, theirs = page.tables["Groups"]
    ours, theirs = (dict(zip(head, row, strict=True)) for row in (ours, theirs))
    # Of 0.8, 0.82, 0.84: the standard error is 0.02 / sqrt(3), t(0.975, 2) is 4.3027.
    assert ours["Avg@K last"] == "0.82\n[0.7703, 0.8697]"
    assert theirs["Avg@K last"] == "0.91\n(0.9, 0.92)"
    assert ours["seconds a step"] == "0.75\n(0.5 to 1)"
    assert (ours["seeds"], theirs["seeds"]) == ("0, 1, 2", "0, 1")


def test_students_t():
    assert mean_interval([0.0, 2.0]) == pytest.approx((1 - 12.7062, 1 + 12.7062), abs=1e-3)
    half = 2.0452 * statistics.stdev(range(30)) / math.sqrt(30)
    assert mean_interval(list(range(30))) == pytest.approx((14.5 - half, 14.5 + half), abs=1e-3)


def test_tables_of_charts_have_the_mean_and_range_at_a_step(two_groups):
    folders, _, page = two_groups
    head, *lines = page.tables["Reward"]
    assert head == ["step", "A: oisd", "B: grpo"]
    files = [(folder / "metrics.jsonl").read_text().splitlines() for folder in folders]
    assert len(lines) == 9 and lines[-1][0] == "40"
    for step, ours, _ in lines:
        values = [json.loads(file[int(step)])["reward"] for file in files[:3]]
        wanted = [statistics.fmean(values), min(values), max(values)]
        assert [float(x) for x in re.findall(r"[\d.]+", ours)] == pytest.approx(wanted, rel=1e-3)
    # A metric that only every other step has.
    steps = {int(row[0]) for row in page.tables["Divergence of predictions: advantage < 0"][1:]}
    assert steps and all(step % 2 for step in steps)


def test_completions_that_changed(two_groups):
    _, _, page = two_groups
    assert (
        "2 right, as before, 2 wrong, as before, 1 wrong to right, 1 right to wrong." in page.text
    )
    assert "text 3.0" in page.text and "text 2.1" in page.text
    # The problem that stays right is no example.
    assert "text 1.0" not in page.text


def test_completions_and_names_are_escaped(two_groups, tmp_path):
    _, text, page = two_groups
    assert page.text.count(HOSTILE) >= 4  # as text, from completions/ and evaluations/
    assert HOSTILE not in text and "onmouseover" not in {name for _, a in page.tags for name in a}
    name = "a<b>&'\"$x$ $"
    alarmed = [*rows(3)[:-1], rows(3)[-1] | {"alarms": ["<i>look</i>"]}]
    folders = [write(tmp_path / name, alarmed), write(tmp_path / "b", model={"path": "m<i>"})]
    text, page = report(tmp_path, *folders)
    assert f"A: {name}" in page.text and "<i>look</i>" in page.text
    assert f"A: {name}: " in next(a["aria-label"] for tag, a in page.tags if tag == "svg")
    assert not {"b", "i"} & {tag for tag, _ in page.tags} - {"b"}
    assert "<i>" not in text


def test_runs_that_began_with_other_weights_are_apart(tmp_path):
    files = [{"model": {"files": {"w": {"sha256": str(i)}}}, "reward": "r"} for i in (0, 0, 1)]
    folders = [write(tmp_path / f"r{i}", sources=f, run={"seed": i}) for i, f in enumerate(files)]
    groups = grouped(read_runs(folders)[0])
    assert [[run.name for run in group.runs] for group in groups] == [["r0", "r1"], ["r2"]]
    _, page = report(tmp_path, *folders)
    assert "began with other weights" in page.text


def test_what_to_know_first(tmp_path):
    cut = write(tmp_path / "cut", rows(20))
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "rew')
    for name in ("evaluations/step-40.jsonl", "completions/step-1.jsonl"):
        with (cut / name).open("a") as file:
            file.write('{"prompt": "of a li')
    other = write(tmp_path / "other", data={"source": "arithmetic:digits=3"})
    empty = write(tmp_path / "empty", [])
    _, page = report(tmp_path, cut, other, empty)
    assert "data.source is arithmetic:digits=2 / arithmetic:digits=3" in page.text
    files = "metrics.jsonl and evaluations/step-40.jsonl and completions/step-1.jsonl"
    assert f"The last line of cut's {files} is unfinished" in page.text
    assert "cut has done 20 of its 40 steps" in page.text
    assert "empty has no finished step yet" in page.text


def test_other_problems_are_another_task(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", oisd={"think_weight": 0.5})
    assert "differ in their task" not in report(tmp_path, a, b)[1].text
    write_evaluation(b, 0, [problem(9, [1.0, 0.0])])
    assert "they were evaluated on other problems" in report(tmp_path, a, b)[1].text


def test_one_run_writes_into_its_folder(tmp_path, capsys):
    folder = write(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    page = Page((folder / "report.html").read_text())
    # The lines of a panel are its metrics.
    assert page.tables["Divergence of predictions"][0] == ["step", "advantage > 0", "advantage < 0"]
    assert "Groups" not in page.tables and len(page.tables["Runs"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "RUN is missing"),
        (["nowhere"], "'nowhere' is not a run of `oisd train`, because it is no folder"),
        (["."], "'.' is not a run of `oisd train`, because it has no config.toml"),
        (["empty"], "empty holds a run without a finished step"),
        (["run", "run/"], "is named twice"),
        (
            ["damaged"],
            "damaged/metrics.jsonl is damaged: wanted a JSON object in each line, got line 2",
        ),
        (["damaged"], "in each line, got line 2, which is not JSON"),
        (["listed"], "in each line, got line 2, which is no object"),
        (
            ["stepless"],
            "stepless/metrics.jsonl is damaged: wanted a step in each row, got none in row 1",
        ),
        (["unset"], "unset/config.toml is empty or cut off: wanted all settings of the run"),
        (["foreign"], "step-40.jsonl is not an evaluation of `oisd train`, whose rows have id, pr"),
        (["torn"], "torn/completions/step-1.jsonl is damaged: wanted a JSON object in each line"),
        (["run", "--output", "run/config.toml/x.html"], "x.html' cannot be written"),
        (["run", "--inside-texts", "0"], "--inside-texts must be at least 1, got 0"),
        (["run", "--device", "cudda"], '--device must be "auto", "cpu"'),
    ],
)
def test_refuses(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run")
    write(tmp_path / "empty", [])
    write(tmp_path / "stepless", [{"reward": 1.0}])
    listed = write(tmp_path / "listed")
    (listed / "metrics.jsonl").write_text('{"step": 1}\n[2]\n')
    damaged = write(tmp_path / "damaged")
    (damaged / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    (write(tmp_path / "unset") / "config.toml").write_text('[model]\npath = "arithmetic"\n')
    foreign, torn = write(tmp_path / "foreign"), write(tmp_path / "torn")
    (foreign / "evaluations" / "step-40.jsonl").write_text('{"question": 1}\n')
    (torn / "completions" / "step-1.jsonl").write_text('{"prompt\n')
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_long_runs_are_thinned_to_buckets(tmp_path):
    """The extremes stay, and the page stays small."""
    values = np.sin(np.arange(5000) * 0.37)
    values[1234] = 9.0
    metrics = [{"step": i + 1, "reward": float(v)} for i, v in enumerate(values)]
    run = write(tmp_path / "long", metrics, run={"steps": 5000})
    (group,) = grouped(read_runs([run])[0])
    curve = curves.curve_of(group, "reward", "r", 0)
    assert isinstance(curve, Curve) and len(curve.steps) == 5000
    thin = curve.thinned()
    assert len(thin.steps) == BUCKETS
    assert thin.high.max() == 9.0 and thin.low.min() == values.min()
    at = thin.high.argmax()
    assert abs(thin.steps[at] - 1235) < 5000 / BUCKETS
    sizes = np.diff(np.linspace(0, 5000, BUCKETS + 1)).round()
    assert np.average(thin.mean, weights=sizes) == pytest.approx(values.mean(), abs=1e-2)
    text, page = report(tmp_path, run)
    assert "thinned out to as many buckets" in page.text and "up to 5,000" in page.text
    assert len(text) < 200_000


def test_a_curve_of_runs_of_different_length(tmp_path):
    folders = [write(tmp_path / f"r{n}", rows(n, seed=n), run={"seed": n}) for n in (10, 20)]
    (group,) = grouped(read_runs(folders)[0])
    curve = curves.curve_of(group, "entropy/policy", "e", 0)
    assert curve is not None and curve.steps.tolist() == list(range(1, 21))
    assert curve.mean[9] == pytest.approx(0.15 + 1.5) and curve.low[9] == pytest.approx(1.15)
    assert curve.mean[10] == curve.low[10] == pytest.approx(1.5 / 11 + 2.0)
    _, page = report(tmp_path, *folders)
    assert "after step 10 its curves are of the longer ones alone" in page.text


def test_methods_in_words(tmp_path):
    assert method_words(config(tmp_path)) == (
        "OISD: GRPO, and layer 3 learns the final layer's next-token distribution (weight 1) and "
        "attention (weight 0.1)."
    )
    bupo = {"internal_layer": 2, "internal_steps": 5}
    off = {"think_weight": 0.0, "attention_weight": 0.0}
    assert "for 5 steps GRPO trains the policy of layer 2" in method_words(
        config(tmp_path, grpo=bupo, oisd=off)
    )


def test_inside_compares_checkpoints(tmp_path):
    """Against the lens itself, on the texts of the run; the weights differ by one layer's."""
    import torch

    from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
    from oisd.lens import LayerLens, summarise
    from oisd.optimizer import Optimizer
    from oisd.run.folder import RunFolder
    from oisd.run.processes import Processes

    folder = write(tmp_path / "run", warmup={"steps": 1})
    run, tokenizer = RunFolder(folder), arithmetic_tokenizer()
    texts = [["2", "2"], ["40", "4"]]
    write_evaluation(folder, 40, [problem(n + 1, [1.0, 0.0], t) for n, t in enumerate(texts)])
    run.checkpoints.mkdir()
    model, processes = arithmetic_model(seed=0).eval(), Processes("cpu")
    optimizer = Optimizer(model, TrainConfig(), processes)
    entropies = []
    for step in (0, 40):
        run.save(step, model, tokenizer, optimizer, processes, {}, keep=2)
        texts = [tokenizer(text)["input_ids"] for text in ("1+1=2", "2+2=40")]
        entropies.append(summarise([LayerLens(model)(ids) for ids in texts]).entropy)
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight.mul_(30)
    assert abs(entropies[0][2] - entropies[1][2]) > 1e-3
    options = ["--inside", "--inside-texts", "2", "--device", "cpu"]
    _, page = report(tmp_path, folder, options=options)
    head, *lines = page.tables["Layers"]
    for name, wanted in zip(("step 0", "step 40"), entropies, strict=True):
        found = [float(line[head.index(f"entropy, {name}")]) for line in lines[::-1]]
        assert found == pytest.approx(wanted, abs=1e-4)
    rows_of_tokens = page.tables["Top tokens, A: run"]
    assert [row[0] for row in rows_of_tokens[1:]] == [
        "step 0, final", "step 0, 3", "step 40, final", "step 40, 3"]  # fmt: skip


def test_inside_says_why_not(tmp_path):
    _, page = report(tmp_path, write(tmp_path / "run"), options=["--inside"])
    assert "Not shown: run has no checkpoint after a step yet" in page.text


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
def test_in_a_browser(two_groups, tmp_path):
    """No overflow at the width of a telephone, and pages to print."""
    _, text, _ = two_groups
    probe = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", probe))
    chromium = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"]
    narrow = [*chromium, "--window-size=500,900", "--dump-dom", file.as_uri()]
    dom = subprocess.run(narrow, capture_output=True, text=True, timeout=120, check=True).stdout
    width = re.search(r"<title>(\d+)</title>", dom)
    assert width and int(width[1]) <= 500
    pdf = tmp_path / "page.pdf"
    subprocess.run([*chromium, f"--print-to-pdf={pdf}", file.as_uri()], timeout=120, check=True)
    assert pdf.read_bytes()[:4] == b"%PDF" and pdf.stat().st_size > 20_000
