"""Files of JSON lines that a kill may have cut short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows that were written to their end, and the bytes that they take.

    In bytes, because text has more line ends than JSON knows, and a cut can be inside a character.
    A file that is not there has no rows.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.split(b"\n") if line], len(whole)
