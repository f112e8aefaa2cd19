"""Whole answers: lists, relations, quantities, ratios, words, choices."""

from __future__ import annotations

import re
from functools import lru_cache

from oisd.rewards.reading.expressions import END, MAX_DEPTH, OPERANDS, ExpressionReader
from oisd.rewards.reading.phrases import (
    DATES,
    HEDGES,
    LINKS,
    is_prose,
    number_words,
    phrase,
    scale,
    whole_phrase,
)
from oisd.rewards.reading.spelling import tidy
from oisd.rewards.reading.tokens import NeedsAlgebra, Unreadable, tokenize
from oisd.rewards.reading.trees import Tree, num, times
from oisd.rewards.reading.units import (
    CURRENCIES,
    CURRENCY_WORDS,
    SYMBOL_UNITS,
    Unit,
    unit_of,
)

_RELATIONS = frozenset("= ≠ < > ≤ ≥ ∈ ≡ ≈ ∉ ~ ∝ →".split())
_CLOSERS = frozenset([")", "]", "}", "\\}", "|", "⌋", "⌉", "&", "\\\\", ""])
_JOINTS = frozenset([",", ";", "and", "or", ",and", ",or", ";and", ";or"])


class AnswerReader(ExpressionReader):
    """An answer with all that may stand around its expressions."""

    def items(self) -> tuple[list[Tree], list[str]]:
        """Elements up to a closing mark, and what stands between them."""
        found, between = [self.element()], []
        while True:
            joint = ""
            while self.sees(",", ";") or self.word("and", "or"):
                joint += self.take().text.lower()
            if not joint:
                return found, between
            if self.sees(*_CLOSERS):  # a comma at the end
                return found, between
            if joint not in _JOINTS:
                raise Unreadable(f"{joint!r} between two items")
            between.append(joint)
            found.append(self.element())

    def element(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        sides, signs = [self.side()], []
        while True:
            if self.peek().kind == "mark" and self.peek().text in _RELATIONS:
                signs.append(self.take().text)
                if self.sees(","):
                    raise Unreadable("half a relation")
            elif self.word(*LINKS) and not self.sees_set_after("in"):
                self.at += 1
                self.accept(":")
                signs.append("=")
            elif self.sees_set_after("in"):
                self.at += 1
                signs.append("∈")
            elif sides[-1][0] == "label" and self.accept(":"):
                signs.append("=")
            else:
                break
            sides.append(self.side())
        self.depth -= 1
        modulus = self.modulus()
        if modulus is not None:
            return ("mod", sides[0] if signs else None, sides[-1], modulus)
        return ("rel", tuple(sides), tuple(signs)) if signs else sides[0]

    def sees_set_after(self, word: str) -> bool:
        after = self.peek(1)
        return self.word(word) and (after.text in ("(", "[", "\\{") or after.text.startswith("set"))

    def modulus(self) -> Tree | None:
        opened = self.sees("(") and self.peek(1).text in ("mod", "bmod") and bool(self.take())
        if self.peek().text in ("pmod", "bmod", "mod") and self.peek().kind in ("command", "word"):
            self.take()
            modulus = self.total()
            if opened:
                self.expect(")")
            return modulus
        return None

    def side(self) -> Tree:
        if not self.sees("≈", "~", *"=<>≤≥") or self.at:
            left = self.quantity()
        elif self.sees("≈", "~", "="):  # "≈ 7.3" and "= 7" are 7.3 and 7
            self.at += 1
            left = self.quantity()
        else:
            raise Unreadable("half a relation")
        while self.sees("∪", "∩", "∖"):
            form = {"∪": "union", "∩": "inter", "∖": "minus"}[self.take().text]
            left = (form, left, self.quantity())
        ratio = left[0] in ("num", "fn", "mul", "const", "div") and self.sees(":")
        ratio = ratio and not self.bars  # within { }, a colon says "such that"
        if ratio or (left[0] == "num" and self.word("to") and self.peek(1).kind == "number"):
            return self.ratio(left)
        return left

    def ratio(self, first: Tree) -> Tree:
        numbers, texts = [first], [self.peek(-1).text]
        while self.accept(":") or (self.word("to") and self.take()):
            texts.append(self.peek().text)
            numbers.append(self.total())
        half = None
        if self.word("am", "pm"):
            half = self.take().text.lower().replace(".", "")
        clock = len(texts) == 2 and len(texts[1]) == 2 and all(t.isdigit() for t in texts)
        clock = clock and all(number[0] == "num" for number in numbers)
        if clock and int(texts[0]) < 25 and int(texts[1]) < 60:
            return ("time", 60 * int(texts[0]) + int(texts[1]), half, tuple(numbers))
        if half:
            raise Unreadable("a time that is none")
        return ("ratio", *numbers)

    def quantity(self) -> Tree:
        """A value with or without its unit; also 2 hours 30 minutes, 30° 15', $5, or a label."""
        token = self.peek()
        if token.text.lower() in CURRENCY_WORDS and self.peek(1).kind == "number":
            return self.one_quantity()
        if token.kind == "word" and (len(token.text) > 1 or not token.text.isascii()):
            return self.words()
        parts = [self.one_quantity()]
        while parts[-1][0] == "quantity":
            start = self.at
            joined = self.word("and") and bool(self.take())
            if self.peek().kind not in ("number", "command"):
                self.at = start
                break
            part = self.one_quantity(after_degrees=parts[-1][2].is_angle)
            if joined and not (part[0] == "quantity" and part[2].is_part_of(parts[-1][2])):
                self.at = start  # 5 cm and 7 cm are two answers, 1 hour and 20 minutes are one
                break
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        value: Tree = num(0)
        unit: Unit = parts[0][2]
        for part in parts:
            if part[0] != "quantity" or part[2].dims != unit.dims or part[2].offset or part[2].pi:
                raise Unreadable("two quantities that do not add")
            ratio = part[2].factor / unit.factor
            value = ("add", value, ("mul", part[1], num(ratio)))
        return ("quantity", value, unit)

    def one_quantity(self, after_degrees: bool = False) -> Tree:
        negative = self.sees("-") and self.peek(1).text in CURRENCIES and self.accept("-")
        coin = self.peek().text
        money = self.take().text if coin in CURRENCIES or coin.lower() in CURRENCY_WORDS else None
        value = self.total()
        if negative:
            value = ("neg", value)
        parts: list[str] = [money] if money else []
        value, degrees = _without_degrees(value)
        if degrees:
            if self.peek().text in ("C", "F") and self.peek().kind in ("symbol", "word"):
                parts.append("°" + self.take().text)
            else:
                parts.append("°")
        elif self.sees("'", '"'):
            mark = self.take().text
            if mark == "'" and self.accept("'"):
                mark = '"'
            parts.append({"'": "arcmin", '"': "arcsec"}[mark] if after_degrees else mark)
        elif self.peek().text in CURRENCIES and not money:
            parts.append(self.take().text)
        parts += self.unit_words()
        words = 1 if money else 0  # $5 million, 5 million dollars
        while len(parts) > words and (factor := scale(parts[words])) is not None:
            value = times(value, factor)
            parts.pop(words)
        if not parts:
            return value
        first = parts[0].lower().replace(".", "")
        if first in ("percent", "percentage", "pct") or parts[:2] == ["per", "cent"]:
            return ("pct", value)
        if first in ("am", "pm", "oclock", "o'clock") and value[0] == "num":
            return ("time", int(60 * value[1]), first if first in ("am", "pm") else None, (value,))
        if any(part.lower() in HEDGES | DATES for part in parts):
            raise Unreadable("words that qualify the value")
        if value[0] == "pct":  # 30% of the area
            return value
        unit = unit_of(tuple(parts[1:] if first == "of" else parts))  # 3/4 of an hour
        return value if unit is None else ("quantity", value, unit)

    def unit_words(self) -> list[str]:
        """Words, powers and strokes of a unit, for `unit_of`."""
        parts: list[str] = []
        while True:
            token, after = self.peek(), self.peek(1)
            letter = token.kind == "symbol" and token.text in SYMBOL_UNITS
            if self.word("to") and after.kind == "number":  # 3 to 4
                return parts
            if token.kind == "word" and not self.word("and", "or", *LINKS):
                parts.append(self.take().text)
            elif letter and parts and parts[-1] in "/*":
                parts.append(self.take().text)
            elif letter and self.letters_as_units and not parts:
                parts.append(self.take().text)
            elif not parts:
                return parts
            elif self.sees("^"):
                self.take()
                power = self.group_or_one()
                negative = power[0] == "neg"
                power = power[1] if negative else power
                if power[0] != "num" or power[1].denominator != 1:
                    raise Unreadable("a unit to a power that is no integer")
                parts.append(f"^{'-' if negative else ''}{power[1]}")
            elif self.sees("/", "*") and (after.kind == "word" or after.text in SYMBOL_UNITS):
                parts.append(self.take().text)
            elif token.kind == "number" and token.value in (2, 3) and not token.spaced:
                parts.append(f"^{self.take().text}")  # cm2
            elif self.sees(".") and (not after.text or after.kind in ("word", "number")):
                self.take()
            else:
                return parts

    def words(self) -> Tree:
        """A number in words, or what is said before `is`, `=` or a colon: a label."""
        start, texts = self.at, []
        while self.peek().kind == "word" and not self.word("and", "or"):
            texts.append(self.take().text)
        if texts and texts[0].lower() in ("negative", "minus"):
            self.at = start + 1
            return ("neg", self.quantity())
        value, used = number_words(texts)
        if value is not None:
            self.at = start + used
            unit = self.unit_words()
            if any(p.lower() in HEDGES for p in unit):
                raise Unreadable("words that qualify the value")
            known = unit_of(tuple(unit)) if unit else None
            return num(value) if known is None else ("quantity", num(value), known)
        self.at, texts = start, []
        while not self.sees("=", ":", ",", ";", "") and not self.word("and", "or", *LINKS):
            texts.append(self.take().text)
            if len(texts) > 20:
                raise Unreadable("prose")
        if any(text.lower() in HEDGES for text in texts):
            raise Unreadable("words that qualify the value")
        if self.sees(",", ";", "") or self.word("and", "or"):  # Alice and Bob
            if not all(text.isalpha() or "-" in text for text in texts):
                raise Unreadable("words")
            return ("text", phrase(" ".join(texts)))
        return ("label", phrase(" ".join(texts)))


def _without_degrees(value: Tree) -> tuple[Tree, bool]:
    if value[0] == "deg":
        return value[1], True
    if value[0] == "neg" and value[1][0] == "deg":
        return ("neg", value[1][1]), True
    return value, False


def _choice(reader: AnswerReader) -> str | None:
    """The letter of a choice at the start, consumed; None where there is none."""
    start = reader.at
    if reader.word("option", "choice", "answer"):
        reader.take()
        reader.accept(":")
    grouped = reader.accept("{")
    opened = reader.accept("(", "[")
    inner = reader.accept("{")
    token = reader.take()
    if inner:
        reader.accept("}")
    closed = reader.accept(")", "]")
    if grouped and not reader.accept("}"):
        closed = False
    if token.kind in ("symbol", "word") and len(token.text) == 1 and "A" <= token.text <= "J":
        if opened == closed or closed:
            marked = closed or reader.sees(".", ":")
            rest = reader.peek(0 if closed else 1)
            if closed:
                reader.accept(":", ".")
            if not reader.peek().text or (marked and not rest.text):
                reader.accept(".", ":")
                return token.text
            product = not token.prose and rest.text in ("(", "-")  # (D)(x + 1), (D) - 3
            sign = rest.kind == "mark" and rest.text not in OPERANDS and rest.text not in "$-"
            joined = rest.kind == "word" and rest.text in ("and", "or")
            if marked and not (product or sign or joined) and (closed or rest.kind != "symbol"):
                reader.accept(".", ":")
                return token.text
    reader.at = start
    return None


def _whole(reader: AnswerReader) -> Tree:
    while reader.word("so", "thus", "hence", "therefore", "then", "finally"):
        reader.take()
        reader.accept(",")
    letter = _choice(reader)
    if not letter:
        return _rest(reader)
    if reader.peek() is END:
        return ("choice", letter, None)
    start = reader.at
    try:
        return ("choice", letter, _rest(reader))
    except Unreadable:
        words = phrase(" ".join(token.text for token in reader.tokens[start:]))
        if not is_prose(words):
            raise
        return ("choice", letter, ("text", words))


def _rest(reader: AnswerReader) -> Tree:
    items, between = reader.items()
    while reader.accept(".", ",", ";", ":"):
        pass
    if reader.accept("⇒", "⇔"):
        return _rest(reader)
    if reader.peek() is not END:
        raise Unreadable(f"{reader.peek().text!r} at the end")
    if not between:
        return items[0]
    joined = (
        "or"
        if any("or" in b for b in between)
        else "and"
        if any("and" in b for b in between)
        else ","
    )
    return ("list", joined, *items)


_THOUSANDS_OR_LIST = re.compile(r"\d,\d{3}(?!\d)")
_LETTER_UNIT = re.compile(rf"[\d}})]\s+(?:{'|'.join(sorted(SYMBOL_UNITS))})(?![a-zA-Z])")


@lru_cache(maxsize=8192)
def read(text: str) -> tuple[Tree, ...]:
    """Every way to read an answer: one as a rule, more for 1,234 (a number or a list).

    The last is always the text itself. NeedsAlgebra passes through.
    """
    text = tidy(text)
    known = whole_phrase(text)
    if known is not None:
        return (known, ("text", phrase(text)))
    readings: list[Tree] = []
    algebra: NeedsAlgebra | None = None
    ways = [(True, False)]
    if _THOUSANDS_OR_LIST.search(text):
        ways.append((False, False))
    if _LETTER_UNIT.search(text):
        ways.append((True, True))
    for commas, letters in ways:
        try:
            tree = _whole(AnswerReader(tokenize(text, commas), letters))
        except NeedsAlgebra as error:
            algebra = error
            continue
        except (Unreadable, RecursionError):
            continue
        if tree not in readings:
            readings.append(tree)
    if algebra and not readings:
        raise algebra
    return (*readings, ("text", phrase(text)))
