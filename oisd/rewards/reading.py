r"""Answers as trees: what a careful reader sees in the content of a box.

A tree is a tuple whose first entry names its form.

Expressions (`values` evaluates them): ("num", Fraction, places), ("sym", name), ("const", "π" | "e" |
"i"), ("inf",), ("add" | "mul" | "div" | "pow", a, b), ("neg" | "deg" | "pct", a), ("pm", a, b, sign),
("fn", name, *arguments), ("call", name, *arguments), ("sum" | "prod", variable, from, to, body).

Shapes (`verdicts` compares them): ("list" | "set", *items), ("fenced", open, close, *items), ("union" |
"inter" | "minus", a, b), ("rel", sides, signs), ("matrix", kind, rows), ("quantity", value, Unit),
("ratio", *numbers), ("time", minutes, half of the day or None), ("based", digits, base),
("choice", letter, rest or None), ("text", words), ("label", words), ("space", "R"), ("empty",),
("mod", residue, modulus), ("dots",).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from oisd.rewards.phrases import HEDGES, LINKS, number_words, phrase, said
from oisd.rewards.tokens import FUNCTIONS, Token, Unreadable, NeedsAlgebra, tidy, tokenize
from oisd.rewards.units import CURRENCIES, CURRENCY_WORDS, SYMBOL_UNITS, Unit, unit_of

Tree = tuple
MAX_DEPTH = 40
_RELATIONS = frozenset("= ≠ < > ≤ ≥ ∈ ≡ ≈ ∉ ~ ∝".split())
_CLOSERS = frozenset([")", "]", "}", "\\}", "|", "⌋", "⌉", "&", "\\\\", ""])
_OPERANDS = frozenset(["(", "{", "\\{", "|", "⌊", "⌈", "π", "∞", "∅", "…"])
_JOINTS = frozenset([",", ";", "and", "or", ",and", ",or", ";and", ";or"])
_FUNCTION_LETTERS = frozenset("f g h F G H O".split())
_MATRICES = frozenset("matrix pmatrix bmatrix Bmatrix vmatrix smallmatrix array".split())
END = Token("mark", "")


def num(value: int | Fraction) -> Tree:
    return ("num", Fraction(value), None)


class _Reader:
    """Recursive descent over the tokens of one answer."""

    def __init__(self, tokens: list[Token], letters_as_units: bool) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0
        self.brackets = 0
        self.letters_as_units = letters_as_units

    # ---- tokens ----

    def peek(self, ahead: int = 0) -> Token:
        i = self.at + ahead
        return self.tokens[i] if i < len(self.tokens) else END

    def take(self) -> Token:
        token = self.peek()
        self.at += 1
        return token

    def sees(self, *marks: str) -> bool:
        token = self.peek()
        return token.kind == "mark" and token.text in marks

    def accept(self, *marks: str) -> bool:
        if self.sees(*marks):
            self.at += 1
            return True
        return False

    def expect(self, *marks: str) -> str:
        token = self.take()
        if token.kind != "mark" or token.text not in marks:
            raise Unreadable(f"wanted {marks}, got {token.text!r}")
        return token.text

    def word(self, *words: str) -> bool:
        token = self.peek()
        return token.kind == "word" and token.text.lower().replace(".", "") in words

    # ---- lists and relations ----

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
        if not self.sees("≈", *"=<>≤≥") or self.at:
            left = self.quantity()
        elif self.sees("≈", "="):  # "≈ 7.3" and "= 7" are 7.3 and 7
            self.at += 1
            left = self.quantity()
        else:
            raise Unreadable("half a relation")
        while self.sees("∪", "∩", "∖"):
            form = {"∪": "union", "∩": "inter", "∖": "minus"}[self.take().text]
            left = (form, left, self.quantity())
        ratio = left[0] in ("num", "fn", "mul", "const", "div") and self.sees(":")
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
        if clock and int(texts[0]) < 25 and int(texts[1]) < 60:
            return ("time", 60 * int(texts[0]) + int(texts[1]), half, tuple(numbers))
        if half:
            raise Unreadable("a time that is none")
        return ("ratio", *numbers)

    # ---- quantities ----

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
        while parts and (scale := said(parts[0])) is not None and not money:
            value = ("mul", value, num(scale))
            parts.pop(0)
        while money and len(parts) > 1 and (scale := said(parts[1])) is not None:
            value = ("mul", value, num(scale))
            parts.pop(1)
        if not parts:
            return value
        first = parts[0].lower().replace(".", "")
        if first in ("percent", "percentage", "pct", "per cent"):
            return ("pct", value)
        if first in ("am", "pm", "oclock", "o'clock") and value[0] == "num":
            return ("time", int(60 * value[1]), first if first in ("am", "pm") else None, (value,))
        if any(p.lower() in HEDGES for p in parts):
            raise Unreadable("words that qualify the value")
        unit = unit_of(tuple(parts))
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
            elif self.sees(".") and not after.text:
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
        if self.sees(",", ";", "") or self.word("and", "or"):
            raise Unreadable("words")
        if any(text.lower() in HEDGES for text in texts):
            raise Unreadable("words that qualify the value")
        return ("label", phrase(" ".join(texts)))

    # ---- expressions ----

    def total(self) -> Tree:
        """Terms joined by +, - and ±."""
        if self.accept("±"):
            left: Tree = ("pm", num(0), self.product(), 1)
        elif self.accept("∓"):
            left = ("pm", num(0), self.product(), -1)
        else:
            left = self.product()
        while self.sees("+", "-", "±", "∓"):
            mark = self.take().text
            right = self.product()
            if mark in "+-":
                left = ("add", left, right if mark == "+" else ("neg", right))
            else:
                left = ("pm", left, right, 1 if mark == "±" else -1)
        return left

    def product(self) -> Tree:
        negative = False
        while self.sees("+", "-"):
            negative ^= self.take().text == "-"
            if negative and self.sees("-"):
                raise Unreadable("two minus signs")
        left = self.power()
        if mixed := self.mixed(left):
            left = mixed
        while True:
            token = self.peek()
            if self.accept("*"):
                left = ("mul", left, self.signed())
            elif self.sees("/") and self.peek(1).kind != "word":
                self.at += 1
                left = ("div", left, self.signed())
            elif token.kind == "mark" and (
                token.text in _OPERANDS or token.text.startswith("begin ")
            ):
                if (token.text == "|" and self.bars) or token.text == "…":
                    break
                if token.text == "(" and self.peek(1).text in ("mod", "bmod"):
                    break
                left = ("mul", left, self.power())
            elif self.sees("[") and not self.brackets:
                left = ("mul", left, self.power())
            elif token.kind in ("symbol", "command"):
                if token.text in ("pmod", "bmod", "mod"):
                    break
                if left[0] == "deg" and token.text in ("C", "F"):
                    break
                if self.letters_as_units and left[0] == "num" and token.text in SYMBOL_UNITS:
                    break
                left = ("mul", left, self.power())
            elif token.kind == "word" and token.prose and len(token.text) == 1 and self.at == 0:
                left = ("mul", left, self.power())
            elif token.kind == "number" and left[0] not in ("num", "deg", "pct"):
                if left[0] == "sym" or left[0] == "mul":
                    raise Unreadable("a number after a letter")
                left = ("mul", left, self.power())
            else:
                break
        return ("neg", left) if negative else left

    def signed(self) -> Tree:
        if self.accept("-"):
            return ("neg", self.power())
        self.accept("+")
        return self.power()

    def mixed(self, whole: Tree) -> Tree | None:
        """2 1/2 and 2\\frac{1}{2}, which a reader takes for a sum."""
        if whole[0] != "num" or whole[1].denominator != 1 or whole[2] is not None:
            return None
        start = self.at
        if self.peek().text == "frac" and self.peek().kind == "command":
            part = self.power()
            plain = part[0] == "div" and part[1][0] == part[2][0] == "num"
            if plain and 0 < part[1][1] < part[2][1]:
                return ("add", whole, part)
        elif self.peek().kind == "number" and self.peek().spaced and self.peek(1).text == "/":
            above, _, below = self.take(), self.take(), self.take()
            if below.kind == "number" and above.value and below.value:
                if above.value < below.value and above.places is below.places is None:
                    return ("add", whole, ("div", num(above.value), num(below.value)))
        self.at = start
        return None

    def power(self) -> Tree:
        base = self.postfix(self.primary())
        if not self.sees("^"):
            return base
        self.take()
        if self.accept("°") or self.is_degree_group():
            return self.postfix(("deg", base))
        if self.sees("'"):
            self.take()
            return base
        exponent = self.group_or_one(chain=True)
        return self.postfix(("pow", base, exponent))

    def is_degree_group(self) -> bool:
        if self.sees("{") and self.peek(1).text == "°" and self.peek(2).text == "}":
            self.at += 3
            return True
        return False

    def postfix(self, node: Tree) -> Tree:
        while True:
            if self.sees("!"):
                self.take()
                if self.sees("!"):
                    raise Unreadable("!!")
                node = ("fn", "factorial", node)
            elif self.sees("%"):
                self.take()
                node = ("pct", node)
            elif self.accept("‰"):
                node = ("pct", ("div", node, num(10)))
            elif self.sees("°"):
                self.take()
                node = ("deg", node)
            elif self.sees("^") and self.peek(1).text == "°":
                self.at += 2
                node = ("deg", node)
            else:
                return node

    def group_or_one(self, chain: bool = False) -> Tree:
        """A group in braces, or the one sign that LaTeX would take."""
        if self.sees("{"):
            return self.primary()
        if self.accept("-"):
            return ("neg", self.group_or_one())
        token = self.peek()
        if token.kind == "number" and not chain and len(token.text) > 1 and token.places is None:
            digits, self.at = token.text, self.at + 1
            if not digits.isdigit():
                raise Unreadable("half a number")
            if len(digits) == 2 and self.previous_is_half():
                raise Unreadable("half a number")
            rest = Token("number", digits[1:], Fraction(digits[1:]))
            self.tokens.insert(self.at, rest)
            return num(int(digits[0]))
        node = self.primary()
        if chain and self.sees("^"):
            self.take()
            node = ("pow", node, self.group_or_one(chain=True))
        return node

    def previous_is_half(self) -> bool:
        return False

    def primary(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        node = self._primary(self.take())
        self.depth -= 1
        return node

    def _primary(self, token: Token) -> Tree:
        if token.kind == "number":
            assert token.value is not None
            return ("num", token.value, token.places)
        if token.kind == "based":
            digits, base = token.text.split("_")
            return ("based", digits.lstrip("0") or "0", int(base))
        if token.kind in ("symbol", "word"):
            if token.kind == "word" and len(token.text) > 1:
                raise Unreadable("a word in an expression")
            return self.symbol(token)
        if token.kind == "command":
            return self.command(token.text)
        if token.text == "{":
            return self.braces()
        if token.text in ("(", "[", "]"):
            return self.fence(token.text)
        if token.text == "\\{":
            return self.set_braces()
        if token.text == "|":
            self.bars += 1
            inside = self.total()
            self.expect("|")
            self.bars -= 1
            return ("fn", "abs", inside) if inside[0] != "matrix" else ("fn", "det", inside)
        if token.text in ("⌊", "⌈"):
            inside = self.total()
            self.expect("⌋" if token.text == "⌊" else "⌉")
            return ("fn", "floor" if token.text == "⌊" else "ceil", inside)
        if token.text == "π":
            return ("const", "π")
        if token.text == "∞":
            return ("inf",)
        if token.text == "∅":
            return ("empty",)
        if token.text == "…":
            return ("dots",)
        if token.text.startswith("begin "):
            return self.matrix(token.text.removeprefix("begin "))
        raise Unreadable(f"{token.text!r} where a value was wanted")

    def symbol(self, token: Token) -> Tree:
        name = token.text
        if name.startswith("set") and len(name) == 4:
            sign = self.take().text if self.sees("^") and self.peek(1).text in "+-*" else ""
            sign += self.take().text if self.sees("+", "-", "*") and sign else ""
            if self.sees("_", "/", "[", "(", "^"):  # Z_2, Z/nZ, Q(i), R^3
                return ("sym", name[3] + ("_" + self.raw_group() if self.accept("_") else ""))
            return ("space", name[3] + sign.replace("^", ""))
        if name in ("imath", "jmath"):
            name = name[0]
        if self.accept("_"):
            name += "_" + self.raw_group()
        while self.sees("'"):
            name += self.take().text
        if name in ("e", "i") and not token.text == "word":
            return ("const", name)
        if self.sees("(") and not self.peek().spaced:
            if name in ("C", "P") or name in _FUNCTION_LETTERS:
                return self.call(name)
        return ("sym", name)

    def call(self, name: str) -> Tree:
        start = self.at
        self.take()
        arguments, _ = self.items()
        self.expect(")")
        if name in ("C", "P"):
            if len(arguments) == 2:
                return ("fn", "binom" if name == "C" else "permutations", *arguments)
            self.at = start
            return ("sym", name)
        return ("call", name, *arguments)

    def raw_group(self) -> str:
        """Content of a group as it is spelt: subscripts and what stands under an accent."""
        if not self.sees("{"):
            return self.take().text
        depth, texts = 0, []
        while True:
            token = self.take()
            if token is END:
                raise Unreadable("a brace too few")
            depth += (token.text == "{") - (token.text == "}")
            if not depth:
                return "".join(texts[1:])
            texts.append(token.text)

    def braces(self) -> Tree:
        if self.accept("}"):
            raise Unreadable("empty group")
        items, between = self.items()
        if self.accept("over"):
            items = [("div", items[0], self.total())]
        elif self.accept("choose"):
            items = [("fn", "binom", items[0], self.total())]
        self.expect("}")
        return items[0] if not between else ("set", *items)

    def fence(self, opened: str) -> Tree:
        bars, self.bars = self.bars, 0
        self.brackets += opened != "("
        items, between = self.items()
        self.brackets -= opened != "("
        closed = self.expect(")", "]", "[")
        self.bars = bars
        if between:
            return ("fenced", opened, closed, *items)
        if (opened, closed) in (("(", ")"), ("[", "]")):
            return items[0]
        raise Unreadable("brackets that do not match")

    def set_braces(self) -> Tree:
        if self.accept("\\}"):
            return ("empty",)
        bars, self.bars = self.bars, 1
        items, _ = self.items()
        self.bars = bars
        if self.accept("|", ":"):  # { x | condition }
            conditions, between = self.items()
            self.expect("\\}")
            if len(items) != 1:
                raise Unreadable("set-builder notation")
            return conditions[0] if not between else ("list", *conditions)
        self.expect("\\}")
        return ("set", *items)

    def matrix(self, kind: str) -> Tree:
        if kind not in _MATRICES:
            raise Unreadable(f"environment {kind}")
        rows: list[tuple[Tree, ...]] = []
        while True:
            row = [self.total()]
            while self.accept("&"):
                row.append(self.total())
            rows.append(tuple(row))
            if not self.accept("\\\\") or self.peek().text.startswith("end "):
                break
        self.expect(f"end {kind}")
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("rows of different lengths")
        node: Tree = ("matrix", kind, tuple(rows))
        return ("fn", "det", node) if kind == "vmatrix" else node

    def command(self, name: str) -> Tree:
        if name in ("frac", "binom"):
            if self.sees("("):  # binom(6, 2)
                node = self.primary()
                if node[0] != "fenced" or len(node) != 5:
                    raise Unreadable("two arguments wanted")
                above, below = node[3:]
            else:
                above = self.group_or_one()
                below = self.group_or_one()
            return ("div", above, below) if name == "frac" else ("fn", "binom", above, below)
        if name in ("sqrt", "cbrt", "root"):
            degree: Tree = num(3 if name == "cbrt" else 2)
            if self.accept("["):
                self.brackets += 1
                degree = self.total()
                self.brackets -= 1
                self.expect("]")
            radicand = self.group_or_one()
            return ("fn", "root", radicand, degree)
        if name in ("sum", "prod"):
            return self.finite_sum(name)
        if name in ("accent", "named"):
            if name == "accent" or self.sees("{"):
                return ("sym", f"{name} {self.raw_group()}")
            texts = []
            while self.peek().kind == "symbol" or (self.peek().kind == "word" and not texts):
                texts.append(self.take().text)
            return ("sym", "angle " + "".join(texts))
        if name in FUNCTIONS or name == "factorial":
            return self.function(name)
        raise Unreadable(f"{name} here")

    def finite_sum(self, name: str) -> Tree:
        self.expect("_")
        below = self.group_or_one()
        if below[0] != "rel" or below[2] != ("=",) or below[1][0][0] not in ("sym", "const"):
            raise NeedsAlgebra(name)
        self.expect("^")
        above = self.group_or_one()
        if above == ("inf",):
            raise NeedsAlgebra(name)
        variable, body = below[1][0], self.product()
        return (
            name,
            variable[1],
            below[1][1],
            above,
            replaced(body, variable, ("sym", variable[1])),
        )

    def function(self, name: str) -> Tree:
        base = power = None
        while self.sees("_", "^"):
            if self.take().text == "_":
                base = self.group_or_one()
            else:
                power = self.group_or_one()
        arguments = self.arguments()
        if power == ("neg", num(1)) and name in ("sin", "cos", "tan", "cot", "sec", "csc"):
            name, power = "arc" + name, None
        if name in ("log", "lg", "ln"):
            base = num(10) if name == "lg" else base
            arguments = arguments if base is None else [*arguments, base]
            name = "ln" if name == "ln" else "log"
        elif base is not None:
            raise Unreadable("a subscript to a function")
        node: Tree = ("fn", name, *arguments)
        return node if power is None else ("pow", node, power)

    def arguments(self) -> list[Tree]:
        """What a function is applied to: brackets, or the factors that follow."""
        if self.sees("("):
            node = self.primary()
            return list(node[3:]) if node[0] == "fenced" else [node]
        node = None
        while True:
            token = self.peek()
            if node is not None and token.kind == "command" and token.text in FUNCTIONS - {"sqrt"}:
                break
            if token.kind in ("number", "symbol", "command") or self.sees("{", "π", "|", "∞", "("):
                if token.kind == "number" and node is not None or (self.sees("|") and self.bars):
                    break
                factor = self.power()
                node = factor if node is None else ("mul", node, factor)
                if (
                    self.sees("/")
                    and token.kind != "command"
                    and self.peek(1).kind in ("number", "symbol")
                ):
                    self.take()
                    node = ("div", node, self.power())
            elif self.sees("-") and node is None:
                self.take()
                node = ("neg", self.power())
            else:
                break
        if node is None:
            raise Unreadable("a function of nothing")
        return [node]


def _without_degrees(value: Tree) -> tuple[Tree, bool]:
    if value[0] == "deg":
        return value[1], True
    if value[0] == "neg" and value[1][0] == "deg":
        return ("neg", value[1][1]), True
    return value, False


def replaced(tree: Tree, old: Tree, new: Tree) -> Tree:
    """The tree with another in place of each `old`."""
    if tree == old:
        return new
    return tuple(replaced(part, old, new) if isinstance(part, tuple) else part for part in tree)


def children(tree: Tree) -> list[Tree]:
    """The trees right below this one."""
    found: list[Tree] = []
    for part in tree[1:]:
        if isinstance(part, tuple) and part and isinstance(part[0], str):
            found.append(part)
        elif isinstance(part, tuple):
            for inner in part:
                if isinstance(inner, tuple) and inner and isinstance(inner[0], tuple):
                    found.extend(inner)
                elif isinstance(inner, tuple) and inner:
                    found.append(inner)
    return found


def walk(tree: Tree, found: Callable[[Tree], None]) -> None:
    found(tree)
    for child in children(tree):
        walk(child, found)


# ---- whole answers -----------------------------------------------------------------------------


def _choice(reader: _Reader) -> str | None:
    """The letter of a choice at the start, consumed; None where there is none."""
    start = reader.at
    if reader.word("option", "choice", "answer", "answer choice"):
        reader.take()
        reader.accept(":")
    opened = reader.accept("(", "[")
    token = reader.take()
    single = token.kind in ("symbol", "word") and len(token.text) == 1
    if single and "A" <= token.text <= "J":
        closed = reader.accept(")", "]")
        ended = closed or reader.accept(".", ":")
        if opened == closed or closed:
            rest = reader.peek()
            if reader.accept(":") or reader.accept(".") or not rest.text:
                return token.text
            operator = rest.kind == "mark" and rest.text not in _OPERANDS and rest.text not in "$-"
            if ended and not operator and (token.prose or rest.text not in ("(", "-")):
                if not reader.word("and", "or") and (closed or rest.kind != "symbol"):
                    return token.text
    reader.at = start
    return None


def _whole(reader: _Reader) -> Tree:
    letter = _choice(reader)
    if letter:
        return ("choice", letter, None if reader.peek() is END else _rest(reader))
    return _rest(reader)


def _rest(reader: _Reader) -> Tree:
    items, between = reader.items()
    while reader.accept(".", ",", ";", ":"):
        pass
    if reader.accept("⇒", "⇔", "→"):
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
    known = said(text, whole=True)
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
            tree = _whole(_Reader(tokenize(text, commas), letters))
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
