"""How far a public function is from its kernel, how long argument lists are, who imports whom."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.interpreter import interpreted, outside, passes_in_the_interpreter
from tests.test_layering import imports, module, sources

PACKAGES = ("oisd_kernels", "oisd", "benchmarks")
MOST_PARAMETERS = 12
# Signatures that users call by name; the contract fixes them.
PUBLIC = {
    "logit_lens_divergence",
    "policy_head",
    "distillation_divergence",
    "attention_divergence",
    "chunked_divergence_loss",
    "grpo_and_think_loss",
    "evaluate",
}


@outside
def test_the_interpreter_passes_these_tests():
    passes_in_the_interpreter(__file__, "-k", "from_call_to_launch")


class Stack(Exception):
    """Raised at the first launch of a kernel, with the frames of ours that led to it."""


def frames_to_launch(call, monkeypatch) -> list[tuple[str, str]]:
    """(file, function) from the public function to the launch, both included."""
    from triton.runtime import interpreter

    found: list[tuple[str, str]] = []

    def launch(*arguments, **options):
        frame = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT / "oisd_kernels"):
                found.append((str(path.relative_to(ROOT)), frame.f_code.co_name))
            frame = frame.f_back
        raise Stack

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    with pytest.raises(Stack):
        call()
    return found[::-1]


def lens():
    from oisd_kernels import logit_lens_divergence

    hidden, teacher, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(11, 8)
    return logit_lens_divergence(hidden, teacher, weight, impl="chunked")


def flash():
    from oisd_kernels import flash_attention

    q, k, v = (torch.randn(5, 2, 16) for _ in range(3))
    return flash_attention(q, k, v, impl="triton")


@interpreted
@pytest.mark.parametrize("call, calls, files", [(lens, 5, 5), (flash, 5, 6)], ids=["lens", "flash"])
def test_from_call_to_launch(call, calls, files, monkeypatch):
    found = frames_to_launch(call, monkeypatch)
    assert found[0][1] in ("logit_lens_divergence", "flash_attention")
    assert len(found) <= calls, found
    assert len({file for file, _ in found}) <= files, found


def functions(file: str):
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def count(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    own = bool(named) and named[0].arg in ("self", "cls")
    return len(named) - own + bool(given.vararg) + bool(given.kwarg)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_takes_more_than_a_dozen(package):
    seen = 0
    for file in sources(package):
        for function in functions(file):
            kernel = any("jit" in ast.unparse(d) for d in function.decorator_list)
            if kernel or function.name in PUBLIC:
                continue
            seen += 1
            assert count(function) <= MOST_PARAMETERS, f"{file}: {function.name}"
    assert seen > 50


def rooms(package: str) -> dict[str, set[str]]:
    """Which rooms of a package, files and folders right below it, import which others."""
    graph: dict[str, set[str]] = {}
    for file in sources(package):
        parts = module(file).split(".")
        if len(parts) < 2 or parts[1].startswith("__"):
            continue
        room = graph.setdefault(parts[1], set())
        for name in imports(file):
            other = name.split(".")
            if other[0] == package and len(other) > 1 and other[1] != parts[1]:
                room.add(other[1])
    return {room: others & set(graph) for room, others in graph.items()}


def levels(graph: dict[str, set[str]]) -> int:
    """How many rows a drawing needs, in which each room stands above what it imports."""
    height: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        height[room] = 1 + max((height[other] for other in graph[room]), default=0)
    return max(height.values())


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_in_one_direction(package):
    graph = rooms(package)
    assert levels(graph) <= {"oisd_kernels": 5, "oisd": 10, "benchmarks": 6}[package], graph
