"""The study: statistics by hand, order, resume, repetition, refusals, and what the report says."""

import json
import math
from dataclasses import replace

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study import report
from benchmarks.study.cells import REPEATED, area, differences, run_cell
from benchmarks.study.inference import Estimate, estimate, holm, t_quantile, t_tail
from benchmarks.study.protocol import ARMS, COMMON, STUDY, Cell, Protocol
from oisd.schema import merged
from oisd.trainer import Trainer
from tests import ROOT

SMALL = {
    "rollout": {"prompts_per_step": 4, "completions_per_prompt": 4},
    "warmup": {"steps": 30, "batch_size": 16},
    "eval": {"limit": 6, "samples": 2, "every": 2},
    "run": {"steps": 4, "save_every": 2},
    "oisd": {"student_layers": [1], "share_every": 2},
}
TASK = {
    "model": {"path": "scratch:layers=2,width=16,heads=2"},
    "data": {"source": "modular:terms=2,modulus=3", "limit": 12},
    "eval": {"source": "modular:terms=2,modulus=3"},
    "reward": {"function": "final"},
    "rollout": {"max_completion_tokens": 3},
}
TINY = Protocol(
    common=merged(COMMON, SMALL),
    tasks={"modular": TASK},
    arms={arm: ARMS[arm] for arm in ("grpo", "both-30", "both-30-shuffled")},
    seeds=(1,),
    lens_texts=2,
)


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("t", [0.3, 1.0, 2.5, 9.0])
def test_tails_of_students_t_by_their_closed_forms(t):
    assert t_tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-10)
    assert t_tail(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-10)
    u = t / math.sqrt(4 + t * t)
    assert t_tail(t, 4) == pytest.approx(1 - 1.5 * (u - u**3 / 3), rel=1e-8)


def test_quantiles_of_students_t_are_those_of_the_tables():
    tables = {1: 12.7062, 2: 4.30265, 4: 2.77645, 12: 2.17881, 40: 2.02108}
    for freedom, expected in tables.items():
        assert t_quantile(0.95, freedom) == pytest.approx(expected, rel=1e-5)


def test_holm_by_hand():
    # 3 * 0.01; 2 * 0.03; 1 * 0.04 raised to the one before it.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_an_estimate_of_one_group_is_the_paired_t_test():
    found = estimate([[1.0, 2.0, 3.0]])
    assert found.mean == 2.0 and found.pairs == 3
    assert found.half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    assert (found.low, found.high) == (2 - found.half_width, 2 + found.half_width)


def test_tasks_count_alike_and_have_their_own_variance():
    found = estimate([[0.0, 2.0], [10.0, 12.0]])
    # v_k = 2 / 2 each: a standard error of sqrt(2) / 2 with (1 + 1)^2 / (1 + 1) = 2 degrees.
    assert found.mean == 6.0
    assert found.half_width == pytest.approx(4.30265 * math.sqrt(2) / 2, rel=1e-5)
    assert estimate([[0.0, 2.0, 4.0, 2.0], [8.0, 8.0]]).mean == 5.0


def test_one_difference_has_no_interval_and_none_is_refused():
    assert math.isnan(estimate([[0.5]]).half_width) and math.isnan(estimate([[0.5]]).p)
    assert estimate([[0.5, 0.5]]) == Estimate(0.5, 0.0, 0.0, 2)
    with pytest.raises(ValueError, match="at least one difference"):
        estimate([[1.0], []])


def test_the_area_is_the_mean_over_the_steps():
    assert area([[0, 0.0], [10, 1.0], [40, 1.0]]) == pytest.approx((5 + 30) / 40)


# ---------------------------------------------------------------- protocol


def test_a_seed_is_complete_before_the_next_one_begins():
    cells = replace(TINY, tasks={"a": TASK, "b": TASK}, seeds=(1, 2)).cells()
    assert [str(cell) for cell in cells[:4]] == [
        "a/grpo/1", "a/both-30/1", "a/both-30-shuffled/1", "b/grpo/1",
    ]  # fmt: skip
    assert [cell.seed for cell in cells] == [1] * 6 + [2] * 6


