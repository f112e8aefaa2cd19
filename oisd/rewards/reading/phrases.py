"""Words in answers: spelt alike, and those that stand for a set, a number or a scale."""

from __future__ import annotations

import re
from fractions import Fraction

from oisd.rewards.reading.trees import Tree

LINKS = ("is", "are", "equals", "equal")  # between what is asked for and its value
# Words that turn a value into something else than the answer.
HEDGES = frozenset(
    """
    not no never none neither nor cannot can't isn't aren't but except unlike other either any some
    all less more greater fewer smaller larger bigger at most least than over under above below
    between up to about almost around nearly approximately roughly maybe perhaps possibly probably
    might may could would should guess unknown undefined impossible false wrong incorrect unless if
    when where for was were be is are solution minus plus
    """.split()
)
# No units, though they stand behind numbers.
DATES = frozenset(
    """
    january february march april may june july august september october november december
    monday tuesday wednesday thursday friday saturday sunday bc ad ce bce
    """.split()
)
_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12, "mn": 10**6, "bn": 10**9,
}  # fmt: skip
_ONES = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
    """.split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6,
    "eighth": 8, "tenth": 10,
}  # fmt: skip
_NUMBERS = {word: i for i, word in enumerate(_ONES)} | {
    word: 10 * i for i, word in enumerate(_TENS, 2)
}
_WHOLE: dict[str, Tree] = {
    phrase: tree
    for tree, phrases in (
        (("empty",), """no solution|no solutions|no real solution|no real solutions|no roots|none|
            no integer solutions|no real roots|there is no solution|there are no solutions|no value|
            there are no real solutions|has no solution|empty set|null set|no such value|no values|
            no such number|no such numbers|solution set is empty|
            no solution exists|no solutions exist|no real values"""),
        (("space", "R"), """all real numbers|all reals|reals|real numbers|any real number|
            every real number|set of real numbers|set of all real numbers|all real x|
            all real values"""),
        (("space", "Z"), """all integers|integers|set of integers|set of all integers|any integer|
            every integer"""),
        (("space", "Q"), "all rational numbers|rational numbers|set of rational numbers"),
        (("text", "does not exist"), """dne|does not exist|limit does not exist|
            it does not exist|doesnt exist"""),
        (("text", "infinitely many"), """infinitely many|infinitely many solutions|infinite|
            infinite solutions|there are infinitely many|there are infinitely many solutions|
            infinite number of solutions"""),
        (("inf",), "infinity|positive infinity|plus infinity"),
        (("neg", ("inf",)), "negative infinity|minus infinity"),
        (("time", 720, "pm", ()), "noon|12 noon|midday"),
        (("time", 720, "am", ()), "midnight|12 midnight"),
    )
    for phrase in map(str.strip, phrases.split("|"))
}  # fmt: skip
_COMMAND = re.compile(r"\\(?:text|math|mbox|emph|bold|q?quad|left|right|operatorname|underline)\w*")
_ARTICLES = re.compile(r"\b(?:the|a|an)\b(?!\s*$)")
_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
_WORD = re.compile(r"[^\W\d_]{2,}")
_MATHEMATICS = re.compile(r"[\\=<>^+*/|\[\]]|\b(?:sin|cos|tan|log|ln|sqrt|pi)\b")


def phrase(text: str) -> str:
    """Lower case, without articles, wrappers, punctuation at the ends and spaces too many."""
    bare = re.sub(r"[{}$]", " ", _COMMAND.sub(" ", text)).casefold()
    bare = _HYPHEN.sub(" ", bare.replace("’", "'")).strip(" .,;:!\"'`*_")
    shorter = _ARTICLES.sub(" ", bare)
    return " ".join((shorter if shorter.strip() else bare).split())


def is_prose(phrase: str) -> bool:
    """Whether a phrase consists of words, and equality as words says something."""
    return bool(_WORD.search(phrase)) and not _MATHEMATICS.search(phrase)


_MONTHS = "january february march april may june july august september october november december"
_MONTH = "|".join(rf"{month[:3]}(?:{month[3:]})?" for month in _MONTHS.split()) + "|sept"
_DATE = re.compile(
    rf"(?:(?P<day>\d{{1,2}})\s*(?:of )?(?P<month>{_MONTH})\.?"
    rf"|(?P<month_>{_MONTH})\.? (?P<day_>\d{{1,2}}))"
    r"(?:,? (?P<year>\d{4}))?"
)


def _date(phrase: str) -> Tree | None:
    """A day with its month in words, in either order, with or without a year."""
    found = _DATE.fullmatch(" ".join(phrase.replace(" ,", ",").split()))
    if not found:
        return None
    day, month = int(found["day"] or found["day_"]), found["month"] or found["month_"]
    return ("date", found["year"], month[:3], day) if 1 <= day <= 31 else None


def whole_phrase(text: str) -> Tree | None:
    """What an answer all in words stands for: a set, a limit, a time of day, a date."""
    words = phrase(text)
    return _WHOLE.get(words.replace("'", "")) or _date(words)


def scale(word: str) -> Fraction | None:
    """The factor that `million` is."""
    word = word.lower()
    found = _SCALES.get(word) or _SCALES.get(word.removesuffix("s"))
    return None if found is None else Fraction(found)


def number_words(words: list[str]) -> tuple[Fraction | None, int]:
    """Value of words like `twenty one`, and how many of them it takes."""
    total, part, used = 0, 0, 0
    for word in map(str.lower, words):
        pieces = word.split("-")
        if all(piece in _NUMBERS for piece in pieces):
            part += sum(_NUMBERS[piece] for piece in pieces)
        elif word in _SCALES and used:
            if word in ("hundred", "dozen"):
                part *= _SCALES[word]
            else:
                total, part = total + part * _SCALES[word], 0
        else:
            break
        used += 1
    word = words[used].lower() if 0 < used < len(words) else ""
    if below := _PARTS.get(word) or _PARTS.get(word.removesuffix("s")):  # two thirds
        return Fraction(total + part, below), used + 1
    if used == 0 and words and words[0].lower() in ("half", "one-half"):
        return Fraction(1, 2), 1
    return (Fraction(total + part), used) if used else (None, 0)
