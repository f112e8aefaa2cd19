"""Whether two answers are equal, as a careful human grader decides it.

The gold's form rules. An exact gold asks for an exactly equal answer; a decimal is the number that
its digits say. Units agree or convert where both answers have one, and are left out where one has
none. An ordered gold asks for that order. Where the two are of different kinds (a word and a number, a
point and a set), they are different.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from oisd.rewards.reading import NeedsAlgebra, Tree, num, read, replaced, walk
from oisd.rewards.regions import Region, linear, region_of, same_region
from oisd.rewards.tokens import Unreadable, tidy
from oisd.rewards.values import (
    TooBig,
    Undefined,
    allow,
    equal,
    exact,
    points,
    rounds_to,
    symbols,
    value,
)

MAX_ITEMS = 60
_EXPRESSIONS = frozenset("num sym const add mul div pow neg fn call sum prod deg".split())
_NAMES = frozenset("sym label call".split())


class Undecided(Exception):
    """Only a computer algebra system can tell, or it takes long."""


# ---- normal forms ------------------------------------------------------------------------------


def _has(tree: Tree, form: str) -> bool:
    found = False

    def look(part: Tree) -> None:
        nonlocal found
        found |= part[0] == form

    walk(tree, look)
    return found


def _signed(tree: Tree, plus: bool) -> Tree:
    """One of the two expressions that ± stands for."""
    if tree[0] == "pm":
        right = _signed(tree[2], plus)
        return ("add", _signed(tree[1], plus), right if (tree[3] > 0) == plus else ("neg", right))
    return tuple(_signed(part, plus) if isinstance(part, tuple) else part for part in tree)


def _is_constant(tree: Tree) -> bool:
    return tree[0] in _EXPRESSIONS and not symbols(tree) and not _has(tree, "call")


def _close(a: Tree, b: Tree) -> bool:
    """Whether b may be written after `a ≈`."""
    try:
        left, right = value(a), value(b)
        return abs(left - right) <= abs(left) / 50 if left else abs(right) < Fraction(1, 50)
    except (Undefined, TooBig, TypeError):
        return False


def _equation(sides: Sequence[Tree], signs: Sequence[str]) -> tuple[Tree, ...] | None:
    """Sides of an equation without the rounded ones after ≈; None where it is false."""
    kept = [sides[0]]
    for side, sign in zip(sides[1:], signs, strict=True):
        if sign == "=" or kept[-1][0] in _NAMES:
            kept.append(side)
        elif _is_constant(kept[-1]) and _is_constant(side) and not _close(kept[-1], side):
            return None
    constants = [side for side in kept if _is_constant(side)]
    if any(not equal(constants[0], other) for other in constants[1:]):
        return None
    return tuple(kept)


def _shape(tree: Tree) -> Tree:
    """± spelt out, labels and rounded values dropped, one name for all values of `x = 1, 2`."""
    form = tree[0]
    if form in ("mul", "div", "neg") and _has(tree, "matrix"):
        return _scaled(tree)
    if form == "mul" and tree[1][0] == "sym" and tree[2][0] == "fenced":  # the point A(1, 2)
        return tree[2]
    if form == "rel":
        sides, signs = tree[1], tree[2]
        if set(signs) <= {"=", "≈"}:
            kept = _equation(sides, signs)
            if kept is None:
                return ("false",)
            if kept[0][0] == "label":
                kept = kept[1:]
            if len(kept) == 1:
                return _shape(kept[0])
            if (
                len(kept) == 2
                and kept[0][0] == kept[1][0] == "fenced"
                and len(kept[0]) == len(kept[1])
            ):
                if all(name[0] == "sym" for name in kept[0][3:]):  # (x, y) = (1, 2)
                    pairs = zip(kept[0][3:], kept[1][3:], strict=True)
                    return ("list", ",", *(("rel", pair, ("=",)) for pair in pairs))
            if kept[-1][0] == "list" or _has(kept[-1], "pm"):
                items = _items(_shape(kept[-1]))
                return ("list", "or", *(("rel", (kept[0], item), ("=",)) for item in items))
            return ("rel", kept, ("=",) * (len(kept) - 1))
        return tree
    if form == "list":
        items = [_shape(item) for item in tree[2:]]
        flat: list[Tree] = []
        for item in items:
            if (
                flat
                and item[0] not in ("rel", "mod", "dots")
                and _name(flat[-1])
                and _name(flat[-1]) == _name(flat[0])
            ):
                item = ("rel", (flat[0][1][0], item), ("=",))
            flat += item[2:] if item[0] == "list" else [item]
        family = _family(flat)
        return family or ("list", tree[1], *flat)
    if form in ("quantity", "pct") and _has(tree, "pm"):
        return ("list", "or", *((form, _signed(tree[1], s), *tree[2:]) for s in (True, False)))
    if form in _EXPRESSIONS | {"pm"} and _has(tree, "pm"):
        return ("list", "or", _signed(tree, True), _signed(tree, False))
    if form == "set":
        return ("set", *(i for item in tree[1:] for i in _items(_shape(item))))
    if form == "union":
        parts = [_shape(part) for part in tree[1:]]
        if all(part[0] == "set" for part in parts):
            return ("set", *(item for part in parts for item in part[1:]))
    return tree


def _scaled(tree: Tree) -> Tree:
    """A matrix times a number, entry by entry."""
    if tree[0] == "neg":
        scale: Tree = num(-1)
        matrix = tree[1]
    elif tree[0] == "div":
        matrix, scale = tree[1], ("div", num(1), tree[2])
    else:
        scale, matrix = (
            tree[1:] if tree[2][0] not in _EXPRESSIONS or _has(tree[2], "matrix") else tree[:0:-1]
        )
    matrix = _shape(matrix)
    if matrix[0] != "matrix" or scale[0] not in _EXPRESSIONS or _has(scale, "matrix"):
        return tree
    rows = tuple(tuple(("mul", scale, entry) for entry in row) for row in matrix[2])
    return ("matrix", matrix[1], rows)


def _items(tree: Tree) -> tuple[Tree, ...]:
    return tree[2:] if tree[0] == "list" else (tree,)


def _name(tree: Tree) -> Tree | None:
    """`x` of `x = 5`."""
    if tree[0] == "rel" and set(tree[2]) == {"="} and tree[1][0][0] in _NAMES:
        return tree[1][0]
    return None


def _family(items: list[Tree]) -> Tree | None:
    """`a + n b, n ∈ Z`: ("family", expression, n)."""
    if len(items) != 2 or items[1][0] != "rel" or items[1][2] != ("∈",):
        return None
    (parameter, where), what = items[1][1], items[0]
    if parameter[0] != "sym" or where[0] != "space":
        return None
    if _name(what):
        what = what[1][-1]
    return ("family", what, parameter[1]) if what[0] in _EXPRESSIONS else None


def _stated(tree: Tree) -> Tree | None:
    """The value that an equation states: 5 of `x = 5`, of `5 = x` and of `x = 2 + 3 = 5`."""
    values = [side for side in tree[1] if side[0] not in _NAMES]
    return values[-1] if values else tree[1][-1]


# ---- kinds of answers --------------------------------------------------------------------------


def _decimal(tree: Tree) -> tuple[Fraction, int] | None:
    """Value and places of a decimal as written."""
    if tree[0] == "neg" and (inner := _decimal(tree[1])):
        return -inner[0], inner[1]
    return (tree[1], tree[2]) if tree[0] == "num" and tree[2] is not None else None


def _has_decimals(tree: Tree) -> bool:
    found = False

    def look(part: Tree) -> None:
        nonlocal found
        found |= part[0] == "num" and part[2] is not None

    walk(tree, look)
    return found


def _is_written_out(fraction: Fraction, decimal: Fraction, places: int) -> bool:
    """Whether 0.333333 is 1/3: six digits or more that show the period three times over."""
    if places < 6 or (fraction < 0) != (decimal < 0):
        return False
    shown = int(abs(decimal) * 10**places)
    if int(abs(fraction) * 10**places) != shown:
        return False
    digits = str(shown)[-places:].rjust(places, "0")
    return any(
        digits.endswith(digits[-n:] * 3) and set(digits[-n:]) != {"0"} and 3 * n >= places - 2
        for n in range(1, places // 3 + 1)
    ) and bool((10**places * fraction).denominator != 1)


def _same_expression(gold: Tree, answer: Tree) -> bool:
    if equal(gold, answer):
        return True
    if decimal := _decimal(answer):
        fraction = exact(gold)
        return (
            fraction is not None and not _has_decimals(gold) and _is_written_out(fraction, *decimal)
        )
    if (decimal := _decimal(gold)) and _is_constant(answer) and not _has_decimals(answer):
        significant = len(str(abs(int(decimal[0] * 10 ** decimal[1]))))
        return significant >= 5 and decimal[1] >= 4 and rounds_to(answer, *decimal)
    return _same_up_to_constant(gold, answer)


def _same_up_to_constant(gold: Tree, answer: Tree) -> bool:
    """Antiderivatives, whose + C takes up every other constant."""
    names = symbols(gold), symbols(answer)
    constants = ["C", "c", "K", "k"]
    found = [next((c for c in constants if c in n), None) for n in names]
    if not all(found) or any(len(n) < 2 for n in names) or not any(_ends_in(gold, c) for c in "C"):
        return False
    if not _ends_in(answer, found[1] or ""):
        return False
    answer = replaced(answer, ("sym", found[1]), ("sym", found[0]))
    if symbols(gold) != symbols(answer):
        return False
    gap: Tree = ("add", gold, ("neg", answer))
    first, *others = (_at(gap, spot) for spot in points(gap))
    return all(equal(first, other) for other in others)


def _ends_in(tree: Tree, name: str) -> bool:
    """Whether the symbol is one of the terms."""
    if tree[0] == "add":
        return _ends_in(tree[1], name) or _ends_in(tree[2], name)
    return tree == ("sym", name)


def _same_quantity(gold: Tree, answer: Tree) -> bool:
    if gold[0] == answer[0] == "quantity":
        (_, g, unit), (_, a, other) = gold, answer
        if unit.dims != other.dims:
            return False
        if unit == other:
            return same(g, a)
        if not _is_constant(g) or not _is_constant(a):
            return False
        sides = [
            (
                "add",
                ("mul", v, ("mul", num(u.factor), ("pow", ("const", "π"), num(u.pi)))),
                num(u.offset),
            )
            for v, u in ((g, unit), (a, other))
        ]
        return equal(sides[0], sides[1])
    if gold[0] == "quantity" and answer[0] == "quantity":
        return False
    return same(
        gold[1] if gold[0] == "quantity" else gold, answer[1] if answer[0] == "quantity" else answer
    )


def _same_percent(gold: Tree, answer: Tree) -> bool:
    """50 % is 50 and 0.5 where the gold has the sign; a gold of 1 or less without it is a share."""
    if gold[0] == answer[0] == "pct":
        return same(gold[1], answer[1])
    if gold[0] == "pct":
        if answer[0] not in _EXPRESSIONS:
            return False
        return same(gold[1], answer) or equal(("div", gold[1], num(100)), answer)
    if gold[0] not in _EXPRESSIONS:
        return False
    share = ("div", answer[1], num(100))
    size = exact(gold)
    return equal(gold, share) or (size is not None and abs(size) > 1 and same(gold, answer[1]))


def _same_time(gold: Tree, answer: Tree) -> bool:
    if gold[0] == answer[0] == "time":
        (_, g, g_half, _), (_, a, a_half, _) = gold, answer
        if g_half and a_half:
            return g % 720 == a % 720 and g_half == a_half
        if g_half or a_half:
            half, full = ((g, g_half), a) if g_half else ((a, a_half), g)
            day = half[0] % 720 + (720 if half[1] == "pm" else 0)
            return full in (day, half[0])
        return g == a
    numbers = [tree[3] if tree[0] == "time" else None for tree in (gold, answer)]
    plain = [tree if n is None else ("ratio", *n) if len(n) == 2 else n[0] if n else None
             for tree, n in zip((gold, answer), numbers, strict=True)]  # fmt: skip
    return plain[0] is not None and plain[1] is not None and same(plain[0], plain[1])


def _same_ratio(gold: Tree, answer: Tree) -> bool:
    if gold[0] == answer[0] == "ratio":
        return len(gold) == len(answer) and all(
            equal(("mul", g, answer[1]), ("mul", a, gold[1]))
            for g, a in zip(gold[2:], answer[2:], strict=True)
        )
    ratio, other = (gold, answer) if gold[0] == "ratio" else (answer, gold)
    return len(ratio) == 3 and other[0] == "div" and same(("div", *ratio[1:]), other)


def _same_based(gold: Tree, answer: Tree) -> bool:
    if gold[0] == answer[0] == "based":
        return gold == answer
    based, other = (gold, answer) if gold[0] == "based" else (answer, gold)
    number = exact(other) if other[0] == "num" else None
    return number is not None and str(number) == based[1]


def _same_choice(gold: Tree, answer: Tree) -> bool:
    if gold[0] == answer[0] == "choice":
        if gold[1] != answer[1]:
            return False
        return gold[2] is None or answer[2] is None or same(gold[2], answer[2])
    if gold[0] == "choice":
        if gold[2] is not None:
            return same(gold[2], answer)
        return answer == ("sym", gold[1].lower()) or answer == ("sym", gold[1])
    return answer[2] is not None and same(gold, answer[2])


def _same_modulo(gold: Tree, answer: Tree) -> bool:
    if gold[0] == answer[0] == "mod":
        (_, g_name, g, m), (_, a_name, a, n) = gold, answer
        named = g_name is None or a_name is None or same(g_name, a_name)
        steps = exact(("div", ("add", g, ("neg", a)), m))
        return named and equal(m, n) and steps is not None and steps.denominator == 1
    return same(gold[2] if gold[0] == "mod" else gold, answer[2] if answer[0] == "mod" else answer)


def _same_family(gold: Tree, answer: Tree) -> bool:
    """Arithmetic progressions a + n b are equal as sets; others, when they are the same in n."""
    sides = []
    for tree in (gold, answer):
        if tree[0] == "rel" and _name(tree):
            tree = tree[1][-1]
        if tree[0] != "family":
            if tree[0] not in _EXPRESSIONS or len(symbols(tree)) != 1:
                return False
            tree = ("family", tree, next(iter(symbols(tree))))
        sides.append(replaced(tree[1], ("sym", tree[2]), ("sym", "parameter")))
    if equal(sides[0], sides[1]):
        return True
    at = [[replaced(side, ("sym", "parameter"), num(i)) for i in range(3)] for side in sides]
    steps = []
    for values in at:
        step = ("add", values[1], ("neg", values[0]))
        if symbols(*values) or not equal(("add", values[2], ("neg", values[1])), step):
            return False
        steps.append(step)
    offset = ("div", ("add", at[0][0], ("neg", at[1][0])), steps[0])
    if not (equal(steps[0], steps[1]) or equal(steps[0], ("neg", steps[1]))):
        return False
    found = value(offset)
    return equal(offset, num(round(found if isinstance(found, Fraction) else found.real)))


# ---- relations ---------------------------------------------------------------------------------


def _gap(tree: Tree) -> Tree:
    left, right = tree[1]
    return ("add", left, ("neg", right))


def _proportional(gold: Tree, answer: Tree, positive: bool) -> bool:
    """Whether one expression is a constant multiple of the other."""
    spots = points(gold, answer)
    if spots == [{}]:
        return False
    pairs = []
    for spot in spots:
        try:
            pairs.append((value(gold, spot), value(answer, spot), spot))
        except Undefined:
            continue
    pairs = [(g, a, spot) for g, a, spot in pairs if g and a]
    if len(pairs) < 3:
        return False
    g, a, spot = pairs[0]
    if positive and not (isinstance(g, Fraction) and isinstance(a, Fraction) and g / a > 0):
        return False
    first_gold, first_answer = _at(gold, spot), _at(answer, spot)
    return all(
        equal(("mul", _at(gold, s), first_answer), ("mul", _at(answer, s), first_gold))
        for _, _, s in pairs[1:]
    )


def _same_solution(gold: Tree, answer: Tree) -> bool:
    """Whether two equations, linear in some variable, give the same value for it."""
    if symbols(gold) != symbols(answer) or len(symbols(gold)) < 2:
        return False
    for name in symbols(gold):
        solved = [linear(tree, name) for tree in (gold, answer)]
        if solved[0] and solved[1]:
            return equal(solved[0][1], solved[1][1])
    return False


def _at(tree: Tree, spot: dict[str, Fraction]) -> Tree:
    if tree[0] == "sym" and tree[1] in spot:
        return num(spot[tree[1]])
    return tuple(_at(part, spot) if isinstance(part, tuple) else part for part in tree)


def _same_relation(gold: Tree, answer: Tree) -> bool:
    if gold[0] == answer[0] == "rel":
        if set(gold[2]) == set(answer[2]) == {"="}:
            names = _name(gold), _name(answer)
            if all(names) and names[0] == names[1]:
                return same(gold[1][-1], answer[1][-1])
            if all(names) and symbols(gold[1][-1]) == symbols(answer[1][-1]) == frozenset():
                return False
            if len(gold[1]) == len(answer[1]) == 2:
                g, a = _gap(gold), _gap(answer)
                return _are_expressions(gold, answer) and (
                    _proportional(g, a, False) or _same_solution(g, a)
                )
            return False
        flipped = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
        if len(gold[2]) != 1 or len(answer[2]) != 1 or not _are_expressions(gold, answer):
            return False
        if gold[2][0] in flipped and answer[2] == (flipped[gold[2][0]],):
            answer = ("rel", answer[1][::-1], gold[2])
        return gold[2] == answer[2] and _proportional(
            _gap(gold), _gap(answer), gold[2][0] in flipped
        )
    if answer[0] == "rel":
        if set(answer[2]) == {"="}:
            stated = _stated(answer)
            return stated is not None and same(gold, stated)
        return answer[2] == ("∈",) and same(gold, answer[1][1])
    if set(gold[2]) == {"="}:
        return _name(gold) is not None and same(gold[1][-1], answer)
    return gold[2] == ("∈",) and same(gold[1][1], answer)


def _are_expressions(*relations: Tree) -> bool:
    return all(side[0] in _EXPRESSIONS for relation in relations for side in relation[1])


# ---- collections -------------------------------------------------------------------------------


def _matched(gold: Sequence[Tree], answer: Sequence[Tree]) -> bool:
    """The same items in any order."""
    left = list(answer)
    for item in gold:
        for i, other in enumerate(left):
            if same(item, other):
                del left[i]
                break
        else:
            return False
    return not left


def _in_order(gold: Sequence[Tree], answer: Sequence[Tree]) -> bool:
    return len(gold) == len(answer) and all(map(same, gold, answer))


def _distinct(items: Sequence[Tree]) -> list[Tree]:
    kept: list[Tree] = []
    for item in items:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return kept


def _vector(tree: Tree) -> tuple[Tree, ...] | None:
    if tree[0] == "matrix":
        rows = tree[2]
        return tuple(e for row in rows for e in row) if min(len(rows), len(rows[0])) == 1 else None
    if tree[0] == "fenced":
        return tree[3:]
    return None


def _unnamed(items: Sequence[Tree]) -> list[Tree]:
    return [item[1][-1] if _name(item) else item for item in items]


def _same_collection(gold: Tree, answer: Tree) -> bool:
    kinds = gold[0], answer[0]
    if kinds[0] == "set" and kinds[1] not in ("set", "list") and len(gold) == 2:
        return same(gold[1], answer)
    if kinds[1] == "set" and kinds[0] not in ("set", "list") and len(answer) == 2:
        return same(gold, answer[1])
    if kinds == ("matrix", "matrix"):
        g, a = gold[2], answer[2]
        return len(g) == len(a) and all(map(_in_order, g, a))
    if "matrix" in kinds or kinds == ("fenced", "fenced"):
        if kinds == ("fenced", "fenced") and gold[1:3] != answer[1:3]:
            return False
        g, a = _vector(gold), _vector(answer)
        return g is not None and a is not None and _in_order(g, a)
    if "fenced" in kinds:
        return _same_point(gold, answer)
    g, a = (list(tree[1:]) if tree[0] == "set" else list(_items(tree)) for tree in (gold, answer))
    if max(len(g), len(a)) > MAX_ITEMS:
        return False
    if any(item[0] == "dots" for item in g + a):
        return _in_order(_unnamed(g), _unnamed(a))
    named = [bool(items) and all(_name(item) for item in items) for items in (g, a)]
    if named[0] and not named[1] or named[1] and not named[0]:
        names = {repr(_name(item)) for item in (g if named[0] else a)}
        if len(names) > 1:  # x = 2, y = -3 for 2, -3
            return kinds == ("list", "list") and _in_order(_unnamed(g), _unnamed(a))
        g, a = _unnamed(g), _unnamed(a)
    if "set" in kinds or gold[0] != "list" or answer[0] != "list" or "or" in (gold[1], answer[1]):
        g, a = _distinct(g), _distinct(a)
    return len(g) == len(a) and _matched(g, a)


def _same_point(gold: Tree, answer: Tree) -> bool:
    """A point and a list without brackets: x = 2, y = -3 for (2, -3)."""
    point, other = (gold, answer) if gold[0] == "fenced" else (answer, gold)
    if point[1:3] != ("(", ")") or other[0] != "list" or other[1] == "or":
        return False
    items = _unnamed(other[2:])
    g, a = (point[3:], items) if gold[0] == "fenced" else (items, point[3:])
    return _in_order(g, a)


# ---- the comparison ----------------------------------------------------------------------------


def _region(tree: Tree) -> Region | None:
    try:
        return region_of(tree)
    except (Undefined, TypeError):
        return None


def _infinite(tree: Tree) -> int:
    if tree[0] == "neg":
        return -_infinite(tree[1])
    return 1 if tree == ("inf",) else 0


def same(gold: Tree, answer: Tree) -> bool:
    """Whether two trees are the same answer. Raises TooBig where that takes long to tell."""
    gold, answer = _shape(gold), _shape(answer)
    kinds = {gold[0], answer[0]}
    if "false" in kinds:
        return False
    if gold == answer:
        return True
    if "choice" in kinds:
        return _same_choice(gold, answer)
    if "text" in kinds or "label" in kinds:
        return False
    if "mod" in kinds:
        return _same_modulo(gold, answer)
    if "family" in kinds:
        return _same_family(gold, answer)
    if kinds & {"rel", "union", "inter", "minus", "fenced", "space", "empty", "set", "list"}:
        g, a = _region(gold), _region(answer)
        if (
            g
            and a
            and (kinds == {"fenced"} or not (g.written_as_interval and a.written_as_interval))
        ):
            if "set" not in kinds or "fenced" not in kinds:
                return same_region(g, a)
    if "rel" in kinds and "list" not in kinds:
        return _same_relation(gold, answer)
    if "pct" in kinds:
        return _same_percent(*(t[1] if t[0] == "quantity" else t for t in (gold, answer)))
    if "time" in kinds:
        return _same_time(gold, answer)
    if "quantity" in kinds and not kinds & {"list", "set", "fenced"}:
        return _same_quantity(gold, answer)
    if "ratio" in kinds:
        return _same_ratio(gold, answer)
    if "based" in kinds:
        return _same_based(gold, answer)
    if kinds & {"list", "set", "fenced", "matrix"}:
        return _same_collection(gold, answer)
    if infinite := _infinite(gold) or _infinite(answer):
        return _infinite(gold) == _infinite(answer) == infinite
    if kinds <= _EXPRESSIONS:
        return _same_expression(gold, answer)
    return False


# ---- verdicts on texts -------------------------------------------------------------------------

_DECIMAL_COMMA = re.compile(
    r"[-+]?(?:0,\d+|\d+,(?:\d{1,2}|\d{4,}))"
)  # only where a number is asked for
_PROSE = re.compile(r"[^\W\d_]{2,}")
_NUMBER = re.compile(r"[-+]?\d{1,1000}(?:\.\d{1,1000})?", re.A)
_NOT_PROSE = re.compile(r"[\\=<>^+*/|\[\]]|\b(?:sin|cos|tan|log|ln|sqrt|pi)\b")


@lru_cache(maxsize=8192)
def key(text: str) -> str:
    """Equal for answers with the same spelling, but for white space."""
    tidied = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])", "", tidy(text))
    tidied = tidied.replace("$", "").strip(" .,;")
    return re.sub(r"(?<![\d\\a-zA-Z]) +| +(?![\da-zA-Z])", "", tidied)


def is_prose(text: str) -> bool:
    """Whether an answer consists of words, which are compared as words."""
    return bool(_PROSE.search(text)) and not _NOT_PROSE.search(text)


@lru_cache(maxsize=8192)
def is_readable(gold: str) -> bool:
    """Whether a gold answer has a meaning beyond its letters. NeedsAlgebra counts as none."""
    try:
        readings = read(gold)
    except NeedsAlgebra:
        return False
    return len(readings) > 1 or is_prose(readings[-1][1])


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
    if _DECIMAL_COMMA.fullmatch(answer.strip()) and golds[0][0] in _EXPRESSIONS:
        return verdict(answer.replace(",", "."), gold)
    return None if undecided else False
