"""Files of JSON lines whose last line may be unfinished, because the writer was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The finished rows and the number of bytes that they take; none for a missing file.

    In bytes, because text has more line ends than JSON knows, and a cut can be inside a character.
    Raises ValueError that names the first finished line that is not JSON.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.split(b"\n"), 1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError as error:
            raise ValueError(f"line {number}, which is not JSON ({error})") from error
    return rows, len(whole)
