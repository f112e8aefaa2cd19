"""`python -m benchmarks gpu`: what breaks costs itself alone, what is known is not run again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import command, packages, results, steps, sweep, table
from benchmarks.gpu.place import GPU, REHEARSAL
from benchmarks.gpu.results import Results
from benchmarks.gpu.schedule import groups
from benchmarks.gpu.watch import Step
from benchmarks.measure.machine import ROOT
from oisd_kernels import measured_tiles
from oisd_kernels.attention import tiles as attention_tiles
from oisd_kernels.lens.tiled import tiles as lens_tiles
from tests.benchmarks import planted

# A machine whose cores are busy needs long to start a process.
LONG = 120.0


def planned(*names: str, **fields) -> list[Step]:
    fields = {"seconds": LONG, "least": 1.0, "silent": LONG} | fields
    return [Step(name, f"{planted.HERE}:{name}", **fields) for name in names]


def queue(folder, todo, minutes: float = 4.0, **options) -> int:
    return command.run(todo, folder, time.monotonic() + 60 * minutes, True, **options)


def ends(folder) -> dict[str, dict]:
    return {row["step"]: row for row in Results(folder).rows("step")}


def checks(folder, step: str) -> dict[str, dict]:
    return {row["name"]: row for row in Results(folder).rows("check", step)}


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """One queue of everything that fails but does not hang."""
    folder = tmp_path_factory.mktemp("failures")
    todo = planned("right", "wrong_kernel", "no_gradient", "loud_fault", "signalled",
                   "out_of_memory", "refuted", "broken", together=True)  # fmt: skip
    return folder, queue(folder, [*todo, *planned("counted")]), todo


def test_what_breaks_costs_itself_alone(failures):
    folder, status, _ = failures
    assert status == 1
    found = {step: row["verdict"] for step, row in ends(folder).items()}
    assert found == {
        "right": "passed", "wrong_kernel": "WRONG", "no_gradient": "WRONG", "loud_fault": "FAILED",
        "signalled": "FAILED", "out_of_memory": "OUT OF MEMORY", "refuted": "WRONG",
        "broken": "FAILED", "counted": "passed",
    }  # fmt: skip


def test_a_wrong_kernel_is_seen_by_the_check_of_the_queue(failures):
    found = checks(failures[0], "wrong_kernel")
    assert found["lens"]["verdict"] == "WRONG"
    errors, bound = found["lens"]["errors"], found["lens"]["bound"]
    assert errors["loss"] == pytest.approx(1e-3, rel=0.05) and bound["loss"] == 1e-5
    assert errors["d_hidden"] == pytest.approx(1e-3, rel=0.05) and bound["gradient"] == 1e-4
    assert found["after it"]["verdict"] == "passed"
    assert checks(failures[0], "no_gradient")["zeros"]["errors"] == {"d_x": None}


@pytest.mark.parametrize(
    "step, name, reason, last",
    [
        ("loud_fault", "faults", "ended with 13", "illegal memory access"),
        ("signalled", "killed", "killed, perhaps because memory ran out", ""),
    ],
)
def test_the_rest_of_a_step_goes_on_in_a_new_process(failures, step, name, reason, last):
    found = checks(failures[0], step)
    assert found[name]["verdict"] == "FAILED" and reason in found[name]["reason"]
    assert last in "\n".join(found[name]["last"])
    assert found["behind"]["verdict"] == "passed"


def test_out_of_memory_and_facts_say_what_they_found(failures):
    found = checks(failures[0], "out_of_memory")
    assert "99 GiB" in found["too large"]["reason"] and found["behind"]["verdict"] == "passed"
    assert "waited 3 times" in checks(failures[0], "refuted")["fact"]["reason"]
    assert any("no such library" in line for line in ends(failures[0])["broken"]["last"])


def test_the_table_is_short_and_says_what_is_wrong(failures):
    folder, _, todo = failures
    text = table.table(folder, todo, True)
    assert "counted" in (folder / table.NAME).read_text()
    assert text.startswith("REHEARSAL") and len(text.splitlines()) <= table.LINES
    for wanted in ("WRONG: lens: loss is 1.0e-03 off", "FAILED: faults", "OUT OF MEMORY"):
        assert wanted in text
    assert not any(len(line) > table.WIDTH for line in text.splitlines())
    assert (folder / "log.txt").read_text().count("[loud_fault]") >= 1
    # The folder is copied from another machine, so it has few files.
    assert len(list(folder.iterdir())) <= 4


def test_what_is_known_is_not_run_again(failures, capsys):
    folder, _, todo = failures
    before = len(Results(folder).rows())
    assert queue(folder, [*todo, *planned("counted")]) == 1
    rows = Results(folder).rows()[before:]
    assert [row["kind"] for row in rows] == ["queue"]
    assert "counted: passed, as found before" in capsys.readouterr().out


def test_a_hang_is_killed_and_the_rest_goes_on(tmp_path):
    assert queue(tmp_path, planned("hang", silent=4.0) + planned("right")) == 1
    found = checks(tmp_path, "hang")
    assert found["hangs"]["verdict"] == "STOPPED" and "no news for" in found["hangs"]["reason"]
    assert found["before"]["verdict"] == found["behind"]["verdict"] == "passed"
    assert ends(tmp_path)["hang"]["verdict"] == "STOPPED"
    assert ends(tmp_path)["right"]["verdict"] == "passed"


def test_a_step_has_a_limit(tmp_path):
    # Its own limit: it is done. The queue's end: it is tried again.
    (own,) = planned("hang", seconds=6.0)
    queue(tmp_path, [own])
    assert ends(tmp_path)["hang"]["verdict"] == "STOPPED"
    assert "stopped after" in ends(tmp_path)["hang"]["reason"]
    other = tmp_path / "other"
    begun = time.monotonic()
    queue(other, planned("hang"), minutes=0.3)
    assert time.monotonic() - begun < 0.3 * 60 + 5
    assert ends(other)["hang"]["verdict"] == "cut short"
    assert "hang" not in Results(other).done()


def test_what_does_not_fit_is_skipped_with_the_reason(tmp_path):
    todo = planned("right", least=500.0) + planned("counted")
    assert queue(tmp_path, todo) == 1
    row = ends(tmp_path)["right"]
    assert row["verdict"] == "skipped" and row["reason"].startswith("needs 500 s")
    assert ends(tmp_path)["counted"]["verdict"] == "passed"
    assert "right" not in Results(tmp_path).done()  # the next call tries it


def test_a_step_waits_for_what_it_needs(tmp_path):
    todo = [*planned("slow", background=True), *planned("counted", "broken")]
    todo += [Step("ready", f"{planted.HERE}:right", LONG, 1.0, after=("slow",))]
    todo += [Step("not ready", f"{planted.HERE}:right", LONG, 1.0, after=("broken",))]
    queue(tmp_path, todo)
    found = ends(tmp_path)
    assert list(found).index("ready") > list(found).index("slow")
    assert found["ready"]["verdict"] == "passed"
    assert found["not ready"]["reason"] == "needs 'broken', which is FAILED"
    # What runs in the background is named beside what runs alone.
    (mark,) = Results(tmp_path).rows("mark")
    assert mark["beside"] == ["slow"]


@pytest.mark.parametrize("probe", ["dead_probe", "dies_later"])
def test_a_dead_device_ends_the_queue_in_one_line(probe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PLANTED_MARK", str(tmp_path / "mark"))
    folder = tmp_path / "out"
    todo = planned("loud_fault", "right", "counted")
    assert queue(folder, todo, probe=f"{planted.HERE}:{probe}") == 3
    found = {step: row["verdict"] for step, row in ends(folder).items()}
    assert found == {"loud_fault": "DEVICE DEAD", "right": "skipped", "counted": "skipped"}
    out = capsys.readouterr().out
    assert out.count("The device is dead") == 1
    # With a device that answers, the same call does the rest.
    assert Results(folder).done() == {}


def test_a_kill_and_a_resume(tmp_path):
    """The queue itself is killed in the midst of a step: no process stays, nothing is lost."""
    script = (
        "import sys, time; from benchmarks.gpu import command; "
        "from tests.benchmarks.test_gpu_queue import planned; from pathlib import Path; "
        "command.run(planned('counted', 'slow'), Path(sys.argv[1]), time.monotonic() + 240, True)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command_line = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.Popen(command_line, env=environment, cwd=ROOT, start_new_session=True)
    end = time.monotonic() + LONG
    while "a" not in checks(tmp_path, "slow") and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert "a" in checks(tmp_path, "slow") and "slow" not in ends(tmp_path)
    time.sleep(2.5)
    left = Results(tmp_path).rows()
    with Results(tmp_path).path.open("a") as file:
        file.write('{"kind": "check", "step": "slow", "na')  # as a kill leaves it
    assert len(Results(tmp_path).rows()) == len(left)
    assert subprocess.run(command_line, env=environment, cwd=ROOT, timeout=200).returncode == 0
    marks = Results(tmp_path).rows("mark")
    assert len(marks) == 1, "a step with its end was run again"
    names = [row["name"] for row in Results(tmp_path).rows("check", "slow")]
    assert sorted(names) == ["a", "b", "c"], "a check with a result was run again"
    assert ends(tmp_path)["slow"]["verdict"] == "passed"


def test_what_never_ends_is_not_begun_a_third_time(tmp_path):
    found = Results(tmp_path)
    for _ in range(results.MOST_BEGINS):
        assert "x" not in found.known("s")
        found.append({"kind": "begin", "step": "s", "name": "x"})
    assert found.known("s") == {"x"}


def test_results_of_something_else_are_refused_by_name(tmp_path):
    made_of = {"sources": "a", "device": "NVIDIA H200", "mode": "GPU"}
    Results(tmp_path).begin(made_of, "DIR")
    Results(tmp_path).begin(made_of, "DIR")
    for key, value in (("sources", "b"), ("device", "NVIDIA A100"), ("mode", "rehearsal")):
        with pytest.raises(ValueError, match=f"--out must be a folder of the same {key}.*got DIR"):
            Results(tmp_path).begin(made_of | {key: value}, "DIR")


@pytest.mark.parametrize("content", ["not json\n", '{"a": 1}\n', '{"step": "machine"}\n'])
def test_a_file_of_another_program_is_left_alone(content, tmp_path):
    (tmp_path / results.NAME).write_text(content)
    with pytest.raises(ValueError, match="--out must be a new folder or one .* got DIR with a res"):
        Results(tmp_path).begin({"sources": "a", "device": "CPU", "mode": "rehearsal"}, "DIR")
    assert (tmp_path / results.NAME).read_text() == content


def test_a_file_for_the_folder_is_refused(tmp_path):
    file = tmp_path / "taken"
    file.write_text("")
    with pytest.raises(ValueError, match="--out must be a folder that can be made, got .*taken"):
        command.run([], file, end=0.0, rehearse=True)


# The queue itself


def test_the_steps():
    names = [step.name for step in steps.STEPS]
    assert len(set(names)) == len(names)
    for step in steps.STEPS:
        assert set(step.after) <= set(names) and step.decides
    kinds = [[step.name.split(":")[0] for step in group] for group in groups(
        [step for step in steps.STEPS if not step.background])]  # fmt: skip
    assert set(kinds[0]) == {"machine", "correct"}  # correctness comes before any time
    assert [kind[0] for kind in kinds[1:6]] == ["time"] * 5
    # Everything up to the tiles fits into nine minutes, even if each step takes all it may.
    alone = sum(step.seconds for step in steps.HEADLINES)
    assert 130 + alone <= 9 * 60 - 8
    assert len(steps.STEPS) + 8 <= table.LINES
    assert groups([]) == []


def test_every_step_finds_its_work():
    from benchmarks.gpu.worker import find

    for step in steps.STEPS:
        assert callable(find(step.work)), step.name


def test_wrong_commands_say_so(capsys):
    from benchmarks.__main__ import main

    assert main(["gpu", "--rehearse", "--minutes", "0"]) == 2
    assert "--minutes must be at least 0.2, got 0.0" in capsys.readouterr().err
    assert main(["gpu", "--rehearse", "--only", "nothing"]) == 2
    assert "got 'nothing'; there are csrc: build; machine" in capsys.readouterr().err


def test_no_gpu_says_so(monkeypatch, tmp_path):
    def nothing(*_, **__):
        raise OSError("no such file")

    monkeypatch.setattr(command.subprocess, "run", nothing)
    with pytest.raises(ValueError, match="a GPU must answer, got none; .*--rehearse"):
        queue_of_a_gpu = command.run([], tmp_path, time.monotonic() + 60, False)
        assert queue_of_a_gpu


def test_a_gpus_table(tmp_path):
    """Bars and machine, from rows as a GPU writes them."""
    found = Results(tmp_path)
    machine = {"device": "a GPU", "driver": "1", "versions": {"torch": "2"}, "date": "today"}
    found.append({"kind": "check", "step": "machine", "name": "machine", "verdict": "passed",
                  "machine": machine})  # fmt: skip
    bar = {"metric": "median_s", "at_most": 1.5, "against": "b", "case": None}
    for name, seconds in (("a", 3.0), ("b", 1.0)):
        found.append({"kind": "measurement", "step": "time", "name": name, "verdict": "passed",
                      "case": "c", "implementation": name, "median_s": seconds, "reason": "",
                      "status": "ok", "bars": [bar] if name == "a" else []})  # fmt: skip
    text = table.table(tmp_path, steps.STEPS, False)
    assert text.startswith("a GPU, driver 1, torch 2, today")
    assert "MISSED: c: a: time against b: 3x, wanted <= 1.5x" in text
    assert "time: lens, S = 1                  not begun" in text
    many = [f"line {i}" for i in range(100)]
    assert len(table.most(many, 60)) == 60 and "41 more" in table.most(many, 60)[-1]


def test_what_all_processes_share(tmp_path):
    """Triton's folder is its own wherever that can be written, so that a second call finds it."""
    environment = {"HOME": str(tmp_path)}
    command.prepare(environment)
    assert environment["HF_HUB_OFFLINE"] == "1" and "TRITON_CACHE_DIR" not in environment
    environment = {"HOME": str(tmp_path / "none"), "HF_HUB_OFFLINE": "0"}
    command.prepare(environment)
    made = environment["TRITON_CACHE_DIR"]
    assert environment["HF_HUB_OFFLINE"] == "0" and os.path.isdir(made)
    os.rmdir(made)
    environment = {"HOME": str(tmp_path / "none"), "TRITON_CACHE_DIR": "elsewhere"}
    command.prepare(environment)
    assert environment["TRITON_CACHE_DIR"] == "elsewhere"


