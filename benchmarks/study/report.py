"""The study's results, from its rows: tables for docs/study.md, between two markers.

Tests are made once, when every cell is done. Before that there are differences without a verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.inference import Estimate, estimate, holm
from benchmarks.study.protocol import BASELINE, Cell, Protocol

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
LEVEL = 0.05
# Differences of accuracy, or of its mean over a run, that would not matter to a user.
MARGIN = 0.02
# Planned beside those to the baseline: is an effect owed to the sign of the reward?
CONTRASTS = (("both-30", "both-30-absolute"), ("both-30", "both-30-shuffled"))

Rows = Mapping[Cell, dict[str, Any]]


def write_results(protocol: Protocol, done: Rows, page: Path) -> None:
    """Replace what is between the page's markers. Exits where it has none."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{page} must have the lines {BEGIN} and {END}, once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{results(protocol, done)}\n{END}{after}", "utf-8")


def results(protocol: Protocol, done: Rows) -> str:
    """The whole section."""
    cells = protocol.cells()
    missing = [cell for cell in cells if cell not in done]
    parts = [_state(protocol, done, missing)]
    if done:
        _require_same_start(protocol, done)
        parts += [
            _section(
                "Area under the curve, minus GRPO's", _main_table(protocol, done, not missing)
            ),
            _section("Is it the reward's sign?", _contrasts(protocol, done, not missing)),
            _section("Final accuracy, minus GRPO's", _final_table(protocol, done, not missing)),
            _section("What the runs were like", _outcomes(protocol, done)),
        ]
    return "\n".join(parts)


def paired(
    protocol: Protocol, done: Rows, arm: str, other: str, measure: str
) -> dict[str, list[float]]:
    """Differences of a measure, arm minus other, by task; tasks without any pair are left out."""
    found: dict[str, list[float]] = {}
    for task, seed in protocol.pairs():
        a, b = (done.get(Cell(task, name, seed), {}) for name in (arm, other))
        if measure in a and measure in b:
            found.setdefault(task, []).append(a[measure] - b[measure])
    return found


def verdict(found: Estimate, adjusted: float, failed: int) -> str:
    """What a difference counts as, by the protocol's words."""
    if adjusted < LEVEL and found.mean > 0:
        return "undecided: failed runs" if failed else "**help**"
    if adjusted < LEVEL and found.mean < 0:
        return "**harm**"
    if -MARGIN < found.low and found.high < MARGIN:
        return "nothing"
    return "undecided"


def tested(
    protocol: Protocol, done: Rows, pairs: Sequence[tuple[str, str]], measure: str
) -> list[tuple[Estimate, float]]:
    """Each pair of arms over all tasks, with its p value after Holm's correction for all pairs."""
    found = [estimate(list(paired(protocol, done, *p, measure).values())) for p in pairs]
    return list(zip(found, holm([one.p for one in found]), strict=True))


def _state(protocol: Protocol, done: Rows, missing: Sequence[Cell]) -> str:
    total = len(protocol.cells())
    lines = [f"{len(done)} of {total} cells are done (protocol `{protocol.digest}`)."]
    if missing:
        lines.append(
            "**The study is not complete: no test is made and no verdict given yet.** "
            "Missing: " + "; ".join(_by_pair(protocol, missing)) + "."
        )
    if done:
        devices = sorted({str(row.get("device")) for row in done.values()})
        commits = sorted({str(row.get("commit"))[:12] for row in done.values()})
        lines.append(f"Run on {'; '.join(devices)}; one thread, at {', '.join(commits)}.")
        walls = [row["wall_s"] for row in done.values() if row.get("wall_s") is not None]
        used = [row["cpu_s"] for row in done.values() if row.get("cpu_s") is not None]
        if walls:
            lines.append(
                f"A cell took {statistics.median(walls):.0f} s by the clock and "
                f"{statistics.median(used):.0f} s of processor time (medians)."
            )
    failed = [str(cell) for cell, row in done.items() if "failed" in row]
    if failed:
        lines.append(f"Failed, and so not in any pair: {', '.join(failed)}.")
    return "\n".join(lines) + "\n"


def _by_pair(protocol: Protocol, missing: Iterable[Cell]) -> list[str]:
    arms: dict[tuple[str, int], list[str]] = {}
    for cell in missing:
        arms.setdefault((cell.task, cell.seed), []).append(cell.arm)
    whole = len(protocol.arms)
    seeds: dict[str, list[str]] = {}
    parts = []
    for (task, seed), names in arms.items():
        if len(names) == whole:
            seeds.setdefault(task, []).append(str(seed))
        else:
            parts.append(f"{task} seed {seed}: {', '.join(names)}")
    return parts + [f"{task} seeds {', '.join(s)}: all arms" for task, s in seeds.items()]


def _require_same_start(protocol: Protocol, done: Rows) -> None:
    for task, seed in protocol.pairs():
        rows = [done[c] for arm in protocol.arms if (c := Cell(task, arm, seed)) in done]
        if len({row["start"] for row in rows}) > 1:
            raise SystemExit(
                f"the arms of {task}, seed {seed}, did not set out from the same model, so that "
                f"they are no pairs; delete their rows and run them again on one machine"
            )


