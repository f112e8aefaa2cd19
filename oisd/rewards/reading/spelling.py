r"""One spelling for what is written in many ways: signs, thousands, spaces, colours, ordinals.

`tidy` works on the text alone and knows nothing of mathematics; its result is still LaTeX.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

GROUP = "\u201a"  # a comma that the writer keeps together with its digits: {,} and ,\!
THIN = "\u2009"  # a space of which the same is true

_SIGNS = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\ufe63": "-", "\uff0d": "-", "∗": "*", "÷": "/",
    "′": "'", "’": "'", "″": "''", "“": '"', "”": '"', "。": ".", "，": ",", "、": ",", "；": ";",
    "：": ":", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "∛": r"\sqrt[3]", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅕": r"\frac{1}{5}",
    "⅙": r"\frac{1}{6}", "⅛": r"\frac{1}{8}", "\u202f": THIN,
}  # fmt: skip
_NAMED_SIGNS = {
    "°": "circ", "º": "circ", "∞": "infty", "π": "pi", "Π": "Pi", "·": "cdot", "⋅": "cdot",
    "×": "times", "≤": "le", "⩽": "le", "≥": "ge", "⩾": "ge", "≠": "ne", "±": "pm", "∓": "mp",
    "∪": "cup", "∩": "cap", "∅": "emptyset", "∈": "in", "≈": "approx", "≡": "equiv", "√": "sqrt",
    "⟨": "langle", "⟩": "rangle", "…": "ldots", "→": "to", "∖": "setminus", "‰": "permille",
    "∠": "angle", "θ": "theta", "α": "alpha", "β": "beta", "γ": "gamma", "λ": "lambda", "φ": "phi",
    "✓": "checkmark", "✔": "checkmark", "✅": "checkmark", "□": "square", "■": "blacksquare",
}  # fmt: skip
_TRANSLATED = (
    dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\xad"))
    | {0xFEE0 + code: chr(code) for code in range(0x21, 0x7F)}  # full width
    | {ord(sign): f"\\{name} " for sign, name in _NAMED_SIGNS.items()}
    | {ord(sign): wanted for sign, wanted in _SIGNS.items()}
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_TEXT = r"\\(?:text|mathrm|textrm|rm)"
_ORDINAL = r"(?:st|nd|rd|th)"
_BRACED = r"\s*\{([^{}]*)\}"


def _superscript(found: re.Match[str]) -> str:
    return "^{" + found[0].translate(_SUPERSCRIPTS) + "}"


_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_DIGITS = "one|two|three|four|five|six|seven|eight|nine"
_EVERY_REAL = r"(?:\\text\s*\{)?\s*[aA]ll (?:real numbers|reals)(?: x)?,? except(?: for)?\s*\}?"

_BETWEEN = r"(?:,|\s|and|\\text\s*\{\s*and\s*\})+"


def _all_but(found: re.Match[str]) -> str:
    return r"\setR \setminus \{" + re.sub(r"\\text\s*\{\s*and\s*\}|and", ",", found[1]) + r"\}"


_REWRITTEN: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), wanted)
    for pattern, wanted in (
        (r"(?s)^.*####\s*", ""),  # GSM8K's mark of an answer
        # signs that end a proof, "for all n"
        (r"(?<=[\w})\]%$])(?:\\?\s)*\\(?:checkmark|(?:black)?square|qed(?:symbol)?|Box)\s*\.?\s*$",
         ""),
        (r"(?<=[\w})\]])\s*,?\s*(?:\\text\s*\{)?\s*,?\s*for (?:all|every|any)\s*\}?\s*"
         r"[a-z]\s*\}?\s*$", ""),
        (rf"^{_EVERY_REAL}\s*(?:x\s*=\s*)?(-?\d+(?:{_BETWEEN}-?\d+)*)\s*\}}?$", _all_but),
        (rf"(?i)(?<![\w-])({_TENS})-({_DIGITS})(?![\w-])", r"\\text{\1-\2}"),
        (r"(?<![a-zA-Z\\])Rs\.?\s*(?=\d)", "₹"),
        (r"^\{?\s*(\w+)\s*\\choose\s*\{?\s*(\w+)\s*\}?\s*\}?$", r"\\binom{\1}{\2}"),
        (r"^(\d+)\s*h(?:rs?)?\s*(\d+)\s*m(?:ins?)?$", r"\1\\text{ h }\2\\text{ min}"),
        (r"\\(?:widehat|hat|vec)\s*\{\s*\\?([ijk])(?:math)?\s*\}", r" \1 "),  # unit vectors
        ("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", _superscript),
        # 2,\!345, 2,\! 345 and 2{,}345; elsewhere \! is nothing
        (r"\\!\s*,|,\s*\\!(?:\s*\\!)*|\{,\}\s*(?:\\!)?", GROUP),
        (rf"{GROUP}[ \t]*(?=\d)", GROUP),
        (r"\{([:.])\}", r"\1"),
        (r"\\!", ""),
        (r"(?<=\d)\s*(?:\\[,; :]|~)\s*(?=\d)", THIN),
        (r"(?<!\\)\\[,;: >]|\\q?quad(?![a-zA-Z])|~", " "),
        # siunitx
        (rf"\\(?:SI|qty){_BRACED}{_BRACED}", r"\1\\text{ \2}"),
        (rf"\\(?:num|ang|si|unit){_BRACED}", r"\1"),
        # colours and empty space
        (r"\\(?:textcolor|colorbox|fcolorbox\s*\{[^{}]*\})\s*(?:\[[^][]*\])?\s*\{[^{}]*\}", ""),
        (r"\\color\s*(?:\[[^][]*\])?\s*\{[^{}]*\}", ""),
        (r"\\[hv]?phantom\s*\{[^{}]*\}|\\[hv]space\*?\s*\{[^{}]*\}", ""),
        # 12^{\text{th}}, 12\text{th}, 12th
        (rf"\^\s*\{{?\s*(?:{_TEXT})?\s*\{{?\s*{_ORDINAL}\s*\}}?\s*\}}?(?![a-zA-Z])", " "),
        (rf"\\(?:text(?:superscript)?|mathrm)\s*\{{\s*{_ORDINAL}\s*\}}", " "),
        (rf"(?<=\d)\s*\^?\s*\{{?{_ORDINAL}\}}?(?![a-zA-Z}}])", " "),
        # units: a fraction of words, a.m. outside of \text, o'clock; 1.2 x 10^5
        (rf"\\[dt]?frac\s*\{{\s*{_TEXT}{_BRACED}\s*\}}\s*\{{\s*{_TEXT}{_BRACED}\s*\}}",
         r"\\text{ \1/\2}"),
        (r"(?<=[\d}\s{])\s*([aApP])\.\s?[mM]\.?(?![a-zA-Z])", r" \\text{ \1m}"),
        (r"o'clock", "oclock"),
        (r"(?<=[\d}\s])\\[dt]?frac\s*\{\s*([a-z]{1,3})\s*\}\s*\{\s*(h|s|hr|min)\s*\}",
         r"\\text{ \1/\2}"),
        (r"\^\{([+*-])\}", r"^\1"),
        (r"(?<=\d)\s+[(\[]\s*(?:\\(?:text|mathrm)\s*\{)?\s*([a-zA-Z]{2,})\s*\}?\s*[)\]]",
         r"\\text{ \1}"),
        (r"\^\s*\{?\s*\\prime(?![a-zA-Z])\s*\}?", "'"),
        (r"\\&", r"\\text{ and }"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
        # \text{1A}_{16}, sets of numbers, binomials with two subscripts, optional arguments
        (r"\\text(?:rm|bf)?\s*\{([0-9A-F]+)\}(?=\s*_)", r"\1"),
        (r"\\mathbf\s*\{?\s*([RZNQC])\s*\}?(?=\s*[+*^]?\s*(?:$|[\\),.$ ]))", r"\\set\1 "),
        (r"\\(?:mathbb|Bbb)\s*\{?\s*([A-Z])\s*\}?", r"\\set\1 "),
        # parts of Z and R, each with one name
        (r"\\set[ZN]\s*[_^]\s*\{?\s*(?:>\s*0|\\geq?(?:slant)?\s*1)(?!\d)\s*\}?", r"\\setN "),
        (r"\\set(?:Z\s*\^|N\s*[_^])\s*\+", r"\\setN "),
        (r"\\set[ZN]\s*[_^]\s*\{?\s*\\geq?(?:slant)?\s*0\s*\}?|\\setN\s*_\s*(?:0|\{\s*0\s*\})",
         r"\\setW "),
        (r"\\setZ\s*[_^]\s*\{?\s*<\s*0\s*\}?", r"\\setZ ^-"),
        (r"\\setR\s*[_^]\s*\{?\s*>\s*0\s*\}?", r"\\setR ^+"),
        (r"\\setR\s*[_^]\s*\{?\s*\\geq?(?:slant)?\s*0\s*\}?", r"[0,\\infty)"),
        (r"\((\d+)\)(?=\s*_)", r"\1"),
        (r"[,;]?\s*\(\s*([a-zA-Z])\s*\\in\s*\\setZ\s*\)", r", \1\\in\\setZ "),
        (r"\{?\}?\s*[_^]\s*\{?(\d+)\}?\s*(?:C|\\(?:text|mathrm)\{C\})\s*_\s*\{?(\d+)\}?",
         r"\\binom{\1}{\2}"),
        (r"\{?\}?\s*[_^]\s*\{?(\d+)\}?\s*(?:P|\\(?:text|mathrm)\{P\})\s*_\s*\{?(\d+)\}?",
         r"P(\1,\2)"),
        (r"(?<=[\dA-F])\s*\(?\s*(?:\\text\s*\{)?\s*\(?(?:in )?base(?:[- ]|\s*\})\s*(\w+)\s*\)?"
         r"\s*\}?\s*\)?", r"_{\1}"),
        (r"(?<![.\w])(\d[\dA-F]*)\s*\(?\s*(?:\\text\s*\{)?\s*\(?(?:in )?"
         r"(binary|octal|decimal|hexadecimal)\s*\)?\s*\}?\s*\)?\s*$", r"\1_{\2}"),
        (r"_\{\((\d+)\)\}", r"_{\1}"),
        (r"\\\\\[[^][]*\]", r"\\\\"),
        (r"\\+\s*$", ""),
    )
)  # fmt: skip
_SIMPLE = re.compile(
    r"[-+/=.,()\s\d]*(?<!\d) ?[a-zA-Z]*|[-+]?\d+(?:[./]\d+)?", re.A
)  # nothing to do
_STARRED = re.compile(r"\s*(\*\*|__|`+|\*)(?=\S)(.*?)(?<=\S)\1\s*([.,;:]?)\s*", re.S)


@lru_cache(maxsize=8192)
def tidy(text: str) -> str:
    """The answer with one spelling for signs, thousands and spaces, without colours and stars."""
    if _SIMPLE.fullmatch(text) and not text.endswith(("binary", "octal", "decimal")):
        return text.strip()
    text = text.translate(_TRANSLATED)
    if not text.isascii():
        text = "".join(
            str(unicodedata.digit(c)) if c.isdecimal() and not c.isascii() else c for c in text
        )
    if "\n" in text:
        text = " ".join(text.split())
    while starred := _STARRED.fullmatch(text):
        text = starred[2] + starred[3]
    for pattern, wanted in _REWRITTEN:
        text = pattern.sub(wanted, text)
    return text.strip()
