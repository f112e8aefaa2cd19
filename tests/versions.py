"""The tests with other versions than those of `constraints.txt`; prints a row for development.md.

    python -m tests.versions newest                # of everything, as pip finds them today
    python -m tests.versions oldest --python python3.11     # the oldest that pyproject.toml allows
    python -m tests.versions newest --keep tests/oisd/rollout -m 'slow or not slow'

Makes a new environment, .venv-newest or .venv-oldest (`--keep` takes the one that is there), and
runs pytest in it, with the options that are not its own. Below the row stands every test that did
not pass. Exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from tests import ROOT

PROMISED_EXTRAS = ("lora", "trl")  # the other extras are not in the environment of the tests
# What the oldest versions of others need: Triton 3.6's interpreter makes numbers of arrays, which
# numpy refuses from 2.4 on.
BESIDE_THE_OLDEST = ("numpy<2.4",)
NAMED = ("torch", "triton", "transformers", "trl", "peft")


def released(package: str, python: str = sys.executable) -> list[Version]:
    """The versions of a package that pip would take for a Python."""
    command = [python, "-m", "pip", "index", "versions", package]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search("^Available versions: (.*)$", shown, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"tests.versions: pip shows no versions of {package}: {shown!r}")
    versions = []
    for name in found[1].split(", "):
        with suppress(InvalidVersion):  # some packages have very old ones, such as 0.4.src
            versions.append(Version(name))
    return versions


def oldest(find: Callable[[str], list[Version]]) -> list[str]:
    """Constraints for pip: of each package that pyproject.toml promises, the oldest version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    promised = project["dependencies"] + [x for name in PROMISED_EXTRAS for x in extras[name]]
    chosen = {}
    for requirement in map(Requirement, promised):
        if requirement.marker is None or requirement.marker.evaluate():
            allowed = [*requirement.specifier.filter(find(requirement.name))]
            chosen[requirement.name] = f"{requirement.name}=={min(allowed)}"
    return [*chosen.values(), *BESIDE_THE_OLDEST]


def make(folder: Path, which: str, python: str) -> None:
    """An environment with the newest or the oldest versions; RuntimeError if pip finds none."""
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    own = str(folder / "bin" / "python")
    command = [own, "-m", "pip", "install", "--quiet", "-e", ".[dev]"]
    if which == "oldest":
        constraints = folder / "oldest.txt"
        wanted = oldest(lambda package: released(package, own))
        constraints.write_text("\n".join(wanted) + "\n", encoding="utf-8")
        command += ["-c", str(constraints)]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise RuntimeError(f"tests.versions: pip cannot install {which} together; see above")


class Outcome(NamedTuple):
    """What pytest counted, and the tests that did not pass."""

    passed: int
    skipped: int
    wrong: list[str]


def outcome(report: Path) -> Outcome:
    """Of a report that pytest's --junitxml wrote."""
    cases = [*ElementTree.parse(report).getroot().iter("testcase")]
    wrong = [case for case in cases if {x.tag for x in case} & {"failure", "error"}]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in wrong]
    return Outcome(len(cases) - len(wrong) - skipped, skipped, names)


def row(python: str, found: Outcome) -> str:
    """The line of the table in development.md."""
    script = (
        "import platform; from importlib.metadata import version; "
        f"print(*map(version, {NAMED}), platform.python_version())"
    )
    shown = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    torch, triton, transformers, trl, peft, own = shown.stdout.split()
    counts = f"{found.passed} passed, {found.skipped} skipped, {len(found.wrong)} failed"
    return f"| {torch}, {triton}, {transformers} | {trl}, {peft} | {own} | {counts} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description="Other versions")
    parser.add_argument("which", choices=("newest", "oldest"))
    parser.add_argument("--python", default=sys.executable, help="of the new environment")
    parser.add_argument("--keep", action="store_true", help="take the environment that is there")
    arguments, options = parser.parse_known_args()
    folder = ROOT / f".venv-{arguments.which}"
    if not arguments.keep:
        make(folder, arguments.which, arguments.python)
    own, report = str(folder / "bin" / "python"), folder / "tests.xml"
    report.unlink(missing_ok=True)
    subprocess.run([own, "-m", "pytest", f"--junitxml={report}", *options], cwd=ROOT)
    found = outcome(report)
    print(row(own, found), *found.wrong, sep="\n")
    return int(bool(found.wrong) or not found.passed)


if __name__ == "__main__":
    sys.exit(main())
