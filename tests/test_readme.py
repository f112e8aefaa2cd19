"""The README's commands are what CI runs, its code runs, and its files are there."""

import re

import pytest

from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_two_set_up_commands_of_one_line_each():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert all("-c constraints.txt" in command for command in commands)
    assert commands[0].endswith(".venv/bin/oisd train")
    assert commands[1].endswith(".venv/bin/pytest -n 2 --dist worksteal")


def test_ci_runs_the_commands_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "grep '^python3 -m venv' README.md" in ci
    assert 'run "${commands[0]}"' in ci and 'run "${commands[1]}"' in ci
    assert "pip install" not in ci and "pytest" not in ci


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(number, capsys):
    assert PYTHON
    exec(compile(PYTHON[number], f"README block {number}", "exec"), {})


def test_files_that_the_readme_names_exist():
    linked = re.findall(r"\]\(((?!http|#)[^)]+)\)", README)
    assert linked
    for name in linked:
        assert (ROOT / name).exists(), name


def test_recipes_that_the_readme_names_exist():
    for name in re.findall(r"^oisd train ([\w-]+)\s", README, re.MULTILINE):
        assert name == "my" or (ROOT / "recipes" / f"{name}.toml").exists(), name


def test_constraints_pin_what_pyproject_asks_for():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.match(r"[\w-]+", w)[0].lower().replace("_", "-") for w in wanted}
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert names <= pinned, names - pinned
