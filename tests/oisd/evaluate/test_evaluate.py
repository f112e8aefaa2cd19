"""Estimates against enumeration; an evaluation that is cut off and one that is not agree."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
from oisd.data import Example
from oisd.evaluate import (
    Evaluation,
    Problem,
    avg_at_k,
    bootstrap_interval,
    bootstrap_interval_of_mean,
    evaluate,
    in_order,
    pass_at_k,
    read_problems,
)
from oisd.policy import Policy
from oisd.rewards import load_reward

SAMPLES = 6


# ---------------------------------------------------------------- the estimates


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations(range(n), k))
            wanted = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("c, k", [(1, 1), (1, 299), (3, 128), (150, 2), (299, 1), (7, 256)])
def test_pass_at_k_of_three_hundred_does_not_overflow(c, k):
    wanted = 1 - Fraction(math.comb(300 - c, k), math.comb(300, k))
    assert pass_at_k(300, c, k) == pytest.approx(float(wanted), rel=1e-10)
    assert 0 < pass_at_k(300, c, k) <= 1


@pytest.mark.parametrize(
    "n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)], ids=str
)
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match=f"got n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_avg_at_k_weighs_problems_alike():
    assert avg_at_k([[1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]) == (0.5 + 0.75) / 2
    for nothing in ([], [[1.0], []]):
        with pytest.raises(ValueError, match="at least one"):
            avg_at_k(nothing)


def test_bootstrap_is_fixed_by_its_seed():
    values = np.random.default_rng(0).random(40).tolist()
    first, again, other = (bootstrap_interval(values, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert first == pytest.approx(other, abs=0.02)
    assert first[0] < np.mean(values) < first[1]


def test_bootstrap_draws_the_problems_of_one_resample_after_another():
    """However many resamples are drawn at once: intervals stay what they were, to the bit."""
    groups = [np.random.default_rng(n).random(n).tolist() for n in (1, 7, 1319)]
    generator, total = np.random.default_rng(5), np.zeros(103)
    for values in groups:
        for i in range(len(total)):
            total[i] += np.array(values)[generator.integers(0, len(values), len(values))].mean()
    wanted = np.quantile(total / 3, [0.25, 0.75])
    found = bootstrap_interval_of_mean(groups, confidence=0.5, resamples=103, seed=5)
    assert found == tuple(wanted)


def test_bootstrap_width_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(size=400)
    for confidence, z in ((0.95, 1.960), (0.8, 1.2816)):
        low, high = bootstrap_interval(values.tolist(), confidence=confidence)
        assert high - low == pytest.approx(2 * z * values.std() / 20, rel=0.05)


def test_bootstrap_covers_as_often_as_it_says():
    generator = np.random.default_rng(2)
    hits = 0
    for seed in range(200):
        values = (generator.random(60) < 0.6).astype(float).tolist()
        low, high = bootstrap_interval(values, resamples=400, seed=seed)
        hits += low <= 0.6 <= high
    assert 178 <= hits <= 199  # 190 wanted, of deviation 3.1; the bootstrap is a little narrow


@pytest.mark.parametrize("values, confidence", [([], 0.95), ([1.0], 0.0), ([1.0], 1.0)], ids=str)
def test_bootstrap_refuses(values, confidence):
    with pytest.raises(ValueError, match="bootstrap_interval"):
        bootstrap_interval(values, confidence=confidence)


def test_summary_of_known_problems():
    def problem(name, rewards):
        k = len(rewards)
        return Problem(name, "?", "1", ["x"] * k, rewards, [3] * k, [True] * (k - 1) + [False])

    result = Evaluation([problem("a", [1.0, 0.0, 0.0, 0.5]), problem("b", [1.0, 1.0, 1.0, 0.0])])
    summary = result.summary()
    assert summary["problems"] == 2 and summary["samples"] == 4
    assert summary["avg_at_k"] == (1.5 / 4 + 3 / 4) / 2
    assert summary["pass_at_k"] == {
        1: pytest.approx((1 / 4 + 3 / 4) / 2),  # half a reward is no solution
        2: pytest.approx((1 / 2 + 1) / 2),
        4: 1.0,
    }
    low, high = summary["pass_at_k_interval"][1]
    assert 0.25 <= low < high <= 0.75
    assert summary["completion_length"] == 3 and summary["frac_finished"] == 0.75


# ---------------------------------------------------------------- evaluations


@pytest.fixture(scope="module")
def policy():
    model = arithmetic_model(0, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return Policy(model, arithmetic_tokenizer(), model.dtype)


@pytest.fixture(scope="module")
def examples():
    """A blank model is sometimes right only where an answer is short: digits, or nothing."""
    answers = ["", "3", "", "7", "", "1", "", "5", "9", ""]
    return [Example(f"{i}+{i}=", answer, f"problem-{i}") for i, answer in enumerate(answers)]


def run(policy, examples, **settings):
    prompts = [policy.tokenizer(example.prompt)["input_ids"] for example in examples]
    settings = dict(samples=SAMPLES, max_completion_tokens=3, batch_size=2 * SAMPLES) | settings
    return evaluate(policy, examples, prompts, load_reward("exact", 1.0), **settings)


@pytest.fixture(scope="module")
def whole(policy, examples):
    problems = run(policy, examples)
    rewards = [reward for problem in problems for reward in problem.rewards]
    assert set(rewards) == {0.0, 1.0}  # or equality below would say little
    return problems


def test_problems_hold_what_was_sampled(policy, examples, whole):
    for problem, example in zip(whole, examples, strict=True):
        assert (problem.id, problem.answer) == (example.id, example.answer)
        assert problem.prompt.replace(" ", "") == example.prompt
        assert len(problem.completions) == SAMPLES
        for text, reward, length in zip(
            problem.completions, problem.rewards, problem.lengths, strict=True
        ):
            assert reward == (text.strip() == example.answer)
            assert 1 <= length <= 3
    assert len({text for problem in whole for text in problem.completions}) > 10


@pytest.mark.parametrize("batch_size", [1, SAMPLES, 1000])
def test_batches_do_not_matter(policy, examples, whole, batch_size):
    assert run(policy, examples, batch_size=batch_size) == whole


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}], ids=str)
def test_seed_and_step_draw_other_samples(policy, examples, whole, change):
    assert run(policy, examples, **change) != whole


@pytest.mark.parametrize("world_size", [2, 3, 12])
def test_processes_do_the_same_as_one(policy, examples, whole, world_size):
    parts = [run(policy, examples, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [p.id for p in parts[1]] == [e.id for e in examples[1::world_size]]
    assert in_order(parts, examples).problems == whole


@pytest.mark.parametrize("kept", ["nothing", "half-a-line", "lines", "lines-and-a-half"])
def test_a_dump_that_was_cut_short_is_gone_on_from(policy, examples, whole, tmp_path, kept):
    dump = tmp_path / "problems.jsonl"
    assert run(policy, examples, dump=dump) == whole
    complete = dump.read_bytes()
    lines = complete.splitlines(keepends=True)
    half = len(lines[0]) // 2
    size = {
        "nothing": 0,
        "half-a-line": half,
        "lines": sum(map(len, lines[:4])),
        "lines-and-a-half": sum(map(len, lines[:4])) + half,
    }[kept]
    dump.write_bytes(complete[:size])
    finished = []
    assert run(policy, examples, dump=dump, on_progress=finished.append) == whole
    assert dump.read_bytes() == complete
    assert finished[0] == (6 if "lines" in kept else 2) and finished[-1] == len(examples)


def test_a_finished_dump_is_not_sampled_again(policy, examples, whole, tmp_path):
    dump = tmp_path / "problems.jsonl"
    run(policy, examples, dump=dump)

    class Broken:
        def sample(self, *arguments, **settings):
            raise AssertionError("sampled again")

    found = evaluate(
        Broken(), examples, [[1]] * len(examples), load_reward("exact", 1.0),
        samples=SAMPLES, max_completion_tokens=3, dump=dump,
    )  # fmt: skip
    assert found == whole


def write_dump(dump, text, cut=0):
    problem = Problem("a", "?", "1", [text], [1.0], [3], [True])
    line = (json.dumps(asdict(problem), ensure_ascii=False) + "\n").encode()
    dump.write_bytes(line + line[:cut])
    return problem, line


@pytest.mark.parametrize("separator", "\n\x0b\x85\u2028\u2029", ids=ascii)
def test_a_completion_may_hold_any_line_separator(tmp_path, separator):
    problem, _ = write_dump(tmp_path / "dump.jsonl", f"x{separator}y")
    assert read_problems(tmp_path / "dump.jsonl") == [problem]


def test_a_dump_may_be_cut_within_a_character(tmp_path):
    dump = tmp_path / "dump.jsonl"
    _, line = write_dump(dump, "xé")
    problem, _ = write_dump(dump, "xé", cut=line.index("é".encode()) + 1)
    assert read_problems(dump) == [problem]
    assert dump.read_bytes() == line


def test_a_dump_that_is_not_there_is_empty(tmp_path):
    assert read_problems(tmp_path / "nothing.jsonl") == []
