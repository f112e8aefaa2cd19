"""Forms in which models and data sets write one answer, and their like that are other answers."""

import pytest

from oisd.rewards import math_reward
from oisd.rewards.algebra import closed_form
from oisd.rewards.verdicts import verdict

# What is written, forms equal to it, and forms that are not.
FORMS = {
    "x^3 + c": (["x^3+C", "C + x^3"], ["x^3+2c", "x^3+K", "x^2+C", "x^3+C+c"]),
    "34": (["thirty-four", r"\text{thirty-four}", "Thirty-four"], ["thirty-five", "forty-three"]),
    r"\mathbb{N}": (
        [r"\{1,2,3,\ldots\}", r"\{1, 2, 3, 4, \dots\}", r"\{1,2,3,...\}"],
        [r"\{1,2,3\}", r"\{0,1,2,\ldots\}", r"\{2,3,4,\ldots\}", r"\{1,3,5,\ldots\}"],
    ),
    r"\mathbb{Z}": ([r"\{\ldots,-2,-1,0,1,2,\ldots\}"], [r"\{\ldots,1,2,3,\ldots\}"]),
    r"2\mathbf{i} - 5\mathbf{j}": (
        [r"2\hat{i}-5\hat{j}", r"2\hat{\imath}-5\hat{\jmath}", "2i-5j"],
        [r"2\hat{i}+5\hat{j}", r"2\hat{j}-5\hat{i}"],
    ),
    "2 hours 5 minutes 9 seconds": (["2:05:09", "7509 seconds"], ["2:05:90", "2:05", "2:09:05"]),
    "75": (
        ["Rs. 75", "Rs 75", r"\text{Rs. }75", r"75 \checkmark", r"75\ \blacksquare", r"\fbox{75}",
         "75 ✓", "75 ✅"],
        ["Rs. 76", "76 ✓", "75 ✗", r"76\checkmark", r"\checkmark", r"\square"],
    ),
    "56": ([r"8 \choose 3", r"{8\choose 3}", r"8\choose{3}"], [r"8 \choose 2", r"3 \choose 8"]),
    r"\mathbb{R} \setminus \{3\}": (
        ["all real numbers except 3", r"\text{all real numbers except } 3", r"x \neq 3",
         "All real numbers except x = 3"],
        ["all real numbers except 2", "all real numbers except -3", "all real numbers",
         "all real numbers except 3 and 4"],
    ),
    r"(-\infty,1)\cup(1,4)\cup(4,\infty)": (
        ["all real numbers except 1 and 4", r"\text{all reals except }1\text{ and }4"],
        ["all real numbers except 1", "all real numbers except 1, 4, 5"],
    ),
    "3^n - 1": (
        [r"3^n - 1 \text{ for all } n", "3^n - 1 for all n", r"3^n-1,\text{ for every }n"],
        [r"3^n + 1 \text{ for all } n", r"3^n - 1 \text{ for all } n > 4"],
    ),
    "14 July 1789": (
        ["July 14, 1789", r"\text{July 14, 1789}", "the 14th of July, 1789", "14 JULY 1789",
         "14 Jul 1789", "Jul. 14, 1789"],
        ["14 Jun 1789", "July 4, 1789", "July 14, 1798", "June 14, 1789", "July 14"],
    ),
    "2400000": (["2.4M", "2.4 million"], ["2.4", "2.4k", "2.5M"]),
    "6.5k": (["6500", "6.5 thousand"], ["6.5", "6.5M"]),
    "A and D": (["AD", "A, D", "D and A"], ["AC", "A", "ABD", "AAD"]),
    "BCE": (["B, C, E", "B, C and E"], ["B, C", "B, C, D"]),
    "4 hours 50 minutes": (["4h50min", "4 h 50 min", "4h50m", "290 minutes"], ["4h05min", "4h"]),
    "#### 1,250": (["1250", "1,250"], ["125", "1,251"]),
    "1001": ([], ["1001_2", "1001_{8}", r"1001_{\text{two}}"]),
    "9": (["1001_2", r"11_{8}"], ["9_{12}0"]),
    "1001_2": (
        ["1001", "1001_{2}", r"1001\text{ base }2", r"1001\text{ in binary}"],
        ["1001_3", "9_{10}", r"1001\text{ base }3", r"1001\text{ in base }{8}",
         r"1001\text{ octal}", "1001 (hexadecimal)"],
    ),
    "63_9": (
        [r"63\text{ base }9"],
        [r"63\text{ octal}", r"63\text{ decimal}", "63 decimal", "63 octal"],
    ),
}  # fmt: skip
RIGHT = [(gold, form) for gold, (equal, _) in FORMS.items() for form in equal]
WRONG = [(gold, form) for gold, (_, other) in FORMS.items() for form in other]


@pytest.mark.parametrize("gold, answer", RIGHT)
def test_equal(gold, answer):
    assert verdict(answer, gold) is True


@pytest.mark.parametrize("gold, answer", WRONG)
def test_other(gold, answer):
    assert verdict(answer, gold) is False


@pytest.mark.parametrize("gold", ["1 2", r"1\quad 2", "1 2 3"])
def test_numbers_side_by_side_are_not_added(gold):
    assert closed_form(gold) is None
    assert closed_form(r"\int_0^1 2\,dx") == "2"


def test_a_whole_solution_of_gsm8k_as_gold():
    gold = "She sells 4 + 3 = 7.\nSo she earns $2 * 7 = $14.\n#### 14"
    assert math_reward([r"\boxed{14}", r"\boxed{7}", r"\boxed{2}"], [gold] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("given", [("a", "b"), ("\\boxed{2}", ["2"]), (["\\boxed{2}"], "2")])
def test_one_string_for_a_list_is_refused_in_words(given):
    with pytest.raises(ValueError, match="must be a list of strings, got one string"):
        math_reward(*given)
