"""Expressions: sums, products, powers, functions, brackets, matrices, by recursive descent.

What may stand inside brackets (lists, relations, words) is the subclass's, in `answers`.
"""

from __future__ import annotations

from fractions import Fraction

from oisd.rewards.reading.commands import FUNCTIONS
from oisd.rewards.reading.tokens import NeedsAlgebra, Token, Unreadable
from oisd.rewards.reading.trees import Tree, nodes, num, replaced
from oisd.rewards.reading.units import SYMBOL_UNITS

MAX_DEPTH = 40
OPERANDS = frozenset(["(", "{", "\\{", "|", "⌊", "⌈", "π", "∞", "∅", "…"])
_FUNCTION_LETTERS = frozenset("f g h F G H O".split())
_MATRICES = frozenset("matrix pmatrix bmatrix Bmatrix vmatrix smallmatrix array".split())
END = Token("mark", "")


class ExpressionReader:
    """Recursive descent over the tokens of one answer."""

    def __init__(self, tokens: list[Token], letters_as_units: bool) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0
        self.brackets = 0
        self.letters_as_units = letters_as_units

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

    # ---- what the subclass reads ----

    def items(self) -> tuple[list[Tree], list[str]]:
        raise NotImplementedError

    # ---- terms and factors ----

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
                token.text in OPERANDS or token.text.startswith("begin ")
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
            mark = part[0] if part[0] in ("deg", "pct") else ""
            part = part[1] if mark else part
            plain = part[0] == "div" and part[1][0] == part[2][0] == "num"
            if plain and 0 < part[1][1] < part[2][1]:
                return (mark, ("add", whole, part)) if mark else ("add", whole, part)
        elif self.peek().kind == "number" and self.peek().spaced and self.peek(1).text == "/":
            above, _, below = self.take(), self.take(), self.take()
            if below.kind == "number" and above.value and below.value:
                if above.value < below.value and above.places is below.places is None:
                    value = ("add", whole, ("div", num(above.value), num(below.value)))
                    return ("pct", value) if self.accept("%") else value
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
            rest = Token("number", digits[1:], Fraction(digits[1:]))
            self.tokens.insert(self.at, rest)
            return num(int(digits[0]))
        node = self.primary()
        if chain and self.sees("^"):
            self.take()
            node = ("pow", node, self.group_or_one(chain=True))
        return node

    # ---- operands ----

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
                name = name[3] + sign.replace("^", "")
                return ("sym", name + ("_" + self.raw_group() if self.accept("_") else ""))
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
        if self.accept("|", ":"):
            conditions, between = self.items()
            self.expect("\\}")
            return _set_builder(items, conditions, between)
        self.expect("\\}")
        return ("set", *items)

    def matrix(self, kind: str) -> Tree:
        if kind == "cases":
            return self.system()
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

    def system(self) -> Tree:
        """Equations one below the other, x = 1 and y = 2; not the pieces of a function."""
        lines, _ = self.items()
        while self.accept("\\\\") and not self.sees("end cases"):
            lines += self.items()[0]
        self.expect("end cases")
        return ("list", ",", *lines)

    # ---- commands and functions ----

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
        if self.sees("(", "\\{"):
            node = self.primary()
            return list(
                node[3:] if node[0] == "fenced" else node[1:] if node[0] == "set" else [node]
            )
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


def _set_builder(items: list[Tree], conditions: list[Tree], between: list[str]) -> Tree:
    """{ x | condition } is the condition; { 2k | k in Z } is a family, `2k, k in Z`."""
    if len(items) != 1:
        raise Unreadable("set-builder notation")
    what = items[0]
    if what[0] == "rel" and what[2] == ("∈",) and what[1][1] == ("space", "R"):
        what = what[1][0]
    if what[0] == "sym" and all(what in nodes(condition) for condition in conditions):
        return conditions[0] if not between else ("list", between[0], *conditions)
    if what[0] in ("rel", "sym") or len(conditions) != 1 or conditions[0][0] != "rel":
        raise Unreadable("set-builder notation")
    return ("list", ",", what, conditions[0])
