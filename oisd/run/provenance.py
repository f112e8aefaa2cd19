"""What a result was made of: weights, problems, reward, versions. Reused only for the same.

A record is kept beside a result and held against a new one before the result is shown again or gone
on from. A file's record has its size, its time of change, a digest of samples of it and one of the
whole. Where size, time and samples agree, the whole is not read again; where the time differs, the
whole decides.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from oisd import adapters
from oisd.data import Example
from oisd.rewards import is_reasoning_reward

# Of a model's folder: what decides over its outputs. Not the trainer's state, nor a model card.
_SUFFIXES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".py", ".txt"}
_LEFT_OUT = {"digests.json", "trainer_state.json", "all_results.json", "train_results.json"}
_PACKAGES = ("oisd", "torch", "transformers", "math-verify")

_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16

Record = dict[str, Any]


def of_sources(
    model: str,
    problems: Mapping[str, Sequence[Example]],
    reward: str,
    then: Mapping[str, Any] | None = None,
) -> Record:
    """The record of a result: its model, its problems by setting, its reward, and versions.

    then: an earlier record, which saves reading large files that are as they were.
    """
    return {
        "model": of_model(model) if then is None else refreshed(then["model"], model),
        "problems": {setting: of_examples(rows) for setting, rows in problems.items()},
        "reward": of_reward(reward),
        "versions": versions(),
    }


def changes(then: Mapping[str, Any], now: Mapping[str, Any], model: str, reward: str) -> list[str]:
    """What of a record's sources is not what it was, in words; versions are left to `warn`."""
    found = changed_model(then["model"], model, now["model"])
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    text = [f"the model {model!r}: {', '.join(found[:3])}{more}"] if found else []
    settings = then["problems"].keys() | now["problems"].keys()
    for setting in sorted(settings):
        if then["problems"].get(setting) != now["problems"].get(setting):
            text.append(f"the problems of {setting} or their answers")
    if then["reward"] != now["reward"]:
        text.append(f"the source of the reward {reward!r}")
    return text


def warn_of_versions(where: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn of packages that have another version than the record's."""
    before, after = then["versions"], now["versions"]
    names = [name for name in sorted(before.keys() | after.keys())
             if before.get(name) != after.get(name)]  # fmt: skip
    if names:
        listed = ", ".join(f"{n} {before.get(n, 'none')} -> {after.get(n, 'none')}" for n in names)
        warnings.warn(f"{where} was begun with other versions: {listed}", stacklevel=3)


def is_unknown(model: Mapping[str, Any]) -> bool:
    """Whether a model, or an adapter's base, is of the Hub and has no copy here yet."""
    if "base" in model:
        return is_unknown(model["base"])
    return "name" in model and model["commit"] is None


def of_model(path: str) -> Record:
    """The files of a model's folder, of its base where it is an adapter; a Hub model's commit."""
    folder = Path(path)
    if not folder.is_dir():
        return {"name": path, "commit": _cached_commit(path)}
    files = {file.name: _of_file(file) for file in _files(folder)}
    if not adapters.is_adapter(folder):
        return {"files": files}
    return {"files": files, "base": of_model(adapters.base_path(folder))}


def of_examples(examples: Iterable[Example]) -> str:
    """Digest of the problems, their order, their answers and solutions."""
    rows = [json.dumps(_row(example), ensure_ascii=False, default=str) for example in examples]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _row(example: Example) -> tuple[Any, ...]:
    row = astuple(example)
    # Without a solution as before there were any, so that earlier records stay good.
    return row if example.solution else row[:-1]


def of_reward(name: str) -> str:
    """Digest of the source of a reward: the user's module, or our own graders."""
    module, _, function = name.partition(":")
    own = is_reasoning_reward(name)
    if own:
        module, function = "oisd.rewards", ""
    path = [*sys.path]
    try:
        sys.path.insert(0, os.getcwd())  # as the processes that grade do
        importlib.invalidate_caches()
        found = importlib.util.find_spec(module if function else "oisd.rewards")
    finally:
        sys.path[:] = path
    if found is None or not found.has_location or found.origin is None:  # built into Python
        return name
    source = Path(found.origin)
    files = [source] if function else sorted(source.parent.rglob("*.py"))
    digest = hashlib.sha256(name.encode())
    if own:
        digest.update((_version("reasoning-gym") or "none").encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions of the packages that decide over a result."""
    return {name: found for name in _PACKAGES if (found := _version(name))}


def machine() -> str:
    """This machine in words: its GPUs, or else its processor, and how many threads that has."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    model = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        model = found[1].strip() if found else model
    except OSError:  # not Linux
        pass
    return f"{model}, {os.cpu_count()} threads"


def changed_model(then: Mapping[str, Any], path: str, now: Mapping[str, Any]) -> list[str]:
    """What of a model is not what it was, in words; none if it is the same, to the byte."""
    if then.get("commit") != now.get("commit"):
        return [f"{path} is at commit {now.get('commit')}, was at {then.get('commit')}"]
    found = []
    before, after = then.get("files", {}), now.get("files", {})
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            found.append(f"{name} is gone")
        elif name not in before:
            found.append(f"{name} is new")
        elif before[name]["sha256"] != after[name]["sha256"]:
            found.append(f"{name} has other content")
    if "base" in then and "base" in now:
        found += [f"its base: {text}" for text in changed_model(then["base"], path, now["base"])]
    return found


def refreshed(then: Mapping[str, Any], path: str) -> Record:
    """`of_model` again, which reads a file whole only where `then` leaves a doubt."""
    folder = Path(path)
    if not folder.is_dir():
        return of_model(path)
    before = then.get("files", {})
    files = {file.name: _of_file(file, before.get(file.name)) for file in _files(folder)}
    if not adapters.is_adapter(folder):
        return {"files": files}
    base = adapters.base_path(folder)
    return {"files": files, "base": refreshed(then.get("base", {}), base)}


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _SUFFIXES and file.name not in _LEFT_OUT:
            yield file


def _of_file(file: Path, then: Mapping[str, Any] | None = None) -> Record:
    status = file.stat()
    found = {"size": status.st_size, "time": status.st_mtime_ns, "samples": _samples(file)}
    if then is not None and all(then[name] == value for name, value in found.items()):
        return {**found, "sha256": then["sha256"]}
    with file.open("rb") as stream:
        return {**found, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _samples(file: Path) -> str:
    """Digest of places all over a file: its first bytes, which are a checkpoint's header, too."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    step = max(size // _SAMPLES, _SAMPLE_BYTES)
    with file.open("rb") as stream:
        for start in range(0, size, step):
            stream.seek(start)
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _cached_commit(name: str) -> str | None:
    """The commit of a Hub model's copy on this disk; None before it is there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the Hub knows
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
