"""The reader of answers: exact comparisons, texts that are no answers, bounded work."""

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oisd.rewards.reading import read
from oisd.rewards.reading.spelling import tidy
from oisd.rewards.verdicts import verdict
from oisd.rewards.verdicts.values import TooBig, Undefined, allow, value

PIECES = [
    "1", "2", "12", "0.5", "1,000", "x", "y", "n", "e", "i", r"\pi", "+", "-", "*", "/", "^", "_",
    "=", "<", r"\le ", "(", ")", "[", "]", r"\{", r"\}", "{", "}", ",", ";", ":", "!", "%", r"\%",
    "'", "|", r"\frac", r"\sqrt", r"\text{ cm}", r"\text{", r"\textbf{(A)}", r"\sin ", r"\ln ",
    r"\infty", "^\\circ", r"\cup ", r"\pm ", r"\binom", r"\sum_{k=1}^", r"\begin{pmatrix}",
    r"\end{pmatrix}", "&", r"\\", "\\$", "million", " hours ", " and ", " or ", "not ", "\n", " ",
    "The answer is ", r"\approx ", r"\in ", r"\mathbb{Z}", r"\pmod", "a.m.", "..", "…", "。", "**",
    "\\", "é",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@settings(max_examples=400, deadline=None)
@given(TEXTS, TEXTS)
def test_no_text_raises(answer, gold):
    assert verdict(answer, gold) in (True, False, None)


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6), st.integers(-3, 3))
def test_fractions_are_compared_exactly(above, below, off):
    gold = rf"\frac{{{above}}}{{{below}}}"
    other = Fraction(above, below) + Fraction(off, 10**30)
    assert verdict(f"{other.numerator}/{other.denominator}", gold) is (off == 0)
    assert verdict(f"{above}/{below}+{abs(off)}*10^{{-40}}", gold) is (off == 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.integers(2, 200), st.integers(20, 300))
def test_roots_are_compared_exactly(a, b, digits):
    gold = rf"\sqrt{{{a}}}+\sqrt{{{b}}}"
    right = rf"\sqrt{{{a + b}+2\sqrt{{{a * b}}}}}"
    assert verdict(right, gold) is True
    assert verdict(rf"{right}+10^{{-{digits}}}", gold) is False
    assert verdict(rf"({right})(1+10^{{-{digits}}})", gold) is False


@pytest.mark.parametrize("digits", [1, 4, 6, 8, 15, 30, 60])
def test_no_number_of_decimals_makes_a_root(digits):
    text = str(math.isqrt(2 * 100**digits))
    assert verdict(f"{text[0]}.{text[1:]}", r"\sqrt2") is False


def test_a_wrong_digit_anywhere_is_wrong():
    rng = random.Random(0)
    for _ in range(300):
        gold = str(rng.randrange(10, 10**9))
        at = rng.randrange(len(gold))
        digit = rng.choice([d for d in "0123456789" if d != gold[at]])
        wrong = gold[:at] + digit + gold[at + 1 :]
        for number, right in ((wrong, False), (gold, True)):
            for form in (
                "{0}",
                "{1}",
                r"\textbf{{{0}}}",
                r"{0}\text{{ cm}}",
                "x={0}",
                "({0})",
                "{0}.",
            ):
                answer = form.format(number, f"{int(number):,}")
                assert verdict(answer, gold) is right, (answer, gold)


@pytest.mark.parametrize(
    "text",
    [
        r"9^{9^{9}}", "100000!", r"\sum_{k=1}^{100000} k", r"e^{e^{e^{e}}}", r"10^{10^{10}}",
        r"\sum_{k=1}^{1999}\sum_{j=1}^{1999} \sin(jk)", r"\binom{10^9}{10^8}",
    ],
)  # fmt: skip
def test_work_is_bounded(text):
    allow()
    with pytest.raises((TooBig, Undefined)):
        value(read(text)[0])


@pytest.mark.parametrize(
    "text, wanted",
    [
        (r"2,\! 345,\! 678", "2\u201a345\u201a678"),
        (r"12^{\text{th}}", "12"),
        (r"\textcolor{red}{73}", "{73}"),
        ("**73**.", "73."),
        ("７３", "73"),
        ("x²", "x^{2}"),
    ],
)
def test_tidy(text, wanted):
    assert tidy(text) == wanted


@pytest.mark.parametrize(
    "text", ["{" * 900, "(" * 900, "-" * 1500, "1," * 800, r"\frac" * 300, "x^" * 700]
)
def test_nothing_is_read_for_long(text):
    assert len(read(text)) >= 1
    assert verdict(text, "5") is False
