r"""Answers as strings: the last box, unified spellings, and the grader that needs no parser.

Two rewards compare strings here, each in its own way.

`compare_strings` is the first half of the `math` reward. It decides only what needs no mathematics
(words, choice letters, integers, the same spelling) and leaves the rest to a parser.

`same_string` is the whole of the `boxed_string` reward, in the manner of the MATH data set
(Hendrycks et al., arXiv 2103.03874), which BuPO and, through it, the OISD paper grade with. It
normalises both sides and compares: `\frac12` is `\frac{1}{2}`, but 0.25 is not 1/4, nor is
`x+1` equal to `1+x`. So it errs on the strict side, is always fast, and its results can be compared
with papers that grade this way. It is written from the description of those rules; published
scripts differ in small ways.

Standard library only, because the graders' worker processes import it.
"""

from __future__ import annotations

import re

# ---- the last box ----------------------------------------------------------------------------

_BOX_TOKEN = re.compile(r"\\boxed\s*\{|\\\\(?!boxed)|\\[{}]|[{}]")
_BARE_BOX = re.compile(r"\\boxed(?![a-zA-Z])\s*(\\[a-zA-Z]+(?:\{[^{}]*\})*|[^\s$\\{}]+)")


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}`, or None; linear in the length of the text.

    Of nested boxes the inner one counts, since it opens last. A box that is never closed is passed
    over. Only when there is no complete box with braces does `\boxed 5` count, as `5`.
    """
    open_braces: list[int | None] = []  # for a box, where its content starts
    start, end = -1, -1
    for token in _BOX_TOKEN.finditer(text):
        if token[0] == "{":
            open_braces.append(None)
        elif token[0].startswith("\\boxed"):
            open_braces.append(token.end())
        elif token[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened is not None and opened > start:
                start, end = opened, token.start()
    if start >= 0:
        return text[start:end]
    bare = _BARE_BOX.findall(text)
    return bare[-1] if bare else None


# ---- what needs no mathematics ---------------------------------------------------------------

_MINUS_SIGNS = dict.fromkeys(map(ord, "\u2212\u2013\u2014\ufe63\uff0d"), "-")
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\xad"))
_FULL_WIDTH = {0xFEE0 + code: chr(code) for code in range(0x21, 0x7F)}
# Signs that people type instead of a LaTeX command; a space ends the command.
_SYMBOLS = {
    ord(symbol): f"{latex} " if latex[-1].isalpha() else latex
    for symbol, latex in {
        "°": "^\\circ", "∞": "\\infty", "π": "\\pi", "Π": "\\Pi", "·": "\\cdot", "×": "\\times",
        "÷": "/", "≤": "\\le", "≥": "\\ge", "≠": "\\ne", "±": "\\pm", "∪": "\\cup", "∩": "\\cap",
        "∅": "\\emptyset", "ℝ": "\\mathbb{R}", "√": "\\sqrt", "½": "\\frac{1}{2}",
        "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}",
        "²": "^2", "³": "^3", "′": "'", "⟨": "\\langle", "⟩": "\\rangle",
    }.items()
}  # fmt: skip
_TYPED = _FULL_WIDTH | _MINUS_SIGNS | _SYMBOLS | _INVISIBLE
_RENAMED = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:mathbb|Bbb)\s*\{?\s*([A-Z])\s*\}?"), r"\\mathbb{\1}"),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
    (re.compile(r"\\sqrt\s*(\[[^][]*\])?\s*([0-9a-zA-Z])"), r"\\sqrt\1{\2}"),
)
_DELIMITER_SIZE = re.compile(r"\\(?:left|right)(?![a-zA-Z])\.?")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,|\\,| )\d{3})+")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~")
_SPACE_TO_DROP = re.compile(r"(?<!\d) | (?!\d)")  # all but "2 1/2", which is not 21/2
_REPEATING = re.compile(r"(\d{0,30})\.(\d{0,30})\\(?:overline|bar)\s*\{(\d{1,30})\}")
_SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})")
_SET = re.compile(r"\\\{.*\\\}")
_TUPLE = re.compile(r"\([^()]*,[^()]*\)")
_INFINITY = re.compile(r"([-+]?)\s*(?:\\text\s*\{\s*)?infinity\s*\}?", re.IGNORECASE)
WORD = re.compile(r"yes|no|true|false|[A-Z]")
INTEGER = re.compile(r"[-+]?\d+")


def clean(text: str) -> str:
    """Spell an answer so that both math-verify and the comparison of strings understand it."""
    text = text.translate(_TYPED).replace("\\$", "").replace("$", "").replace("\\!", "")
    text = _DELIMITER_SIZE.sub("", text).replace("{,}", ",")
    for spelling, wanted in _RENAMED:
        text = spelling.sub(wanted, text)
    text = text.strip().rstrip(".").strip()
    if (quantity := _WRAPPER.fullmatch(text)) and quantity[1].strip()[:1].isdigit():
        text = quantity[1].strip()  # \text{12 apples}
    if infinity := _INFINITY.fullmatch(text):
        return f"{infinity[1]}\\infty"
    if number := _SCIENTIFIC.fullmatch(text):
        return f"{number[1]}\\times10^{{{number[2]}}}"
    text = _REPEATING.sub(_as_fraction, text)
    return re.sub(r"[^-+\d]", "", text) if _THOUSANDS.fullmatch(text) else text


def _as_fraction(repeating: re.Match[str]) -> str:
    """0.1666... written with a bar, as (16 - 1) / 90."""
    whole, once, again = repeating.groups()
    before = whole + once
    numerator = int(before + again) - int(before or "0")
    return f"\\frac{{{numerator}}}{{{10 ** len(once) * (10 ** len(again) - 1)}}}"


def key(cleaned: str) -> str:
    """The same for answers spelt alike: without wrappers and spaces, words in lower case."""
    key = _SPACE.sub(" ", _WRAPPER.sub(r"\1", cleaned))
    key = _SPACE_TO_DROP.sub("", " ".join(key.split())).rstrip(".")
    if choice := re.fullmatch(r"\(([A-Z])\)", key):
        return choice[1]
    return key.lower() if WORD.fullmatch(key.lower()) else key


def compare_strings(answer: str, gold: str) -> bool | None:
    """Verdict on two cleaned answers, or None if only mathematics can tell."""
    a, g = key(answer), key(gold)
    if not a or a == g:
        return bool(a)
    if WORD.fullmatch(a) or WORD.fullmatch(g):
        return False
    # math-verify takes a set and a tuple of the same elements for equal.
    if any(_SET.fullmatch(x) and _TUPLE.fullmatch(y) for x, y in ((a, g), (g, a))):
        return False
    return int(a) == int(g) if INTEGER.fullmatch(a) and INTEGER.fullmatch(g) else None


# ---- the grader of strings -------------------------------------------------------------------

_FRAC = re.compile(r"\\[dtc]?frac(?![a-zA-Z])")
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})")
_UNIT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{\s[^{}]*\}\s*$")
_BARE_POINT = re.compile(r"(^|[\s{(\[,=+\-])\.(?=\d)")
_BARE_SQRT = re.compile(r"\\sqrt\s*(\w)")
_FRAC_DIGITS = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))")
_SLASH = re.compile(r"([-+]?)(\d+)/([-+]?\d+)")
_INTEGRAL = re.compile(r"([-+]?)(\d+)(?:\.0*)?")
_NAME = re.compile(r"[^=]{1,2}=([^=]+)")


def same_string(answer: str, gold: str) -> bool:
    """Whether two answers have the same normal form; an empty one equals nothing."""
    a = normal_form(answer)
    return bool(a) and a == normal_form(gold)


def normal_form(answer: str) -> str:
    r"""One spelling for answers that differ only in their LaTeX.

    Drops line breaks, spacing and size commands, dollar and per cent signs, degrees, a unit at the
    end (`\text{ cm}`, with its space) and the name in `x = 5`; writes fractions, also `1/2` and a
    bare 0.5, as `\frac{1}{2}`, roots with braces, `.5` as 0.5, 049 and 49.0 as 49. Linear in the
    length of the text.
    """
    text = answer.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = _DELIMITER_SIZE.sub("", _FRAC.sub(r"\\frac", text))
    text = _DEGREES.sub("", text).replace("\\$", "").replace("$", "")
    text = _UNIT.sub("", text).replace("\\%", "").replace("%", "")
    text = _BARE_POINT.sub(r"\g<1>0.", text.strip())
    if named := _NAME.fullmatch(text.replace(" ", "")):
        text = named[1]
    text = _BARE_SQRT.sub(r"\\sqrt{\1}", text)
    text = _FRAC_DIGITS.sub(_braced, text).replace(" ", "")
    if whole := _INTEGRAL.fullmatch(text):
        # AIME's gold answers have leading zeros, and some copies of AMC's are floats.
        return whole[1].strip("+") + (whole[2].lstrip("0") or "0")
    if text == "0.5":
        return "\\frac{1}{2}"
    if slash := _SLASH.fullmatch(text):
        return f"{slash[1]}\\frac{{{slash[2]}}}{{{slash[3]}}}"
    return text


def _braced(found: re.Match[str]) -> str:
    numerator, denominator = found[1] or found[2] or "", found[3] or found[4] or ""
    return f"\\frac{{{numerator}}}{{{denominator}}}"