def test_every_cell_of_the_study_is_a_valid_run_and_differs_from_grpo():
    assert len(STUDY.tasks) >= 3 and len(STUDY.seeds) >= 5
    for task in STUDY.tasks:
        runs = {arm: STUDY.run(Cell(task, arm, 11), "start", "out") for arm in STUDY.arms}
        assert len(set(map(repr, runs.values()))) == len(STUDY.arms)
        assert not runs["grpo"].oisd.active and runs["grpo"].warmup.steps == 0
        assert runs["paper"].oisd.think_weight == 1.0 and runs["paper"].oisd.think_share is None
        assert runs["both-30"].oisd.think_share == runs["both-30"].oisd.attention_share == 0.3
        assert runs["think-30"].oisd.attention_weight == 0.0
        assert runs["bupo"].grpo.internal_steps == runs["bupo"].run.steps // 3
        assert STUDY.warm_up(task, 11, "out").run.steps == 0


def test_the_digest_is_of_every_setting():
    assert replace(TINY).digest == TINY.digest
    for other in (
        replace(TINY, seeds=(2,)),
        replace(TINY, common=merged(TINY.common, {"optimizer": {"learning_rate": 2e-4}})),
        replace(TINY, arms={**TINY.arms, "more": {}}),
        replace(TINY, lens_texts=3),
    ):
        assert other.digest != TINY.digest


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A study whose second cell was stopped in its third step, and which then went on."""
    folder = tmp_path_factory.mktemp("study")
    arguments = ["--out", str(folder / "runs"), "--results", str(folder / "results")]
    step, taken = Trainer._train_step, []

    def stopped(self, progress):
        taken.append(self.config.run.output_dir)
        if len(taken) == 7:
            raise KeyboardInterrupt
        return step(self, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            study.main(arguments, TINY)
        half = (folder / "results" / "study_modular.jsonl").read_text()
        study.main(arguments, TINY)
    return folder, arguments, half, taken


def rows_of(folder):
    text = (folder / "results" / "study_modular.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_study_that_was_stopped_goes_on(ran):
    folder, _, half, taken = ran
    rows = rows_of(folder)
    assert [row["arm"] for row in rows] == ["grpo", "both-30", "both-30-shuffled"]
    assert json.loads(half) == rows[0]
    # 4 steps, 2 and one that was stopped, then 2 more from the checkpoint, 4.
    assert [sum(f.endswith(arm) for f in taken) for arm in TINY.arms] == [4, 5, 4]
    assert rows[0]["wall_s"] > 0 and rows[1]["wall_s"] is None
    assert not any((folder / "runs").glob("modular/seed-1/*/checkpoints/step-4"))


def test_arms_share_their_start_and_part_from_it(ran):
    rows = rows_of(ran[0])
    assert len({row["start"] for row in rows}) == 1
    assert len({row["curve"][0][1] for row in rows}) == 1
    assert all(row["layers"]["before"] == rows[0]["layers"]["before"] for row in rows)
    after = [row["layers"]["after"]["js"][0] for row in rows]
    assert len({round(value, 5) for value in after}) == 3
    assert rows[0]["shares"] == {} and len(rows[1]["shares"]["share/think"]) == 2
    assert all(row["digest"] == TINY.digest and row["commit"] is not None for row in rows)
    assert len(rows[0]["layers"]["after"]["attention_js"]) == 1


def test_a_cell_can_be_repeated_to_the_bit(ran, capsys):
    folder, arguments, *_ = ran
    study.main([*arguments, "--cell", "modular/both-30/1"], TINY)
    assert "to the bit" in capsys.readouterr().out
    row = rows_of(folder)[1]
    assert differences(row, row | {"final": 0}) == []
    changed = row | {"curve": [[0, 0.123]]}
    assert [text.split(":")[0] for text in differences(row, changed)] == ["curve"]
    assert set(REPEATED) <= set(row)


def test_what_is_done_and_what_is_missing(ran, capsys):
    _, arguments, *_ = ran
    longer = replace(TINY, seeds=(1,))
    study.main([*arguments, "--list"], longer)
    assert "3 of 3 cells are done" in capsys.readouterr().out
    study.main([*arguments[:2], "--results", str(ran[0] / "none"), "--list"], TINY)
    assert "missing  modular/both-30/1" in capsys.readouterr().out


def test_the_tasks_that_are_named_are_run_alone(tmp_path, capsys):
    two = replace(TINY, tasks={"other": TASK, "modular": TASK})
    arguments = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path), "--minutes", "0"]
    study.main([*arguments, "--tasks", "modular"], two)
    assert "modular/grpo/1 is next" in capsys.readouterr().out
    study.main(arguments, two)
    assert "other/grpo/1 is next" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        study.main([*arguments, "--tasks", "sums"], two)


def test_no_cell_begins_after_its_time(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path), "--minutes", "0"]
    study.main(arguments, TINY)
    assert "modular/grpo/1 is next" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_rows_of_another_protocol_are_refused(ran):
    _, arguments, *_ = ran
    with pytest.raises(SystemExit, match="rows of another protocol"):
        study.main(arguments, replace(TINY, lens_texts=1))


def test_half_a_row_is_dropped(ran, tmp_path):
    text = (ran[0] / "results" / "study_modular.jsonl").read_text()
    file = tmp_path / "study_modular.jsonl"
    file.write_text(text + text[:50])
    study.main([*ran[1][:2], "--results", str(tmp_path)], TINY)
    assert file.read_text() == text


def test_a_seed_is_not_continued_from_another_start(ran, tmp_path):
    folder, arguments, *_ = ran
    rows = rows_of(folder)[:2]
    rows[0]["start"], rows[1]["commit"] = "another", "c0ffee"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "study_modular.jsonl").write_text(text)
    refusal = "of modular, seed 1, is not that of its 2 recorded .* working tree of commit c0ffee"
    with pytest.raises(SystemExit, match=refusal):
        study.main([*arguments[:2], "--results", str(tmp_path)], TINY)


def test_an_unknown_cell_and_one_not_recorded_are_refused(tmp_path):
    arguments = ["--results", str(tmp_path), "--cell"]
    with pytest.raises(SystemExit, match="a task of modular, an arm of grpo, both-30"):
        study.main([*arguments, "modular/grpo/7"], TINY)
    with pytest.raises(SystemExit, match="not recorded yet"):
        study.main([*arguments, "modular/grpo/1"], TINY)


def test_a_run_that_is_not_finite_is_a_failed_row(tmp_path, ran, monkeypatch):
    from oisd.objective import NonFiniteError

    def broken(self):
        raise NonFiniteError("step 3: the loss is not finite\nmore", None)

    start = ran[0] / "runs"
    monkeypatch.setattr(Trainer, "train", broken)
    row = run_cell(replace(TINY, arms={"other": {}}), Cell("modular", "other", 1), start)
    assert row["failed"] == "step 3: the loss is not finite" and "final" not in row


# ---------------------------------------------------------------- report


def made_up(protocol, differences_of, missing=()):
    """Rows whose areas differ from GRPO's by what is given for (arm, seed)."""
    done = {}
    for cell in protocol.cells():
        if cell in missing:
            continue
        gain = differences_of(cell)
        done[cell] = {
            **cell._asdict(), "start": str(cell.seed), "device": "a machine", "commit": "c0ffee",
            "curve": [[0, 0.4], [40, 0.6 + gain]], "auc": 0.5 + gain, "final": 0.6 + gain,
            "pass_at_k": {"1": 0.6, "8": 0.9}, "entropy": [0.5, 0.25], "shares": {},
            "layers": {"before": {"js": [0.3], "attention_js": [0.1]},
                       "after": {"js": [0.2], "attention_js": [0.1]}},
            "step_s": 2.0, "wall_s": 100.0, "cpu_s": 50.0,
        }  # fmt: skip
    return done