def _main_table(protocol: Protocol, done: Rows, complete: bool) -> list[str]:
    arms = [arm for arm in protocol.arms if arm != BASELINE]
    tests = tested(protocol, done, [(arm, BASELINE) for arm in arms], "auc") if complete else []
    tasks = list(protocol.tasks)
    lines = _header("arm", *tasks, "all tasks", "p, Holm", "counts as")
    for number, arm in enumerate(arms):
        groups = paired(protocol, done, arm, BASELINE, "auc")
        cells = [_shown([groups[task]]) if task in groups else "" for task in tasks]
        cells.append(_shown(list(groups.values())) if len(groups) == len(tasks) else "")
        words = ["", ""]
        if tests:
            found, adjusted = tests[number]
            failed = sum("failed" in row for cell, row in done.items() if cell.arm == arm)
            words = [f"{adjusted:.3f}", verdict(found, adjusted, failed)]
        lines.append(_line(arm, *cells, *words))
    return lines


def _contrasts(protocol: Protocol, done: Rows, complete: bool) -> list[str]:
    planned = [pair for pair in CONTRASTS if set(pair) <= set(protocol.arms)]
    tests = tested(protocol, done, planned, "auc") if complete else []
    tasks = list(protocol.tasks)
    lines = _header("arms", *tasks, "all tasks", "p, Holm")
    for number, pair in enumerate(planned):
        groups = paired(protocol, done, *pair, "auc")
        cells = [_shown([groups[task]]) if task in groups else "" for task in tasks]
        cells.append(_shown(list(groups.values())) if len(groups) == len(tasks) else "")
        lines.append(_line(" minus ".join(pair), *cells, _p(tests, number)))
    return lines


def _final_table(protocol: Protocol, done: Rows, complete: bool) -> list[str]:
    arms = [arm for arm in protocol.arms if arm != BASELINE]
    tasks = list(protocol.tasks)
    places = [(arm, task) for arm in arms for task in tasks]
    found = {
        (arm, task): groups[task]
        for arm in arms
        if (groups := paired(protocol, done, arm, BASELINE, "final"))
        for task in groups
    }
    adjusted: dict[tuple[str, str], float] = {}
    if complete and all(len(found.get(place, ())) > 1 for place in places):
        values = holm([estimate([found[place]]).p for place in places])
        adjusted = dict(zip(places, values, strict=True))
    lines = _header("arm", *tasks)
    for arm in arms:
        cells = [
            _shown([found[arm, task]])
            + (f", p = {adjusted[arm, task]:.2f}" if (arm, task) in adjusted else "")
            if (arm, task) in found
            else ""
            for task in tasks
        ]
        lines.append(_line(arm, *cells))
    return lines


def _outcomes(protocol: Protocol, done: Rows) -> list[str]:
    columns = ("before", "after", "pass@k", "entropy", "think share", "attention share", "lens JS",
               "after", "attention JS", "after", "step", "processor")  # fmt: skip
    lines = _header("task, arm", *columns)
    for task in protocol.tasks:
        for arm in protocol.arms:
            rows = [
                (row, done.get(Cell(task, BASELINE, seed), {}))
                for seed in protocol.seeds
                if "failed" not in (row := done.get(Cell(task, arm, seed), {"failed": ""}))
            ]
            if rows:
                lines.append(_line(f"{task}, {arm}", *_outcome(protocol, rows)))
    return [*lines, "", _LEGEND]


_LEGEND = """\
Means over seeds: accuracy before and after; pass@k with k the number of samples, at the end; the
entropy of the policy in training, in nats a token, in the last quarter of the steps; the mean of
the measured shares; the divergences of the student layer from the final one, lens and attention, on
held-out solutions, in nats, before and after. The last two are medians: the time of a step, with
whatever else the machine did, and the processor's time of the whole run, each over GRPO's in the
same task and seed."""


def _outcome(
    protocol: Protocol, rows: Sequence[tuple[dict[str, Any], dict[str, Any]]]
) -> list[str]:
    student = protocol.common["oisd"]["student_layers"][0] - 1
    own = [row for row, _ in rows]
    means = [
        [row["curve"][0][1] for row in own],
        [row["final"] for row in own],
        [list(row["pass_at_k"].values())[-1] for row in own],
        [_late([x for x in row["entropy"] if x is not None]) for row in own],
        *([x for row in own for x in row["shares"].get(name, ())]
          for name in ("share/think", "share/attention")),
        *([row["layers"][when][name][student] for row in own]
          for name in ("js", "attention_js") for when in ("before", "after")),
    ]  # fmt: skip
    ratios = [
        [row[name] / base[name] for row, base in rows if row.get(name) and base.get(name)]
        for name in ("step_s", "cpu_s")
    ]
    found = [f"{statistics.mean(values):.3f}" if values else "" for values in means]
    return found + [f"{statistics.median(values):.2f}" if values else "" for values in ratios]


def _late(values: Sequence[float]) -> float:
    return statistics.mean(values[-max(1, len(values) // 4) :])


def _shown(groups: Sequence[Sequence[float]]) -> str:
    found = estimate(groups)
    spread = "" if math.isnan(found.half_width) else f" ± {found.half_width:.3f}"
    return f"{found.mean:+.3f}{spread} ({found.pairs})"


def _p(tests: Sequence[tuple[Estimate, float]], number: int) -> str:
    return f"{tests[number][1]:.3f}" if tests else ""


def _section(title: str, lines: Sequence[str]) -> str:
    return f"### {title}\n\n" + "\n".join(lines) + "\n"


def _header(*names: str) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
