"""Values of expressions, and whether two of them are equal: exactly, never to some digits.

Rational arithmetic stays in fractions. Whatever else (roots, pi, sines) is evaluated in as many
digits as the numbers in it can hide: two numbers that are written with few signs and agree in far
more digits than these signs can encode are equal. Expressions with variables are equal when they
are at random rational points, by the same measure (the Schwartz-Zippel argument).

The size of every intermediate number is bounded, so an evaluation takes milliseconds at most;
what is beyond (9^9^9) raises TooBig and is left to a process that can be killed.
"""

from __future__ import annotations

import hashlib
import math
import threading
from fractions import Fraction
from typing import Any

from oisd.rewards.reading import Tree, walk

MAX_BITS = 20_000  # of an exact integer
MAX_DIGITS = 2_000  # of a working precision
BUDGET = 100_000  # cost of all evaluations for one verdict, in units of about 5 us


class TooBig(Exception):
    """Finite, but not to be had in milliseconds."""


class Undefined(Exception):
    """No value: 1/0, an unknown form."""


_threads = threading.local()


def allow(budget: int = BUDGET) -> None:
    """Set what evaluations in this thread may cost from here on."""
    _threads.budget = budget


def _spend(cost: int) -> None:
    _threads.budget = getattr(_threads, "budget", BUDGET) - cost
    if _threads.budget < 0:
        raise TooBig


def _context() -> Any:
    if not hasattr(_threads, "mp"):
        from mpmath.ctx_mp import MPContext

        _threads.mp = MPContext()
    return _threads.mp


def _is_exact(*values: Any) -> bool:
    return all(isinstance(value, Fraction) for value in values)


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """The real root where it is rational."""
    negative = value < 0
    if negative and degree % 2 == 0:
        return None
    parts = []
    for part in (abs(value.numerator), value.denominator):
        root = math.isqrt(part) if degree == 2 else _integer_root(part, degree)
        if root**degree != part:
            return None
        parts.append(root)
    return Fraction(-parts[0] if negative else parts[0], parts[1])


def _integer_root(value: int, degree: int) -> int:
    if value < 2:
        return value
    low, high = 1, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low


