"""Whether two answers are equal, as a careful human grader decides it.

The gold's form rules. An exact gold asks for an exactly equal answer; a decimal is the number that
its digits say. Units agree or convert where both answers have one, and are left out where one has
none. An ordered gold asks for that order. Answers of different kinds (a word and a number, a point
and a set) are different.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from oisd.rewards.reading.trees import Tree
from oisd.rewards.verdicts.equality import (
    EXPRESSIONS,
    at_point,
    equal,
    points,
    same_expression,
    symbols,
)
from oisd.rewards.verdicts.quantities import (
    same_based,
    same_clock,
    same_family,
    same_modulo,
    same_percent,
    same_quantity,
    same_ratio,
    same_time,
)
from oisd.rewards.verdicts.regions import Region, linear, region_of, same_region
from oisd.rewards.verdicts.shapes import items_of, name_of, normal, stated, unnamed, vector
from oisd.rewards.verdicts.values import Undefined, value

MAX_ITEMS = 60


def same(gold: Tree, answer: Tree) -> bool:
    """Whether two trees are the same answer. Raises TooBig where that takes long to tell."""
    gold, answer = normal(gold), normal(answer)
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
        return same_modulo(gold, answer, same)
    if "family" in kinds:
        return same_family(gold, answer)
    if kinds & {"rel", "union", "inter", "minus", "fenced", "space", "empty", "set", "list"}:
        g, a = _region(gold), _region(answer)
        if (
            g
            and a
            and (kinds == {"fenced"} or not (g.written_as_interval and a.written_as_interval))
        ):
            if "set" not in kinds or "fenced" not in kinds:
                return same_region(g, a)
    if "rel" in kinds:
        return _same_relation(gold, answer)
    if kinds == {"quantity", "ratio"}:
        return same_clock(gold, answer)
    if "quantity" in kinds and kinds & {"pct", "time"}:
        return False
    if "pct" in kinds:
        return same_percent(gold, answer, same)
    if "time" in kinds:
        return same_time(gold, answer, same)
    if "quantity" in kinds and not kinds & {"list", "set", "fenced"}:
        return same_quantity(gold, answer, same)
    if "ratio" in kinds:
        return same_ratio(gold, answer, same)
    if "based" in kinds:
        return same_based(gold, answer)
    if kinds & {"list", "set", "fenced", "matrix"}:
        return _same_collection(gold, answer)
    if infinite := _infinite(gold) or _infinite(answer):
        return _infinite(gold) == _infinite(answer) == infinite
    if kinds <= EXPRESSIONS:
        return same_expression(gold, answer)
    return False


def _region(tree: Tree) -> Region | None:
    try:
        return region_of(tree)
    except (Undefined, TypeError):
        return None


def _infinite(tree: Tree) -> int:
    if tree[0] == "neg":
        return -_infinite(tree[1])
    return 1 if tree == ("inf",) else 0


def _same_choice(gold: Tree, answer: Tree) -> bool:
    if gold[0] == answer[0] == "choice":
        if gold[1] != answer[1]:
            return False
        return gold[2] is None or answer[2] is None or same(gold[2], answer[2])
    if gold[0] == "choice":
        if gold[2] is not None:
            return same(gold[2], answer)
        return answer == ("sym", gold[1].lower()) or answer == ("sym", gold[1])
    return gold == ("sym", answer[1]) if answer[2] is None else same(gold, answer[2])


def _same_relation(gold: Tree, answer: Tree) -> bool:
    if gold[0] == answer[0] == "rel":
        if set(gold[2]) == set(answer[2]) == {"="}:
            names = name_of(gold), name_of(answer)
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
        if gold[2][0] not in flipped and gold[2] != ("≠",):
            return gold[2] == answer[2] and _in_order(gold[1], answer[1])
        if gold[2][0] in flipped and answer[2] == (flipped[gold[2][0]],):
            answer = ("rel", answer[1][::-1], gold[2])
        return gold[2] == answer[2] and _proportional(
            _gap(gold), _gap(answer), gold[2][0] in flipped
        )
    if answer[0] == "rel":
        if set(answer[2]) == {"="}:
            return same(gold, stated(answer))
        return answer[2] == ("∈",) and same(gold, answer[1][1])
    if set(gold[2]) == {"="}:
        return name_of(gold) is not None and same(gold[1][-1], answer)
    return gold[2] == ("∈",) and same(gold[1][1], answer)


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
    first_gold, first_answer = at_point(gold, spot), at_point(answer, spot)
    return all(
        equal(("mul", at_point(gold, s), first_answer), ("mul", at_point(answer, s), first_gold))
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


def _are_expressions(*relations: Tree) -> bool:
    return all(side[0] in EXPRESSIONS for relation in relations for side in relation[1])


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
        g, a = vector(gold), vector(answer)
        return g is not None and a is not None and _in_order(g, a)
    if "fenced" in kinds:
        return _same_point(gold, answer)
    g, a = (list(tree[1:]) if tree[0] == "set" else list(items_of(tree)) for tree in (gold, answer))
    if max(len(g), len(a)) > MAX_ITEMS:
        return False
    joints = {tree[1] for tree in (gold, answer) if tree[0] == "list"}
    if joints == {"and", "or"} and any(item[0] == "sym" for item in g):  # p and q, p or q
        return False
    if any(item[0] == "dots" for item in g + a):
        return _in_order(unnamed(g), unnamed(a))
    named = [bool(items) and all(name_of(item) for item in items) for items in (g, a)]
    if named[0] and not named[1] or named[1] and not named[0]:
        names = {_base_name(item) for item in (g if named[0] else a)}
        if len(names) > 1:  # x = 2, y = -3 for 2, -3
            return (
                kinds == ("list", "list")
                and "or" not in joints
                and _in_order(unnamed(g), unnamed(a))
            )
        g, a = unnamed(g), unnamed(a)
    if "set" in kinds or "or" in joints:
        g, a = _distinct(g), _distinct(a)
    return len(g) == len(a) and _matched(g, a)


def _base_name(item: Tree) -> str:
    """`x` of both `x_1 = 2` and `x_2 = 3`, which are values of the same unknown."""
    return str((name_of(item) or ("", ""))[1]).rstrip("0123456789_")


def _same_point(gold: Tree, answer: Tree) -> bool:
    """A point and a list without brackets: x = 2, y = -3 for (2, -3)."""
    point, other = (gold, answer) if gold[0] == "fenced" else (answer, gold)
    if point[1:3] != ("(", ")") or other[0] != "list" or other[1] == "or":
        return False
    items = unnamed(other[2:])
    g, a = (point[3:], items) if gold[0] == "fenced" else (items, point[3:])
    return _in_order(g, a)


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