# Packages


# What a machine with a GPU and no network has: a CUDA image's own Python.
IMAGE = (ROOT / "tests" / "data" / "gpu_image_packages.txt").read_text(encoding="utf-8")


def test_what_a_gpu_machine_needs_from_a_wheel_folder(tmp_path):
    """Of the image that we know, what is to be carried; the rivals are named as absent."""
    have = packages.listed(IMAGE.splitlines())
    text, absent = packages.report(have, set())
    assert absent == ["pebble", "tomli-w"]
    for name in packages.OPTIONAL.keys() - {"datasets"}:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        assert line.split()[1] == "absent"
    for name in ("Pebble-5.2.3-py3-none-any.whl", "tomli_w-1.2.0-py3-none-any.whl",
                 "liger_kernel-0.8.5-py3-none-any.whl"):  # fmt: skip
        (tmp_path / name).touch()
    text, absent = packages.report(have, packages.wheels(tmp_path))
    (liger,) = [line for line in text.splitlines() if line.startswith("liger-kernel ")]
    assert absent == [] and "in the wheel folder" in liger
    assert packages.listed(["torch==2.11.0", "tomli_w >= 1 # x", "a,B.c"]) == {
        "torch", "tomli-w", "a", "b-c"}  # fmt: skip


def test_a_machine_without_a_c_compiler_is_told(monkeypatch):
    assert "a C compiler" not in packages.report(set(), set())[1]  # of another machine
    for found, told in (("/usr/bin/gcc", False), (None, True)):
        monkeypatch.setattr(packages, "c_compiler", lambda found=found: found)
        assert ("a C compiler" in packages.report(None, set())[1]) == told
    monkeypatch.undo()
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert packages.c_compiler() is None