FIVE = replace(TINY, tasks={"a": TASK, "b": TASK}, seeds=(1, 2, 3, 4, 5))


def gains(cell):
    noise = 0.001 * (cell.seed - 3)
    return {"grpo": 0.0, "both-30": 0.0512 + noise, "both-30-shuffled": noise}[cell.arm]


def test_help_harm_and_nothing():
    text = report.results(FIVE, made_up(FIVE, gains))
    row = next(line for line in text.splitlines() if line.startswith("| both-30 |"))
    # s = sqrt(2.5) * 0.001 in each task: s / sqrt(5) / sqrt(2) with 8 degrees of freedom, 2.306.
    assert "+0.051 ± 0.002 (5) | +0.051 ± 0.002 (5) | +0.051 ± 0.001 (10) | 0.000 | **help**" in row
    assert any(
        line.startswith("| both-30-shuffled |") and line.endswith("| nothing |")
        for line in text.splitlines()
    )
    assert "| both-30 minus both-30-shuffled | +0.051" in text
    worse = report.results(FIVE, made_up(FIVE, lambda cell: -gains(cell)))
    assert "| **harm** |" in worse and "**help**" not in worse
    assert "100 s by the clock and 50 s" in text
    numbers = "0.400 | 0.600 | 0.900 | 0.250 |  |  | 0.300 | 0.200 | 0.100 | 0.100 | 1.00 | 1.00"
    assert f"| a, grpo | {numbers} |" in text


