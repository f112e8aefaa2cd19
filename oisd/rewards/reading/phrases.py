"""Words in answers: spelt alike, and those that stand for a set, a number or a scale."""

from __future__ import annotations

import re
from datetime import date
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
        (("space", "N"), """all positive integers|positive integers|set of positive integers|
            set of all positive integers|any positive integer|every positive integer|
            all natural numbers|natural numbers|set of natural numbers"""),
        (("space", "W"), """all non negative integers|non negative integers|
            all nonnegative integers|nonnegative integers|set of nonnegative integers|
            set of non negative integers|all whole numbers|whole numbers"""),
        (("space", "Z-"), """all negative integers|negative integers|set of negative integers"""),
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
_WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_WEEKDAY = re.compile(rf"({'|'.join(_WEEKDAYS)}),? (?=\S)")
_MONTH_ALONE = re.compile(rf"(?P<month>{_MONTH})\.?(?:,| of)? (?P<year>\d{{4}})")
_YEAR_FIRST = re.compile(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})")
_YEAR_LAST = re.compile(r"(\d{1,2})([-/.])(\d{1,2})\2(\d{4})")


def _date(phrase: str) -> Tree | None:
    """A day with its month in words, in either order, with or without a year; or a month of a year.

    A day of the week in front must be that of the date.
    """
    text = " ".join(phrase.replace(" ,", ",").split())
    if found := _MONTH_ALONE.fullmatch(text):
        return ("date", found["year"], found["month"][:3], None)
    weekday = _WEEKDAY.match(text)
    found = _DATE.fullmatch(text[weekday.end() :] if weekday else text)
    if not found:
        return None
    day, month = int(found["day"] or found["day_"]), found["month"] or found["month_"]
    if weekday and weekday[1] != _weekday(found["year"], month[:3], day):
        return None
    return ("date", found["year"], month[:3], day) if 1 <= day <= 31 else None


def _weekday(year: str | None, month: str, day: int) -> str:
    names = [name[:3] for name in _MONTHS.split()]
    try:
        return _WEEKDAYS[date(int(year or 0), names.index(month) + 1, day).weekday()]
    except ValueError:
        return ""


def numeric_date(text: str) -> Tree | None:
    """The date of 1776-07-04 and of 25/12/2000; None for 04/07/1776, which has two readings."""
    if found := _YEAR_FIRST.fullmatch(text):
        readings = {(int(found[3]), int(found[4]))}
    elif found := _YEAR_LAST.fullmatch(text):
        first, second = int(found[1]), int(found[3])
        readings = {(first, second), (second, first)}
    else:
        return None
    days = [(month, day) for month, day in readings if 1 <= month <= 12 and 1 <= day <= 31]
    if len(days) != 1:
        return None
    year = found[1] if len(found[1]) == 4 else found[4]
    return ("date", year, _MONTHS.split()[days[0][0] - 1][:3], days[0][1])


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
