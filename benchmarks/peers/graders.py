r"""What other projects' graders say of the answers of tests/data/grading.jsonl, beside ours.

Each gets its own proper form of the same answer: a box, a line "Answer: ...", a formula between
dollar signs. The answers are those of `benchmarks.grading.table`: boxes that are short and meant
to hang nobody. Written against math-verify 0.9, TRL 1.16, verl 0.9.1 and lm-eval 0.4.13.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.grading import plain_math_verify, table
from benchmarks.peers.lenses import Absent, Row, load
from oisd.rewards import boxed_string_reward, math_reward

Answer = tuple[str, str, bool]  # what stands in the box, the gold answer, the human's verdict
Verdict = bool | None  # None: the answer was skipped, because the gold was not read
Grade = Callable[[str, str], Verdict]


class Grader(NamedTuple):
    """One project's grader.

    make: gives the function of box and gold; raises Absent.
    form: what it gets for completion and gold, in words.
    package: on PyPI, whose version the row names; "" for ours.
    """

    make: Callable[[], Grade]
    form: str
    package: str = ""


def boxed(box: str) -> str:
    return f"\\boxed{{{box}}}"


def _ours(reward: Callable[[list[str], list[str]], list[float]]) -> Grade:
    return lambda box, gold: reward([boxed(box)], [gold])[0] > 0


def _math_verify() -> Grade:
    load("math_verify", "math-verify")
    return lambda box, gold: plain_math_verify([boxed(box)], [gold])[0] > 0


def _trl() -> Grade:
    reward = load("trl.rewards", "trl").accuracy_reward
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def grade(box: str, gold: str) -> Verdict:
        found = reward([[{"role": "assistant", "content": boxed(box)}]], [f"${gold}$"])[0]
        return None if found is None else found > 0

    return grade


def _verl_math() -> Grade:
    score = load("verl.utils.reward_score.math_reward", "verl").compute_score
    return lambda box, gold: score(boxed(box), gold) > 0


def _verl_dapo() -> Grade:
    score = load("verl.utils.reward_score.math_dapo", "verl").compute_score
    return lambda box, gold: bool(score(f"Answer: {box}", gold)["acc"])


def _lm_eval() -> Grade:
    task = load("lm_eval.tasks.hendrycks_math.utils", "lm-eval")

    def grade(box: str, gold: str) -> Verdict:
        return task.process_results({"solution": boxed(gold)}, [f"${box}$"])["exact_match"] > 0

    return grade


GRADERS: dict[str, Grader] = {
    "oisd `math`": Grader(lambda: _ours(math_reward), "`\\boxed{a}`, gold as it is"),
    "math-verify": Grader(_math_verify, "`\\boxed{a}`, gold as `$g$`", "math-verify"),
    "TRL `accuracy_reward`": Grader(_trl, "a message `\\boxed{a}`, gold as `$g$`", "trl"),
    "oisd `boxed_string`": Grader(
        lambda: _ours(boxed_string_reward), "`\\boxed{a}`, gold as it is"
    ),
    "verl `math_reward`": Grader(_verl_math, "`\\boxed{a}`, gold as it is", "verl"),
    "verl `math_dapo`": Grader(_verl_dapo, "`Answer: a`, gold as it is", "verl"),
    "lm-eval `hendrycks_math`": Grader(_lm_eval, "`$a$`, gold as `\\boxed{g}`", "lm-eval"),
}
INTEGER = re.compile(r"-?\d+")
# Shown in the documentation: box and gold, the wrong answers first.
EXAMPLES = (
    (r"10^{-40}", r"10^{-41}"),
    (r"3.14159265", r"\pi"),
    (r"5 km", r"5 m"),
    (r"(1,2)", r"\{1,2\}"),
    (r"12,34", r"1234"),
    (r"x^2-y^2=4", r"x^2+y^2=4"),
    (r"12\text{ }13", r"12"),
    (r"0.5", r"\frac{1}{2}"),
    (r"\frac12", r"\frac{1}{2}"),
    (r"1,234", r"1234"),
    (r"25\%", r"0.25"),
    (r"x²", r"x^2"),
    (r"YES", r"Yes"),
    (r"0.\overline{3}", r"\frac13"),
    (r"\mathbb R", r"\mathbb{R}"),
    (r"\textbf{(B)}\ \frac{5}{8}", r"\frac58"),
)


def count(grade: Grade, answers: Sequence[Answer]) -> Row:
    """Verdicts that differ from the human's, over all answers and those to integer golds.

    An answer that the grader skips or raises on earns nothing, so it counts as refused; how many
    these are is counted too. `mistakes` lists (box, gold, right) of the differences.
    """
    found: dict[str, Any] = dict.fromkeys(
        ("right_answers", "wrong_answers", "right_refused", "wrong_accepted", "skipped", "raised",
         "integer_right_answers", "integer_wrong_answers", "integer_right_refused",
         "integer_wrong_accepted"), 0
    )  # fmt: skip
    mistakes: list[Answer] = []
    for box, gold, right in answers:
        verdict: Verdict = False
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some print what they cannot read
                verdict = grade(box, gold)
        except Exception:  # in a trainer it would end the run
            found["raised"] += 1
        found["skipped"] += verdict is None
        groups = ("", "integer_") if INTEGER.fullmatch(gold) else ("",)
        for group in groups:
            found[f"{group}{'right' if right else 'wrong'}_answers"] += 1
            if right and not verdict:
                found[f"{group}right_refused"] += 1
            elif verdict and not right:
                found[f"{group}wrong_accepted"] += 1
        if bool(verdict) != right:
            mistakes.append((box, gold, right))
    return found | {"mistakes": mistakes}


def verdicts(
    graders: dict[str, Grader] = GRADERS, answers: Sequence[Answer] | None = None
) -> Iterator[Row]:
    """A row for each grader, or one that says why it is absent.

    Each of `examples` is box, gold, whether it is right, whether the grader accepts it. Ours
    spends most of its time in other processes, which `process_s` leaves out.
    """
    answers = table() if answers is None else answers
    for name, grader in graders.items():
        row: Row = {"part": "grader", "grader": name, "form": grader.form}
        try:
            grade = grader.make()
        except Absent as absent:
            yield row | {"absent": str(absent)}
            continue
        start = time.process_time()
        counts = count(grade, answers)
        row |= counts | {"process_s": round(time.process_time() - start, 2)}
        mistaken = {(box, gold) for box, gold, _ in row.pop("mistakes")}
        row["examples"] = [
            [box, gold, right, ((box, gold) not in mistaken) is right]
            for box, gold, right in answers
            if (box, gold) in EXAMPLES
        ]
        yield row