def test_a_wide_interval_is_undecided_not_nothing():
    assert report.verdict(Estimate(0.01, 0.03, 0.4, 5), 1.0, 0) == "undecided"
    assert report.verdict(Estimate(0.001, 0.01, 0.4, 5), 1.0, 0) == "nothing"
    assert report.verdict(Estimate(0.05, 0.01, 1e-4, 5), 1e-3, 1) == "undecided: failed runs"


def test_an_incomplete_study_has_no_verdict():
    missing = [Cell("b", "both-30", 5), *(Cell("a", arm, 4) for arm in FIVE.arms)]
    text = report.results(FIVE, made_up(FIVE, gains, missing))
    assert "no test is made" in text and "26 of 30 cells" in text
    assert "b seed 5: both-30; a seeds 4: all arms" in text
    assert "help" not in text and "nothing |" not in text
    assert "| both-30 | +0.051 ± 0.003 (4) | +0.051 ± 0.002 (4) |" in text


def test_pairs_with_different_starts_are_refused():
    done = made_up(FIVE, gains)
    done[Cell("a", "both-30", 2)]["start"] = "another"
    with pytest.raises(SystemExit, match="of a, seed 2, did not set out from the same model"):
        report.results(FIVE, done)


def test_the_report_goes_between_its_markers(tmp_path):
    page = tmp_path / "study.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_results(FIVE, made_up(FIVE, gains), page)
    report.write_results(FIVE, made_up(FIVE, gains), page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text and text.count("30 of 30 cells") == 1
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="must have the lines"):
        report.write_results(FIVE, {}, page)


def test_the_page_and_the_readme_say_what_the_rows_do():
    done = study.read_results(STUDY, ROOT / "benchmarks" / "results")
    assert len(done) == 165 and not any("failed" in row for row in done.values())
    page = study.PAGE.read_text(encoding="utf-8")
    assert report.results(STUDY, done).strip() in page
    arms = [arm for arm in ARMS if arm != "grpo"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for found, p in report.tested(STUDY, done, [(arm, "grpo") for arm in arms], "auc"):
        kind = {"nothing": "no difference", "**harm**": "harm"}[report.verdict(found, p, 0)]
        line = f"{found.mean:+.3f} ± {found.half_width:.3f} | {p:.3f} | {kind} |"
        assert line in readme, line
