r"""Answers as strings: the last box, and the grader that needs no parser.

`same_string` is the whole of the `boxed_string` reward, in the manner of the MATH data set
(Hendrycks et al., arXiv 2103.03874), which BuPO and, through it, the OISD paper grade with. It
normalises both sides and compares: `\frac12` is `\frac{1}{2}`, but 0.25 is not 1/4, nor is
`x+1` equal to `1+x`. So it errs on the strict side, is always fast, and its results can be compared
with papers that grade this way. It is written from the description of those rules; published
scripts differ in small ways.
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
    last = text.rfind("\\boxed")
    if last < 0:
        return None
    content = _last_complete(text[last:])  # as a rule; else the whole text is gone through once
    if content is None:
        content = _last_complete(text)
    if content is None:
        bare = _BARE_BOX.findall(text)
        content = bare[-1] if bare else None
    return content


def _last_complete(text: str) -> str | None:
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
    return text[start:end] if start >= 0 else None


# ---- the grader of strings -------------------------------------------------------------------

_DELIMITER_SIZE = re.compile(r"\\(?:left|right)(?![a-zA-Z])\.?")
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
