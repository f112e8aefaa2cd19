"""Who may import what, read from the syntax of the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

STANDARD_LIBRARY = sys.stdlib_module_names

# The modules and packages of `oisd`, each of which imports only those before it.
LAYERS = (
    "moved", "jsonl", "schema", "config", "weights", "options", "sharding", "norms", "adapters",
    "models", "rewards", "data", "losses", "rollout", "arithmetic", "scratch", "batch", "policy",
    "page", "plots", "run", "evaluate", "lens", "report", "objective", "optimizer",
    "reference_policy", "term_gradients", "warmup", "plan", "check", "trainer", "errors", "cli",
    "integrations",
)  # fmt: skip

# The files of `oisd` that may import transformers, and no other.
USE_TRANSFORMERS = {
    "oisd/models/__init__.py",
    "oisd/models/layout.py",
    "oisd/models/loading.py",
    "oisd/models/thorough_guards.py",
    "oisd/models/attention.py",
    "oisd/models/offsets.py",
    "oisd/rollout/__init__.py",
    "oisd/rollout/generate.py",
    "oisd/rollout/sampling.py",
    "oisd/rollout/continuous.py",
    "oisd/arithmetic.py",
    "oisd/scratch.py",
    "oisd/optimizer.py",
    "oisd/warmup.py",
    "oisd/cli.py",
    "oisd/plan/shapes.py",
}


def sources(folder: str) -> list[str]:
    found = sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py"))
    assert found
    return found


OISD, KERNELS = sources("oisd"), sources("oisd_kernels")


def imports(file: str, nodes: Iterable[ast.AST] | None = None) -> Iterator[str]:
    """Dotted names that a file imports when it runs, wherever in it; not `if TYPE_CHECKING`."""
    for node in syntax(file).body if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = Path(file).parent.parts
                parents = package[: len(package) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            yield from imports(file, node.orelse)
        else:
            yield from imports(file, ast.iter_child_nodes(node))


def syntax(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def packages(file: str) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


def module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("file", KERNELS)
def test_kernels_import_torch_and_triton_alone(file):
    assert packages(file) <= {"torch", "triton", "oisd_kernels", *STANDARD_LIBRARY}


def test_reference_never_imports_triton():
    assert "triton" not in packages("oisd_kernels/reference.py")


def test_config_imports_the_standard_library_alone():
    assert packages("oisd/schema.py") <= STANDARD_LIBRARY
    files = sorted(file for file in OISD if file.startswith("oisd/config/"))
    own = {name for file in files for name in imports(file) if name.startswith("oisd.")}
    assert len(files) == 2
    for file in files:
        assert packages(file) <= {"oisd", *STANDARD_LIBRARY}
    assert {name.split(".")[1] for name in own} == {"config", "schema"}


@pytest.mark.parametrize("file", OISD)
def test_transformers_are_known_where_they_may_be(file):
    inside_integrations = file.startswith("oisd/integrations/")
    if "transformers" in packages(file):
        assert file in USE_TRANSFORMERS or inside_integrations


@pytest.mark.parametrize(
    "file, wanted",
    [
        ("losses/__init__", {"oisd.losses", "oisd.config"}),
        ("losses/attention", {"oisd.losses", "oisd.config"}),
    ],
)
def test_losses_know_no_transformers_at_all(file, wanted):
    path = f"oisd/{file}.py"
    assert packages(path) <= {"torch", "oisd", "oisd_kernels", *STANDARD_LIBRARY}
    own = {name for name in imports(path) if name.startswith("oisd.")}
    assert {".".join(name.split(".")[:2]) for name in own} == wanted


@pytest.mark.parametrize("file", OISD)
def test_only_the_command_line_imports_tyro(file):
    assert file == "oisd/cli.py" or "tyro" not in packages(file)


@pytest.mark.parametrize("file", OISD)
def test_each_other_trainer_is_imported_by_its_integration_alone(file):
    for trainer in ("trl", "verl"):
        if file != f"oisd/integrations/{trainer}.py":
            assert trainer not in packages(file)


@pytest.mark.parametrize("file", OISD)
def test_only_the_adapters_import_peft_and_only_when_asked(file):
    if not file.startswith("oisd/integrations/"):
        assert file == "oisd/adapters.py" or "peft" not in packages(file)
    top = [node for node in syntax(file).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(name.split(".")[0] == "peft" for name in imports(file, top))


def test_trl_is_imported_somewhere():
    assert {"trl", "transformers"} <= packages("oisd/integrations/trl.py")


def test_the_package_of_integrations_imports_none_of_them():
    assert not packages("oisd/integrations/__init__.py")


@pytest.mark.parametrize("file", OISD)
def test_integrations_stand_on_top(file):
    """They use taps and losses; no other file knows them, nor they our trainer."""
    own = {name for name in imports(file) if name.startswith("oisd.")}
    if file.startswith("oisd/integrations/"):
        assert not own & {"oisd.trainer", "oisd.objective", "oisd.optimizer", "oisd.cli"}
    else:
        assert not any(name.startswith("oisd.integrations") for name in own)


@pytest.mark.parametrize("file", [*OISD, *KERNELS])
def test_every_module_has_a_name_that_says_what_it_is(file):
    assert not set(module(file).split(".")) & {"utils", "util", "helpers", "common", "misc"}


def test_no_module_imports_itself_by_a_detour():
    modules = {module(file): file for file in [*OISD, *KERNELS]}
    graph = {
        name: {
            other
            for other in imports(file)
            if other in modules
            # `from package import module` runs the package first, which is no detour.
            and not f"{name}.".startswith(f"{other}.")
        }
        for name, file in modules.items()
    }
    assert "oisd.losses" in graph["oisd.trainer"]  # the graph is there
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("file", [file for file in OISD if file != "oisd/__init__.py"])
def test_imports_go_downward(file):
    place = LAYERS.index(module(file).split(".")[1])
    parts = {name.split(".")[1] for name in imports(file) if name.startswith("oisd.")}
    assert parts & set(LAYERS) <= set(LAYERS[: place + 1])


def test_the_reader_of_imports_sees_all_forms():
    code = (
        "import a.b\nfrom c import d\nfrom . import e\n"
        "if TYPE_CHECKING:\n    import f\nelse:\n    import g\n"
        "def h():\n    import i\n"
    )
    found = set(imports("oisd/x.py", ast.parse(code).body))
    assert found == {"a.b", "c", "c.d", "oisd", "oisd.e", "g", "i"}


@pytest.mark.parametrize("file", OISD)
def test_verl_is_imported_by_its_integration_alone(file):
    assert ("verl" in packages(file)) == (file == "oisd/integrations/verl.py")
