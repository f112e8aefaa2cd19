"""The run as a whole: what it writes, exact resume after kill -9, two processes as one."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import oisd.trainer
from oisd.config import from_tables, to_tables
from oisd.objective import NonFiniteError
from oisd.run.folder import RunFolderError
from oisd.trainer import Trainer
from tests.oisd.launches import PLOTS, Launch, launch

TINY = {
    "data": {"max_prompt_tokens": 16, "limit": 500},
    "rollout": {"prompts_per_step": 6, "completions_per_prompt": 8, "max_completion_tokens": 5},
    "reward": {"function": "tests_reward:first_digit"},
    # Shares are measured at steps 1 and 4, and the second changes a weight that later steps have.
    "oisd": {"student_layers": [2, 4], "attention_share": 0.3, "share_every": 3},
    "optimizer": {"learning_rate": 1e-3},
    "warmup": {"steps": 20, "batch_size": 16},
    "eval": {"source": "arithmetic", "limit": 8, "samples": 4, "every": 2},
    "run": {
        "steps": 4,
        "save_every": 2,
        "threads": 1,
        "device": "cpu",
        "tokens_per_microbatch": 200,
        "grad_norm_every": 2,
    },
}
# Easy enough that a model which has seen little is sometimes right: no advantage, no gradient.
REWARD = """
def first_digit(texts, answers):
    return [float(text[:1] == answer[:1]) for text, answer in zip(texts, answers)]
"""


def tables(output_dir: Path, **changes: dict) -> dict:
    merged = {name: dict(table) for name, table in TINY.items()}
    for name, table in changes.items():
        merged.setdefault(name, {}).update(table)
    merged["run"]["output_dir"] = str(output_dir)
    return merged


@pytest.fixture(autouse=True)
def reward_module(tmp_path, monkeypatch):
    (tmp_path / "tests_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    """They take longer than the rest of a tiny run; `whole_run`, which is made before, has them."""
    for name in PLOTS:
        monkeypatch.setattr(f"oisd.run.summary.{name}", lambda *_: [])


def train(output_dir: Path, **changes: dict) -> dict:
    return Trainer(from_tables(tables(output_dir, **changes))).train()


def launched(output_dir: Path, before: str = "", processes: int = 1, **changes: dict) -> Launch:
    return Launch(tables(output_dir, **changes), before, processes)


def metrics(folder: Path) -> list[dict]:
    """The rows without what a clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step}" / "model.safetensors")


def assert_same_run(ours: Path, theirs: Path, step: int = 4) -> None:
    assert metrics(ours) == metrics(theirs)
    a, b = weights(ours, step), weights(theirs, step)
    assert a.keys() == b.keys() and len(a) > 10
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tests_reward.py").write_text(REWARD)
    previous = Path.cwd()
    os.chdir(folder)
    try:
        train(folder / "run")
    finally:
        os.chdir(previous)
    return folder / "run"