class _Evaluation:
    """One evaluation at one point, in a given number of digits."""

    def __init__(self, point: dict[str, Fraction], digits: int) -> None:
        self.mp = _context()
        self.mp.dps = digits
        self.point = point
        self.digits = digits
        self.span = 0.0  # largest |log10| of a number that went in
        self.largest = 0.0  # largest log10 of an intermediate value

    def inexact(self, value: Any) -> Any:
        if isinstance(value, Fraction):
            if value:
                # Most of the digits of a long numerator may be the answer's.
                bits = max(value.numerator.bit_length(), value.denominator.bit_length())
                self.span = max(self.span, bits * 0.30103)
            return self.mp.mpf(value.numerator) / value.denominator
        return value

    def note(self, value: Any, source: bool = False) -> Any:
        if _is_exact(value):
            bits = max(value.numerator.bit_length(), value.denominator.bit_length())
            if bits > MAX_BITS:
                raise TooBig
            if bits > 512:
                _spend(bits // 256)
            return value
        if value:
            if not self.mp.isfinite(value):
                raise Undefined
            size = float(self.mp.mag(value)) * 0.30103
            self.largest = max(self.largest, size)
            if source:
                self.span = max(self.span, abs(size))
        return value

    def __call__(self, tree: Tree) -> Any:
        form = tree[0]
        _spend(1 + self.digits // 20 if form in ("fn", "pow") else 1)
        if form == "num":
            return tree[1]
        if form == "sym":
            if tree[1] not in self.point:
                raise Undefined
            return self.point[tree[1]]
        if form == "const":
            return {"π": self.mp.pi, "e": self.mp.e, "i": self.mp.j}[tree[1]] * 1
        if form == "neg":
            return -self(tree[1])
        if form == "pct":
            return self(tree[1]) / 100
        if form == "deg":
            return self.inexact(self(tree[1])) * self.mp.pi / 180
        if form in ("add", "mul", "div", "pow"):
            return self.note(self.binary(form, self(tree[1]), self(tree[2])), form == "pow")
        if form in ("sum", "prod"):
            return self.repeated(*tree)
        if form == "fn":
            return self.note(
                self.function(tree[1], tree[2:]), tree[1] in ("exp", "factorial", "binom")
            )
        if form == "call":
            text = tree[1] + "".join(self.text(self(argument)) for argument in tree[2:])
            return _random(text)
        raise Undefined(form)

    def text(self, value: Any) -> str:
        return str(value) if _is_exact(value) else self.mp.nstr(value, 20)

    def binary(self, form: str, a: Any, b: Any) -> Any:
        if form == "pow":
            return self.power(a, b)
        if form == "div":
            if not b:
                raise Undefined
            if _is_exact(a, b):
                return a / b
            return self.inexact(a) / self.inexact(b)
        if not _is_exact(a, b):
            a, b = self.inexact(a), self.inexact(b)
        return a + b if form == "add" else a * b

    def power(self, a: Any, b: Any) -> Any:
        if _is_exact(a, b):
            if not a and b <= 0:
                raise Undefined
            bits = max(a.numerator.bit_length(), a.denominator.bit_length())
            if b.denominator == 1:
                if bits * abs(b) <= MAX_BITS or abs(a) == 1 or not a:
                    return a ** int(b) if abs(a) != 1 else Fraction(1 if b % 2 == 0 else a)
            elif b.denominator <= 64 and bits * abs(b) <= MAX_BITS:
                root = _exact_root(a, b.denominator)
                if root is not None:
                    return root**b.numerator
                if a < 0 and b.denominator % 2:
                    size = self.inexact(-a) ** self.inexact(b)
                    return size if b.numerator % 2 == 0 else -size
        base, exponent = self.inexact(a), self.inexact(b)
        if not base:
            raise Undefined
        if float(abs(exponent)) * (1 + abs(float(self.mp.mag(base)))) > 20 * MAX_BITS:
            raise TooBig
        return base**exponent

    def repeated(self, form: str, variable: str, low: Tree, high: Tree, body: Tree) -> Any:
        first, last = self(low), self(high)
        if not _is_exact(first, last) or first.denominator != 1 or last.denominator != 1:
            raise Undefined
        if last - first > 2000:
            raise TooBig
        total: Any = Fraction(form == "prod")
        kept = self.point.get(variable)
        for value in range(int(first), int(last) + 1):
            self.point[variable] = Fraction(value)
            total = self.note(self.binary("add" if form == "sum" else "mul", total, self(body)))
        self.point.pop(variable)
        if kept is not None:
            self.point[variable] = kept
        return total

    def function(self, name: str, arguments: tuple[Tree, ...]) -> Any:
        if name == "det":
            return self.determinant(arguments[0])
        values = [self(argument) for argument in arguments]
        x, mp = values[0], self.mp
        if name == "root":
            degree = values[1]
            if not _is_exact(degree) or not degree:
                raise Undefined
            if degree.denominator != 1 or not 0 < degree < 1000:
                return self.power(x, 1 / degree)
            if _is_exact(x):
                exact = _exact_root(x, int(degree)) if degree < 65 else None
                if exact is not None:
                    return exact
                if x < 0 and degree % 2:
                    return -mp.root(self.inexact(-x), int(degree))
            return (
                mp.root(self.inexact(x), int(degree)) if degree != 2 else mp.sqrt(self.inexact(x))
            )
        if name == "abs":
            return abs(x)
        if name in ("max", "min"):
            return (max if name == "max" else min)(values)
        if name in ("gcd", "lcm", "factorial", "binom", "permutations", "floor", "ceil"):
            return self.integers(name, values)
        if name == "log":
            base = self.inexact(values[1] if len(values) > 1 else _random("the base of log"))
            if not x or not base or base == 1:
                raise Undefined
            return mp.log(self.inexact(x)) / mp.log(base)
        values = [self.inexact(value) for value in values]
        x = values[0]
        if len(values) != 1 or float(mp.mag(x)) > (30 if name != "exp" else 16):
            raise TooBig
        if name == "ln" and not x:
            raise Undefined
        if name in ("Re", "Im", "arg"):
            return {"Re": mp.re, "Im": mp.im, "arg": mp.arg}[name](x)
        if name in ("zeta", "Gamma") and (x == 1 or abs(x) > 200 or mp.im(x)):
            raise Undefined
        inverse = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec",
                   "arccsc": "acsc", "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh", "Gamma": "gamma"}  # fmt: skip
        try:
            return getattr(mp, inverse.get(name, name))(x)
        except (ValueError, ZeroDivisionError):
            raise Undefined from None

    def integers(self, name: str, values: list[Any]) -> Any:
        if name in ("floor", "ceil"):
            if _is_exact(values[0]):
                return Fraction((math.floor if name == "floor" else math.ceil)(values[0]))
            return getattr(self.mp, name)(values[0])
        if not _is_exact(*values) or any(v.denominator != 1 for v in values):
            raise Undefined
        whole = [int(v) for v in values]
        if name in ("gcd", "lcm"):
            return Fraction((math.gcd if name == "gcd" else math.lcm)(*whole))
        if name == "factorial":
            if whole[0] < 0:
                raise Undefined
            if whole[0] > 2000:
                raise TooBig
            return Fraction(math.factorial(whole[0]))
        n, k = whole
        if n < 0 or k < 0:
            raise Undefined
        if min(k, n - k) > 1000 or n > 10**50:
            raise TooBig
        return Fraction((math.comb if name == "binom" else math.perm)(n, k))

    def determinant(self, tree: Tree) -> Any:
        rows = tree[2] if tree[0] == "matrix" else ()
        if not rows or len(rows) != len(rows[0]) or len(rows) > 5:
            raise Undefined

        def minor(rows: list[tuple[Any, ...]]) -> Any:
            if len(rows) == 1:
                return rows[0][0]
            total: Any = Fraction(0)
            for j, head in enumerate(rows[0]):
                rest = minor([row[:j] + row[j + 1 :] for row in rows[1:]])
                part = self.binary("mul", head, rest)
                total = self.binary("add", total, part if j % 2 == 0 else -part)
            return total

        return minor([tuple(self(entry) for entry in row) for row in rows])


def _random(name: str, index: int = 0) -> Fraction:
    """A rational number between 1/2 and 7/2 that depends on the name alone."""
    digest = hashlib.blake2b(f"{index} {name}".encode(), digest_size=8).digest()
    return Fraction(1, 2) + Fraction(3 * int.from_bytes(digest[:4], "big"), 2**32 - 5)


# ---- what is in an expression ------------------------------------------------------------------


def symbols(*trees: Tree) -> frozenset[str]:
    """Free symbols."""
    names: set[str] = set()
    bound: set[str] = set()

    def look(tree: Tree) -> None:
        if tree[0] == "sym":
            names.add(tree[1])
        elif tree[0] in ("sum", "prod"):
            bound.add(tree[1])

    for tree in trees:
        walk(tree, look)
    return frozenset(names - bound)


def _discrete(*trees: Tree) -> bool:
    """Whether its variables count something: n! and the like are taken at integers."""
    found = False

    def look(tree: Tree) -> None:
        nonlocal found
        counts = tree[0] in ("sum", "prod")
        counts |= tree[0] == "fn" and tree[1] in (
            "factorial",
            "binom",
            "gcd",
            "lcm",
            "permutations",
        )
        negative = tree[0] == "pow" and tree[1][0] == "neg" and tree[1][1][0] == "num"
        found |= bool((counts or (negative and symbols(tree[2]))) and symbols(tree))

    for tree in trees:
        walk(tree, look)
    return found


def _mentions_i(*trees: Tree) -> bool:
    found = False

    def look(tree: Tree) -> None:
        nonlocal found
        found |= tree == ("const", "i")

    for tree in trees:
        walk(tree, look)
    return found


def points(*trees: Tree) -> list[dict[str, Fraction]]:
    """Where to compare these: one empty point for constants."""
    names = sorted(symbols(*trees))
    if not names:
        return [{}]
    if _discrete(*trees):
        return [
            {n: Fraction(2 + 3 * i + j + (i * j) % 5) for j, n in enumerate(names)}
            for i in range(6)
        ]
    return [
        {n: _random(n, i) * (-1 if (i >> j) & 1 and i > 1 else 1) for j, n in enumerate(names)}
        for i in range(6)
    ]


# ---- equality ----------------------------------------------------------------------------------


def value(tree: Tree, point: dict[str, Fraction] | None = None, digits: int = 50) -> Any:
    """The value; Fraction where everything is rational. Raises Undefined or TooBig."""
    try:
        return _Evaluation(dict(point or {}), digits)(tree)
    except (ZeroDivisionError, OverflowError, ValueError, TypeError):
        raise Undefined from None


def exact(tree: Tree) -> Fraction | None:
    """The value where it is a rational number found by rational arithmetic, else None."""
    try:
        found = value(tree)
    except (Undefined, TooBig):
        return None
    return found if isinstance(found, Fraction) else None


def difference(a: Tree, b: Tree, point: dict[str, Fraction]) -> tuple[bool, bool]:
    """Whether a equals b at a point, and whether both values are real."""
    digits = 50
    for _ in range(2):
        try:
            run = _Evaluation(dict(point), digits)
            left, right = run(a), run(b)
            if _is_exact(left, right):
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
    return gap <= size, real


def equal(a: Tree, b: Tree) -> bool:
    """Whether two expressions have the same value wherever they have one.

    Raises TooBig where that cannot be told quickly.
    """
    if a == b:
        return True
    complex_numbers = _mentions_i(a, b)
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
    mp = _context()
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
        mp = _context()
        if mp.im(found) or float(mp.mag(found)) > 100:
            return False
        found = Fraction(mp.nstr(mp.re(found), 45, min_fixed=-1000, max_fixed=1000))
    return abs(found - decimal) * 2 <= Fraction(1, 10**places)
