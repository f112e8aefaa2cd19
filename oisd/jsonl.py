"""Files of JSON lines whose last line may be unfinished, because the writer was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class DamagedFileError(ValueError):
    """A file of JSON lines holds a finished line that is no JSON object."""


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The finished rows and the number of bytes that they take; none for a missing file.

    In bytes, because text has more line ends than JSON knows, and a cut can be inside a character.
    Raises DamagedFileError that names the file and the first finished line that is no JSON object.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.split(b"\n"), 1):
        if line:
            rows.append(_row(line, f"{path} is damaged: wanted a JSON object in each line, got "
                                   f"line {number}, which is"))  # fmt: skip
    return rows, len(whole)


def _row(line: bytes, damaged: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{damaged} not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DamagedFileError(f"{damaged} no object")
    return row
