"""Whether two expressions are equal: exactly, never to some digits.

Two numbers that are written with few signs and agree in far more digits than these signs can encode
are equal: the working precision is three times what went into them and more. Expressions with
variables are equal when they are at random rational points (the Schwartz-Zippel argument).
"""

from __future__ import annotations

from fractions import Fraction

from oisd.rewards.reading.trees import Tree, has, nodes, num, replaced
from oisd.rewards.verdicts.values import (
    Evaluation,
    TooBig,
    Undefined,
    context,
    exact,
    is_exact,
    random_rational,
    value,
)

MAX_DIGITS = 2_000  # of a working precision


def symbols(*trees: Tree) -> frozenset[str]:
    """Free symbols."""
    found = [node for tree in trees for node in nodes(tree)]
    bound = {node[1] for node in found if node[0] in ("sum", "prod")}
    return frozenset(node[1] for node in found if node[0] == "sym") - bound


def _counts(node: Tree) -> bool:
    """Whether its variables are integers: those of n!, of sums and of (-1)^n."""
    if node[0] == "fn":
        counts = node[1] in ("factorial", "binom", "gcd", "lcm", "permutations")
    elif node[0] == "pow":
        counts = node[1][0] == "neg" and node[1][1][0] == "num"
    else:
        counts = node[0] in ("sum", "prod")
    return counts and bool(symbols(node))


def points(*trees: Tree) -> list[dict[str, Fraction]]:
    """Where to compare these: one empty point for constants."""
    names = sorted(symbols(*trees))
    if not names:
        return [{}]
    if any(_counts(node) for tree in trees for node in nodes(tree)):
        return [
            {n: Fraction(2 + 3 * i + j + (i * j) % 5) for j, n in enumerate(names)}
            for i in range(6)
        ]
    return [
        {
            n: random_rational(n, i) * (-1 if (i >> j) & 1 and i > 1 else 1)
            for j, n in enumerate(names)
        }
        for i in range(6)
    ]


def difference(a: Tree, b: Tree, point: dict[str, Fraction]) -> tuple[bool, bool]:
    """Whether a equals b at a point, and whether both values are real."""
    digits = 50
    while True:
        try:
            run = Evaluation(dict(point), digits)
            left, right = run(a), run(b)
            if is_exact(left, right):
                return left == right, True
            left, right = run.inexact(left), run.inexact(right)
            mp = run.mp
            size = mp.mpf(10) ** (max(run.largest, 0.0) - digits + 20)
            real = abs(mp.im(left)) <= size and abs(mp.im(right)) <= size
            gap = abs(left - right)
        except (ZeroDivisionError, OverflowError, ValueError, TypeError):
            raise Undefined from None
        if gap > size and gap > (abs(left) + abs(right)) * mp.mpf(10) ** (20 - digits):
            return False, real
        # Equal so far. Twice the digits that went in could still differ further on.
        needed = int(3 * run.span + 3 * max(run.largest, 0.0)) + 100
        if digits >= needed:
            return gap <= size, real
        if needed > MAX_DIGITS:
            raise TooBig
        digits = needed + 50


def has_i(tree: Tree) -> bool:
    return ("const", "i") in nodes(tree)


def equal(a: Tree, b: Tree) -> bool:
    """Whether two expressions have the same value wherever they have one.

    Raises TooBig where that cannot be told quickly.
    """
    if a == b:
        return True
    complex_numbers = has_i(a) or has_i(b)
    checked = 0
    for point in points(a, b):
        try:
            same, real = difference(a, b, point)
        except Undefined:
            defined = [_defined(tree, point) for tree in (a, b)]
            if defined[0] != defined[1] or not point:
                return False
            continue
        if not same:
            if not real and point and not complex_numbers and not _any_real(a, b, point):
                continue  # outside the domain of both
            return False
        checked += 1
    return checked > 0


def _defined(tree: Tree, point: dict[str, Fraction]) -> bool:
    try:
        value(tree, point)
    except Undefined:
        return False
    return True


def _any_real(a: Tree, b: Tree, point: dict[str, Fraction]) -> bool:
    mp = context()
    for tree in (a, b):
        found = value(tree, point)
        if isinstance(found, Fraction) or abs(mp.im(found)) < mp.mpf(10) ** -30:
            return True
    return False


def rounds_to(tree: Tree, decimal: Fraction, places: int) -> bool:
    """Whether a constant, rounded to these decimal places, is this decimal."""
    try:
        found = value(tree)
    except (Undefined, TooBig):
        return False
    if not isinstance(found, Fraction):
        mp = context()
        if mp.im(found) or float(mp.mag(found)) > 100:
            return False
        found = Fraction(mp.nstr(mp.re(found), 45, min_fixed=-1000, max_fixed=1000))
    return abs(found - decimal) * 2 <= Fraction(1, 10**places)


EXPRESSIONS = frozenset("num sym const add mul div pow neg fn call sum prod deg".split())


def is_constant(tree: Tree) -> bool:
    return tree[0] in EXPRESSIONS and not symbols(tree) and not has(tree, "call")


def _decimal(tree: Tree) -> tuple[Fraction, int] | None:
    """Value and places of a decimal as written."""
    if tree[0] == "neg" and (inner := _decimal(tree[1])):
        return -inner[0], inner[1]
    return (tree[1], tree[2]) if tree[0] == "num" and tree[2] is not None else None


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


def _has_decimals(tree: Tree) -> bool:
    return any(node[0] == "num" and node[2] is not None for node in nodes(tree))


def same_expression(gold: Tree, answer: Tree) -> bool:
    if equal(gold, answer):
        return True
    if decimal := _decimal(answer):
        fraction = exact(gold)
        return (
            fraction is not None and not _has_decimals(gold) and _is_written_out(fraction, *decimal)
        )
    if (decimal := _decimal(gold)) and is_constant(answer) and not _has_decimals(answer):
        significant = len(str(abs(int(decimal[0] * 10 ** decimal[1]))))
        return significant >= 5 and decimal[1] >= 4 and rounds_to(answer, *decimal)
    return _same_up_to_constant(gold, answer) or _same_but_for_case_of_c(gold, answer)


def _same_but_for_case_of_c(gold: Tree, answer: Tree) -> bool:
    """x^2 + C for x^2 + c; no other constant, since a small c may be given."""
    fits = _ends_in(gold, "c") and _ends_in(answer, "C") and len(symbols(gold)) > 1
    if not fits or "C" in symbols(gold) or "c" in symbols(answer):
        return False
    return equal(gold, replaced(answer, ("sym", "C"), ("sym", "c")))


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
    first, *others = (at_point(gap, spot) for spot in points(gap))
    return all(equal(first, other) for other in others)


def _ends_in(tree: Tree, name: str) -> bool:
    """Whether the symbol is one of the terms."""
    if tree[0] == "add":
        return _ends_in(tree[1], name) or _ends_in(tree[2], name)
    return tree == ("sym", name)


def at_point(tree: Tree, spot: dict[str, Fraction]) -> Tree:
    if tree[0] == "sym" and tree[1] in spot:
        return num(spot[tree[1]])
    return tuple(at_point(part, spot) if isinstance(part, tuple) else part for part in tree)
