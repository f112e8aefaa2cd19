"""The findings of `oisd check` on a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from oisd.check.findings import Finding

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "not checked": "dim"}


def findings_table(title: str, findings: Sequence[Finding]) -> Table:
    """One row for each finding; a remedy stands under what was found."""
    table = Table(title=title, title_justify="left", show_lines=False)
    table.add_column("what", no_wrap=True)
    table.add_column("")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("bound", justify="right", no_wrap=True)
    table.add_column("found", overflow="fold")
    part = None
    for row in findings:
        if part is not None and row.part != part:
            table.add_section()
        part = row.part
        found = Text(row.found)
        if row.remedy:
            found.append(f"\n-> {row.remedy}", style="italic")
        status = Text(row.status, style=_STYLES[row.status])
        table.add_row(row.name, status, _number(row.value), _number(row.bound), found)
    return table


def verdict(findings: Sequence[Finding]) -> str:
    """How many rows there are of each status, in words."""
    count = Counter(finding.status for finding in findings)
    return ", ".join(f"{count[status]} {status}" for status in _STYLES if count[status])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g}" if abs(value) < 1e4 else f"{value:,.0f}"
