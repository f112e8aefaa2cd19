"""Sets of real numbers: intervals, unions, inequalities in one variable, all in one normal form.

A region is a sorted row of end points and, for each gap between them and each point itself, whether
it belongs. Two regions are equal when these are, however they were written.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from oisd.rewards.reading.trees import Tree, num, replaced
from oisd.rewards.verdicts.equality import equal, points, symbols
from oisd.rewards.verdicts.values import Undefined, value

_INEQUALITIES = frozenset("< > ≤ ≥ ≠".split())


@dataclass(frozen=True)
class Region:
    ends: tuple[Tree, ...]
    inside: tuple[bool, ...]  # gap, end, gap, end, ..., gap
    variable: str | None = None
    written_as_interval: bool = False  # (1, 2) may as well be a point


def minus_one(tree: Tree) -> Tree:
    return ("neg", tree)


def _place(end: Tree) -> Any:
    """Where to sort an end point; one with letters at a random value of these."""
    found = value(end, points(end)[0])
    if isinstance(found, Fraction):
        return found
    if getattr(found, "imag", 0):
        raise Undefined
    return found.real


def _below(a: Any, b: Any) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a < b
    from mpmath import mpf

    a, b = (mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x for x in (a, b))
    return a < b


def _merged(a: tuple[Tree, ...], b: tuple[Tree, ...]) -> list[Tree]:
    merged: list[Tree] = []
    left, right = list(a), list(b)
    while left and right:
        if equal(left[0], right[0]):
            right.pop(0)
        elif _below(_place(left[0]), _place(right[0])):
            merged.append(left.pop(0))
        else:
            merged.append(right.pop(0))
    return merged + left + right


def _spread(region: Region, ends: list[Tree]) -> list[bool]:
    """Membership on a finer row of end points."""
    inside, at = [region.inside[0]], 0
    for end in ends:
        if at < len(region.ends) and equal(region.ends[at], end):
            inside.append(region.inside[2 * at + 1])
            at += 1
        else:
            inside.append(region.inside[2 * at])
        inside.append(region.inside[2 * at])
    return inside


def _normal(ends: list[Tree], inside: list[bool], variable: str | None) -> Region:
    kept, flags = [], [inside[0]]
    for i, end in enumerate(ends):
        if inside[2 * i] == inside[2 * i + 1] == inside[2 * i + 2]:
            continue
        kept.append(end)
        flags += inside[2 * i + 1 : 2 * i + 3]
    return Region(tuple(kept), tuple(flags), variable)


def _combined(form: str, a: Region, b: Region) -> Region | None:
    if a.variable and b.variable and a.variable != b.variable:
        return None
    ends = _merged(a.ends, b.ends)
    rule = {
        "union": lambda x, y: x or y,
        "inter": lambda x, y: x and y,
        "minus": lambda x, y: x and not y,
    }[form]
    inside = [rule(x, y) for x, y in zip(_spread(a, ends), _spread(b, ends), strict=True)]
    return _normal(ends, inside, a.variable or b.variable)


EVERYTHING = Region((), (True,))
NOTHING = Region((), (False,))


def _is_infinite(tree: Tree) -> int:
    if tree == ("inf",):
        return 1
    return -1 if tree == ("neg", ("inf",)) else 0


def _interval(low: Tree, low_in: bool, high: Tree, high_in: bool) -> Region | None:
    bounds = _is_infinite(low), _is_infinite(high)
    if bounds[0] > 0 or bounds[1] < 0:
        return None
    if not any(bounds) and not _below(_place(low), _place(high)):
        return None
    ends = [end for end, bound in ((low, bounds[0]), (high, bounds[1])) if not bound]
    inside = [True] if bounds[0] else [False, low_in, True]
    inside += [] if bounds[1] else [high_in, False]
    return Region(tuple(ends), tuple(inside))


def linear(gap: Tree, variable: str) -> tuple[Tree, Tree] | None:
    """Slope and root of an expression linear in the variable, else None."""
    at = [replaced(gap, ("sym", variable), num(i)) for i in range(3)]
    slope: Tree = ("add", at[1], minus_one(at[0]))
    if not equal(("add", at[2], at[0]), ("mul", num(2), at[1])) or equal(slope, num(0)):
        return None
    return slope, minus_one(("div", at[0], slope))


def _half_line(left: Tree, sign: str, right: Tree, variable: str) -> Region | None:
    """Solutions of a linear inequality, or of one with |...| on the left."""
    if left[:2] == ("fn", "abs") and not symbols(right):
        within = "≤" if sign in ("≤", ">") else "<"
        inner = left[2]
        low, high = (_half_line(minus_one(right), within, inner, variable),
                     _half_line(inner, within, right, variable))  # fmt: skip
        inside = _combined("inter", low, high) if low and high else None
        if sign in ("<", "≤") or inside is None:
            return inside
        return _combined("minus", EVERYTHING, inside) if sign in (">", "≥") else None
    if left[0] in ("label", "list") or right[0] in ("label", "list"):
        return None
    flipped = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
    if right == ("sym", variable):
        left, right, sign = right, left, flipped.get(sign, sign)
    if left == ("sym", variable) and variable not in symbols(right):
        end = right
    else:
        gap: Tree = ("add", left, minus_one(right))
        if symbols(gap) != {variable}:
            return None
        solved = linear(gap, variable)
        if solved is None:
            return None
        slope, end = solved
        if _below(_place(slope), Fraction(0)):
            sign = flipped.get(sign, sign)
    if _is_infinite(end):
        return EVERYTHING
    _place(end)
    inside = ("<" in sign or sign in "≤≠", sign in "≤≥=", ">" in sign or sign in "≥≠")
    return Region((end,), inside, variable)


def _main_variable(sides: tuple[Tree, ...]) -> str | None:
    alone = [side[1] for side in sides if side[0] == "sym"]
    if alone:
        return alone[0] if len(set(alone)) == 1 or len(alone) == 1 else None
    names = symbols(*(side for side in sides if side[0] != "label"))
    return next(iter(names)) if len(names) == 1 else None


def _of_relation(sides: tuple[Tree, ...], signs: tuple[str, ...]) -> Region | None:
    if signs == ("∈",):
        region = region_of(sides[1])
        name = sides[0][1] if sides[0][0] == "sym" else None
        return region and Region(region.ends, region.inside, name)
    if not set(signs) <= _INEQUALITIES:
        return None
    variable = _main_variable(sides)
    if variable is None:
        return None
    region: Region | None = EVERYTHING
    for left, sign, right in zip(sides, signs, sides[1:], strict=False):
        half = _half_line(left, sign, right, variable)
        region = _combined("inter", region, half) if region and half else None
    return region


def region_of(tree: Tree) -> Region | None:
    """The region that a tree describes, None where it describes none. May raise Undefined."""
    form = tree[0]
    if tree == ("space", "R"):
        return EVERYTHING
    if tree == ("space", "R+"):
        return _interval(num(0), False, ("inf",), False)
    if form == "empty":
        return NOTHING
    if form == "fenced" and len(tree) == 5:
        low, high = tree[3:]
        if any(end[0] in ("fenced", "set", "list", "rel", "label") for end in (low, high)):
            return None
        region = _interval(low, tree[1] == "[", high, tree[2] == "]")
        pointlike = tree[1:3] == ("(", ")") and not any(map(_is_infinite, tree[3:]))
        return region and Region(region.ends, region.inside, None, pointlike)
    if form in ("union", "inter", "minus"):
        a, b = region_of(tree[1]), region_of(tree[2])
        return _combined(form, a, b) if a and b else None
    if form == "add" and tree[1][0] == "space" and tree[2][0] == "neg":  # R - {0}
        return region_of(("minus", tree[1], tree[2][1]))
    if form == "set":
        region: Region | None = NOTHING
        for item in tree[1:]:
            if item[0] in ("fenced", "set", "list", "rel", "dots") or symbols(item):
                return None
            region = region and _combined("union", region, Region((item,), (False, True, False)))
        return region
    if form == "rel":
        return _of_relation(tree[1], tree[2])
    if form == "list":
        return _of_list(tree[1], list(tree[2:]))
    return None


def _of_list(joint: str, items: list[Tree]) -> Region | None:
    """Inequalities joined by words, intervals one after the other."""
    regions = [region_of(item) for item in items]
    if any(region is None for region in regions):
        return None
    intervals = all(item[0] in ("fenced", "union") for item in items)
    if intervals and joint == "," and not any(map(_is_infinite, (e for i in items for e in i[3:]))):
        return None
    if any(item[0] in ("set", "empty", "space") for item in items):
        return None
    result = regions[0]
    for region in regions[1:]:
        form = "union" if joint == "or" or intervals else "inter"
        result = _combined(form, result, region) if result and region else None
    return result


def same_region(gold: Region, answer: Region) -> bool:
    if gold.variable and answer.variable and gold.variable != answer.variable:
        return False
    return (
        gold.inside == answer.inside
        and len(gold.ends) == len(answer.ends)
        and all(equal(g, a) for g, a in zip(gold.ends, answer.ends, strict=True))
    )
