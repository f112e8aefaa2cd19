"""Other weights, problems or graders under the same name are told apart, cheaply where they can."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oisd.data import Example
from oisd.run import provenance


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    save_file({"w": torch.randn(1024, 2048, generator=generator)}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "README.md").write_text("a card")
    (path / "digests.json").write_text("{}")
    return path


def change_a_byte(file: Path, place: int, keep_time: bool = False) -> None:
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    if keep_time:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def changes(folder: Path, then: dict) -> list[str]:
    then = json.loads(json.dumps(then))  # as it is read from a file
    return provenance.changed_model(then, str(folder), provenance.refreshed(then, str(folder)))


def test_a_copy_and_a_touched_file_are_the_same(folder, tmp_path):
    then = provenance.of_model(str(folder))
    assert set(then["files"]) == {"model.safetensors", "config.json"}
    os.utime(folder / "model.safetensors")
    (folder / "README.md").write_text("another card")
    assert changes(folder, then) == []


@pytest.mark.parametrize("place", [100, 1_000_003, -1], ids=["header", "between samples", "end"])
def test_one_changed_byte_of_the_weights_is_found(folder, place):
    then = provenance.of_model(str(folder))
    change_a_byte(folder / "model.safetensors", place)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert changes(folder, then) == ["model.safetensors has other content"]


def test_a_sampled_byte_is_found_behind_the_same_time(folder):
    then = provenance.of_model(str(folder))
    change_a_byte(folder / "model.safetensors", 100, keep_time=True)
    assert changes(folder, then) == ["model.safetensors has other content"]


def test_what_agrees_is_not_read_whole(folder, monkeypatch):
    then = provenance.of_model(str(folder))
    monkeypatch.setattr(provenance.hashlib, "file_digest", None)  # would fail
    assert changes(folder, then) == []


def test_files_that_come_and_go_are_named(folder):
    then = provenance.of_model(str(folder))
    (folder / "config.json").rename(folder / "generation_config.json")
    assert changes(folder, then) == ["config.json is gone", "generation_config.json is new"]


def test_an_adapter_has_its_base(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    named = {"base_model_name_or_path": str(folder), "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    then = provenance.of_model(str(adapter))
    change_a_byte(folder / "model.safetensors", -1)
    assert changes(adapter, then) == ["its base: model.safetensors has other content"]


def test_a_model_of_the_hub_is_known_by_its_commit():
    then = {"name": "somebody/model", "commit": "a" * 40}
    now = provenance.of_model("somebody/model")
    assert now == {"name": "somebody/model", "commit": None}
    (text,) = provenance.changed_model(then, "somebody/model", now)
    assert text.startswith("somebody/model is at commit None, was at aaa")


def test_examples_are_told_apart_by_each_field_and_their_order():
    rows = [Example("1+1=", "2", "a"), Example("1+2=", "3", "b")]
    digest = provenance.of_examples(rows)
    assert digest == provenance.of_examples(list(rows))
    for other in (
        rows[::-1],
        rows[:1],
        [Example("1+1=", "3", "a"), rows[1]],
        [Example("1+1 =", "2", "a"), rows[1]],
        [Example("1+1=", "2", "c"), rows[1]],
    ):
        assert provenance.of_examples(other) != digest


def test_a_reward_is_known_by_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "a_reward_of_mine.py"
    module.write_text("def zero(completions, answers):\n    return [0.0] * len(answers)\n")
    before = provenance.of_reward("a_reward_of_mine:zero")
    assert before == provenance.of_reward("a_reward_of_mine:zero")
    assert before != provenance.of_reward("a_reward_of_mine:one")
    module.write_text(module.read_text().replace("0.0", "1.0"))
    assert provenance.of_reward("a_reward_of_mine:zero") != before
    assert "a_reward_of_mine" not in sys.modules  # known without being run
    assert provenance.of_reward("math") != provenance.of_reward("boxed_string")


def test_our_graders_rules_count_and_what_is_built_into_python_has_no_source(monkeypatch):
    read: list[Path] = []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or whole(path))
    assert len(provenance.of_reward("math")) == 64
    assert {"compare.py", "spelling.py", "grading.py"} <= {path.name for path in read}
    assert provenance.of_reward("sys:exit") == "sys:exit"


def test_versions_are_those_installed():
    found = provenance.versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert "oisd" in found and "not-a-package" not in found
