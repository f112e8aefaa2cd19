r"""The words of an answer: LaTeX and ASCII made into one row of tokens.

A token is a number, a symbol (one letter), a word of prose, a command that takes arguments, or a
mark. Fonts, sizes and spacing vanish here; the content of `\text` is read like everything else,
except that its letters form words. So `\text{12 apples}` and `12 \text{ apples}` are the same row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from oisd.rewards.reading.commands import (
    ACCENTS,
    ALGEBRA,
    ALIASES,
    ASCII,
    ASCII_FUNCTIONS,
    BASES,
    COMMANDS,
    GREEK,
    IGNORED,
    MARKS,
    NAMES,
    SHORT_WORDS,
    TEXT,
)
from oisd.rewards.reading.spelling import GROUP, THIN

MAX_TOKENS = 600


class Unreadable(ValueError):
    """Not an answer in the notation that this reader knows."""


class NeedsAlgebra(Unreadable):
    """Well-formed as far as we can tell, but only a computer algebra system can evaluate it."""


@dataclass(frozen=True, slots=True)
class Token:
    kind: str  # "number" | "symbol" | "word" | "command" | "mark"
    text: str
    value: Fraction | None = None
    places: int | None = None  # decimal places as written, None for an integer
    spaced: bool = False  # white space before it
    prose: bool = False  # from inside \text{...}


# ---- numbers -----------------------------------------------------------------------------------

_REPEATING = re.compile(
    r"(\d{0,30})\.(\d{0,30}?)(?:\\(?:overline|bar|dot)\s*(?:\{(\d{1,30})\}|\s*(\d))"
    r"|(\d)\5{2,}\s*\\[lc]?dots|(\d)\6{2,}\.\.\.)"
)
_GROUPED = re.compile(
    rf"\d{{1,3}}(?:(?:{GROUP}\d{{3}})+|(?:{THIN}\d{{3}})+|(?: \d{{3}})+)(?!\d)(?:\.\d+)?"
)
_COMMAS = re.compile(r"(?!0)\d{1,3}(?:,\d{3})+(?!\d|,\d)(?:\.\d+)?")
_DECIMAL_COMMA = re.compile(rf"(\d+){GROUP}(\d+)")
_BASED = re.compile(
    r"(\d[0-9A-Fa-f]*)\s*_\s*"
    r"(?:\{\s*(?:\\text\s*\{)?\s*(\w+)\s*\}?\s*\}|(\d)|\\text\s*\{\s*(\w+)\s*\})"
)
_SCIENTIFIC = re.compile(r"(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d{1,3})(?![\d.a-zA-Z])")
_PLAIN = re.compile(r"\d+(?:\.\d+)?|\.\d+")


def _number(text: str, at: int, commas: bool) -> tuple[Token, int] | None:
    """The number that starts here, and where it ends. `commas`: 1,234 is one number."""
    if found := _REPEATING.match(text, at):
        whole, once = found[1], found[2]
        again = found[3] or found[4] or found[5] or found[6]
        before = whole + once
        value = Fraction(
            int(before + again) - int(before or "0"), 10 ** len(once) * (10 ** len(again) - 1)
        )
        return Token("number", found[0], value), found.end()
    if found := _GROUPED.match(text, at) or (_COMMAS.match(text, at) if commas else None):
        return _decimal(re.sub(r"[^\d.]", "", found[0])), found.end()
    if (found := _DECIMAL_COMMA.match(text, at)) and not _GROUPED.match(text, at):
        return _decimal(f"{found[1]}.{found[2]}"), found.end()
    if found := _BASED.match(text, at):
        base = found[2] or found[3] or found[4]
        base = int(base) if base.isdigit() else BASES.get(base.lower(), 0)
        digits = found[1].upper() if base == 16 else found[1]
        if 2 <= base <= 36 and all(d.isdigit() or d.isupper() for d in digits):
            if all(int(d, 36) < base for d in digits):
                return Token("based", f"{digits}_{base}"), found.end()
    if found := _SCIENTIFIC.match(text, at):
        value = Fraction(found[1]) * Fraction(10) ** int(found[2])
        return Token("number", found[0], value), found.end()
    if found := _PLAIN.match(text, at):
        return _decimal(found[0]), found.end()
    return None


def _decimal(digits: str) -> Token:
    if len(digits) > 1500:
        raise Unreadable("a number of more than 1,500 digits")
    places = len(digits) - digits.index(".") - 1 if "." in digits else None
    return Token("number", digits, Fraction(digits), places)


# ---- commands and words ------------------------------------------------------------------------

_COMMAND = re.compile(r"\\([a-zA-Z]+)\*?")
_LETTERS = re.compile(r"[a-zA-Z]+")
_PROSE = re.compile(r"[^\W\d_](?:[^\W\d_]|[-'’](?=[^\W\d_]{2})|\.(?=[a-z]\.))*\.?")
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{(\w+)\*?\}(?:\s*\{[lcr| ]*\})?(?:\[[^][]*\])?")
_MATH_LETTERS = re.compile(
    r"\\(?:mathrm|mathsf|operatorname|text|textit|textrm|rm)\s*\{\s*([a-zA-Z]+)\s*\}"
)
_ROMAN = re.compile(r"(?=..)X{0,3}(?:IX|IV|V?I{0,3})")
_DELIMITERS = re.compile(r"\\[()\[\]]")


def tokenize(text: str, commas: bool = True) -> list[Token]:
    """Tokens of a tidied answer.

    commas: whether 1,234 outside of brackets is one number, or else a list of two.
    Raises Unreadable for what no answer contains, NeedsAlgebra for limits and integrals.
    """
    return _Lexer(text, commas).run()


class _Lexer:
    def __init__(self, text: str, commas: bool) -> None:
        self.text = text
        self.commas = commas
        self.tokens: list[Token] = []
        self.at = 0
        self.depth = 0  # of braces
        self.prose: list[int] = []  # depths at which a \text{ was opened
        self.fences = 0  # brackets that are open
        self.spaced = False

    def run(self) -> list[Token]:
        while self.at < len(self.text):
            if len(self.tokens) > MAX_TOKENS:
                raise Unreadable("too long")
            if self.text[self.at].isspace():
                self.at, self.spaced = self.at + 1, True
            else:
                self.step()
                self.spaced = False
        if self.depth:
            raise Unreadable("a brace too few")
        return self.tokens

    def add(self, kind: str, content: str) -> None:
        self.tokens.append(Token(kind, content, spaced=self.spaced, prose=bool(self.prose)))

    def mark(self, mark: str, opens: str = "([", closes: str = ")]") -> None:
        self.fences = max(0, self.fences + (mark in opens or mark == "\\{"))
        if mark in closes or mark == "\\}":
            self.fences = max(0, self.fences - 1)
        self.add("mark", mark)

    def step(self) -> None:
        text, at = self.text, self.at
        char = text[at]
        if char.isdigit() or (char == "." and text[at + 1 : at + 2].isdigit()):
            self.number()
        elif found := _ENVIRONMENT.match(text, at):
            self.at = found.end()
            self.add("mark", f"{found[1]} {found[2]}")
        elif (signs := text[at : at + 3]) in ASCII or (signs := text[at : at + 2]) in ASCII:
            self.at += len(signs)
            self.mark(ASCII[signs])
        elif _DELIMITERS.match(text, at):
            self.at += 2
        elif found := _MATH_LETTERS.match(text, at):
            self.at = found.end()
            self.letters(found[1], prose=True)
        elif found := _COMMAND.match(text, at):
            self.at = found.end()
            self.command(ALIASES.get(found[1], found[1]))
        elif char in "{}":
            self.brace(char)
        elif found := _PROSE.match(text, at):
            self.word(found)
        elif char in "()[]|+-*/^_=<>!':;,.%&~£€¥¢₹₽₩#\"":
            self.at += 1
            self.mark(char)
        elif char == "$":  # as in $5$; the sign of money is \$ in LaTeX
            self.at += 1
            if text[self.at : self.at + 1].isdigit() and text.count("$") % 2:
                self.add("mark", "$")
        elif char in GROUP + THIN:
            self.at += 1
            if char == GROUP:
                self.add("mark", ",")
        else:
            raise Unreadable(f"unknown sign {char!r}")

    def number(self) -> None:
        found = _number(self.text, self.at, self.commas and not self.fences)
        if found is None:
            raise Unreadable("a digit that is none")
        token, self.at = found
        self.tokens.append(replace(token, spaced=self.spaced, prose=bool(self.prose)))

    def brace(self, char: str) -> None:
        self.at += 1
        if char == "{":
            self.depth += 1
            self.add("mark", "{")
            return
        if self.prose and self.prose[-1] == self.depth:
            self.prose.pop()
        else:
            self.add("mark", "}")
        self.depth -= 1
        if self.depth < 0:
            raise Unreadable("a brace too many")

    def command(self, name: str) -> None:
        if name in TEXT:
            if self.text[self.at :].lstrip().startswith("{"):
                self.at = self.text.index("{", self.at) + 1
                self.depth += 1
                self.prose.append(self.depth)
        elif name in MARKS:
            mark = MARKS[name]
            if mark in ("and", "or"):
                self.add("word", mark)
            else:
                self.mark(mark, "", "")
        elif name in COMMANDS:
            self.add("command", name)
        elif name == "pi":
            self.add("mark", "π")
        elif name in GREEK or (name.startswith("set") and len(name) == 4):
            self.add("symbol", name)
        elif name in ALGEBRA:
            raise NeedsAlgebra(name)
        elif name in ACCENTS:
            self.add("command", "accent")
        elif name in ("angle", "triangle", "measuredangle"):
            self.add("command", "named")
        elif name not in IGNORED:
            raise Unreadable(f"unknown command {name}")

    def word(self, found: re.Match[str]) -> None:
        if self.prose or not found[0].isascii():
            word = found[0].rstrip(".")
            # The point of an abbreviation is part of it, that of a choice (D.) is not.
            self.at = found.end() - (len(word) == 1 and word != found[0])
            self.letters(word, prose=True)
            return
        found = _LETTERS.match(self.text, self.at) or found
        self.at = found.end()
        after_number = bool(self.tokens) and self.tokens[-1].kind == "number"
        minutes = found[0] in ("min", "sec") and not self.text.startswith("(", self.at)
        self.letters(found[0], prose=after_number and minutes)

    def letters(self, run: str, prose: bool) -> None:
        """A run of letters: a function, a constant, a word of prose, or a product of symbols."""
        if prose and run in ("min", "sec", "max", "deg", "inf"):
            self.add("word", run)
        elif run in ASCII_FUNCTIONS:
            self.add("command", ALIASES.get(run, run))
        elif run in NAMES or run.lower() == "infinity":
            self.add("mark", NAMES.get(run, "∞"))
        elif run in GREEK or (prose and run in ("e", "i")):
            self.add("symbol", run)
        elif prose or len(run) > 2 or run in SHORT_WORDS or _ROMAN.fullmatch(run):
            self.add("word", run)
        else:
            for letter in run:
                self.add("symbol", letter)
