"""Tiles that a GPU has measured, which come before the launch tables where they were measured.

`python -m benchmarks gpu` writes them; `measured_tiles.json` beside this file is read if it is
there. They count only on the GPU whose name the file gives, with the Triton that it gives: another
version may spill where that one did not. Without the file, or elsewhere, the tables stand.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton

PATH = Path(__file__).with_name("measured_tiles.json")
# Of a tile: the fields that its family's record has, and what they may be.
SIZES = tuple(2**power for power in range(4, 9))
ALLOWED: dict[str, tuple[Any, ...]] = {
    "m": SIZES, "n": SIZES, "v": SIZES, "d": SIZES, "warps": (4, 8), "stages": (1, 2, 3, 4, 5),
    "split": (False, True), "registers": (None, 128, 168, 255), "depth": (None, 16, 32, 64, 128),
}  # fmt: skip
FIELDS = {
    "attention": ("m", "n", "warps", "stages", "split", "registers", "depth"),
    "lens": ("n", "v", "d", "warps", "stages", "registers"),
}
Key = tuple[Any, ...]
Table = dict[tuple[str, Key], dict[str, Any]]  # by family and the key of its table

_tried: list[Table] = []


def measured(family: str, key: Key, capability: int) -> dict[str, Any] | None:
    """Fields of the measured tile of a launch table's entry, if there is one for this GPU.

    capability: of the launch; 0 is the interpreter.

    Raises ValueError where `measured_tiles.json` is not as written by the command.
    """
    for table in _tried[::-1]:
        if (family, key) in table:
            return table[family, key]
    return None if capability == 0 else _of_this_gpu(PATH, capability).get((family, key))


@contextmanager
def trying(family: str, key: Key, fields: Mapping[str, Any]) -> Iterator[None]:
    """Launches take this tile for the entry."""
    _tried.append({(family, key): dict(fields)})
    try:
        yield
    finally:
        _tried.pop()


@functools.cache
def _of_this_gpu(path: Path, capability: int) -> Table:
    """Those of a file for the current GPU, if it has this capability."""
    if not path.exists() or not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    if capability != 10 * major + minor:  # a launch for an absent GPU, which is only compiled
        return {}
    device, version, table = read(path)
    here = torch.cuda.get_device_name(), triton.__version__
    return table if (device, version) == here else {}


def read(path: Path) -> tuple[str, str, Table]:
    """(GPU's name, Triton's version, tiles) of a file.

    Raises ValueError that names what is wrong in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        device, version, rows = content["device"], content["triton"], content["tiles"]
        table = {_key(row): _fields(row) for row in rows}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise _wrong(path, "device, triton and tiles", f"{type(error).__name__}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_REMEDY}") from None
    if not isinstance(device, str) or not isinstance(version, str):
        raise _wrong(path, "the names of a GPU and of a Triton version", (device, version))
    return device, version, table


def _key(row: Mapping[str, Any]) -> tuple[str, Key]:
    if row["family"] not in FIELDS:
        raise ValueError(f"family must be one of {', '.join(FIELDS)}, got {row['family']!r}")
    return row["family"], tuple(row["key"])


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    tile = row["tile"]
    wanted = FIELDS[row["family"]]
    if set(tile) != set(wanted):
        raise ValueError(f"{row['key']} must have {', '.join(wanted)}, got {', '.join(tile)}")
    for name, value in tile.items():
        if not any(value is x or (type(value) is type(x) and value == x) for x in ALLOWED[name]):
            allowed = ", ".join(map(str, ALLOWED[name]))
            raise ValueError(f"{row['key']}: {name} must be one of {allowed}, got {value!r}")
    return dict(tile)


_REMEDY = "remove it, or let `python -m benchmarks gpu` write it again"


def _wrong(path: Path, wanted: str, got: object) -> ValueError:
    return ValueError(f"{path} must hold {wanted}, got {got}; {_REMEDY}")
