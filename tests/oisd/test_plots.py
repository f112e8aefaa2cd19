import json
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from oisd import plots

PANELS = ["reward", "js_think", "js_attention", "entropy", "completion_length", "gradient_norms"]


def run(steps, **metrics):
    """Rows of a run in which each metric is a function of the step."""
    return [{"step": s} | {key: value(s) for key, value in metrics.items()} for s in steps]


def full_run(n):
    return run(
        range(1, n + 1),
        **{
            "reward": lambda s: 1 - 1 / s,
            "eval/avg_at_k": lambda s: 0.5 if s % 10 == 0 else None,
            "js/think_pos": lambda s: 0.692 + 1e-4 * math.sin(s),
            "js/think_neg": lambda s: 0.693 - 1e-4 * math.sin(s),
            "js/attention_pos": lambda s: 0.2 / s,
            "js/attention_neg": lambda s: 0.3 / s if s % 2 else None,
            "entropy/student": lambda s: 11.65 - 1e-3 * s,
            "entropy/teacher": lambda s: 0.3 + 0.1 / s,
            "completion_length": lambda s: 1000.0 + s,
            "grad_norm": lambda s: 0.3,
            "grad_norm/think": lambda s: 1e-4,
        },
    )


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each figure by file name, without the time it takes to render them."""
    figures = {}

    def save(figure: Figure, path):
        figures[path.stem] = figure.axes
        return path

    monkeypatch.setattr(plots, "save_figure", save)
    return figures


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_files_of_a_run(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in full_run(40)))
    paths = plots.plot_training(metrics, tmp_path / "plots")
    assert [path.name for path in paths] == [f"{name}.png" for name in ["training", *PANELS]]
    assert all(map(is_png, paths))
    assert sorted((tmp_path / "plots").iterdir()) == sorted(paths), "nothing else is left behind"


def test_panels_without_data_are_left_out(drawn):
    rows = run(range(5), reward=lambda s: 0.5, grad_norm=lambda s: 1.0)
    for row in rows:
        row["js/think_pos"] = None
        row["entropy/student"] = math.nan
    plots.plot_training(rows, "plots")
    assert list(drawn) == ["training", "reward", "gradient_norms"]
    assert len(drawn["training"]) == 2


def test_shares_are_percents_on_a_logarithmic_axis_and_weights_have_a_panel(drawn):
    rows = run(
        range(1, 40),
        **{
            "share/think": lambda s: 0.03 if s % 20 == 1 else None,
            "share/attention": lambda s: 0.0 if s == 1 else 0.0004 if s == 21 else None,
            "weight/attention": lambda s: 0.1 * s,
        },
    )
    plots.plot_training(rows, "plots")
    assert list(drawn) == ["training", "shares", "weights"]
    (ax,) = drawn["shares"]
    assert ax.get_yscale() == "log"
    think, attention, one = ax.lines
    assert list(think.get_ydata()) == pytest.approx([3, 3]) and list(think.get_xdata()) == [1, 21]
    assert list(attention.get_ydata()) == pytest.approx([0.04])
    assert list(one.get_ydata()) == [1, 1]


def test_nothing_is_drawn_of_nothing(drawn):
    assert plots.plot_training([], "plots") == []
    assert plots.plot_training([{"step": 1, "loss/grpo": 0.1}], "plots") == []
    assert not drawn


def test_rewards_keep_their_own_range_outside_the_unit_interval(drawn):
    plots.plot_training(run(range(9), reward=lambda s: s / 10), "plots")
    assert drawn["reward"][0].get_ylim() == (-0.02, 1.02)
    plots.plot_training(run(range(9), reward=lambda s: s - 3.0), "plots")
    assert drawn["reward"][0].get_ylim()[0] < -3


def test_long_runs_are_smoothed_over_their_raw_line(drawn):
    def lines(n):
        plots.plot_training(run(range(n), reward=lambda s: s % 2), "plots")
        return drawn["reward"][0].lines

    assert len(lines(30)) == 1
    raw, smooth = lines(300)
    assert np.ptp(raw.get_ydata()) == 1
    assert np.ptp(smooth.get_ydata()) < 0.2


def test_smoothing_keeps_constants_and_length():
    assert np.allclose(plots.smooth([3.0] * 31), 3.0)
    values = np.arange(100.0)
    assert np.allclose(plots.smooth(values)[5:-5], values[5:-5]), "centred: a slope has no lag"


def test_ln_2_is_marked_where_it_is_near(drawn):
    plots.plot_training(full_run(20), "plots")
    assert [text.get_text() for text in drawn["js_think"][0].texts] == ["ln 2"]
    assert not drawn["js_attention"][0].texts


def test_entropies_far_apart_get_an_axis_each(drawn):
    plots.plot_training(full_run(20), "plots")
    left, right = drawn["entropy"]
    assert left.get_ylim()[0] > 11 and right.get_ylim()[1] < 1
    assert len(left.get_legend().get_texts()) == 2
    close = {"entropy/student": lambda s: 1.5 - s / 30, "entropy/teacher": lambda s: 1 - s / 30}
    plots.plot_training(run(range(20), **close), "plots")
    assert len(drawn["entropy"]) == 1


def test_gradient_norms_of_different_size_get_a_logarithmic_axis(drawn):
    plots.plot_training(full_run(20), "plots")
    assert drawn["gradient_norms"][0].get_yscale() == "log"
    plots.plot_training(run(range(5), grad_norm=lambda s: 1.0 + s), "plots")
    assert drawn["gradient_norms"][0].get_yscale() == "linear"


def test_the_last_row_of_a_step_counts(drawn):
    rows = [{"step": 2, "reward": 0.1}, {"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.9}]
    plots.plot_training(rows, "plots")
    assert drawn["reward"][0].lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.9]]


def test_half_a_row_at_the_end_is_forgiven(tmp_path, drawn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    assert len(plots.plot_training(path, tmp_path)) == 2
    path.write_text('{"step": 1, "rew\n{"step": 2, "reward": 0.5}\n')
    with pytest.raises(ValueError, match="metrics.jsonl is damaged: .*line 1, which is not JSON"):
        plots.plot_training(path, tmp_path)
    path.write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.25, "a": "\u2028"}\n3\n')
    with pytest.raises(ValueError, match="line 3, which is no object"):
        plots.plot_training(path, tmp_path)
    with pytest.raises(FileNotFoundError):
        plots.plot_training(tmp_path / "nowhere.jsonl", tmp_path)


def test_pass_at_k_file(tmp_path):
    curves = {"GRPO": {1: 0.4, 2: 0.5, 256: 0.9}, "OISD": {1: 0.5, 2: 0.6, 256: 0.92}}
    path = plots.plot_pass_at_k(
        curves, tmp_path / "new" / "pass.png", {"OISD": {1: (0.45, 0.55), 2: (0.5, 0.7)}}
    )
    assert is_png(path) and list(path.parent.iterdir()) == [path]


def test_pass_at_k_axes(drawn):
    plots.plot_pass_at_k({"OISD": {4: 0.75, 1: 0.5, 2: 0.625}}, "pass.png")
    (ax,) = drawn["pass"]
    assert ax.get_xscale() == "log"
    assert ax.lines[0].get_xydata().tolist() == [[1, 50], [2, 62.5], [4, 75]]
    with pytest.raises(ValueError, match="no points"):
        plots.plot_pass_at_k({"OISD": {}}, "pass.png")


@pytest.mark.parametrize("share, low, high", [(0.0, -1, 5), (1.0, 90, 101), (0.5, 45, 55)])
def test_pass_at_k_of_a_flat_curve_keeps_an_axis_of_different_ticks(drawn, share, low, high):
    plots.plot_pass_at_k({"a": {1: share, 2: share}}, "pass.png")
    below, above = drawn["pass"][0].get_ylim()
    assert low <= below and above <= high and above - below >= 5


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = plots.plot_pass_at_k({"a": {1: 0.5}}, tmp_path / "pass.png")
    before = path.read_bytes()

    def fail(self, file, **_):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.plot_pass_at_k({"a": {1: 0.9}}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_plots_touch_neither_pyplot_nor_torch():
    code = "import sys, oisd.plots; sys.exit(bool({'matplotlib.pyplot', 'torch'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
