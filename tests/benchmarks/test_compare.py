"""Comparing the results of two runs: slowdowns, memory, what broke, and the bars."""

from __future__ import annotations

import pytest
import torch

from benchmarks.report.bars import judge
from benchmarks.report.compare import changes, text


def measured(seconds, yardstick, peak=100.0, name="ours", **fields) -> dict:
    row = {"kind": "measurement", "case": "c", "implementation": name, "status": "ok",
           "reason": "", "seconds": list(seconds), "yardstick_seconds": list(yardstick),
           "peak_mib": peak}  # fmt: skip
    return row | fields


def noise(scale, seed=0, count=12):
    generator = torch.Generator().manual_seed(seed)
    return (scale * (1 + 0.02 * torch.randn(count, generator=generator))).tolist()


def test_compare_flags_a_slowdown():
    (found,) = changes([measured(noise(1), noise(2, 1))], [measured(noise(1.3, 2), noise(2, 3))])
    assert found.flags == ["SLOWER"] and found.is_worse
    assert (
        found.low
        and found.high
        and found.low < 1.3 < found.high
        and found.ratio == pytest.approx(1.3, rel=0.05)
    )
    assert "SLOWER" in text([found]) and "1 of 1 got worse" in text([found])


def test_compare_is_not_fooled_by_a_slow_machine():
    base, new = measured(noise(1), noise(2, 1)), measured(noise(3, 2), noise(6, 3))
    (found,) = changes([base], [new])
    assert found.flags == [] and found.ratio == pytest.approx(1, rel=0.05)


def test_compare_flags_memory_and_what_broke():
    base = [measured(noise(1), noise(2, 1)), measured(noise(1), noise(2), name="b")]
    new = [measured(noise(1), noise(2, 1), peak=110.0),
           measured([], [], name="b", status="wrong")]  # fmt: skip
    found = {c.implementation: c for c in changes(base, new)}
    assert found["ours"].flags == ["MORE MEMORY"] and found["b"].flags == ["NOW WRONG"]
    assert all(c.is_worse for c in found.values())
    faster = changes([measured(noise(1), noise(2))], [measured(noise(0.5), noise(2))])
    assert faster[0].flags == ["faster"] and not faster[0].is_worse


def test_bars():
    bar = {"metric": "median_s", "at_most": 1.0, "against": "eager", "case": None}
    ours = measured([1], [1], median_s=2.0, bars=[bar], name="ours")
    (missed,) = judge([ours, measured([1], [1], name="eager", median_s=1.0)])
    assert missed.verdict == "MISSED" and missed.measured == 2.0
    (met,) = judge([ours, measured([1], [1], name="eager", median_s=4.0)])
    assert met.verdict == "met" and met.measured == 0.5
    (gone,) = judge([ours, {"case": "c", "implementation": "eager", "status": "absent",
                            "reason": "not installed", "bars": []}])  # fmt: skip
    assert gone.verdict == "not measured" and "not installed" in gone.reason
    absolute = [bar | {"metric": "peak_mib", "against": None, "at_most": 64.0}]
    (absolute,) = judge([measured([1], [1], bars=absolute)])
    assert absolute.verdict == "MISSED" and absolute.unit == "MiB"
