"""The page of `oisd report`, put together and written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oisd import page
from oisd.config import ConfigError
from oisd.options import ReportRun
from oisd.report import answers, curves, numbers, runs, words
from oisd.report.charts import LayerCurve, draw, draw_layers
from oisd.report.runs import Group
from oisd.schema import one_line, option, require, require_device


def write_report(folders: Sequence[str], options: ReportRun) -> Path:
    """Write the page about the runs in `folders`; returns its path.

    Raises ConfigError for a folder that is not a run, and where the page cannot be written.
    """
    require(options.inside_texts >= 1, option("inside_texts"), "at least 1", options.inside_texts)
    require_device("--device", options.device)
    found, notes = runs.read_runs(folders)
    groups = runs.grouped(found)
    file = Path(options.output or _default(folders))
    charts, unseen = curves.sections(groups)
    values = {
        "title": f"Run {found[0].name}" if len(found) == 1 else f"{len(found)} runs of oisd train",
        "groups": groups,
        "facts": words.fact_rows(groups),
        "settings": words.setting_rows(groups),
        "notes": [*words.caveats(groups), *notes],
        "alarms": [(run.name, run.alarms) for run in found if run.alarms],
        "group_table": numbers.group_table(groups) if len(found) > len(groups) else None,
        "run_table": numbers.run_table(groups),
        "sections": [
            (title, [(chart, draw(chart)) for chart in part]) for title, part in charts
        ],
        "unseen": unseen,
        "reading": _reading(groups, [chart for _, part in charts for chart in part]),
        "changes": [(group, answers.changes(group.runs[0])) for group in groups],
        "samples": [(group, answers.training_samples(group.runs[0])) for group in groups],
        "inside": [_inside(group, options) for group in groups] if options.inside else [],
    }  # fmt: skip
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return page.write_page(file, "report.html", **values)
    except OSError as error:
        raise ConfigError(
            f"--output {str(file)!r} cannot be written: {error.strerror or error}"
        ) from error


def _default(folders: Sequence[str]) -> Path:
    return Path(folders[0]) / "report.html" if len(folders) == 1 else Path("runs/report.html")


def _reading(groups: Sequence[Group], charts: Sequence[curves.Chart]) -> str:
    """How the curves are to be read, in a few sentences."""
    several = any(len(group.runs) > 1 for group in groups)
    said = []
    if several:
        said.append(
            "A line is the mean over the runs of a group, which differ in their seed alone; the "
            "band spans their smallest and largest value."
        )
    if any(curve.is_smoothed for chart in charts for curve in chart.curves):
        said.append(
            f"Lines of more than {curves.SMOOTH_ABOVE} points are moving averages over a fifteenth "
            "of the run" + ("" if several else ", over the thin line of the single steps") + "."
        )
    if longest := max((chart.thinned_from for chart in charts), default=0):
        said.append(
            f"Curves of more than {curves.BUCKETS} points (here up to {longest:,}) are thinned out "
            f"to as many buckets: the line is a bucket's mean, the band its smallest and largest "
            "value."
        )
    said.append("The numbers under each chart are not smoothed.")
    return " ".join(said)


def _inside(group: Group, options: ReportRun) -> dict[str, Any]:
    """What is shown of the layers of a group's first run."""
    import torch  # only where a model is looked at

    from oisd.report.inside import look_inside
    from oisd.run.processes import device_named

    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        seen = look_inside(group.runs[0], options.inside_texts, device_named(options.device))
    except (ConfigError, ValueError) as error:  # a model that is gone or cannot be looked at
        reason = one_line(error)
        print(f"oisd report: inside of {group.title} is not shown: {reason}", file=sys.stderr)
        return {"group": group, "failed": reason}
    name = group.letter.lower()
    charts = [
        ("Entropy of the lens", draw_layers(
            f"inside-entropy-{name}", "entropy (nats)",
            [_by_layer(look.name, look.summary.entropy) for look in seen.looks], seen.layer,
        )),
        ("Divergence from the final layer", draw_layers(
            f"inside-divergence-{name}", "divergence (nats)",
            [_by_layer(look.name, look.summary.divergence) for look in seen.looks], seen.layer,
        )),
        ("Same top token as the final layer", draw_layers(
            f"inside-agreement-{name}", "share of tokens",
            [_by_layer(look.name, look.summary.agreement) for look in seen.looks], seen.layer,
        )),
    ]  # fmt: skip
    overlaps = [
        LayerCurve(look.name, look.attention_layers, look.overlap)
        for look in seen.looks
        if look.overlap
    ]
    if overlaps:
        drawn = draw_layers(f"inside-overlap-{name}", "overlap", overlaps, seen.layer)
        charts.append(("Overlap of attention with the final layer's", drawn))
    return {
        "group": group,
        "failed": "",
        "seen": seen,
        "charts": charts,
        "table": _layer_table(seen),
    }


def _by_layer(name: str, values: Sequence[float]) -> LayerCurve:
    return LayerCurve(name, range(1, len(values) + 1), values)


def _layer_table(seen: Any) -> tuple[list[str], list[list[str]]]:
    """The numbers of the charts: a row for each layer, the final one first."""
    header = ["layer"]
    for look in seen.looks:
        header += [f"{what}, {look.name}" for what in ("entropy", "divergence", "same top token",
                                                       "overlap")]  # fmt: skip
    rows = []
    for layer in range(len(seen.looks[0].summary.entropy), 0, -1):
        cells = [str(layer)]
        for look in seen.looks:
            overlap = dict(zip(look.attention_layers, look.overlap, strict=True))
            summary = look.summary
            for values in (summary.entropy, summary.divergence, summary.agreement):
                cells.append(f"{values[layer - 1]:.4f}")
            cells.append(f"{overlap[layer]:.4f}" if layer in overlap else "")
        rows.append(cells)
    return header, rows
