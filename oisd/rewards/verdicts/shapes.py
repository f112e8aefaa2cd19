"""Trees in the form in which they are compared.

± is spelt out, labels and rounded values are dropped, all values of `x = 1, 2` get the name, a
matrix is multiplied out, `a + n b, n ∈ Z` becomes ("family", expression, n), and an equation
between different numbers becomes ("false",).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from oisd.rewards.reading.trees import Tree, has, num
from oisd.rewards.verdicts.equality import EXPRESSIONS, equal, is_constant
from oisd.rewards.verdicts.values import TooBig, Undefined, exact, value

_NAMES = frozenset("sym label call".split())


def normal(tree: Tree) -> Tree:
    """± spelt out, labels and rounded values dropped, one name for all values of `x = 1, 2`."""
    form = tree[0]
    if form in ("mul", "div", "neg") and has(tree, "matrix"):
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
                return normal(kept[0])
            if (
                len(kept) == 2
                and kept[0][0] == kept[1][0] == "fenced"
                and len(kept[0]) == len(kept[1])
            ):
                if all(name[0] == "sym" for name in kept[0][3:]):  # (x, y) = (1, 2)
                    pairs = zip(kept[0][3:], kept[1][3:], strict=True)
                    return ("list", ",", *(("rel", pair, ("=",)) for pair in pairs))
            if kept[-1][0] == "list" or has(kept[-1], "pm"):
                items = items_of(normal(kept[-1]))
                return ("list", "or", *(("rel", (kept[0], item), ("=",)) for item in items))
            return ("rel", kept, ("=",) * (len(kept) - 1))
        return tree
    if form == "list":
        items = [normal(item) for item in tree[2:]]
        flat: list[Tree] = []
        for item in items:
            if (
                flat
                and item[0] not in ("rel", "mod", "dots")
                and name_of(flat[-1])
                and name_of(flat[-1]) == name_of(flat[0])
            ):
                item = ("list", ",", *(("rel", (flat[0][1][0], i), ("=",)) for i in items_of(item)))
            flat += items_of(item)
        family = _family(flat)
        return family or ("list", tree[1], *flat)
    if form in ("quantity", "pct") and has(tree, "pm"):
        return ("list", "or", *((form, _signed(tree[1], s), *tree[2:]) for s in (True, False)))
    if form in EXPRESSIONS | {"pm"} and has(tree, "pm"):
        return ("list", "or", _signed(tree, True), _signed(tree, False))
    if form == "set":
        return _numbers(("set", *(i for item in tree[1:] for i in items_of(normal(item)))))
    if form == "union":
        parts = [normal(part) for part in tree[1:]]
        if all(part[0] == "set" for part in parts):
            return ("set", *(item for part in parts for item in part[1:]))
    return tree


def _signed(tree: Tree, plus: bool) -> Tree:
    """One of the two expressions that ± stands for."""
    if tree[0] == "pm":
        right = _signed(tree[2], plus)
        return ("add", _signed(tree[1], plus), right if (tree[3] > 0) == plus else ("neg", right))
    return tuple(_signed(part, plus) if isinstance(part, tuple) else part for part in tree)


def _scaled(tree: Tree) -> Tree:
    """A matrix times a number, entry by entry."""
    if tree[0] == "neg":
        scale: Tree = num(-1)
        matrix = tree[1]
    elif tree[0] == "div":
        matrix, scale = tree[1], ("div", num(1), tree[2])
    else:
        scale, matrix = (
            tree[1:] if tree[2][0] not in EXPRESSIONS or has(tree[2], "matrix") else tree[:0:-1]
        )
    matrix = normal(matrix)
    if matrix[0] != "matrix" or scale[0] not in EXPRESSIONS or has(scale, "matrix"):
        return tree
    rows = tuple(tuple(("mul", scale, entry) for entry in row) for row in matrix[2])
    return ("matrix", matrix[1], rows)


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
        elif is_constant(kept[-1]) and is_constant(side) and not _close(kept[-1], side):
            return None
    constants = [side for side in kept if is_constant(side)]
    if any(not equal(constants[0], other) for other in constants[1:]):
        return None
    return tuple(kept)


def _numbers(tree: Tree) -> Tree:
    """The set that {1, 2, 3, ...} or {..., -1, 0, 1, ...} is; another one as it stands."""
    open_below, open_above = tree[1] == ("dots",), tree[-1] == ("dots",)
    items = tree[1 + open_below : len(tree) - open_above]
    found = [exact(item) if is_constant(item) else None for item in items]
    if len(found) < 3 or not (open_below or open_above) or found[0] is None:
        return tree
    rising = found == [found[0] + i for i in range(len(found))]
    if rising and open_above:
        if open_below:
            return ("space", "Z") if 0 in found else tree
        return {1: ("space", "N"), 0: ("space", "W")}.get(int(found[0]), tree)
    falling = [*reversed(found)] if open_below else found
    down = falling == [-1 - i for i in range(len(found))]
    return ("space", "Z-") if down and open_below != open_above else tree


def items_of(tree: Tree) -> tuple[Tree, ...]:
    return tree[2:] if tree[0] == "list" else (tree,)


def name_of(tree: Tree) -> Tree | None:
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
    if name_of(what):
        what = what[1][-1]
    return ("family", what, parameter[1]) if what[0] in EXPRESSIONS else None


def stated(tree: Tree) -> Tree:
    """The value that an equation states: 5 of `x = 5`, of `5 = x` and of `x = 2 + 3 = 5`."""
    values = [side for side in tree[1] if side[0] not in _NAMES]
    if len(values) == len(tree[1]) and values[-1] == num(0):
        return ("false",)  # x + 2y - 6 = 0 states no value
    return values[-1] if values else tree[1][-1]


def unnamed(items: Sequence[Tree]) -> list[Tree]:
    return [item[1][-1] if name_of(item) else item for item in items]


def vector(tree: Tree) -> tuple[Tree, ...] | None:
    if tree[0] == "matrix":
        rows = tree[2]
        return tuple(e for row in rows for e in row) if min(len(rows), len(rows[0])) == 1 else None
    if tree[0] == "fenced":
        return tree[3:]
    return None
