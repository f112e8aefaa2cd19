"""The built-in tasks: right solutions, splits that never overlap, problems fixed by the seed."""

from __future__ import annotations

import re

import pytest

from oisd.data import DataError, load_examples
from oisd.data.tasks import TASKS, Draw, is_test, task_examples
from oisd.rewards import load_reward

SOURCES = [
    *TASKS,
    "multiplication:digits=4,by=4",
    "multiplication:digits=1,by=1",
    "running_sum:terms=3,digits=4",
    "modular:terms=8,modulus=97",
    "countdown:numbers=5,limit=200",
    "base:digits=4,base=2",
]


def grader(source):
    return load_reward("countdown" if source.startswith("countdown") else "final")


@pytest.mark.parametrize("source", SOURCES)
def test_solutions_earn_the_reward_and_others_do_not(source):
    examples = task_examples(source, limit=60)
    solutions, answers = [e.solution for e in examples], [e.answer for e in examples]
    assert grader(source)(solutions, answers) == [1.0] * len(examples)
    shifted = grader(source)([*solutions[1:], solutions[0]], answers)
    assert sum(shifted) < 0.5 * len(examples)
    spoilt = [solution[:-1] + str((int(solution[-1]) + 1) % 10) for solution in solutions]
    assert sum(grader(source)(spoilt, answers)) == 0


def test_products_and_sums_are_what_their_prompts_say():
    for e in task_examples("multiplication:digits=3,by=2", limit=100):
        a, b = map(int, e.prompt.removesuffix("=").split("*"))
        partial, product = e.solution.split("=")
        assert 100 <= a <= 999 and 10 <= b <= 99
        assert product == e.answer == f"{a * b:05}"[::-1]
        assert sum(int(p[::-1]) for p in partial.split("+")) == a * b
    for e in task_examples("running_sum:terms=4,digits=2", limit=100):
        numbers = [int(n) for n in e.prompt.removesuffix("=").split("+")]
        sums = [int(s[::-1]) for s in e.solution.split("=")]
        assert (
            sums == [sum(numbers[:n]) for n in (2, 3, 4)]
            and e.answer == e.solution[-len(e.answer) :]
        )


def test_chains_and_bases_are_what_their_prompts_say():
    for e in task_examples("modular:terms=5,modulus=11", limit=100):
        first, *rest = re.findall(r"[-+*]?\d+", e.prompt.partition("%")[0])
        value, steps = int(first), []
        for term in rest:
            sign, number = term[0], int(term[1:])
            value = {"+": value + number, "-": value - number, "*": value * number}[sign] % 11
            steps.append(f"{value:02}")
        assert e.solution.split("=") == steps and e.answer == steps[-1]
    for e in task_examples("base:digits=3,base=7", limit=100):
        number = int(e.prompt.partition(":")[0])
        assert int(e.answer, 7) == number
        quotient, remainder = e.solution.split(",")[0].split("r")
        assert divmod(number, 7) == (int(quotient), int(remainder))


@pytest.mark.parametrize(
    "source", ["multiplication:digits=2,by=2", "countdown:numbers=3,largest=9"]
)
def test_splits_share_no_problem_whatever_their_seeds(source):
    def key(e):
        numbers, _, target = e.id.partition(":")
        return tuple(sorted(re.split(r"[* ]", numbers))), target

    train = {key(e) for seed in (0, 1) for e in task_examples(source, limit=1500, seed=seed)}
    test = {key(e) for e in task_examples(source, split="test", limit=300, seed=2)}
    assert len(train) > 1000 and len(test) > 100
    assert not train & test


def test_a_tenth_is_held_out():
    share = sum(is_test(f"problem {n}") for n in range(20_000)) / 20_000
    assert 0.09 < share < 0.11


def test_problems_are_a_function_of_the_seed_without_repetition():
    draws = [task_examples("modular", limit=200, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len({e.id for e in draws[0]}) == 200
    # The stream is part of the contract: other problems would be another run.
    draw = Draw(3, 5)
    assert [draw.between(0, 999) for _ in range(4)] == [935, 173, 688, 115]
    assert draws[0][0].prompt == load_examples("modular", limit=1)[0].prompt


def test_an_exhausted_task_gives_what_it_has():
    both = [task_examples("multiplication:digits=1,by=1", split=s) for s in ("train", "test")]
    assert sum(map(len, both)) == 55  # pairs of digits, in either order
    assert task_examples("multiplication:digits=1,by=1", limit=3) == both[0][:3]


@pytest.mark.parametrize(
    "source, message",
    [
        ("multiplication:digit=3", "unknown setting 'digit'; did you mean 'digits'"),
        ("multiplication:digits=0", "digits must lie in 1 to 9, got 0"),
        ("multiplication:digits=three", "digits must be a whole number, got 'three'"),
        ("multiplication:digits", "settings are written key=value, got 'digits'"),
        ("multiplication:digits=3,digits=4", "digits is given twice"),
        ("countdown:limit=10", "limit must be at least largest = 20, got 10"),
    ],
)
def test_bad_sources_are_named(source, message):
    with pytest.raises(DataError, match=re.escape(message)):
        load_examples(source)


def test_other_splits_and_columns_are_refused():
    with pytest.raises(DataError, match='split must be "train" or "test"'):
        load_examples("modular", split="validation")
    with pytest.raises(DataError, match="has no answer_field"):
        load_examples("modular", answer_field="x")


def test_a_typo_in_a_tasks_name():
    with pytest.raises(DataError, match="no task is called 'multiplicaton'; did you mean 'multi"):
        load_examples("multiplicaton:digits=3")
