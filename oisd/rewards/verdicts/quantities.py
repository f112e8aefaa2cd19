"""Numbers that mean something: quantities, percentages, times, ratios, numerals, residues.

`same` compares the values inside.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from oisd.rewards.reading.trees import Tree, nodes, num, replaced, times
from oisd.rewards.verdicts.equality import EXPRESSIONS, equal, is_constant, symbols
from oisd.rewards.verdicts.shapes import name_of
from oisd.rewards.verdicts.values import exact, value

Same = Callable[[Tree, Tree], bool]


def same_quantity(gold: Tree, answer: Tree, same: Same) -> bool:
    if gold[0] == answer[0] == "quantity":
        (_, g, unit), (_, a, other) = gold, answer
        if unit.dims != other.dims:
            return False
        if unit == other:
            return same(g, a)
        if not is_constant(g) or not is_constant(a):
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
    for angle, other in ((gold, answer), (answer, gold)):
        # An angle in degrees beside a multiple of pi, which can only be in radians.
        if angle[0] == "quantity" and angle[2].is_angle and other[0] in EXPRESSIONS:
            if ("const", "π") in nodes(other) and angle[2].pi == 0:
                return equal(("deg", times(angle[1], angle[2].factor)), other)
    if _is_compound(gold):  # 3 h 20 min: a number alone may be of hours or of minutes
        return False
    return same(
        gold[1] if gold[0] == "quantity" else gold, answer[1] if answer[0] == "quantity" else answer
    )


def _is_compound(tree: Tree) -> bool:
    """Whether a quantity was written in several units, other than those of an angle."""
    if tree[0] != "quantity" or tree[1][0] != "add" or tree[2].is_angle:
        return False
    first = tree[1]
    while first[0] == "add":
        first = first[1]
    return first == num(0)


def same_percent(gold: Tree, answer: Tree, same: Same) -> bool:
    """50 % is 50 and 0.5 where the gold has the sign; a gold of 1 or less without it is a share."""
    if gold[0] == answer[0] == "pct":
        return same(gold[1], answer[1])
    if gold[0] == "pct":
        if answer[0] not in EXPRESSIONS:
            return False
        return same(gold[1], answer) or equal(("div", gold[1], num(100)), answer)
    if gold[0] not in EXPRESSIONS:
        return False
    share = ("div", answer[1], num(100))
    size = exact(gold)
    return equal(gold, share) or (size is not None and abs(size) > 1 and same(gold, answer[1]))


def same_time(gold: Tree, answer: Tree, same: Same) -> bool:
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


def same_ratio(gold: Tree, answer: Tree, same: Same) -> bool:
    if gold[0] == answer[0] == "ratio":
        return len(gold) == len(answer) and all(
            equal(("mul", g, answer[1]), ("mul", a, gold[1]))
            for g, a in zip(gold[2:], answer[2:], strict=True)
        )
    ratio, other = (gold, answer) if gold[0] == "ratio" else (answer, gold)
    return len(ratio) == 3 and other[0] == "div" and same(("div", *ratio[1:]), other)


def same_based(gold: Tree, answer: Tree) -> bool:
    if gold[0] == answer[0] == "based":
        return gold == answer
    if gold[0] == "based":  # whose base the question has
        number = exact(answer) if answer[0] == "num" else None
        return number is not None and str(number) == gold[1]
    # A base that the gold does not have is part of the answer: 101_2 is 5, not 101.
    return exact(gold) == int(answer[1], answer[2]) if is_constant(gold) else False


def same_clock(gold: Tree, answer: Tree) -> bool:
    """A length of time and h:mm:ss."""
    length, clock = (gold, answer) if gold[0] == "quantity" else (answer, gold)
    parts = [exact(part) for part in clock[1:]]
    total = exact(length[1])
    if length[2].dims != (("second", 1),) or length[2].pi or total is None or len(parts) != 3:
        return False
    if any(part is None or part.denominator != 1 for part in parts):
        return False
    hours, minutes, seconds = (part for part in parts if part is not None)
    in_range = max(minutes, seconds) < 60
    return in_range and total * length[2].factor == 3600 * hours + 60 * minutes + seconds


def same_modulo(gold: Tree, answer: Tree, same: Same) -> bool:
    if gold[0] == answer[0] == "mod":
        (_, g_name, g, m), (_, a_name, a, n) = gold, answer
        named = g_name is None or a_name is None or same(g_name, a_name)
        steps = exact(("div", ("add", g, ("neg", a)), m))
        return named and equal(m, n) and steps is not None and steps.denominator == 1
    return same(gold[2] if gold[0] == "mod" else gold, answer[2] if answer[0] == "mod" else answer)


def same_family(gold: Tree, answer: Tree) -> bool:
    """Arithmetic progressions a + n b are equal as sets; others, when they are the same in n."""
    sides = []
    for tree in (gold, answer):
        if tree[0] == "rel" and name_of(tree):
            tree = tree[1][-1]
        if tree[0] != "family":
            if tree[0] not in EXPRESSIONS or len(symbols(tree)) != 1:
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
