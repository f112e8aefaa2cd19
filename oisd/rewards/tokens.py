r"""The words of an answer: LaTeX, ASCII and Unicode made into one row of tokens.

A token is a number, a symbol (one letter, with its subscript), a word of prose, a command that
takes arguments, or a mark. Fonts, colours, sizes and spacing vanish here; the content of `\text`
is read like everything else, except that its letters form words. So `\text{12 apples}` and
`12 \text{ apples}` are the same row.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

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


# ---- spellings that are alike -----------------------------------------------------------------

_SIGNS = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\ufe63": "-", "\uff0d": "-", "°": "\\circ ", "º": "\\circ ",
    "∞": "\\infty ", "π": "\\pi ", "Π": "\\Pi ", "·": "\\cdot ", "⋅": "\\cdot ", "×": "\\times ", "∗": "*",
    "÷": "/", "≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "∓": "\\mp ",
    "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ", "∈": "\\in ", "≈": "\\approx ", "≡": "\\equiv ",
    "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}",
    "√": "\\sqrt ", "∛": "\\sqrt[3]", "′": "'", "’": "'", "″": "''", "⟨": "\\langle ", "⟩": "\\rangle ",
    "。": ".", "，": ",", "、": ",", "；": ";", "：": ":", "…": "\\ldots ", "→": "\\to ", "∖": "\\setminus ",
    "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}",
    "⅕": "\\frac{1}{5}", "⅙": "\\frac{1}{6}", "⅛": "\\frac{1}{8}", "‰": "\\permille ", "∠": "\\angle ",
    "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ", "φ": "\\phi ",
    "“": '"', "”": '"', "″": "''",
}  # fmt: skip
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\xad"))
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_TRANSLATED = str.maketrans(_SIGNS) | _INVISIBLE
_GROUP = "\u201a"  # a comma that the writer keeps together with its digits: {,} and ,\!
_THIN = "\u2009"  # a space of which the same is true
_REWRITTEN = (
    (re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+"), lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}"),
    (re.compile(r"\\!\s*,|,\s*\\!(?:\s*\\!)*|\{,\}\s*(?:\\!)?"), _GROUP),
    (re.compile(rf"{_GROUP}[ \t]*(?=\d)"), _GROUP),
    (re.compile(r"\{([:.])\}"), r"\1"),
    (re.compile(r"\\!"), ""),
    (re.compile(r"(?<=\d)\s*(?:\\[,; :]|~)\s*(?=\d)"), _THIN),
    (re.compile(r"(?<!\\)\\[,;: >]|\\q?quad(?![a-zA-Z])|~"), " "),
    (re.compile(r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1\\text{ \2}"),
    (re.compile(r"\\(?:num|ang|si|unit)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:textcolor|colorbox|fcolorbox\s*\{[^{}]*\})\s*(?:\[[^][]*\])?\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\color\s*(?:\[[^][]*\])?\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\[hv]?phantom\s*\{[^{}]*\}|\\[hv]space\*?\s*\{[^{}]*\}"), ""),
    (re.compile(r"\^\s*\{?\s*\\(?:text|mathrm|rm|textrm)?\s*\{?\s*(?:st|nd|rd|th)\s*\}?\s*\}?(?![a-zA-Z])"), " "),
    (re.compile(r"\\(?:text(?:superscript)?|mathrm)\s*\{\s*(?:st|nd|rd|th)\s*\}"), " "),
    (re.compile(r"(?<=\d)\s*\^?\s*\{?(?:st|nd|rd|th)\}?(?![a-zA-Z}])"), " "),
    (re.compile(r"\\[dt]?frac\s*\{\s*\\(?:text|mathrm)\s*\{([^{}]*)\}\s*\}\s*\{\s*\\(?:text|mathrm)\s*\{([^{}]*)\}\s*\}"), r"\\text{ \1/\2}"),
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)"), r"\\times "),
    (re.compile(r"\\text(?:rm|bf)?\s*\{([0-9A-F]+)\}(?=\s*_)"), r"\1"),
    (re.compile(r"\\(?:mathbb|Bbb|mathbf)\s*\{?\s*([RZNQC])\s*\}?(?=\s*[+*^]?\s*(?:$|[\\),.$ ]))"), r"\\set\1 "),
    (re.compile(r"\\(?:mathbb|Bbb)\s*\{?\s*([A-Z])\s*\}?"), r"\\set\1 "),
    (re.compile(r"\{?\}?\s*[_^]\s*\{?(\d+)\}?\s*(?:C|\\(?:text|mathrm)\{C\})\s*_\s*\{?(\d+)\}?"), r"\\binom{\1}{\2}"),
    (re.compile(r"\\\\\[[^][]*\]"), r"\\\\"),
    (re.compile(r"\\+\s*$"), ""),
    (re.compile(r"o'clock"), "oclock"),
    (re.compile(r"(?<=[\d}\s{])\s*([aApP])\.\s?[mM]\.?(?![a-zA-Z])"), r" \\text{ \1m}"),
)  # fmt: skip
_SIMPLE = re.compile(r"[-+/=.,()\s\d]*(?<!\d) ?[a-zA-Z]*|[-+]?\d+(?:[./]\d+)?", re.A)
_BOLD = re.compile(r"\s*(\*\*|__|`+|\*)(?=\S)(.*?)(?<=\S)\1\s*([.,;:]?)\s*", re.S)


@lru_cache(maxsize=8192)
def tidy(text: str) -> str:
    """The answer with one spelling for signs, thousands and spaces, and without colours."""
    if _SIMPLE.fullmatch(text):
        return text.strip()
    text = "".join(
        str(unicodedata.digit(c)) if c.isdigit() and not c.isascii() and c.isdecimal() else c
        for c in text.translate(_TRANSLATED)
    )
    text = "".join(chr(ord(c) - 0xFEE0) if "\uff01" <= c <= "\uff5e" else c for c in text)
    text = " ".join(text.replace("\u202f", _THIN).split(None)) if "\n" in text else text
    while bold := _BOLD.fullmatch(text):
        text = bold[2] + bold[3]
    for pattern, wanted in _REWRITTEN:
        text = pattern.sub(wanted, text)
    return text.strip()


# ---- numbers -----------------------------------------------------------------------------------

_REPEATING = re.compile(
    r"(\d{0,30})\.(\d{0,30}?)(?:\\(?:overline|bar|dot)\s*(?:\{(\d{1,30})\}|\s*(\d))"
    r"|(\d)\5{2,}\s*\\[lc]?dots|(\d)\6{2,}\.\.\.)"
)
_GROUPED = re.compile(
    rf"\d{{1,3}}(?:(?:{_GROUP}\d{{3}})+|(?:{_THIN}\d{{3}})+|(?: \d{{3}})+)(?!\d)(?:\.\d+)?"
)
_COMMAS = re.compile(r"(?!0)\d{1,3}(?:,\d{3})+(?!\d|,\d)(?:\.\d+)?")
_DECIMAL_COMMA = re.compile(rf"(\d+){_GROUP}(\d+)")
_BASED = re.compile(
    r"(\d[0-9A-F]*)\s*_\s*(?:\{\s*(?:\\text\s*\{)?\s*(\w+)\s*\}?\s*\}|(\d)|\\text\s*\{\s*(\w+)\s*\})"
)
_SCIENTIFIC = re.compile(r"(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d{1,3})(?![\d.a-zA-Z])")
_PLAIN = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_BASES = dict(
    two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, eleven=11, twelve=12,
    sixteen=16,
)  # fmt: skip


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
        base = base if base.isdigit() else str(_BASES.get(base.lower(), ""))
        if base:
            return Token("based", f"{found[1]}_{int(base)}"), found.end()
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

_TEXT = frozenset(
    "text textbf textit textrm textsf texttt textnormal textsc mbox mathrm mathsf mathtt hbox emph "
    "operatorname mathnormal textup".split()
)
_IGNORED = frozenset(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr middle displaystyle textstyle "
    "scriptstyle limits nolimits bf rm it sf tt mathstrut strut boldsymbol mathbf mathit bm pmb mathcal mathscr "
    "underline uline boxed fbox framebox ensuremath mathop mathord bold large Large LARGE huge Huge small normalsize "
    "hfill noindent centering label nonumber therefore thinspace enspace space overbrace underbrace mathfrak "
    "color".split()
)  # fmt: skip
_MARKS = {
    "cdot": "*", "times": "*", "ast": "*", "bullet": "*", "div": "/", "le": "≤", "leq": "≤", "leqslant": "≤",
    "ge": "≥", "geq": "≥", "geqslant": "≥", "lt": "<", "gt": ">", "ne": "≠", "neq": "≠", "in": "∈",
    "equiv": "≡", "cong": "≡", "approx": "≈", "simeq": "≈", "pm": "±", "mp": "∓", "cup": "∪", "cap": "∩",
    "setminus": "∖", "backslash": "∖", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "langle": "(",
    "rangle": ")", "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")", "lbrace": "\\{", "rbrace": "\\}",
    "circ": "°", "degree": "°", "textdegree": "°", "prime": "'", "ldots": "…", "dots": "…", "cdots": "…",
    "infty": "∞", "emptyset": "∅", "varnothing": "∅", "colon": ":", "pounds": "£", "textsterling": "£",
    "euro": "€", "texteuro": "€", "yen": "¥", "textyen": "¥", "textdollar": "$", "cent": "¢", "textcent": "¢",
    "Rightarrow": "⇒", "implies": "⇒", "Longrightarrow": "⇒", "land": "and", "wedge": "and", "lor": "or",
    "vee": "or", "iff": "⇔", "Leftrightarrow": "⇔", "notin": "∉", "sim": "~", "propto": "∝", "to": "→",
    "rightarrow": "→", "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "permille": "‰", "quad": " ",
    "exclamdown": "!", "percent": "%", "over": "over", "choose": "choose", "colonequals": "=", "coloneqq": "=",
}  # fmt: skip
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sech csch arcsinh arccosh "
    "arctanh ln log lg exp gcd lcm max min zeta Gamma det abs floor ceil sqrt cbrt Re Im arg".split()
)  # fmt: skip
_ASCII_FUNCTIONS = FUNCTIONS | {"asin", "acos", "atan", "binom", "binomial", "factorial", "root"}
_ALIASES = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "dfrac": "frac", "tfrac": "frac", "cfrac": "frac",
    "sfrac": "frac", "nicefrac": "frac", "dbinom": "binom", "tbinom": "binom", "binomial": "binom",
    "arcosh": "arccosh", "arsinh": "arcsinh", "artanh": "arctanh", "Pr": "P", "tg": "tan", "ctg": "cot",
    "arctg": "arctan", "cosec": "csc",
}  # fmt: skip
_COMMANDS = FUNCTIONS | set("frac binom sum prod pmod bmod mod root".split())
_ALGEBRA = frozenset("int iint iiint oint lim limsup liminf partial nabla sup inf".split())
_ACCENTS = frozenset(
    "overline vec hat bar tilde widehat overrightarrow overleftrightarrow widetilde mathring dot ddot".split()
)
GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar imath "
    "jmath aleph".split()
)  # fmt: skip
_SHORT_WORDS = frozenset(
    "or no in to of is at am pm cm mm km kg mg ml ft yd mi lb oz hr dm cL dL kW mL kL sq cu as if be by so "
    "an km hz Hz kN ms ns us mA kV".split()
)
_NAMES = {"pi": "π", "Pi": "Π", "infinity": "∞", "infty": "∞", "oo": "∞", "inf": "∞", "union": "∪"}
_ASCII = {"<=": "≤", ">=": "≥", "!=": "≠", "==": "=", "=>": "⇒", "->": "→", "**": "^", "...": "…", "\\{": "\\{",
          "\\}": "\\}", "\\|": "|", "\\%": "%", "\\$": "$", "\\#": "#", "\\&": "&", "\\\\": "\\\\", "\\_": "_"}  # fmt: skip
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
    tokens: list[Token] = []
    prose: list[int] = []  # brace depths at which a \text{ was opened
    depth = fences = at = 0
    spaced = False

    def add(kind: str, content: str) -> None:
        tokens.append(Token(kind, content, spaced=spaced, prose=bool(prose)))

    while at < len(text):
        if len(tokens) > MAX_TOKENS:
            raise Unreadable("too long")
        char, start = text[at], at
        if char.isspace():
            spaced, at = True, at + 1
            continue
        if char.isdigit() or (char == "." and text[at + 1 : at + 2].isdigit()):
            found = _number(text, at, commas and not fences)
            if found is None:
                raise Unreadable("a digit that is none")
            token, at = found
            tokens.append(
                Token(token.kind, token.text, token.value, token.places, spaced, bool(prose))
            )
        elif found := _ENVIRONMENT.match(text, at):
            at = found.end()
            add("mark", f"{found[1]} {found[2]}")
        elif (pair := text[at : at + 3]) in _ASCII or (pair := text[at : at + 2]) in _ASCII:
            at += len(pair)
            mark = _ASCII[pair]
            fences += (mark == "\\{") - (mark == "\\}" and fences > 0)
            add("mark", mark)
        elif _DELIMITERS.match(text, at):
            at += 2
        elif found := _MATH_LETTERS.match(text, at):
            at = found.end()
            _letters(found[1], add, prose=True)
        elif found := _COMMAND.match(text, at):
            at, name = found.end(), found[1]
            name = _ALIASES.get(name, name)
            if name in _TEXT:
                if text[at:].lstrip().startswith("{"):
                    at = text.index("{", at) + 1
                    depth += 1
                    prose.append(depth)
            elif name in _IGNORED:
                pass
            elif name in _MARKS:
                fences += (name == "lbrace") - (name == "rbrace" and fences > 0)
                mark = _MARKS[name]
                add("word" if mark in ("and", "or") else "mark", mark)
            elif name in _COMMANDS:
                add("command", name)
            elif name == "pi":
                add("mark", "π")
            elif name in GREEK:
                add("symbol", name)
            elif name in _ALGEBRA:
                raise NeedsAlgebra(name)
            elif name in _ACCENTS:
                add("command", "accent")
            elif name in ("angle", "triangle", "measuredangle"):
                add("command", "named")
            elif name.startswith("set") and len(name) == 4:
                add("symbol", name)
            else:
                raise Unreadable(f"unknown command {name}")
        elif char == "{":
            at, depth = at + 1, depth + 1
            add("mark", "{")
        elif char == "}":
            if prose and prose[-1] == depth:
                prose.pop()
            else:
                add("mark", "}")
            at, depth = at + 1, depth - 1
            if depth < 0:
                raise Unreadable("a brace too many")
        elif (prose and (found := _PROSE.match(text, at))) or (found := _PROSE.match(text, at)):
            if prose or not found[0].isascii():
                at = found.end()
                _letters(found[0].rstrip(".") or found[0], add, prose=True)
            else:
                found = _LETTERS.match(text, at)
                assert found
                at = found.end()
                unit = found[0] in ("min", "sec") and bool(tokens) and tokens[-1].kind == "number"
                _letters(found[0], add, prose=unit and not text.startswith("(", at))
        elif char in "([|":
            at += 1
            fences += char != "|"
            add("mark", char)
        elif char in ")]":
            at += 1
            fences = max(0, fences - 1)
            add("mark", char)
        elif char in "+-*/^_=<>!':;,.%&~£€¥¢₹₽₩#\"":
            at += 1
            add("mark", char)
        elif char == "$":
            at += 1  # as in $5$; the sign of money is \$ in LaTeX
            if text[at : at + 1].isdigit() and text.count("$") % 2:
                add("mark", "$")
        elif char == _GROUP:
            at += 1
            add("mark", ",")
        elif char == _THIN:
            at += 1
        else:
            raise Unreadable(f"unknown sign {char!r}")
        spaced = False
        assert at > start
    if depth:
        raise Unreadable("a brace too few")
    return tokens


def _letters(run: str, add, prose: bool) -> None:
    """A run of letters: a function, a constant, a word of prose, or a product of symbols."""
    name = _ALIASES.get(run, run)
    if prose and run in ("min", "sec", "max", "deg", "inf"):
        add("word", run)
    elif run in _ASCII_FUNCTIONS:
        add("command", name)
    elif run in _NAMES or run.lower() in ("infinity",):
        add("mark", _NAMES.get(run, "∞"))
    elif run in GREEK:
        add("symbol", run)
    elif prose and len(run) == 1 and run in "ei":
        add("symbol", run)
    elif prose or len(run) > 2 or run in _SHORT_WORDS or not run.isascii() or _ROMAN.fullmatch(run):
        add("word", run)
    else:
        for letter in run:
            add("symbol", letter)
