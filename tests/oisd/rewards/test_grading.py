"""The graders against a table of answers with the verdict of a careful human.

A row of data/grading.jsonl: `kind`; the completion, as `text`, as the content of a `box`, or as
`parts` [text, repetitions] of a box; the `gold` answer; `right`, whether a human would accept it;
`string`, where the grader of strings is rightly stricter than that; `limitation`, where the `math`
grader is known to err, with the reason. A limitation that is gone must leave the table.
"""

import json
import time
import warnings
from collections import Counter

import pytest

from oisd.rewards import MathReward, boxed_string_reward, load_reward
from oisd.rewards.answers import last_boxed, normal_form, same_string
from oisd.rewards.grading import forget
from oisd.rewards.verdicts import verdict
from tests import DATA, ROOT

TABLE = DATA / "grading.jsonl"
ROWS = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def completion(row: dict) -> str:
    if "text" in row:
        return row["text"]
    box = row["box"] if "box" in row else "".join(part * times for part, times in row["parts"])
    return f"Hence \\boxed{{{box}}}."


def wanted(row: dict, grader: str) -> float:
    if grader == "boxed_string":
        return float(row.get("string", row["right"]))
    return float(row["right"] != ("limitation" in row))


def wrong(rows: list[dict], rewards: list[float], grader: str) -> list[tuple]:
    return [
        (completion(row)[:80], row["gold"], reward)
        for row, reward in zip(rows, rewards, strict=True)
        if reward != wanted(row, grader)
    ]


def grade(reward, rows: list[dict]) -> list[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gold answers that are not mathematics
        return reward([completion(row) for row in rows], [row["gold"] for row in rows])


def test_the_table_is_large_and_has_both_verdicts():
    assert len(ROWS) >= 300
    kinds = Counter(row["kind"] for row in ROWS)
    assert len(kinds) >= 15 and min(kinds.values()) >= 6
    assert 0.3 < sum(row["right"] for row in ROWS) / len(ROWS) < 0.7
    assert len({(completion(row), row["gold"]) for row in ROWS}) == len(ROWS)


def test_the_page_counts_the_limitations():
    limits = Counter(row["limitation"] for row in ROWS if "limitation" in row)
    assert f"errs on {limits.total()} of the {len(ROWS):,} cases" in PAGE
    assert f"{max(limits.values())} are boxes of 2,000 characters" in PAGE
    strict = sum("string" in row for row in ROWS)
    assert f"rejects {strict:,} correct answers written differently" in PAGE


def test_math_gives_the_humans_verdict():
    rows = [row for row in ROWS if row["kind"] != "bomb"]
    reward = MathReward(timeout_s=20.0, workers=2)
    try:
        assert wrong(rows, grade(reward, rows), "math") == []
        assert reward.timeouts == 0  # none of them needs a worker
    finally:
        reward.close()


def test_a_batch_earns_what_its_completions_earn_one_by_one():
    rows = [row for row in ROWS if row["kind"] not in ("bomb", "long")][::4]
    forget()
    alone = []
    reward = MathReward(timeout_s=20.0, workers=2)
    together = grade(reward, rows + rows[::-1])
    for row in rows:
        forget()
        alone += grade(reward, [row])
    reward.close()
    assert together == alone + alone[::-1]


def test_no_verdict_takes_long():
    forget()
    slowest = 0.0
    for row in ROWS:
        if row["kind"] not in ("bomb", "long"):
            start = time.process_time()
            verdict(last_boxed(completion(row)) or "", row["gold"])
            slowest = max(slowest, time.process_time() - start)
    assert slowest < 1.0  # some 10 ms: the work for one verdict is bounded


def check_bombs(rows: list[dict]) -> None:
    reward = MathReward(timeout_s=2.0, workers=1)
    try:
        start = time.perf_counter()
        # Needs computer algebra, which starts the worker; after a hang another one is started.
        assert grade(reward, [{"box": r"\int_0^1 x\,dx", "gold": "0.5"}]) == [1.0]
        # As long as the time limit and two such starts, however busy the machine is.
        longest = 3.0 + 2 * (time.perf_counter() - start)
        for row in rows:
            start = time.perf_counter()
            rewards = grade(reward, [row])
            assert time.perf_counter() - start < longest, row
            assert wrong([row], rewards, "math") == []
    finally:
        reward.close()


BOMBS = [row for row in ROWS if row["kind"] == "bomb"]


def test_some_answers_that_would_hang_a_parser():
    check_bombs([row for row in BOMBS if row["right"] or row["box"] in ("9^9^9^9", "100000000!")])


@pytest.mark.slow
def test_all_answers_that_would_hang_a_parser():
    check_bombs(BOMBS)


def test_strings_are_never_more_lenient_than_a_human():
    reward = load_reward("boxed_string")
    start = time.perf_counter()
    assert wrong(ROWS, grade(reward, ROWS), "boxed_string") == []
    assert time.perf_counter() - start < 5.0
    reward.close()
    assert not any(row.get("string") for row in ROWS)


@pytest.mark.parametrize(
    "answer, form",
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\dfrac1{72}", r"\frac{1}{72}"),
        (r"\tfrac{a}b", r"\frac{a}{b}"),
        ("-1/2", r"-\frac{1}{2}"),
        (".5", r"\frac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        ("1.5", "1.5"),
        ("a/b", "a/b"),
        (r"\sqrt3", r"\sqrt{3}"),
        ("k = 7", "7"),
        ("abc=7", "abc=7"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\$3", "3"),
        (r"12\%", "12"),
        (r"3\text{ cm}", "3"),
        (r"\text{east}", r"\text{east}"),
        (r"\left( 1 , 2 \right)", "(1,2)"),
        ("", ""),
        ("049", "49"),
        ("-27.0", "-27"),
        ("+5.", "5"),
        ("000", "0"),
        ("100", "100"),
        ("0" * 10_000 + "5", "5"),
    ],
    ids=lambda text: text[:20],
)
def test_normal_forms(answer, form):
    assert normal_form(answer) == form
    assert normal_form(form) == form


def test_an_empty_answer_equals_nothing():
    assert not same_string("", "") and not same_string("$$", "")
    assert boxed_string_reward([r"\boxed{}", "no box"], ["", "no box"]) == [0.0, 0.0]


@pytest.mark.parametrize(
    "text", ["\\frac" * 20_000, "\\frac{" * 20_000, "^" * 50_000, "=" * 50_000]
)
def test_normal_forms_take_linear_time(text):
    start = time.perf_counter()
    normal_form(text)
    assert time.perf_counter() - start < 1.0
