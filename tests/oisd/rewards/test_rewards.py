"""Rewards: the last box, verdicts, golds that cannot be graded, deadlines, the user's functions."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from oisd.rewards import (
    MAX_BOX_CHARACTERS,
    MathReward,
    check_answers,
    exact_reward,
    last_boxed,
    load_reward,
    math_reward,
)
from tests import ROOT
from tests.oisd.rewards import reward_functions

MODULE = reward_functions.__name__


@pytest.fixture(scope="module")
def grader():
    reward = MathReward(timeout_s=10.0, workers=2)
    yield reward
    reward.close()


# ---- the last box ----------------------------------------------------------------------------

BOXES = {
    "none": ("the answer is 5", None),
    "empty_text": ("", None),
    "plain": (r"so \boxed{5}.", "5"),
    "empty": (r"\boxed{}", ""),
    "space": (r"\boxed {5}", "5"),
    "nested_braces": (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    "last_of_two": (r"\boxed{1}, no, \boxed{2}", "2"),
    "inner": (r"\boxed{x = \boxed{5}}", "5"),
    "truncated": (r"\boxed{5", None),
    "truncated_after_complete": (r"\boxed{5} or \boxed{\frac{1}{", "5"),
    "truncated_around_complete": (r"\boxed{x = \boxed{5} and", "5"),
    "escaped_braces": (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    "escaped_brace_alone": (r"\boxed{\{1, 2}", r"\{1, 2"),
    "line_break_in_braces": (r"\boxed{{a\\}b}", r"{a\\}b"),
    "double_backslash": (r"\\boxed{5}", "5"),
    "after_line_break": (r"x \\\boxed{5}", "5"),
    "stray_open_brace": (r"{ \boxed{5}", "5"),
    "stray_close_brace": (r"} \boxed{5} }", "5"),
    "newlines": ("\\boxed{\n5\n}", "\n5\n"),
    "bare": (r"\boxed 5", "5"),
    "bare_digits": (r"$\boxed 42$ is it", "42"),
    "bare_command": (r"\boxed\frac{1}{2}", r"\frac{1}{2}"),
    "bare_in_group": (r"{\boxed 5}", "5"),
    "bare_mention_after_box": (r"\boxed{5} in the \boxed format", "5"),
    "bare_at_end": (r"put it in \boxed", None),
    "other_macro": (r"\boxedtext{5} \fbox{6}", None),
}


@pytest.mark.parametrize("text, content", BOXES.values(), ids=BOXES)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


LONG = {
    "open_boxes": "\\boxed{" * 14_000,
    "bare_boxes": "\\boxed " * 14_000,
    "braces": "\\boxed{" + "{" * 50_000 + "}" * 50_000 + "}",
    "nested_boxes": "\\boxed{" * 12_000 + "}" * 12_000,
    "spaces": "\\boxed" + " " * 100_000,
    "backslashes": "\\" * 100_000,
    "bare_open_groups": "\\boxed\\frac" + "{1}" * 30_000,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_last_boxed_takes_linear_time(text):
    start = time.perf_counter()
    last_boxed(text)
    assert time.perf_counter() - start < 1.0  # quadratic: minutes


# ---- verdicts --------------------------------------------------------------------------------

EQUAL = [  # answer, gold
    ("5", "5"),
    ("5.", "5"),
    ("$5$", "5"),
    (r"\$5", "5"),
    ("007", "7"),
    ("+7", "7"),
    ("1,234", "1234"),
    ("1234567", "1,234,567"),
    ("1{,}234", "1234"),
    (r"10,\!000", "10000"),
    (r"12\,345", "12345"),
    ("-1,234", "-1234"),
    ("\u22123", "-3"),
    ("1.0", "1"),
    (".5", "0.5"),
    ("1/2", r"\frac12"),
    ("0.5", r"\frac{1}{2}"),
    (r"\dfrac{1}{2}", "1/2"),
    (r"\tfrac12", r"\frac{1}{2}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"2\frac{1}{2}", r"\frac{5}{2}"),
    ("0.333333", r"\frac13"),
    (r"1.5 \times 10^3", "1500"),
    ("10^{-3}", "0.001"),
    ("2^{10}", "1024"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"),
    (r"\sqrt[3]{8}", "2"),
    (r"\pi \cdot 2", r"2\pi"),
    (r"\frac{\pi}{2}", r"\dfrac{\pi}{2}"),
    (r"2\ln 2", r"\ln 4"),
    ("4i+3", "3+4i"),
    (r"\infty", r"\infty"),
    (r"+\infty", r"\infty"),
    (r"-\infty", r"-\infty"),
    (r"\frac{1}{2}", r"50\%"),
    ("0.05", r"5\%"),
    ("50%", r"50\%"),
    ("30", r"30^\circ"),
    (r"30^{\circ}", r"30^\circ"),
    (r"5\text{ cm}", "5"),
    ("5 cm", r"5 \mathrm{cm}"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("y=1+2x", "y=2x+1"),
    ("(x+1)^2", "x^2+2x+1"),
    ("b+a", "a+b"),
    ("yx", "xy"),
    ("x*2", "2x"),
    (r"3 \ge x", r"x \le 3"),
    (r"|x|", r"\left|x\right|"),
    (r"(3,\frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
    ("(3, 1.5)", r"(3, \frac{3}{2})"),
    ("(1, 2, 3)", r"\left(1,2,3\right)"),
    ("[0.5,2)", r"[\frac12, 2)"),
    (r"(4,\infty)\cup(-\infty,3)", r"(-\infty,3)\cup(4,\infty)"),
    (r"\{2, 1\}", r"\{1, 2\}"),
    ("2,1", "1,2"),
    (r"2 \text{ and } 1", "1, 2"),
    (r"\pm 2", "2, -2"),
    (
        r"\begin{bmatrix}1&0.5\\3&4\end{bmatrix}",
        r"\begin{pmatrix}1&\frac12\\3&4\end{pmatrix}",
    ),
    ("yes", "Yes"),
    (r"\text{Yes}", "Yes"),
    (r"\textbf{No}.", "no"),
    ("TRUE", "true"),
    (r"\text{(C)}", "C"),
    ("a", "A"),
    ("(B)", r"\textbf{(B)}"),
    (r"\text{even}", "even"),
    ("Evelyn", r"\text{Evelyn}"),
]
DIFFERENT = [
    ("", "5"),
    (" ", "5"),
    ("6", "5"),
    ("-3", "3"),
    ("0.99", "1"),
    ("1.00001", "1"),
    ("0.33", r"\frac13"),
    ("12345", "1234"),
    ("1, 234", "1234"),
    ("2 1/2", "21/2"),
    (r"\frac{2}{1}", r"\frac{1}{2}"),
    (r"\pi", r"2\pi"),
    ("6.28", r"2\pi"),
    (r"\sqrt{2}", "2"),
    ("3-4i", "3+4i"),
    (r"-\infty", r"\infty"),
    (r"\infty", "5"),
    ("3", r"\left( 3, \frac{\pi}{2} \right)"),
    ("(2,1)", "(1,2)"),
    ("(3, 2, 1)", "(1, 2, 3)"),
    ("(1, 3)", "(1, 2)"),
    ("(1,2)", "[1,2]"),
    ("(1,2]", "[1,2)"),
    ("1", "1,2"),
    ("3,4", "3"),
    ("1,2", "1,2,3"),
    (r"\{1,3\}", r"\{1,2\}"),
    (r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("x=6", "5"),
    ("y=5", "x=5"),
    ("(x-1)^2", "x^2+2x+1"),
    ("y=2x-1", "y=2x+1"),
    (r"6\text{ cm}", r"5\text{ cm}"),
    (r"5\%", r"50\%"),
    ("60", r"30^\circ"),
    ("No", "Yes"),
    ("Yse", "Yes"),
    ("E s y", r"\text{Yes}"),
    ("1", "True"),
    ("True", "1"),
    ("x", "X"),
    ("B", "A"),
    (r"\text{odd}", r"\text{even}"),
    (r"?? \frac{1}{2}", r"\frac{1}{2}"),
    (r"\text{the answer is } 5 ?", "5"),
    ("{" * 40, "5"),
    ("\\" * 7, "5"),
    ("$$$", "5"),
    ("\x00\ud800", "5"),
]


@pytest.mark.parametrize("answer, gold", EQUAL)
def test_equal_answers_earn_one(grader, answer, gold):
    assert grader([f"hence \\boxed{{{answer}}}."], [gold]) == [1.0]


@pytest.mark.parametrize("answer, gold", DIFFERENT)
def test_different_answers_earn_nothing(grader, answer, gold):
    assert grader([f"hence \\boxed{{{answer}}}."], [gold]) == [0.0]


TEXTS = {
    "no_box": ("the answer is 5", "5", 0.0),
    "nothing": ("", "5", 0.0),
    "last_box_right": (r"\boxed{4}, rather \boxed{5}", "5", 1.0),
    "last_box_wrong": (r"\boxed{5}, rather \boxed{4}", "5", 0.0),
    "two_boxes_are_no_set": (r"\boxed{1} and \boxed{2}", "1,2", 0.0),
    "nested_boxes": (r"\boxed{\boxed{\frac{1}{2}}}", "0.5", 1.0),
    "truncated": (r"\boxed{\frac{1}{2", "0.5", 0.0),
    "truncated_second": (r"\boxed{\frac{1}{2}} and \boxed{0.", "0.5", 1.0),
    "bare": (r"\boxed 5", "5", 1.0),
    "too_long": (r"\boxed{5" + " " * MAX_BOX_CHARACTERS + "}", "5", 0.0),
    "deep": ("\\boxed{" + "{" * 10_000 + "5" + "}" * 10_000 + "}", "5", 0.0),
    "deep_unclosed": ("\\boxed{" + "{" * 10_000 + "5", "5", 0.0),
}


@pytest.mark.parametrize("completion, gold, reward", TEXTS.values(), ids=TEXTS)
def test_completions(grader, completion, gold, reward):
    assert grader([completion], [gold]) == [reward]


HALF = r"\int_0^1 x\,dx"  # only computer algebra knows


def test_each_pair_is_graded_once_and_all_get_the_verdict(grader, monkeypatch):
    seen = []
    run = grader._workers.run
    monkeypatch.setattr(
        grader._workers, "run", lambda f, tasks, t: seen.extend(tasks) or run(f, tasks, t)
    )
    boxes = [HALF, f" {HALF} ", r"\int_0^1 y^2\,dy", "1/2", HALF, HALF]
    completions = [f"\\boxed{{{box}}}" for box in boxes] + ["none"]
    assert grader(completions, ["0.5"] * 7) == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    assert [task[:2] for task in seen] == [(HALF, "0.5"), (r"\int_0^1 y^2\,dy", "0.5")]


def test_strings_and_numbers_need_no_workers():
    reward = MathReward()
    boxes = ["5", "1/2", r"\sqrt{8}", r"5\text{ cm}", "(1,2)", "x<3", r"\text{Yes}", "no box }"]
    golds = ["5", "0.5", r"2\sqrt2", "50 mm", "(1, 2)", "3>x", "yes", "5"]
    completions = [f"\\boxed{{{box}}}" for box in boxes[:-1]] + boxes[-1:]
    assert reward(completions, golds) == [1.0] * 7 + [0.0]
    assert reward._workers._pool is None
    reward.close()


def test_the_workers_may_start_before_there_is_work():
    reward = MathReward(workers=1)
    reward.start()
    reward.start()
    assert reward._workers._pool is not None
    assert reward([f"\\boxed{{{HALF}}}"], ["0.5"]) == [1.0]
    reward.close()
    for other in ("exact", "boxed_string"):
        load_reward(other).start()


def grade_in_a_fork(reward):
    """Exit code of a forked process that grades right."""
    pid = os.fork()
    if not pid:
        try:
            right = reward([f"\\boxed{{{HALF}}}", r"\boxed{1/3}"], ["0.5", "0.5"]) == [1.0, 0.0]
            reward.close()
            os._exit(0 if right else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_grades_in_a_forked_process():
    reward = MathReward(workers=1)
    assert reward([f"\\boxed{{{HALF}}}"], ["1/2"]) == [1.0]
    assert grade_in_a_fork(reward) == 0
    (pid,) = workers_of(reward)
    os.kill(pid, 0)  # the fork has not ended the workers of its parent
    assert reward([r"\boxed{\int_0^1 2x\,dx}"], ["1"]) == [1.0]
    reward.close()


def grade_rows(batch):
    return {"reward": math_reward(batch["completion"], batch["answer"])}


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_grades_inside_datasets_map():
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    completions = [rf"\boxed{{\int_0^1 {2 * i}x\,dx}}" for i in range(1, 5)]
    rows = datasets.Dataset.from_dict(
        {"completion": completions, "answer": [str(i) for i in range(1, 5)]}
    )
    assert grade_rows(rows[:1]) == {"reward": [1.0]}
    graded = rows.map(grade_rows, batched=True, batch_size=2, num_proc=2)
    assert graded["reward"][:] == [1.0] * 4


def test_grades_from_threads(grader):
    rewards = {}

    def grade(n):
        rewards[n] = grader([rf"\boxed{{{n}/7}}", r"\boxed{1/9}"], [rf"\frac{{{n}}}{{7}}", "1/3"])

    threads = [threading.Thread(target=grade, args=(n,)) for n in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == {n: [1.0, 0.0] for n in range(1, 6)}


def test_a_gold_that_cannot_be_parsed_warns(grader):
    with pytest.warns(UserWarning, match=re.escape(r"gold answer '\\frac{1}{' cannot be parsed")):
        assert grader([r"\boxed{1}"], [r"\frac{1}{"]) == [0.0]


def test_check_answers_names_what_cannot_be_graded():
    good = ["5", r"\infty", "Yes", "C", r"\left( 3, \frac{\pi}{2} \right)", r"x \in [0, 1)"]
    good += [r"\text{Evelyn}", "1,234", r"\frac{\pi}{6}", r"90^\circ", r"\{1, 2\}", "1, 2", "x=5"]
    assert check_answers(good) == []
    bad = ["", r"\frac{1}{", "5", "$ $", r"\frac{1}{", "1" * MAX_BOX_CHARACTERS]
    empty, unparsable, long = check_answers(bad)
    assert empty == "answers[0]: gold answer '' is empty"
    assert unparsable.startswith("answers[1]") and "cannot be parsed" in unparsable
    assert long.startswith("answers[5]") and "too long" in long


def test_wrong_arguments():
    for reward in (math_reward, exact_reward):
        with pytest.raises(ValueError, match="got 2 completions and 1 answers"):
            reward(["a", "b"], ["a"])
        with pytest.raises(ValueError, match=r"answers\[1\] must be a string, got int"):
            reward(["a", "b"], ["a", 5])
        assert reward([], []) == []


def test_exact():
    assert exact_reward([" 12\n", "12.", "1 2"], ["12", "12", "12 "]) == [1.0, 0.0, 0.0]
    reward = load_reward("exact")
    assert (reward(["7"], ["7"]), reward.timeouts) == ([1.0], 0)
    reward.close()


# ---- deadlines and dead workers --------------------------------------------------------------


def test_answers_that_hang_are_killed_and_counted():
    reward = load_reward("math", timeout_s=1.0)
    assert reward([r"\boxed{1/2}"], ["0.5"]) == [1.0]
    hanging = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{100000000!}", r"\boxed{9^{9^{9^{9}}}}"]
    start = time.perf_counter()
    rewards = reward([r"\boxed{1/2}", *hanging, r"\boxed{1/4}"], ["0.5", "5", "5", "5", "0.25"])
    assert rewards == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert reward.timeouts == 3
    assert time.perf_counter() - start < 30.0
    assert reward([r"\boxed{1/8}"], ["0.125"]) == [1.0]
    reward.close()
    reward.close()
    assert reward([r"\boxed{1/2}"], ["0.5"]) == [1.0]  # starts again
    reward.close()


def workers_of(reward):
    return list(reward._workers._pool._pool_manager.worker_manager.workers)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_survives_the_death_of_idle_workers():
    reward = MathReward(workers=1)
    assert reward([f"\\boxed{{{HALF}}}"], ["0.5"]) == [1.0]
    for i, wait_s in enumerate((0.0, 0.5), 1):  # before and after the pool notices
        for pid in workers_of(reward):
            os.kill(pid, signal.SIGKILL)
        time.sleep(wait_s)
        assert reward([rf"\boxed{{\int_0^1 {2 * i}x\,dx}}"], [str(i)]) == [1.0]
    assert reward.timeouts == 0
    (pid,) = workers_of(reward)
    reward.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def run_python(code, cwd):
    root = str(ROOT)
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, *code], cwd=cwd, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done


def test_imports_without_torch():
    code = "import sys, oisd.rewards; print({'torch', 'transformers', 'sympy'} & set(sys.modules))"
    assert run_python(["-c", code], ROOT).stdout.strip() == "set()"


def test_a_script_without_main_guard_may_grade_and_name_its_neighbours(tmp_path):
    (tmp_path / "mine.py").write_text("def ones(completions, answers):\n    return [1] * 2\n")
    (tmp_path / "script.py").write_text(
        "import sys\n"
        "import oisd.rewards as r\n"
        "sys.modules['torch'] = sys\n"
        "print(r.math_reward([r'\\boxed{\\int_0^1 x\\,dx}'], ['0.5']))\n"
        "print(r.load_reward('mine:ones')(['', ''], ['', '']))\n"
        "print(r.load_reward('reward_functions:main_module')(['', ''], ['', '']))\n"
    )
    (tmp_path / "reward_functions.py").write_text(Path(reward_functions.__file__).read_text())
    done = run_python(["script.py"], tmp_path)
    assert done.stdout.split("\n")[:3] == ["[1.0]", "[1.0, 1.0]", "[0.0, 0.0]"]
    assert done.stderr == ""
    code = "import oisd.rewards as r; print(r.load_reward('mine:ones')(['', ''], ['', '']))"
    assert run_python(["-c", code], tmp_path).stdout.strip() == "[1.0, 1.0]"
