"""Verdicts on two texts: strings and plain numbers first, then what a reader makes of them."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from oisd.rewards.reading import NeedsAlgebra, Unreadable, read
from oisd.rewards.reading.phrases import is_prose, numeric_date
from oisd.rewards.reading.spelling import tidy
from oisd.rewards.reading.trees import Tree
from oisd.rewards.verdicts.compare import same
from oisd.rewards.verdicts.equality import EXPRESSIONS, is_constant
from oisd.rewards.verdicts.values import TooBig, Undefined, allow

# 0,5 is a decimal only where a number is asked for.
_DECIMAL_COMMA = re.compile(r"[-+]?(?:0,\d+|\d+,(?:\d{1,2}|\d{4,}))")
_SHORTENED = re.compile(
    r"(\\?[$€£]?[-+]?\d+(?:\.\d+)?)"
    r"(?:([kKT])|\s*(?:\\(?:text|mathrm)\s*\{\s*)?([MB]|[mM]n|[bB]n)\s*\}?)"
)
_SCALES = {"k": "thousand", "m": "million", "b": "billion", "t": "trillion"}
_COUNTED = re.compile(r"(?<![\w.\\}])(\d{1,4})(?:C|\\(?:text|mathrm)\{C\})(\d{1,4})(?![\w.])")
_ARRANGED = re.compile(r"(?<![\w.\\}])(\d{1,4})(?:P|\\(?:text|mathrm)\{P\})(\d{1,4})(?![\w.])")
_STACKED = re.compile(r"([CA])(?:_\{?(\d+)\}?\^\{?(\d+)\}?|\^\{?(\d+)\}?_\{?(\d+)\}?)")
_CHOICES = re.compile(r"[A-J]{2,6}")
_LISTED = re.compile(r"\(?[A-J]\)?(?:(?:\s*[,;&]\s*|\s+)(?:and\s+)?\(?[A-J]\)?)+")
_NUMBER = re.compile(r"[-+]?\d{1,1000}(?:\.\d{1,1000})?", re.A)


@lru_cache(maxsize=8192)
def key(text: str) -> str:
    """Equal for answers with the same spelling, but for white space."""
    tidied = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])", "", tidy(text))
    tidied = tidied.replace("$", "").strip(" .,;")
    return re.sub(r"(?<![\d\\a-zA-Z]) +| +(?![\da-zA-Z])", "", tidied)


@lru_cache(maxsize=8192)
def is_readable(gold: str) -> bool:
    """Whether a gold answer has a meaning beyond its letters. NeedsAlgebra counts as none."""
    try:
        *meanings, (_, words) = read(gold)
    except NeedsAlgebra:
        return False
    return bool(meanings) or is_prose(words)


@lru_cache(maxsize=65536)
def verdict(answer: str, gold: str) -> bool | None:
    """Whether an answer equals the gold; None where only computer algebra can tell."""
    answer, gold = answer.strip(), gold.strip()
    if answer and answer == gold:
        return True
    if _NUMBER.fullmatch(answer) and _NUMBER.fullmatch(gold):
        return Fraction(answer) == Fraction(gold)
    wanted = key(gold)
    if wanted and key(answer) == wanted:
        return True
    if not key(answer) or not wanted:
        return False
    if _same_choices(answer, gold) or _same_choices(gold, answer):
        return True
    # 7C2 may be a hexadecimal number: not where the answer is a number of combinations too.
    if (whole := _counted(gold)) != gold and re.search(r"\\[dt]?binom|\\choose", answer):
        return verdict(answer, whole)
    try:
        golds, answers = read(gold), read(answer)
    except NeedsAlgebra:
        return None
    if not is_readable(gold):
        return None
    undecided = False
    allow()
    for g in golds:
        for a in answers:
            try:
                if g[0] == a[0] == "text":
                    if g == a and is_prose(g[1]):
                        return True
                elif same(g, a):
                    return True
            except TooBig:
                undecided = True
            except (Undefined, Unreadable, RecursionError):
                pass
    if _DECIMAL_COMMA.fullmatch(answer.strip()) and golds[0][0] in EXPRESSIONS:
        return verdict(answer.replace(",", "."), gold)
    if (whole := _in_full(answer)) and _is_number(golds[0]):
        return verdict(whole, gold)
    if (whole := _in_full(gold)) and "." in whole and _is_number(answers[0]):
        return verdict(answer, whole)
    if (whole := _counted(answer)) != answer and _is_number(golds[0]):
        return verdict(whole, gold)
    if golds[0][0] == "date" and (found := numeric_date(answer)):
        return same(golds[0], found)
    if answers[0][0] == "date" and (found := numeric_date(gold)):
        return same(found, answers[0])
    return None if undecided else False


def _in_full(text: str) -> str:
    """1.2 million for 1.2M, 3.5 thousand for 3.5k; "" for another text."""
    found = _SHORTENED.fullmatch(text)
    return f"{found[1]} {_SCALES[(found[2] or found[3])[0].lower()]}" if found else ""


def _counted(text: str) -> str:
    """With binomials for 7C2 and C_7^2, and permutations for 7P2 and A_7^2."""
    if stacked := _STACKED.fullmatch(text):
        name, below, above, above_, below_ = stacked.groups()
        n, k = below or below_, above or above_
        if int(k) <= int(n):
            return f"\\binom{{{n}}}{{{k}}}" if name == "C" else f"P({n},{k})"
    return _ARRANGED.sub(r"P(\1,\2)", _COUNTED.sub(r"\\binom{\1}{\2}", text))


def _is_number(tree: Tree) -> bool:
    return tree[0] == "quantity" or (tree[0] in EXPRESSIONS and is_constant(tree))


def _same_choices(run: str, listed: str) -> bool:
    """BC for B and C, where several letters are to be chosen."""
    if not (_CHOICES.fullmatch(run) and _LISTED.fullmatch(listed)):
        return False
    letters = re.findall("[A-J]", listed)
    return sorted(set(run)) == list(run) == sorted(letters)