def test_writes_what_it_promises(whole_run):
    rows = metrics(whole_run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    promised = {
        "reward", "loss/grpo", "loss/think", "loss/attention", "js/think_pos", "js/think_neg",
        "js/attention_pos", "js/attention_neg", "entropy/student", "entropy/teacher",
        "agreement/top1", "frac_zero_std", "completion_length", "grad_norm",
    }  # fmt: skip
    for row in rows[1:]:
        assert promised <= row.keys()
        assert all(row[name] is not None for name in promised)
        assert 0 < row["js/think_pos"] < 0.7 and 0 < row["js/attention_pos"] < 0.7
    assert "grad_norm/think" in rows[1] and "grad_norm/think" not in rows[2]
    assert ["share/think" in row for row in rows] == [False, True, False, False, True]
    assert rows[1]["weight/attention"] == 0.1 and "weight/think" not in rows[1]
    assert rows[2]["weight/attention"] == rows[3]["weight/attention"]
    assert rows[2]["weight/attention"] * rows[1]["share/attention"] == pytest.approx(0.03)
    assert {"eval/avg_at_k", "eval/pass_at_4"} <= rows[0].keys() & rows[4].keys()
    for name in ("config.toml", "summary.json", "completions/step-1.jsonl", "plots/training.png"):
        assert (whole_run / name).stat().st_size > 0, name
    assert list((whole_run / "tensorboard").iterdir())
    assert sorted(p.name for p in (whole_run / "checkpoints").iterdir()) == ["step-2", "step-4"]


def test_same_seed_same_run_and_another_seed_another(whole_run, tmp_path):
    train(tmp_path / "again")
    assert_same_run(tmp_path / "again", whole_run)
    train(tmp_path / "other", run={"seed": 1, "steps": 1})
    ours, theirs = metrics(tmp_path / "other")[1], metrics(whole_run)[1]
    assert ours["entropy/policy"] != theirs["entropy/policy"]


KILLS = {
    "in the warm-up": """
import oisd.warmup
step = oisd.warmup.prompt_indices
oisd.warmup.prompt_indices = lambda i, *rest: die() if i == 10 else step(i, *rest)
""",
    "in a step": """
import oisd.trainer
learn = oisd.trainer.learn
oisd.trainer.learn = lambda *given: die() if given[-1] == 3 else learn(*given)
""",
    "in the middle of a checkpoint": """
import torch
save = torch.save
def cut(state, file):
    save(state, file)
    if state['step'] == 4: open(file, 'r+b').truncate(1000); die()
torch.save = cut
""",
    "in the middle of a line of metrics": """
from oisd.run.folder import RunFolder
log = RunFolder.log
def cut(folder, row):
    if row['step'] != 3: return log(folder, row)
    with folder.metrics_file.open('a') as file:
        file.write('{"step": 3, "rew')
    die()
RunFolder.log = cut
""",
    "after the last checkpoint, before the plots": """
import oisd.run.summary
oisd.run.summary.plot_training = lambda *_: die()
""",
}


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory) -> Path:
    """A folder of runs, each named by the moment at which it was killed."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "tests_reward.py").write_text(REWARD)
    launches = [launched(folder / moment, kill) for moment, kill in KILLS.items()]
    for died in launch(folder, launches):
        assert died.statuses == [-signal.SIGKILL], died.stderr
    return folder


@pytest.mark.parametrize("moment", KILLS)
def test_killed_and_started_again_ends_the_same(moment, killed_runs, whole_run, monkeypatch):
    run = killed_runs / moment
    assert not (run / "summary.json").exists()
    drawn = []
    monkeypatch.setattr("oisd.run.summary.plot_training", lambda *given: drawn.append(given) or [])
    train(run)
    assert_same_run(run, whole_run)
    assert len(drawn) == 1
    assert not list((run / "checkpoints").glob(".writing*"))


def test_corrupt_checkpoint_falls_back_to_the_one_before(whole_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    file = run / "checkpoints" / "step-4" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"step-4 is damaged \(model.safetensors is not what"):
        trainer = Trainer(from_tables(tables(run)))
    assert trainer.step == 2
    trainer.train()
    assert_same_run(run, whole_run)


def test_longer_run_goes_on_from_the_shorter(whole_run, tmp_path):
    train(tmp_path / "run", run={"steps": 2})
    train(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole_run)


def test_two_processes_make_the_same_parameters_as_one(whole_run, tmp_path):
    run = tmp_path / "two"
    (done,) = launch(tmp_path, [launched(run, processes=2)])
    assert done.went_well, done.stderr
    ours, theirs = metrics(run), metrics(whole_run)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), (a["step"], name)
    start, one, two = weights(whole_run, 2), weights(whole_run, 4), weights(run, 4)
    for name in one:
        moved = (one[name] - start[name]).norm()
        assert moved > 1e-3
        # Sums in another order, and AdamW divides by small second moments: a hundredth of the way.
        assert (one[name] - two[name]).norm() < 1e-2 * moved, name


@pytest.mark.slow
def test_two_processes_agree_on_an_engine_and_sample_by_it(tmp_path):
    run = tmp_path / "two"
    runs = {"auto": run, "generate": tmp_path / "one", "continuous": tmp_path / "other"}
    changes = {"eval": {"source": "none"}, "run": {"steps": 2}}
    launches = [
        launched(folder, processes=2, rollout={"engine": engine}, **changes)
        for engine, folder in runs.items()
    ]
    for done in launch(tmp_path, launches):
        assert done.went_well, done.stderr
    assert json.loads((run / "engine.json").read_text())["seconds"].keys() == {
        "generate", "continuous"
    }  # fmt: skip
    found = {engine: metrics(runs[engine]) for engine in ("generate", "continuous")}
    for a, b in zip(found["generate"], found["continuous"], strict=True):
        assert b.keys() - a.keys() == {"tis/weight", "tis/truncated"}
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name


VARIANTS = {
    "bf16-checkpointing": {"model": {"dtype": "bfloat16", "gradient_checkpointing": True}},
    "minibatches-tis": {
        "grpo": {"minibatches": 3, "tis_cap": 2.0, "aggregation": "dr-grpo", "dual_clip": "none"}
    },
    "kl": {"grpo": {"kl_coef": 0.1, "aggregation": "sequence-mean"}},
    "sampled-forward-kl": {
        "oisd": {
            "attention_steps": 2,
            "key_window": 2,
            "key_stride": 3,
            "divergence": "forward_kl",
        }
    },
    "plain-grpo": {
        "oisd": {"think_weight": 0.0, "attention_weight": 0.0, "attention_share": "none"}
    },
    "bupo-lens": {
        "oisd": {
            "lens_norm": "none",
            "attention_weight": 0.0,
            "attention_share": "none",
            "advantage_clip": 1.0,
        }
    },
    "shuffled-following": {"oisd": {"advantage": "shuffled", "think_share": 0.1, "share_every": 1}},
    "absolute-minibatches": {"oisd": {"advantage": "absolute"}, "grpo": {"minibatches": 2}},
    "continuous-bf16": {
        "model": {"dtype": "bfloat16"},
        "rollout": {"engine": "continuous", "batch_size": 5},
    },
    "eager-all-rows": {
        "model": {"attn_implementation": "eager"},
        "grpo": {"skip_zero_advantage": False},
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variants_run_and_resume(changes, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # Without an evaluation, which the shorter run would do after its own last step.
    changes = {**changes, "run": {"steps": 2, "save_every": 1}, "eval": {"source": "none"}}
    train(whole, **changes)
    assert all(row["grad_norm"] > 0 for row in metrics(whole)[1:])
    # As one that was killed in the second step.
    shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("step-2*"))
    trainer = Trainer(from_tables(tables(parts, **changes)))
    assert trainer.step == 1
    trainer.train()
    assert_same_run(parts, whole, step=2)


def test_cosine_ends_with_the_run_and_so_cannot_be_prolonged(tmp_path):
    optimizer = {"schedule": "cosine", "warmup_steps": 1, "learning_rate": 1e-3}
    changes = {"optimizer": optimizer, "eval": {"source": "none"}}
    train(tmp_path / "run", **changes, run={"steps": 3})
    rates = [row["learning_rate"] for row in metrics(tmp_path / "run")]
    assert rates == pytest.approx([0.0, 1e-3, 5e-4])  # linear to the peak, then half a cosine
    with pytest.raises(RunFolderError, match="run.steps: 3 != 4"):
        train(tmp_path / "run", **changes, run={"steps": 4})


def test_annealed_weights_end_with_the_run_and_so_it_cannot_be_prolonged(tmp_path):
    oisd = {"think_schedule": "linear", "attention_schedule": "cosine", "attention_share": "none"}
    changes = {"oisd": oisd, "eval": {"source": "none"}}
    train(tmp_path / "run", **changes, run={"steps": 3})
    rows = metrics(tmp_path / "run")
    assert [row["weight/think"] for row in rows] == pytest.approx([1, 2 / 3, 1 / 3])
    assert [row["weight/attention"] for row in rows] == pytest.approx([0.1, 0.075, 0.025])
    with pytest.raises(RunFolderError, match="run.steps: 3 != 4"):
        train(tmp_path / "run", **changes, run={"steps": 4})
    # Measuring more often changes no number, unless a weight follows what is measured.
    more = {**changes, "oisd": {**oisd, "share_every": 1}}
    assert train(tmp_path / "run", **more, run={"steps": 3})["steps"] == 3


def test_how_often_a_share_is_measured_is_fixed_where_a_weight_follows_it(tmp_path):
    train(tmp_path / "run", run={"steps": 0, "save_every": 0})
    with pytest.raises(RunFolderError, match="oisd.share_every: 3 != 1"):
        Trainer(from_tables(tables(tmp_path / "run", oisd={"share_every": 1})))


def test_measuring_shares_changes_no_number(tmp_path):
    changes = {"eval": {"source": "none"}, "grpo": {"minibatches": 2}}
    for every in (0, 1):
        oisd = {"attention_share": "none", "share_every": every}
        run = {"steps": 2, "grad_norm_every": every}
        train(tmp_path / str(every), **changes, oisd=oisd, run=run)
    without, measured = (weights(tmp_path / str(every), 2) for every in (0, 1))
    assert all(torch.equal(measured[name], without[name]) for name in measured)
    for a, b in zip(metrics(tmp_path / "0"), metrics(tmp_path / "1"), strict=True):
        assert b.keys() - a.keys() == {
            "share/think", "share/attention", "grad_norm/grpo", "grad_norm/think",
            "grad_norm/attention",
        }  # fmt: skip
        assert a == {name: b[name] for name in a}


def test_rows_of_advantage_0_that_shuffling_gives_another_are_kept(tmp_path, monkeypatch):
    """Left out are those alone that have neither an advantage nor an aligned one."""
    learn, seen = oisd.trainer.learn, []
    monkeypatch.setattr(
        oisd.trainer, "learn", lambda *given: [seen.append(given[2]), learn(*given)][1]
    )
    for skip in (True, False):
        train(
            tmp_path / str(skip), eval={"source": "none"}, run={"steps": 1},
            oisd={"advantage": "shuffled"}, grpo={"skip_zero_advantage": skip},
        )  # fmt: skip
    ((part, _),), ((whole, _),) = seen
    kept = (whole.advantages != 0) | (whole.aligned != 0)
    assert len(part) == kept.sum() < len(whole) == 48
    assert ((part.advantages == 0) & (part.aligned != 0)).any()
    assert sorted(whole.advantages.tolist()) == sorted(whole.aligned.tolist())
    assert not torch.equal(whole.advantages, whole.aligned)
    a, b = (metrics(tmp_path / str(skip))[0] for skip in (True, False))
    assert a["loss/think"] != 0 and a["loss/attention"] != 0
    for name in ("loss/grpo", "loss/think", "loss/attention", "grad_norm", "share/think"):
        assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-9), name


def test_more_processes_than_prompts(tmp_path):
    """The second process has no completion; a permutation is the same for any number of them."""
    small: dict[str, Any] = {
        "rollout": {"prompts_per_step": 1},
        "run": {"steps": 1},
        "eval": {"limit": 1},
    }
    small["oisd"] = {"advantage": "shuffled"}
    (done,) = launch(tmp_path, [launched(tmp_path / "run", processes=2, **small)])
    assert done.went_well, done.stderr
    two = metrics(tmp_path / "run")[1]
    assert two["reward"] is not None
    train(tmp_path / "one", **small)
    assert two == pytest.approx(metrics(tmp_path / "one")[1], rel=1e-3, abs=1e-6)


def test_nan_names_step_and_batch_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    run = tmp_path / "run"
    trainer = Trainer(from_tables(tables(run)))
    roll_out = Trainer._roll_out

    def poisoned(self, clock):
        result = roll_out(self, clock)
        if self.step == 3:
            with torch.no_grad():
                self.policy.model.model.layers[3].mlp.down_proj.weight[0, 0] = torch.nan
        return result

    monkeypatch.setattr(Trainer, "_roll_out", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 4: loss/grpo is nan in micro-batch 0") as error:
        trainer.train()
    assert "checkpoints/step-2" in str(error.value)
    report = json.loads((run / "nonfinite-step-4-rank-0.json").read_text())
    assert report["step"] == 4 and report["completions"]
    assert all(tensor.isfinite().all() for tensor in weights(run, 2).values())
    monkeypatch.setattr(Trainer, "_roll_out", roll_out)
    assert Trainer(from_tables(tables(run))).train()["steps"] == 4


def test_nan_in_the_rollout_is_reported(tmp_path):
    trainer = Trainer(
        from_tables(tables(tmp_path / "run", warmup={"steps": 0}, eval={"source": "none"}))
    )
    with torch.no_grad():
        trainer.policy.model.lm_head.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="step 1: the model's logits are not finite"):
        trainer.train()


def test_resolved_configuration_is_saved_and_loads(whole_run):
    from oisd.config import load_recipe

    saved = load_recipe(whole_run / "config.toml")
    assert to_tables(saved)["oisd"]["student_layers"] == [2, 4]
    assert saved.rollout.completions_per_prompt == 8
