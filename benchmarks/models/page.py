"""docs/models.md from the rows of the sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"


def read(file: Path) -> list[dict[str, Any]]:
    """The latest row of each type and version."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        row = json.loads(line)
        rows[row["type"], row["transformers"]] = row
    return list(rows.values())


def write(rows: Sequence[dict[str, Any]], to: Path = PAGE) -> None:
    raise NotImplementedError
