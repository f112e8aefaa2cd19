r"""The commands and words that answers are made of, in tables.

What is in none of them makes an answer unreadable.
"""

TEXT = frozenset(
    """
    text textbf textit textrm textsf texttt textnormal textsc mbox mathrm mathsf mathtt
    hbox emph operatorname mathnormal textup
    """.split()
)
# Fonts, sizes, spacing: these vanish.
IGNORED = frozenset(
    """
    left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr middle
    displaystyle textstyle scriptstyle limits nolimits bf rm it sf tt mathstrut strut
    boldsymbol mathbf mathit bm pmb mathcal mathscr underline uline boxed fbox framebox
    ensuremath mathop mathord bold large Large LARGE huge Huge small normalsize hfill
    noindent centering label nonumber therefore thinspace enspace space overbrace
    underbrace mathfrak color
    """.split()
)
MARKS = {
    "cdot": "*", "times": "*", "ast": "*", "bullet": "*", "div": "/", "le": "≤", "leq": "≤",
    "leqslant": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥", "lt": "<", "gt": ">", "ne": "≠",
    "neq": "≠", "in": "∈", "equiv": "≡", "cong": "≡", "approx": "≈", "simeq": "≈", "pm": "±",
    "mp": "∓", "cup": "∪", "cap": "∩", "setminus": "∖", "backslash": "∖", "lvert": "|",
    "rvert": "|", "vert": "|", "mid": "|", "langle": "(", "rangle": ")", "lbrack": "[",
    "rbrack": "]", "lparen": "(", "rparen": ")", "lbrace": "\\{", "rbrace": "\\}", "circ": "°",
    "degree": "°", "textdegree": "°", "prime": "'", "ldots": "…", "dots": "…", "cdots": "…",
    "infty": "∞", "emptyset": "∅", "varnothing": "∅", "colon": ":", "pounds": "£",
    "textsterling": "£", "euro": "€", "texteuro": "€", "yen": "¥", "textyen": "¥",
    "textdollar": "$", "cent": "¢", "textcent": "¢", "Rightarrow": "⇒", "implies": "⇒",
    "Longrightarrow": "⇒", "land": "and", "wedge": "and", "lor": "or", "vee": "or", "iff": "⇔",
    "Leftrightarrow": "⇔", "notin": "∉", "sim": "~", "propto": "∝", "to": "→", "rightarrow": "→",
    "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "permille": "‰", "quad": " ",
    "exclamdown": "!", "percent": "%", "over": "over", "choose": "choose", "colonequals": "=",
    "coloneqq": "=",
}  # fmt: skip
# Signs of more than one character.
ASCII = {
    "<=": "≤", ">=": "≥", "!=": "≠", "==": "=", "=>": "⇒", "->": "→", "**": "^", "...": "…",
    "\\{": "\\{", "\\}": "\\}", "\\|": "|", "\\%": "%", "\\$": "$", "\\#": "#", "\\&": "&",
    "\\\\": "\\\\", "\\_": "_",
}  # fmt: skip
FUNCTIONS = frozenset(
    """
    sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth
    sech csch arcsinh arccosh arctanh ln log lg exp gcd lcm max min zeta Gamma det abs
    floor ceil sqrt cbrt Re Im arg
    """.split()
)
ASCII_FUNCTIONS = FUNCTIONS | {"asin", "acos", "atan", "binom", "binomial", "factorial", "root"}
ALIASES = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "dfrac": "frac", "tfrac": "frac",
    "cfrac": "frac", "sfrac": "frac", "nicefrac": "frac", "dbinom": "binom", "tbinom": "binom",
    "binomial": "binom", "arcosh": "arccosh", "arsinh": "arcsinh", "artanh": "arctanh", "Pr": "P",
    "tg": "tan", "ctg": "cot", "arctg": "arctan", "cosec": "csc",
}  # fmt: skip
COMMANDS = FUNCTIONS | {"frac", "binom", "sum", "prod", "pmod", "bmod", "mod", "root"}
# Only a computer algebra system evaluates these.
ALGEBRA = frozenset("int iint iiint oint lim limsup liminf partial nabla sup inf".split())
ACCENTS = frozenset(
    """
    overline vec hat bar tilde widehat overrightarrow overleftrightarrow widetilde
    mathring dot ddot
    """.split()
)
GREEK = frozenset(
    """
    alpha beta gamma delta epsilon varepsilon eta theta vartheta iota kappa lambda mu nu
    xi rho varrho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi
    Pi Sigma Upsilon Phi Psi Omega ell hbar imath jmath aleph
    """.split()
)
# Of two letters, and yet no product.
SHORT_WORDS = frozenset(
    """
    AM PM cc
    or no in to of is at am pm cm mm km kg mg ml ft yd mi lb oz hr dm cL dL kW mL kL sq cu
    as if be by so an km hz Hz kN ms ns us mA kV
    """.split()
)
NAMES = {
    "pi": "π", "Pi": "Π", "infinity": "∞", "infty": "∞", "oo": "∞", "inf": "∞", "union": "∪",
}  # fmt: skip
BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16,
    "binary": 2, "octal": 8, "decimal": 10, "hexadecimal": 16,
}  # fmt: skip
