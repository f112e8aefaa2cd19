"""`python -m tests.dependencies` sees what another version has changed, and so do its forms."""

import json
from dataclasses import make_dataclass

import pytest

from tests import dependencies, versions
from tests.dependencies import RELIED_ON, installed, look, pinned

FORMS = json.loads(dependencies.KNOWN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("package", [name for name in RELIED_ON if installed(name)])
def test_all_is_there_here(package):
    line = look(package, FORMS[package], index=False)
    assert not line.changes, str(line)
    assert line.checked == len(FORMS[package]) > 0


def test_every_name_has_a_form():
    assert FORMS.keys() == RELIED_ON.keys()
    for package, names in RELIED_ON.items():
        assert set(names) <= FORMS[package].keys(), package
        for name, known in FORMS[package].items():
            assert known and len(set(known)) == len(known), name
            assert not any(
                "GONE" in form or " from '" in form or " at 0x" in form for form in known
            )


def test_a_parameter_that_has_gone_is_named(monkeypatch):
    import transformers

    original = transformers.AttentionInterface.register

    def register(key, function, backend="auto"):
        original(key, function)

    monkeypatch.setattr(transformers.AttentionInterface, "register", register)
    line = look("transformers", FORMS["transformers"], index=False)
    name = "transformers.AttentionInterface.register"
    assert line.changes == {name: "-value +function +backend='auto'"}
    assert f"1 of {line.checked} changed: {name} -value" in str(line)


def test_a_name_that_has_gone_is_named(monkeypatch):
    import torch

    monkeypatch.delattr(torch._C._functorch, "is_functorch_wrapped_tensor")
    line = look("torch", FORMS["torch"], index=False)
    (change,) = line.changes.values()
    assert change.startswith("GONE: AttributeError")


def test_a_changed_behaviour_is_named(monkeypatch):
    import torch

    clamp = torch.Tensor.clamp
    monkeypatch.setattr(torch.Tensor, "clamp", lambda x, *bounds: clamp(x, *bounds) + 7 * x)
    line = look("torch", FORMS["torch"], index=False)
    assert set(line.changes) == {"slope_of_clamp_at_its_bound"}
    assert len(line.changes) == 1


def test_a_change_is_the_commands_exit_status(monkeypatch, capsys):
    import pebble

    monkeypatch.setattr(dependencies, "RELIED_ON", {"pebble": RELIED_ON["pebble"]})
    assert dependencies.main(["--offline"]) == 0
    monkeypatch.setattr(pebble, "ProcessExpired", make_dataclass("ProcessExpired", ["code"]))
    assert dependencies.main(["--offline"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2  # a line for each call
    assert shown[0].startswith("pebble ") and f" {pinned('pebble')} tested " in shown[0]
    assert shown[1].endswith("1 of 3 changed: pebble.ProcessExpired -msg -code=0 +code")


def test_a_new_form_is_accepted_and_what_is_gone_is_not(tmp_path, monkeypatch):
    import pebble

    monkeypatch.setattr(dependencies, "RELIED_ON", {"pebble": RELIED_ON["pebble"]})
    monkeypatch.setattr(dependencies, "KNOWN", tmp_path / "known.json")
    monkeypatch.setattr(pebble, "ProcessExpired", make_dataclass("ProcessExpired", ["code"]))
    monkeypatch.delattr(pebble.ProcessPool, "schedule")
    assert dependencies.main(["--offline", "--accept"]) == 1
    written = json.loads((tmp_path / "known.json").read_text())["pebble"]
    assert written["pebble.ProcessExpired"] == ["code"]
    assert written["pebble.ProcessPool.schedule"] == []


# ---------------------------------------------------------------- python -m tests.versions


def found(*names: str) -> list[versions.Version]:
    return [versions.Version(name) for name in names]


def test_the_oldest_promised_version_of_each_package():
    def find(package: str) -> list[versions.Version]:
        releases = {"torch": ("2.15.0", "2.11.1", "2.11.0", "2.10.9"), "trl": ("2.0", "1.16.0")}
        return found(*releases.get(package, ("99.0", "50.0", "0.0.1")))

    chosen = versions.oldest(find)
    assert "torch==2.11.0" in chosen and "trl==1.16.0" in chosen and "transformers==50.0" in chosen
    assert len(chosen) == len({line.partition("==")[0] for line in chosen}) > 14


def test_a_row_counts_what_passed(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.a" name="one"/>'
        '<testcase classname="tests.a" name="two"><skipped/></testcase>'
        '<testcase classname="tests.a" name="three"><failure/></testcase>'
        '<testcase classname="tests.b" name="four"><error/></testcase></testsuite></testsuites>'
    )
    outcome = versions.outcome(report)
    assert outcome == (1, 1, ["tests.a::three", "tests.b::four"])
    row = versions.row(versions.sys.executable, outcome)
    assert row.startswith(f"| {installed('torch')}, {installed('triton')}, ")
    assert row.endswith(" | 1 passed, 1 skipped, 2 failed |")
