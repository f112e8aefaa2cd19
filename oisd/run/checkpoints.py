"""A checkpoint: weights that transformers and PEFT read, and what the optimizer goes on from.

    model.safetensors or adapter_model.safetensors, config.json, tokenizer files
    trainer_state.pt     the step, the schedule and, of a whole model, AdamW's state
    optimizer/           AdamW's state where processes share one model: each writes its part, by
                         `torch.distributed.checkpoint`, and any number of processes can read them
    digests.json         written last

It is written beside its final place, flushed to disk and then renamed: a folder named step-N is
complete. What is read of it cannot run code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from oisd import adapters
from oisd.run.processes import Processes
from oisd.sharding import is_sharded, release, whole


class Resumable(Protocol):
    """`oisd.optimizer.Optimizer`, of which this is what checkpoints need."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(
        self, state: dict[str, Any], parts: Mapping[str, Tensor] | None = None
    ) -> None: ...

    def parts(self) -> dict[str, Tensor]: ...

    def blank_parts(self) -> dict[str, Tensor]: ...


_STATE, _PARTS, _DIGESTS = "trainer_state.pt", "optimizer", "digests.json"


def write(
    final: Path,
    model: Any,
    tokenizer: Any,
    optimizer: Resumable,
    processes: Processes,
    more: Mapping[str, Any],
) -> None:
    """Write a checkpoint; all processes call it.

    more: what `read_state` is to return, "step" among it: numbers, texts and containers of them.
    If one of them fails, all raise its OSError or RuntimeError; the folder then does not exist, or
    is the one that was there before.
    """
    writing = final.with_name(f".writing-{final.name}")
    try:
        processes.on_first(lambda: _empty(writing))
        save_model(model, tokenizer, writing, processes)
        state = {**more, "learner": optimizer.state_dict()}  # as version 0.1 names it
        processes.on_first(lambda: torch.save(state, writing / _STATE))
        if is_sharded(model):
            parts = optimizer.parts()
            processes.on_each(lambda: _write_parts(parts, writing / _PARTS))
        files = sorted(file for file in writing.rglob("*") if file.is_file())
        digests = processes.on_each(lambda: _seal(writing, processes.share(files)))
        processes.on_first(lambda: _finish(writing, final, digests))
    except BaseException:
        if processes.is_first:
            shutil.rmtree(writing, ignore_errors=True)
        raise


def save_model(model: Any, tokenizer: Any, folder: Path, processes: Processes) -> None:
    """Write a model as transformers or PEFT does; all processes call it, and the first one writes.

    The weights of one in shards are gathered one by one, and meet in the first process's memory on
    the host. Raises OSError on all of them where the weights cannot be written.
    """
    adapted = adapters.is_adapted(model)
    weights = _gathered(model, adapted, processes.is_first) if is_sharded(model) else None

    def write_model() -> None:
        try:
            if adapted:
                adapters.save(model, folder, weights)
            else:
                model.save_pretrained(folder, safe_serialization=True, state_dict=weights)
        except SafetensorError as error:  # which is no OSError, even where the disk is full
            found = re.search(r"(?:I/O error: )?([^:]*) \(os error (\d+)\)", str(error))
            what = (int(found[2]), found[1]) if found else (errno.EIO, str(error))
            raise OSError(*what, str(folder)) from error
        tokenizer.save_pretrained(folder)

    processes.on_first(write_model)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds besides weights and parts, on the host."""
    return torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True)


def load_optimizer(checkpoint: Path, state: Mapping[str, Any], optimizer: Resumable) -> None:
    """Continue the optimizer from a checkpoint with this state; all processes call it."""
    parts = None
    if (checkpoint / _PARTS).is_dir():
        parts = optimizer.blank_parts()
        # Each process reads what it needs by itself.
        with warnings.catch_warnings():
            # That one process does so alone, as is meant where it resumes the run of several.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(parts, checkpoint_id=checkpoint / _PARTS, no_dist=not dist.is_initialized())
    optimizer.load_state_dict(state["learner"], parts)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        digests = json.loads((checkpoint / _DIGESTS).read_text(encoding="utf-8"))
        wrong = [n for n, digest in digests.items() if _digest(checkpoint / n) != digest]
    except (OSError, ValueError) as error:
        return str(error)
    return f"{wrong[0]} is not what was written" if wrong else None


def is_full(error: Exception) -> bool:
    """Whether the error is that of a full disk, as far as one can tell."""
    # torch reports it as RuntimeError.
    return isinstance(error, RuntimeError) or getattr(error, "errno", None) == errno.ENOSPC


def flush_to_disk(path: Path) -> None:
    """Wait until a file or a folder's entries are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@torch.no_grad()
def _gathered(model: Any, adapted: bool, keep: bool) -> dict[str, Tensor]:
    """A model's saved weights, or its adapters', whole and on the host if `keep`; else empty."""
    release(model)
    weights = model.state_dict(keep_vars=True)
    if adapted:
        weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
    found: dict[int, Tensor] = {}
    for weight in weights.values():
        if id(weight) not in found:  # tied weights stay tied
            full = whole(weight.detach())
            found[id(weight)] = full.cpu() if keep else full.new_empty(0)
    return {name: found[id(weight)] for name, weight in weights.items()} if keep else {}


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _write_parts(parts: dict[str, Tensor], folder: Path) -> None:
    try:
        save(dict(parts), checkpoint_id=folder)
    except CheckpointException as error:  # no Exception; it holds those of all processes
        causes = error.failures.values()
        first = next(iter(causes), error)
        cause = first[0] if isinstance(first, tuple) else first
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror or str(cause)) from error
        raise RuntimeError(str(cause)) from error


def _seal(folder: Path, files: list[Path]) -> dict[str, str]:
    """The digests of files that are now on disk, by their path in the folder."""
    for file in files:
        flush_to_disk(file)
    return {str(file.relative_to(folder)): _digest(file) for file in files}


def _finish(writing: Path, final: Path, digests: list[dict[str, str]]) -> None:
    together = {name: digest for part in digests for name, digest in part.items()}
    file = writing / _DIGESTS
    file.write_text(json.dumps(dict(sorted(together.items())), indent=1), encoding="utf-8")
    flush_to_disk(file)
    for folder in {writing, *(path for path in writing.iterdir() if path.is_dir())}:
        flush_to_disk(folder)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(writing, final)
    flush_to_disk(final.parent)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
