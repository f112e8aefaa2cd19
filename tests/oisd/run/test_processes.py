"""Several processes: what goes wrong on one or on all is said once, and nobody waits in vain."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oisd.batch import Batch
from oisd.config import ConfigError
from oisd.data import DataError
from oisd.errors import is_explained, report
from oisd.jsonl import DamagedFileError
from oisd.models import UnsupportedModelError
from oisd.objective import NonFiniteError
from oisd.rewards import RewardError
from oisd.run import processes
from oisd.run.folder import OtherRunError, RunFolderError
from tests import ROOT

TORCHRUN = "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "oisd.cli"
SMALL = (
    *("--warmup.steps", "0", "--run.steps", "1", "--rollout.prompts-per-step", "2"),
    *("--eval.source", "none", "--run.trackers", "--run.device", "cpu", "--run.output-dir", "run"),
)
# Raises on the second process alone, when it is imported or when it grades.
LONE = """
import os
if (os.environ["RANK"], os.environ["WHEN"]) == ("1", "import"):
    raise RuntimeError("no licence here")
def grade(completions, answers):
    if (os.environ["RANK"], os.environ["WHEN"]) == ("1", "call"):
        raise RuntimeError("the judge is gone")
    return [0.5 * (i % 3) for i in range(len(completions))]
"""


def start(folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    (folder / "lone.py").write_text(LONE)
    (folder / "bad.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n{"question": "1"\n')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=folder,
        env=environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--run.sted", "3"], "Unrecognized options: --run.sted"),
        (["--data.source", "bad.jsonl"], "oisd: bad.jsonl: is not JSON: line 2"),
    ],
    ids=["command line", "data"],
)
def test_torchrun_says_once_what_is_wrong_everywhere(arguments, line, tmp_path):
    done = start(tmp_path, *TORCHRUN, "train", *SMALL, *arguments)
    assert done.returncode != 0
    assert done.stderr.count(line) == 1
    assert re.search("oisd[.]cli FAILED", done.stderr) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "when, status, line",
    [
        ("import", 2, "cannot import module 'lone': RuntimeError: no licence here"),
        pytest.param("call", 1, "RuntimeError: the judge is gone", marks=pytest.mark.slow),
        pytest.param("never", 0, "step 1/1", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_fails_alone_says_so_and_the_others_stop(when, status, line, tmp_path):
    given = "train", "--processes", "2", *SMALL, "--reward.function", "lone:grade"
    done = start(tmp_path, "-m", "oisd.cli", *given, WHEN=when)
    assert done.returncode == status, done.stderr
    assert done.stderr.count(line) == 1
    lines = done.stderr.splitlines()
    if status == 2:
        assert len(lines) == 1 and lines[0].startswith("oisd: reward.function: ")
    assert "distributed" not in done.stderr and "FAILED" not in done.stderr


def test_the_command_line_is_checked_before_processes_are_started(monkeypatch, capsys):
    from oisd.cli import main

    monkeypatch.setattr("oisd.run.launch.run_on_processes", lambda *_: pytest.fail("started"))
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--processes", "2", "--run.sted", "3"])
    capsys.readouterr()
    assert main(["train", "--processes", "0"]) == 2
    assert capsys.readouterr().err == (
        "oisd: --processes must be a number of processes, at least 1, got '0'\n"
    )


@pytest.mark.parametrize(
    "ended, status, line",
    [
        ("os.kill(os.getpid(), 9)", 137,
         "oisd: a process was ended by SIGKILL, perhaps because the machine's memory was full; "),
        ("os.kill(os.getppid(), 15)", 143, "oisd: ended by SIGTERM; "),
    ],
    ids=["one-killed", "all-ended"],
)  # fmt: skip
def test_a_signal_that_ends_processes_is_named(ended, status, line, tmp_path):
    wait = "import os, time\nif os.environ['RANK'] == '1': {}\ntime.sleep(60)"
    launch = (
        "import sys; from oisd.run.launch import run_on_processes as run;"
        f"sys.exit(run(2, [sys.executable, '-c', {wait.format(ended)!r}]))"
    )
    done = start(tmp_path, "-c", launch)
    assert done.returncode == status
    assert done.stderr == f"{line}the same command goes on from what is on disk\n"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_launcher_that_is_killed_takes_its_processes_along(tmp_path):
    (tmp_path / "waits.py").write_text(
        "import os, time\n"
        "from oisd import cli\n"
        "def wait(_):\n"
        "    open('part-' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "    os.rename('part-' + os.environ['RANK'], os.environ['RANK'])\n"
        "    time.sleep(60)\n"
        "cli._plan = wait\n"
        "cli.main(['plan'])\n"
    )
    launch = "from oisd.run.launch import run_on_processes as run; run(2, ['{}', 'waits.py'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(
        [sys.executable, "-c", launch.format(sys.executable)], cwd=tmp_path, env=environment
    )
    files = [tmp_path / "0", tmp_path / "1"]
    try:
        assert soon(lambda: all(file.exists() for file in files), seconds=200)
    finally:
        launcher.kill()
        launcher.wait()
    ids = [int(file.read_text()) for file in files]
    assert soon(lambda: not any(is_alive(each) for each in ids), seconds=30)


def soon(happens: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happens():
            return True
        time.sleep(0.1)
    return False


def is_alive(process: int) -> bool:
    """Whether it runs; one that has ended may wait for whoever adopted it to notice."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_interrupt_is_said_by_the_first_process_without_torch(monkeypatch, capsys):
    from oisd.cli import main

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("oisd.cli._train", interrupted)
    monkeypatch.setattr("oisd.cli.speaks_for_all", lambda: pytest.fail("torch may be half there"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["train"]) == 130
    assert capsys.readouterr().err.startswith("oisd: interrupted; ")
    monkeypatch.setenv("RANK", "1")
    assert main(["train"]) == 130
    assert capsys.readouterr().err == ""


def test_processes_are_not_started_by_those_of_torchrun(monkeypatch):
    from oisd.run.launch import run_on_processes

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--processes must be left out under torchrun"):
        run_on_processes(2, ["true"])


ERRORS = [
    ConfigError("run.seed must be 0"),
    RunFolderError("full"),
    OtherRunError("another"),
    DamagedFileError("damaged"),
    DataError("no row"),
    UnsupportedModelError("no head"),
    RewardError("lone:grade", "raised", 3),
    NonFiniteError("loss is nan", Batch(*(torch.zeros(1, 1) for _ in range(7)))),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_explained_error_is_the_same_on_every_process(error):
    sent = pickle.loads(pickle.dumps(processes._portable(error)))
    assert type(sent) is type(error) and is_explained(sent) and str(sent) == str(error)
    assert {**vars(sent)}.keys() == {**vars(error)}.keys()


def test_an_error_that_cannot_be_sent_goes_in_its_words():
    error = OSError("no room")
    error.lock = threading.Lock()  # pyright: ignore
    sent = pickle.loads(pickle.dumps(processes._portable(error)))
    assert type(sent) is RuntimeError and str(sent) == "OSError: no room"


def test_a_process_whose_peer_is_lost_waits_for_the_peers_own_words(monkeypatch, capsys):
    """Two processes of torchrun, of which the second to speak has the error that nobody foresaw."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.time, "sleep", lambda _: report(DataError("row 7 is empty")))
    assert report(RuntimeError("Connection closed by peer")) == 1
    assert capsys.readouterr().err == "oisd: row 7 is empty\n"
    # Another try of torchrun's may say again what is wrong.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert report(ConfigError("run.seed must be 0")) == 2
    assert capsys.readouterr().err == "oisd: run.seed must be 0\n"
