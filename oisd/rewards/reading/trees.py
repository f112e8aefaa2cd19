r"""Answers as trees: what a careful reader sees in the content of a box.

A tree is a tuple whose first entry names its form.

Expressions, which `verdicts.values` evaluates:
    ("num", Fraction, decimal places as written or None), ("sym", name), ("const", "π" | "e" | "i"),
    ("add" | "mul" | "div" | "pow", a, b), ("neg" | "deg" | "pct", a), ("pm", a, b, sign),
    ("fn", name, *arguments), ("call", name, *arguments), ("sum" | "prod", variable, from, to, body)

Shapes, which `verdicts.compare` compares:
    ("list", joint, *items), ("set", *items), ("fenced", open, close, *items), ("inf",), ("empty",),
    ("union" | "inter" | "minus", a, b), ("space", "R"), ("rel", sides, signs), ("dots",),
    ("matrix", kind, rows), ("quantity", value, Unit), ("ratio", *numbers), ("based", digits, base),
    ("time", minutes, half of the day or None, numbers), ("choice", letter, rest or None),
    ("date", year or None, month, day or None), ("text", words), ("label", words),
    ("mod", name or None, residue, modulus)
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

Tree = tuple[Any, ...]


def num(value: int | Fraction) -> Tree:
    return ("num", Fraction(value), None)


def times(value: Tree, factor: Fraction) -> Tree:
    return ("mul", value, num(factor))


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


def nodes(tree: Tree) -> Iterator[Tree]:
    """This tree and all below it."""
    yield tree
    for child in children(tree):
        yield from nodes(child)


def has(tree: Tree, form: str) -> bool:
    return any(node[0] == form for node in nodes(tree))
