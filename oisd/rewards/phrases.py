"""Words in answers: spelt alike, and those that stand for a set, a number or a scale."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

LINKS = ("is", "are", "equals", "equal")  # between what is asked for and its value
HEDGES = frozenset(
    "not no never none neither nor less more greater fewer at most least than about almost around nearly cannot can't "
    "isn't aren't except maybe perhaps possibly probably impossible false wrong incorrect unless if when where for "
    "either other unknown any some all between over under above below up to was were be is are could would should may "
    "might guess solution approximately roughly bigger smaller larger undefined unlike but minus plus".split()
)  # fmt: skip
_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "hundreds": 10**2, "thousands": 10**3, "millions": 10**6, "billions": 10**9, "trillions": 10**12,
    "dozen": 12, "dozens": 12, "mn": 10**6, "bn": 10**9,
}  # fmt: skip
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBERS = {word: i for i, word in enumerate(_ONES)} | {
    word: 10 * i for i, word in enumerate(_TENS, 2)
}
_SAID: dict[str, tuple[Any, ...]] = {}
for _words, _tree in (
    ("no solution|no solutions|no real solution|no real solutions|none|empty set|null set|no such value|"
     "no such number|no such numbers|no values|no value|there is no solution|there are no solutions|has no solution|"
     "there are no real solutions|no roots|no real roots|no integer solutions|solution set is empty", ("empty",)),
    ("all real numbers|all reals|reals|real numbers|all real number|any real number|every real number|"
     "set of all real numbers|set of real numbers|r|all real x|all real values", ("space", "R")),
    ("all integers|integers|set of integers|set of all integers|any integer|every integer", ("space", "Z")),
    ("all rational numbers|rational numbers|set of rational numbers", ("space", "Q")),
    ("dne|does not exist|limit does not exist|doesnt exist|it does not exist", ("text", "does not exist")),
    ("infinity|positive infinity|plus infinity", ("inf",)),
    ("negative infinity|minus infinity", ("neg", ("inf",))),
    ("infinitely many|infinitely many solutions|infinite solutions|infinite number of solutions|there are infinitely many|"
     "there are infinitely many solutions|infinite", ("text", "infinitely many")),
    ("noon|12 noon|midday", ("time", 720, "pm", ())),
    ("midnight|12 midnight", ("time", 720, "am", ())),
):  # fmt: skip
    _SAID |= dict.fromkeys(_words.split("|"), _tree)
_SAID.pop("r")

_COMMAND = re.compile(r"\\[a-zA-Z]+\s?|\\.")
_ARTICLES = re.compile(r"\b(?:the|a|an)\b(?!\s*$)")


def phrase(text: str) -> str:
    """Lower case, without articles, wrappers, punctuation at the ends and spaces too many."""
    bare = _COMMAND.sub(
        lambda m: m[0] if len(m[0].strip()) < 2 or m[0][1:5] not in _WRAPPERS else " ", text
    )
    bare = bare.replace("{", " ").replace("}", " ").replace("$", " ").casefold()
    bare = bare.replace("’", "'").replace("-", " ").strip(" .,;:!\"'`*_")
    shorter = _ARTICLES.sub(" ", bare)
    return " ".join((shorter if shorter.strip() else bare).split())


_WRAPPERS = frozenset(
    ("text", "math", "mbox", "emph", "bold", "quad", "left", "righ", "oper", "unde")
)


def said(text: str, whole: bool = False) -> Any:
    """What words stand for: a tree for a whole answer, a factor for `million`; or None."""
    if not whole:
        scale = _SCALES.get(text.lower())
        return None if scale is None else Fraction(scale)
    return _SAID.get(phrase(text).replace("'", ""))


def number_words(words: list[str]) -> tuple[Fraction | None, int]:
    """Value of words like `twenty one`, and how many of them it takes."""
    total, part, used = 0, 0, 0
    for word in (w for word in words for w in [word.lower()]):
        pieces = word.split("-")
        if all(p in _NUMBERS for p in pieces):
            part += sum(_NUMBERS[p] for p in pieces)
        elif word in _SCALES and used:
            if word in ("hundred", "dozen"):
                part *= _SCALES[word]
            else:
                total, part = total + part * _SCALES[word], 0
        else:
            break
        used += 1
    return (Fraction(total + part), used) if used else (None, 0)
