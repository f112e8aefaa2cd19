"""Each alarm at its step and with its number, not before, once; silent in a healthy run."""

import json
import math

import pytest

from oisd.config import AlignmentConfig, GRPOConfig, RunConfig, TrainConfig, from_tables
from oisd.rewards import RewardFunction
from oisd.run.alarms import RunAlarms
from oisd.trainer import Trainer

HEALTHY = {
    "reward": 0.5,
    "frac_zero_std": 0.4,
    "frac_finished": 0.9,
    "frac_timeouts": 0.0,
    "sampler_gap": 0.004,
    "entropy/policy": 0.4,
    "share/think": 0.2,
    "share/attention": 0.03,
}


def rows(*changes: dict) -> list[dict]:
    """Healthy rows of metrics with these changes, one a step."""
    return [{"step": i + 1} | HEALTHY | change for i, change in enumerate(changes)]


def raised(rows: list[dict], config: TrainConfig | None = None) -> dict[int, list[str]]:
    alarms = RunAlarms(config or TrainConfig())
    found = {row["step"]: alarms.new(row).get("alarms", []) for row in rows}
    return {step: lines for step, lines in found.items() if lines}


def only(found: dict[int, list[str]]) -> tuple[int, str]:
    """The step and the line of the one alarm that was raised."""
    ((step, lines),) = found.items()
    (line,) = lines
    return step, line


def test_a_healthy_run_raises_none():
    noise = [
        {"entropy/policy": 0.4 + 0.15 * math.sin(i), "reward": 0.5 + i / 200} for i in range(80)
    ]
    assert raised(rows(*noise)) == {}