def test_nothing_else_is_imported():
    """The queue's modules import no package that the list does not have, nor what it may lack."""
    hidden = ("tyro", "datasets", "math_verify", "trl", "liger_kernel", "tensorboard")
    script = (
        "import sys\n"
        f"for name in {hidden!r}: sys.modules[name] = None\n"
        "import benchmarks.__main__, benchmarks.gpu.command, benchmarks.gpu.preload\n"
        "import benchmarks.gpu.csrc, benchmarks.cuda_times, benchmarks.cases.step\n"
        "from importlib.metadata import packages_distributions\n"
        "owners = packages_distributions()\n"
        "tops = {name.split('.')[0] for name, found in sys.modules.items() if found}\n"
        "print(*sorted({x for top in tops if top in owners for x in owners[top]}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=250,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = {packages.normal(name) for name in done.stdout.split()}
    assert {"torch", "triton", "transformers"} <= loaded
    there = packages.listed(IMAGE.splitlines()) | set(packages.REQUIRED) | {"oisd"}
    # Of these the image has others or older or newer ones that do the same.
    client = {"anyio", "httpx", "httpx2", "httpcore2", "truststore"}  # huggingface_hub's
    assert loaded - there <= client | {"dill", "typing-extensions"}


# Tiles


def entry(**fields):
    tile = {"m": 64, "n": 64, "warps": 4, "stages": 2, "split": False, "registers": None,
            "depth": None}  # fmt: skip
    return {"family": "attention", "key": ["dq", "half", 128], "tile": tile | fields}


def written(tmp_path, *rows, **fields):
    path = tmp_path / "measured_tiles.json"
    content = {"device": "NVIDIA H200", "triton": measured_tiles.triton.__version__,
               "tiles": list(rows)}  # fmt: skip
    path.write_text(json.dumps(content | fields))
    return path


def dq(capability: int = 90):
    import torch

    from oisd_kernels.attention.spec import Geometry

    offsets = torch.tensor([0, 8], dtype=torch.int32)
    geometry = Geometry(offsets, 1, 8, True, None, None)
    return attention_tiles.launch_tile(capability, "dq", torch.bfloat16, 128, geometry)


@pytest.fixture
def hopper(monkeypatch):
    """As on an H200."""
    torch = measured_tiles.torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    measured_tiles._of_this_gpu.cache_clear()
    yield
    measured_tiles._of_this_gpu.cache_clear()


def test_measured_tiles_count_on_their_gpu_alone(tmp_path, monkeypatch, hopper):
    today = attention_tiles.TILES[90]["dq", "half", 128]
    assert dq() == today  # no file
    for fields, wanted in (
        ({}, (64, 64, 4, 2)),
        ({"device": "NVIDIA H100"}, today[:4]),
        ({"triton": "0.1"}, today[:4]),
    ):
        monkeypatch.setattr(measured_tiles, "PATH", written(tmp_path, entry(), **fields))
        measured_tiles._of_this_gpu.cache_clear()
        assert dq()[:4] == wanted
    monkeypatch.setattr(measured_tiles, "PATH", written(tmp_path, entry()))
    measured_tiles._of_this_gpu.cache_clear()
    assert dq(80) == attention_tiles.TILES[80]["dq", "half", 128]  # compiled for an absent GPU
    with measured_tiles.trying("attention", ("dq", "half", 128), entry(m=32)["tile"]):
        assert dq().m == 32


@pytest.mark.parametrize(
    "rows, fields, wanted",
    [
        ([entry(m=100)], {}, "m must be one of 16, 32, 64, 128, 256, got 100"),
        ([entry(warps=True)], {}, "warps must be one of 4, 8, got True"),
        ([entry(extra=1)], {}, "must have m, n, warps"),
        ([entry() | {"family": "lent"}], {}, "family must be one of attention, lens, got 'lent'"),
        ([{"family": "attention"}], {}, "must hold device, triton and tiles, got KeyError"),
        ([], {"device": 3}, "the names of a GPU and of a Triton version, got"),
        ([], {"tiles": 3}, "must hold device, triton and tiles, got TypeError"),
    ],
)
def test_a_file_of_tiles_is_checked(rows, fields, wanted, tmp_path):
    path = written(tmp_path, *rows, **fields)
    with pytest.raises(ValueError, match="remove it, or let `python -m benchmarks gpu`") as error:
        measured_tiles.read(path)
    assert wanted in str(error.value) and str(path) in str(error.value)
    path.write_text("{")
    with pytest.raises(ValueError, match="must hold device"):
        measured_tiles.read(path)


def test_the_sweep_is_of_entries_that_the_tables_have(tmp_path):
    for one in sweep.ENTRIES:
        known = attention_tiles.TILES if one.family == "attention" else lens_tiles.TILES
        assert one.key in known[90]
        found = list(one.candidates(GPU))
        assert len({label for label, _ in found}) == len(found) == 1 + len(one.others)
        today = {"seconds": (1.0, 0.95, 1.05)}
        labels = [label for label, _ in found]
        spreads = {labels[0]: today["seconds"], labels[1]: (0.8, 0.78, 0.85)}
        best = sweep._best(one, dict(found), spreads, labels[0])
        assert best and best["label"] == labels[1] and best["of_today"] == 0.8
        unsure = {labels[0]: today["seconds"], labels[1]: (0.94, 0.9, 0.99)}
        assert sweep._best(one, dict(found), unsure, labels[0]) is None
        # What the sweep writes can be read.
        sweep.write(tmp_path, REHEARSAL, [best])
        _, _, read = measured_tiles.read(tmp_path / sweep.NAME)
        assert read == {(one.family, one.key): dict(found)[labels[1]]}


# The whole queue


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_queue_is_rehearsed(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command_line = [sys.executable, "-m", "benchmarks", "gpu", "--rehearse", "--minutes", "12",
                    "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command_line, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert set(Results(tmp_path).done()) == {step.name for step in steps.STEPS}
    assert "REHEARSAL" in done.stdout and "ms" not in (tmp_path / table.NAME).read_text()
