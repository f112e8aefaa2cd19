"""Units of measure: exact factors to a base unit, so that 5 m and 500 cm are the same quantity.

A noun that is no unit (12 students) is a dimension of its own. A unit is its factor, a power of pi
(one radian is 180/pi degrees) and its dimensions. pint has all of this and more, but it takes 0.3 s
to import, needs to be told about every noun, and computes in floats unless it is told otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

CURRENCIES = frozenset("$£€¥¢₹₽₩")
CURRENCY_WORDS = frozenset("usd eur gbp jpy inr rs rs. cny rmb cad aud".split())
SYMBOL_UNITS = frozenset("m s g h L l J N W V A K C F".split())


@dataclass(frozen=True)
class Unit:
    factor: Fraction
    dims: tuple[tuple[str, int], ...]
    pi: int = 0
    offset: Fraction = Fraction(0)  # of temperatures

    def is_part_of(self, other: Unit) -> bool:
        """Whether it may follow the other, as minutes do hours."""
        return self.dims == other.dims and self.pi == other.pi and self.factor < other.factor

    @property
    def is_angle(self) -> bool:
        return self.dims == (("degree", 1),)


def _table() -> dict[str, tuple[Fraction, dict[str, int], int, Fraction]]:
    table: dict[str, tuple[Fraction, dict[str, int], int, Fraction]] = {}

    def add(
        names: str,
        factor: str | int | Fraction,
        dims: dict[str, int],
        pi: int = 0,
        offset: str = "0",
    ) -> None:
        for name in names.split("|"):
            table[name] = Fraction(factor), dims, pi, Fraction(offset)

    metric = {
        "n": ("nano", -9), "u": ("micro", -6), "m": ("milli", -3), "c": ("centi", -2),
        "d": ("deci", -1), "k": ("kilo", 3), "M": ("mega", 6), "G": ("giga", 9),
    }  # fmt: skip

    def add_metric(symbol: str, names: str, factor: str | Fraction, dims: dict[str, int]) -> None:
        add(f"{symbol}|{names}", factor, dims)
        for short, (long, power) in metric.items():
            scaled = Fraction(factor) * Fraction(10) ** power
            add(
                "|".join([short + symbol, *(long + name for name in names.split("|"))]),
                scaled,
                dims,
            )

    length, mass, time, money = {"metre": 1}, {"gram": 1}, {"second": 1}, {"dollar": 1}
    add_metric("m", "metre|meter", "1", length)
    add_metric("g", "gram|gramme", "1", mass)
    add_metric("s", "second", "1", time)
    add_metric("L", "litre|liter", "1/1000", {"metre": 3})
    add_metric("l", "litre|liter", "1/1000", {"metre": 3})
    add_metric("J", "joule", "1000", {"gram": 1, "metre": 2, "second": -2})
    add_metric("W", "watt", "1000", {"gram": 1, "metre": 2, "second": -3})
    add_metric("N", "newton", "1000", {"gram": 1, "metre": 1, "second": -2})
    add_metric("Pa", "pascal", "1000", {"gram": 1, "metre": -1, "second": -2})
    add_metric("Hz", "hertz", "1", {"second": -1})
    add_metric("V", "volt", "1", {"volt": 1})
    add_metric("A", "ampere|amp", "1", {"ampere": 1})
    add("mL|ml|cc", "1/1000000", {"metre": 3})
    add('in|inch|inche|"', "127/5000", length)
    add("ft|foot|feet|'", "381/1250", length)
    add("yd|yard", "1143/1250", length)
    add("mi|mile", "201168/125", length)
    add("acre", Fraction("201168/125") ** 2 / 640, {"metre": 2})
    add("hectare|ha", 10**4, {"metre": 2})
    add("gallon|gal", Fraction(231) * Fraction("127/5000") ** 3, {"metre": 3})
    add("quart|qt", Fraction(231, 4) * Fraction("127/5000") ** 3, {"metre": 3})
    add("pint|pt", Fraction(231, 8) * Fraction("127/5000") ** 3, {"metre": 3})
    add("cup", Fraction(231, 16) * Fraction("127/5000") ** 3, {"metre": 3})
    add("tablespoon|tbsp", Fraction(231, 256) * Fraction("127/5000") ** 3, {"metre": 3})
    add("teaspoon|tsp", Fraction(231, 768) * Fraction("127/5000") ** 3, {"metre": 3})
    add("lb|pound|lbs", "45359237/100000", mass)
    add("oz|ounce", "45359237/1600000", mass)
    add("ton|short ton", "90718474/100", mass)
    add("tonne|metric ton", 10**6, mass)
    add("sec", 1, time)
    add("min|minute", 60, time)
    add("h|hr|hour", 3600, time)
    add("day", 86400, time)
    add("week|wk", 604800, time)
    add("month", 1, {"month": 1})
    add("year|yr", 12, {"month": 1})
    add("decade", 120, {"month": 1})
    add("century", 1200, {"month": 1})
    add("mph", Fraction("201168/125") / 3600, {"metre": 1, "second": -1})
    add("kph|kmh|kmph", Fraction(1000, 3600), {"metre": 1, "second": -1})
    add("rpm", Fraction(1, 60), {"revolution": 1, "second": -1})
    add("°|degree|deg", 1, {"degree": 1})
    add("radian|rad", 180, {"degree": 1}, pi=-1)
    add("arcmin|arcminute", "1/60", {"degree": 1})
    add("arcsec|arcsecond", "1/3600", {"degree": 1})
    add("°C|celsius|degree celsius|degree c|degree centigrade", 1, {"kelvin": 1}, offset="273.15")
    add(
        "°F|fahrenheit|degree fahrenheit|degree f",
        "5/9",
        {"kelvin": 1},
        offset=str(Fraction("45967/180")),
    )
    add("kelvin|K", 1, {"kelvin": 1})
    add("dollar|buck|usd|$|us dollar", 1, money)
    add("cent|¢|penny|pennie", "1/100", money)
    add("euro|eur|€", 1, {"euro": 1})
    add("pound sterling|gbp|£|pence", 1, {"sterling": 1})
    add("pence", "1/100", {"sterling": 1})
    add("yen|jpy|¥", 1, {"yen": 1})
    add("yuan|rmb|元", 1, {"yuan": 1})
    add("rupee|inr|₹|rs", 1, {"rupee": 1})
    add("ruble|₽", 1, {"ruble": 1})
    add("won|₩", 1, {"won": 1})
    return table


_UNITS = _table()
# Counts of nothing in particular.
_NO_UNIT = frozenset(
    """
    unit u u. way possibility outcome total item altogether number exactly each together solution
    case
    """.split()
)
_AFTER_UNIT = frozenset(
    """
    old tall long wide deep high thick away apart late early later ago of in from on longer taller
    faster slower ahead left remaining total altogether exactly each
    """.split()
)
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
_MAY_BE_UPPER = re.compile(r"[A-Z][a-z]{2,}|[A-Z]{3,}")


def _singular(word: str) -> str:
    if word in _UNITS or len(word) < 3:
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _word(text: str) -> str:
    if text not in _UNITS and (_MAY_BE_UPPER.fullmatch(text) or text.rstrip(".").lower() in _UNITS):
        text = text.lower()
    return _singular(text.rstrip(".") if text not in CURRENCIES else text)


@lru_cache(maxsize=4096)
def unit_of(parts: tuple[str, ...]) -> Unit | None:
    """The unit of words, `^2`, `/` and `*`; None where it is only a count (`units`, `ways`)."""
    factor, pi, dims, offset = Fraction(1), 0, dict[str, int](), Fraction(0)
    sign, power, noun, known, generic = 1, 1, list[str](), False, False
    i = 0

    def finish_noun() -> None:
        if noun and not known:
            name = " ".join(noun)
            dims[name] = dims.get(name, 0) + sign
        noun.clear()

    while i < len(parts):
        raw, word = parts[i], _word(parts[i])
        i += 1
        if raw in ("/", "*") or word in ("per", "every"):
            finish_noun()
            sign, known = (-1, False) if raw != "*" else (sign, known)
            continue
        if raw.startswith("^"):
            continue
        if word.lower() in _POWERS:
            power = _POWERS[word.lower()]
            continue
        for length in (2, 1):
            name = " ".join([word, *(_word(p) for p in parts[i : i + length - 1])])
            if name in _UNITS or name.lower() in _UNITS:
                break
        else:
            if word.lower() in _NO_UNIT:
                generic = True
            elif word.lower() in _AFTER_UNIT and (known or noun or dims or generic):
                if word in ("of", "in", "from", "on"):
                    break
            elif word.lower() not in ("a", "an", "the"):
                noun.append(word.lower())
            continue
        entry = _UNITS.get(name) or _UNITS[name.lower()]
        i += len(name.split()) - 1
        exponent = power
        if i < len(parts) and parts[i].startswith("^"):
            exponent, i = int(parts[i][1:]), i + 1
        elif i < len(parts) and parts[i].lower() in ("squared", "cubed"):
            exponent, i = _POWERS[parts[i].lower()], i + 1
        noun.clear()
        if known and sign == 1 and (offset or dims == {d: e for d, e in entry[1].items()}):
            continue  # the same said twice: $5 dollars
        known, power = True, 1
        factor *= entry[0] ** (sign * exponent)
        pi += entry[2] * sign * exponent
        offset = entry[3] if sign * exponent == 1 else offset
        for dim, count in entry[1].items():
            dims[dim] = dims.get(dim, 0) + sign * exponent * count
    finish_noun()
    left = tuple(sorted((dim, count) for dim, count in dims.items() if count))
    if not left:
        return None
    return Unit(factor, left, pi, offset if left == (("kelvin", 1),) else Fraction(0))
