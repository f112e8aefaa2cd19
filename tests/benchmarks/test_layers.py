"""Who may import what among the benchmarks, read from the syntax of the sources."""

from graphlib import CycleError, TopologicalSorter

import pytest

from tests.test_layering import imports, module, sources

FILES = sources("benchmarks")
MODULES = {module(file): file for file in FILES}
# A folder may import those that it names, and nothing else of benchmarks.
MAY_IMPORT = {
    "benchmarks.cases": {"cases"},
    "benchmarks.measure": {"cases", "measure"},
    "benchmarks.report": {"report"},
}
# Both run cases: each of a suite in turn, and those of a queue on a GPU.
USE_RUNNER = {"benchmarks/commands.py", "benchmarks/gpu/headlines.py"}


def own(file: str) -> set[str]:
    """Modules of benchmarks that a file imports."""
    return {name for name in imports(file) if name in MODULES} - {"benchmarks"}


@pytest.mark.parametrize("file", FILES)
def test_imports_go_downward(file):
    folder = ".".join(module(file).split(".")[:2])
    if folder in MAY_IMPORT:
        assert {name.split(".")[1] for name in own(file)} <= MAY_IMPORT[folder]


@pytest.mark.parametrize("file", FILES)
def test_only_the_command_imports_the_command(file):
    assert "benchmarks.__main__" not in own(file)
    if file not in USE_RUNNER:
        assert "benchmarks.runner" not in own(file)


def test_no_module_imports_itself_by_a_detour():
    graph = {
        name: {other for other in own(file) if not f"{name}.".startswith(f"{other}.")}
        for name, file in MODULES.items()
    }
    assert "benchmarks.cases.case" in graph["benchmarks.cases.lens"]  # the graph is there
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
