"""Values of expressions, exact or in as many digits as asked for.

Rational arithmetic stays in fractions; the rest is mpmath's. The size of every intermediate number
is bounded, and so is the work for one verdict; what is beyond (9^9^9) raises TooBig and is left to
a process that can be killed.
"""

from __future__ import annotations

import hashlib
import math
import threading
from fractions import Fraction
from typing import Any

from oisd.rewards.reading.trees import Tree

MAX_BITS = 20_000  # of an exact integer
_SOURCES = ("exp", "factorial", "binom")  # functions whose values are large or small by themselves
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


def context() -> Any:
    if not hasattr(_threads, "mp"):
        from mpmath.ctx_mp import MPContext

        _threads.mp = MPContext()
    return _threads.mp


def is_exact(*values: Any) -> bool:
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


class Evaluation:
    """One evaluation at one point, in a given number of digits."""

    def __init__(self, point: dict[str, Fraction], digits: int) -> None:
        self.mp = context()
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
        if is_exact(value):
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
            return self.note(self.function(tree[1], tree[2:]), tree[1] in _SOURCES)
        if form == "call":
            text = tree[1] + "".join(self.text(self(argument)) for argument in tree[2:])
            return random_rational(text)
        raise Undefined(form)

    def text(self, value: Any) -> str:
        return str(value) if is_exact(value) else self.mp.nstr(value, 20)

    def binary(self, form: str, a: Any, b: Any) -> Any:
        if form == "pow":
            return self.power(a, b)
        if form == "div":
            if not b:
                raise Undefined
            if is_exact(a, b):
                return a / b
            return self.inexact(a) / self.inexact(b)
        if not is_exact(a, b):
            a, b = self.inexact(a), self.inexact(b)
        return a + b if form == "add" else a * b

    def power(self, a: Any, b: Any) -> Any:
        if is_exact(a, b):
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
        if not is_exact(first, last) or first.denominator != 1 or last.denominator != 1:
            raise Undefined
        if last - first > 2000:
            raise TooBig
        total: Any = Fraction(form == "prod")
        kept = self.point.get(variable)
        for value in range(int(first), int(last) + 1):
            self.point[variable] = Fraction(value)
            total = self.note(self.binary("add" if form == "sum" else "mul", total, self(body)))
        self.point.pop(variable, None)
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
            if not is_exact(degree) or not degree:
                raise Undefined
            if degree.denominator != 1 or not 0 < degree < 1000:
                return self.power(x, 1 / degree)
            if is_exact(x):
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
            base = self.inexact(
                values[1] if len(values) > 1 else random_rational("the base of log")
            )
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
        name = "gamma" if name == "Gamma" else name.replace("arc", "a")
        try:
            return getattr(mp, name)(x)
        except (ValueError, ZeroDivisionError):
            raise Undefined from None

    def integers(self, name: str, values: list[Any]) -> Any:
        if name in ("floor", "ceil"):
            if is_exact(values[0]):
                return Fraction((math.floor if name == "floor" else math.ceil)(values[0]))
            return getattr(self.mp, name)(values[0])
        if not is_exact(*values) or any(v.denominator != 1 for v in values):
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


def random_rational(name: str, index: int = 0) -> Fraction:
    """A rational number between 1/2 and 7/2 that depends on the name alone."""
    digest = hashlib.blake2b(f"{index} {name}".encode(), digest_size=8).digest()
    return Fraction(1, 2) + Fraction(3 * int.from_bytes(digest[:4], "big"), 2**32 - 5)


def value(tree: Tree, point: dict[str, Fraction] | None = None, digits: int = 50) -> Any:
    """The value; Fraction where everything is rational. Raises Undefined or TooBig."""
    try:
        return Evaluation(dict(point or {}), digits)(tree)
    except (ZeroDivisionError, OverflowError, ValueError, TypeError):
        raise Undefined from None


def exact(tree: Tree) -> Fraction | None:
    """The value where it is a rational number found by rational arithmetic, else None."""
    try:
        found = value(tree)
    except (Undefined, TooBig):
        return None
    return found if isinstance(found, Fraction) else None
