"""Results as a Markdown table, and the plots beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.report.bars import Judged, Row, judge
from oisd import jsonl

TITLES = {
    "lens": "Lens divergence, with gradient to the hidden states",
    "lens-values": "Lens divergence, values alone",
    "linear_logprob": "Log-probability of labels, gradients to hidden states and unembedding",
    "policy_head": "Policy head: log-probability and divergence",
    "attention_divergence": "Attention divergence, with gradient to q and k",
    "attention": "Attention, forward and backward",
    "attention_backward": "Attention backward with the alignment term in it",
    "step": "A training step: forward, losses, backward, optimizer",
}


def read_rows(folders: Iterable[str | Path]) -> list[Row]:
    """Rows of the folders' rows.jsonl; the last one counts of each case and implementation.

    Raises ValueError for a folder without rows.
    """
    found: dict[tuple[str, str, str], Row] = {}
    for folder in folders:
        path = Path(folder) / "rows.jsonl"
        if not path.is_file():
            raise ValueError(f"benchmarks: {folder} holds no rows.jsonl; `run --out` makes one")
        for row in jsonl.read_rows(path)[0]:
            name = row.get("case") or row.get("promise") or ""
            key = (row["kind"], str(name), row.get("implementation", ""))
            found.pop(key, None)
            found[key] = row
    return list(found.values())


def markdown(rows: Sequence[Row], plots: Sequence[Path] = ()) -> str:
    """The whole report."""
    measured = [row for row in rows if row["kind"] == "measurement"]
    tests = [row for row in rows if row["kind"] == "tests"]
    promised = [row for row in rows if row["kind"] == "promise"]
    parts = ["# Benchmarks", *machines(rows)]
    if tests:
        parts += ["## GPU tests", *(f"{row['summary']}" for row in tests)]
    bars = judge(measured)
    if bars:
        parts += ["## Bars", bar_table(bars)]
    if promised:
        parts += ["## Matmuls and workspace, counted", promise_table(promised)]
    for family, title in TITLES.items():
        chosen = [row for row in measured if row["family"] == family]
        if chosen:
            parts += [f"## {title}", *family_tables(chosen)]
    if measured:
        parts.append(LEGEND)
    parts += [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in plots]
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "Time: median and p20 - p80 over rounds in which all implementations took turns. Peak: memory "
    "beyond the inputs (a step: model and optimizer included). Roofline: the floor of matmuls at "
    "the bare matmul's rate, or of memory traffic at a copy's, over the time; both measured in the "
    "same rounds. TFLOP/s counts the floor. Error: the largest relative error of loss and "
    "gradients against float64 (a step: against the reference)."
)


def machines(rows: Sequence[Row]) -> list[str]:
    """One line for each machine, commit and set of versions."""
    found: dict[str, None] = {}
    for row in rows:
        if "device" not in row:
            continue
        versions = ", ".join(f"{name} {v}" for name, v in row["versions"].items())
        driver = f", driver {row['driver']}" if row["driver"] else ""
        threads = "" if row["driver"] else f", {row['threads']} thread(s)"
        commit = row["commit"]
        short = commit[:12] + ("+changes" if commit.endswith("+changes") else "")
        line = f"{row['device']}{driver}{threads}; {versions}; commit {short}; {row['date']}"
        found[line] = None
    return list(found)


def family_tables(rows: Sequence[Row]) -> list[str]:
    """One table for each case, those not timed below the others."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return [part for case, found in cases.items() for part in case_table(case, found)]


def case_table(case: str, rows: Sequence[Row]) -> list[str]:
    timed = [row for row in rows if row["status"] == "ok"]
    first = timed[0] if timed else rows[0]
    shape = ", ".join(f"{name} = {value:,}" for name, value in first["shape"].items())
    head = f"**{case}**: {shape}, {first['dtype']}"
    if timed:
        head += (
            f"; bare matmul {first['matmul_tflops']:.3g} TFLOP/s, copy "
            f"{first['copy_gbps']:.3g} GB/s; {first['rounds']} rounds after "
            f"{first['warmup']} warm-up"
        )
    if first["checked_at"]:
        head += f"; correctness at {first['checked_at']}"
    unpaired = timed[0]["median_s"] if timed else 1.0
    lines = [
        [
            row["implementation"],
            f"{duration(row['median_s'])} ({duration(row['p20_s'])} - {duration(row['p80_s'])})",
            f"{row['median_s'] / unpaired:.2f}",
            mebibytes(row),
            f"{row['tflops']:.3g}",
            f"{row['roofline_percent']:.0f} %",
            error(row),
            row["note"],
        ]
        for row in timed
    ]
    parts = [head]
    if lines:
        relative = f"x {timed[0]['implementation']}"
        titles = ["", "time (p20 - p80)", relative, "peak MiB", "TFLOP/s", "roofline", "error", ""]
        parts.append(table(titles, lines))
    rest = [row for row in rows if row["status"] != "ok"]
    if rest:
        parts.append(
            "\n".join(
                f"* {row['implementation']}: **{row['status']}**"
                + (f", {row['reason']}" if row["reason"] else "")
                for row in rest
            )
        )
    return parts


def bar_table(bars: Sequence[Judged]) -> str:
    lines = []
    for bar in bars:
        measured = "" if bar.measured is None else amount(bar.measured, bar.unit)
        verdict = bar.verdict + (f" ({bar.reason})" if bar.measured is None and bar.reason else "")
        lines.append([bar.case, bar.text, f"<= {amount(bar.at_most, bar.unit)}", measured, verdict])
    return table(["case", "bar", "wanted", "measured", ""], lines)


def amount(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if unit == "MiB" else f"{value:.3g} {unit}"


def promise_table(rows: Sequence[Row]) -> str:
    return table(
        ["", "wanted", "counted", ""],
        [
            [
                row["promise"],
                f"{'' if row['exactly'] else '<= '}{row['wanted']:g} {row['unit']}",
                f"{row['got']:.3g} {row['unit']}" if row["got"] is not None else "",
                "kept" if row["kept"] else f"BROKEN {row.get('reason', '')}".strip(),
            ]
            for row in rows
        ],
    )


def table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up as plain text, too."""
    cells = [[str(cell).replace("|", "/") for cell in line] for line in [titles, *lines]]
    kept = [i for i in range(len(titles)) if any(line[i] for line in cells)]
    cells = [[line[i] for i in kept] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [
        "| "
        + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def mebibytes(row: Row) -> str:
    peak = row.get("peak_mib")
    return f"{peak:,.0f}" if peak is not None else row.get("peak_reason", "")


def error(row: Row) -> str:
    found = row.get("errors") or {}
    return f"{max(found.values()):.0e}" if found else ""