EQUAL = {"frac_zero_std": 1.0, "reward": 0.0}
# (what each step changes, the step of the alarm, what its line says)
CASES = {
    "equal": ([{}, *[EQUAL] * 12], 11, ["for 10 steps (mean now 0.0000)", "reward.function"]),
    "equal-begins-anew": (
        [*[EQUAL] * 9, {}, *[EQUAL | {"reward": 1.0}] * 11],
        20,
        ["for 10 steps (mean now 1.0000)"],
    ),
    "cut-off": (
        [{"frac_finished": 0.0}] * 2 + [{"frac_finished": 1 / 1024}] + [{"frac_finished": 0.0}] * 4,
        6,
        ["every completion of 3 steps in a row", "rollout.max_completion_tokens"],
    ),
    "gap": (
        [{}, {"sampler_gap": 0.05}, {"sampler_gap": 0.0512}, {"sampler_gap": 0.3}],
        3,
        ["0.051 nats a token", "rollout.engine"],
    ),
    "entropy-low": (
        # The mean of the last ten is 0.0491, then 0.0098.
        [{"entropy/policy": 0.4}] + [{"entropy/policy": 0.0098}] * 11,
        11,
        ["0.0098 nats a token over 10 steps", "grpo.clip_high"],
    ),
    "entropy-high": (
        # After n steps at 0.88 the mean of the last ten is 0.4 + 0.048 n: above 0.6 at n = 5.
        [{}] * 12 + [{"entropy/policy": 0.88}] * 6,
        17,
        ["from 0.4000 to 0.6400", "optimizer.learning_rate"],
    ),
    "think-gradient": (
        # The mean of the last three is 0.933, then 1.067 and 1.033.
        [{"share/think": x} for x in (0.2, 0.2, 1.3, 1.3, 0.6, 1.2)],
        5,
        ["the think term's weighted gradient has 1.067 times", "oisd.think_weight"],
    ),
    "attention-gradient": (
        [{"share/attention": 0.9}] * 3 + [{"share/attention": 1.2}] * 4,
        5,
        ["the attention term's", "1.1 times", "oisd.attention_weight"],
    ),
    "think-share": (
        # 0.0103, then 0.004: ten percent would take 25 times the weight of 2.
        [{"share/think": x} for x in (0.02, 0.009, 0.002, 0.001)],
        4,
        [
            "the think term is 0.4 % of GRPO's gradient (mean of the last 3 measured)",
            "raise oisd.think_weight to about 50 for 10 %, or set oisd.think_share",
        ],
    ),
    "attention-share": (
        [{"share/attention": x} for x in (0.0004, None, 0.0003, math.nan, 0.0002)],
        5,
        ["the attention term is 0.03 %", "raise oisd.attention_weight to about 33 for"],
    ),
    "attention-share-0": (
        [{"share/attention": 0.0}] * 4,
        3,
        ["the attention term has no gradient", "look at oisd.attention_weight"],
    ),
    "timeouts": (
        [{"frac_timeouts": x} for x in (0.02, 0.02, 0.01, 0.02, 0.02, 0.03, 0.04)],
        6,
        ["3.0% of the completions", "reward.timeout"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, step, says", CASES.values(), ids=CASES)
def test_each_alarm_once_at_its_step_with_its_number(changes, step, says):
    config = TrainConfig(oisd=AlignmentConfig(think_weight=2.0, attention_weight=0.1))
    found = only(raised(rows(*changes), config))
    assert found[0] == step
    for part in says:
        assert part in found[1]
    assert "\n" not in found[1]


def test_what_was_not_measured_neither_alarms_nor_ends_a_streak():
    unmeasured = {name: None for name in HEALTHY if name != "reward"}
    gone = {"frac_finished": 0.0}
    assert raised(rows(*[unmeasured] * 30)) == {}
    assert only(raised(rows(gone, gone, unmeasured, gone)))[0] == 4
    assert raised(rows(*[{"entropy/policy": math.nan, "sampler_gap": math.nan}] * 30)) == {}


def test_a_share_that_was_asked_for_raises_none():
    align = AlignmentConfig(think_share=0.005, attention_share=2.0)
    small = {"share/think": 0.005, "share/attention": 2.0}
    assert raised(rows(*[small] * 20), TrainConfig(oisd=align)) == {}
    assert len(raised(rows(*[small] * 20))) == 1


def test_a_share_that_is_annealed_counts_as_it_began():
    """Of 20 steps: the factor at step 16, counted from 0, is 0.2."""
    config = TrainConfig(oisd=AlignmentConfig(think_schedule="linear"), run=RunConfig(steps=20))
    fallen = [{"share/think": 0.02 * (1 - step / 20)} for step in range(20)]
    assert raised(rows(*fallen), config) == {}
    assert len(raised(rows(*fallen))) == 1
    fallen[14:] = [{"share/think": 0.0075 * (1 - step / 20)} for step in range(14, 20)]
    step, line = only(raised(rows(*fallen), config))
    assert step == 17 and "is 0.75 %" in line and "think_weight to about 13 for" in line


def test_reinforce_plus_plus_learns_from_groups_that_differ_from_each_other():
    config = TrainConfig(grpo=GRPOConfig(advantage="reinforce++"))
    differing = [{"frac_zero_std": 1.0, "reward": 0.25 * (i % 3)} for i in range(30)]
    assert raised(rows(*differing), config) == {}
    assert only(raised(rows(*[EQUAL] * 10), config))[0] == 10


def test_entropy_of_bupo_is_that_of_the_sampling_policy():
    config = TrainConfig(
        grpo=GRPOConfig(internal_layer=3, internal_steps=15),
        oisd=AlignmentConfig(think_weight=0.0, attention_weight=0.0),
    )
    assert raised(rows(*[{"entropy/policy": 0.1}] * 15, *[{}] * 30), config) == {}


@pytest.mark.parametrize("cut", [1, 5, 10, 11, 12])
def test_a_resumed_run_raises_each_at_the_same_step_or_no_more(cut):
    """Through JSON, as metrics.jsonl has the rows."""
    changes = [{}, *[EQUAL | {"entropy/policy": math.nan}] * 12, *[{"frac_finished": 0.0}] * 3]
    written, alarms = [], RunAlarms(TrainConfig())
    for row in rows(*changes):
        written.append(row | alarms.new(row))
    earlier = [json.loads(json.dumps(row)) for row in written[:cut]]
    again = RunAlarms(TrainConfig(), earlier)
    assert [row | again.new(row) for row in rows(*changes)[cut:]] == written[cut:]
    assert sum("alarms" in row for row in written) == 2


# ---- in a run -----------------------------------------------------------------------------------

TABLES = {
    "data": {"max_prompt_tokens": 16},
    "rollout": {"prompts_per_step": 4, "completions_per_prompt": 4, "max_completion_tokens": 3},
    "reward": {"function": "exact"},
    "oisd": {"student_layers": [2]},
    "run": {"steps": 11, "save_every": 0, "threads": 1, "device": "cpu"},
}


def test_a_run_that_earns_nothing_says_so(tmp_path, capsys):
    """An untrained model: no reward in ten steps, and its answers run into the limit."""
    tables = TABLES | {"run": {**TABLES["run"], "output_dir": str(tmp_path / "run")}}
    summary = Trainer(from_tables(tables)).train()
    written = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    found = {row["step"]: row["alarms"] for row in written if "alarms" in row}
    assert all(row["reward"] == 0.0 for row in written)
    assert "equal for 10 steps (mean now 0.0000)" in found[10][0]
    assert summary["alarms"] == [line for lines in found.values() for line in lines]
    shown = capsys.readouterr().err
    assert shown.count("alarm: ") == len(summary["alarms"])
    assert f"step 10  alarm: {found[10][0]}\n" in shown
    saved = json.loads((tmp_path / "run/summary.json").read_text())
    assert saved["alarms"] == summary["alarms"]


def test_the_built_in_task_raises_none_and_measures_the_sampler(tmp_path, capsys):
    size = {"prompts_per_step": 16, "completions_per_prompt": 8, "max_completion_tokens": 5}
    tables = TABLES | {
        "data": {"source": "arithmetic:digits=1", "max_prompt_tokens": 16},
        "rollout": size,
        "warmup": {"steps": 150, "stop_at": 0.6},
        "optimizer": {"learning_rate": 2e-4},
        "grpo": {"minibatches": 2},
    }  # fmt: skip
    tables["run"] = {**TABLES["run"], "grad_norm_every": 1, "output_dir": str(tmp_path / "run")}
    summary = Trainer(from_tables(tables)).train()
    assert "alarms" not in summary and "alarm" not in capsys.readouterr().err
    written = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    steps = [row for row in written if row["step"] > 0]
    assert len(steps) == 11
    think, attention = (100 * steps[0][f"share/{term}"] for term in ("think", "attention"))
    assert summary["alignment"] == (
        f"think {think:.2g} %, attention {attention:.2g} % of GRPO's gradient (medians)"
    )
    for row in steps:
        assert "alarms" not in row
        assert 0 < row["sampler_gap"] < 1e-4  # the same forward, in other batches
        assert row["entropy/policy"] > 0.01
        assert row["grad_norm/grpo"] > row["grad_norm/think"] > 0
        assert row["frac_timeouts"] == 0


class Slow(RewardFunction):
    """Grading that takes too long for two completions of each step but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def __call__(self, completions: list[str], answers: list[str]) -> list[float]:
        self.timeouts += 2 * (self.steps > 0)
        self.steps += 1
        return [float(i % 3) for i in range(len(completions))]


def test_time_outs_are_counted_by_step(tmp_path, monkeypatch):
    monkeypatch.setattr("oisd.trainer.load_reward", lambda *_: Slow())
    tables = TABLES | {"run": {**TABLES["run"], "steps": 4, "output_dir": str(tmp_path / "run")}}
    Trainer(from_tables(tables)).train()
    written = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [row["frac_timeouts"] for row in written] == [0.0, 0.125, 0.125, 0.125]
    (line,) = written[3]["alarms"]
    assert "too long for 12.5% of the completions" in line
