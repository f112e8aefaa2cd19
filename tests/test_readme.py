"""README, CONTRIBUTING and docs/: their code runs, and what they name is there."""

import ast
import re
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests import ROOT

PAGES = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")
) + ["README.md", "CONTRIBUTING.md"]  # fmt: skip
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in [*PAGES, "CHANGELOG.md"]}
README = TEXT["README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = ("oisd", "oisd_kernels", "csrc", "benchmarks", "tests", "recipes", "docs", ".ci")
# Blocks that need a model, data, processes or another trainer: who runs them instead.
ELSEWHERE = {
    "docs/lora.md": "below",
    "docs/trl.md": "tests/oisd/integrations/test_trl_scripts.py",
    "docs/your-own-loop.md": "tests/oisd/integrations/test_trl_scripts.py",
    "docs/tensor-parallelism.md": "tests/oisd/integrations/test_trl_scripts.py",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[page], re.DOTALL | re.MULTILINE)


PYTHON = [
    pytest.param(page, code, id=f"{page}-{number}")
    for page in PAGES
    if page not in ELSEWHERE
    for number, code in enumerate(blocks(page, "python"))
]
COMMANDS = [
    pytest.param(command.strip(), id=f"{page}-{number}")
    for page in PAGES
    for number, command in enumerate(
        line
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    )
]


# ---------------------------------------------------------------- the two commands and CI


def test_two_set_up_commands_of_one_line_each():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert all("-c constraints.txt" in command for command in commands)
    assert commands[0].endswith(".venv/bin/oisd train")
    assert commands[1].endswith(".venv/bin/pytest -n 2 --dist worksteal")


def test_ci_runs_the_commands_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "grep '^python3 -m venv' README.md" in ci
    assert 'run "${commands[0]}"' in ci and 'run "${commands[1]}"' in ci
    assert "pip install" not in ci and "pytest" not in ci
    assert "mkdocs build --strict" in ci


def test_constraints_pin_what_pyproject_asks_for():
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["dev"], *extras["docs"]]
    names = {re.match(r"[\w-]+", w)[0].lower().replace("_", "-") for w in wanted} - {"oisd"}
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert names <= pinned, names - pinned


# ---------------------------------------------------------------- code


@pytest.mark.parametrize("page, code", PYTHON)
def test_python_blocks_run(page, code, monkeypatch, capsys):
    if "import trl" in code:  # it replaces a function of TRL's: not for the tests that follow
        module = pytest.importorskip("trl.trainer.distillation_trainer")
        monkeypatch.setattr(module, "ChunkedDivergenceFunction", module.ChunkedDivergenceFunction)
    exec(compile(code, page, "exec"), {})


def test_both_pages_have_code_and_the_rest_is_run_elsewhere():
    assert {"README.md", "docs/kernels.md"} <= {parameters.values[0] for parameters in PYTHON}
    for page, where in ELSEWHERE.items():
        assert blocks(page, "python")
        if where != "below":
            assert f'"{Path(page).name}"' in (ROOT / where).read_text(encoding="utf-8")


def test_adapters_are_merged_as_the_page_says(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer

    (code,) = blocks("docs/lora.md", "python")
    monkeypatch.chdir(tmp_path)
    arithmetic_model().save_pretrained("base")
    base = AutoModelForCausalLM.from_pretrained("base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    folder = re.search(r'"(runs/.*)"', code)[1]
    adapted.save_pretrained(folder, save_embedding_layers=False)
    arithmetic_tokenizer().save_pretrained(folder)
    exec(compile(code, "docs/lora.md", "exec"), {})
    merged = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    before = AutoModelForCausalLM.from_pretrained("base").state_dict()
    changed = {name for name in merged if not merged[name].equal(before[name])}
    assert changed and all("q_proj" in name for name in changed)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml")])
def test_recipes_in_the_text_load(page, tmp_path):
    from oisd.config import load_recipe

    for code in blocks(page, "toml"):
        (tmp_path / "my.toml").write_text(code, encoding="utf-8")
        assert load_recipe(tmp_path / "my.toml") != load_recipe(ROOT / "recipes/arithmetic.toml")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_the_text_gives_exist(command):
    command = re.sub(r"\s+#.*$", "", command)
    for module in re.findall(r"python -m ([\w.]+)", command):
        if module.split(".")[0] in FOLDERS:
            assert source_of(module), module
    for name in re.findall(r"(?:oisd|\.|verl)\[([\w,-]+)\]", command):
        extras = {"vllm"} if "verl[" in command else PROJECT["optional-dependencies"]
        assert set(name.split(",")) <= set(extras), name
    for tested in re.findall(r"(?<=\s)tests/\S+", command):
        for path in braces(tested):
            assert (ROOT / path).exists(), path
    called = re.search(r"(?:^|/|-m )oisd(?:\.cli)? (\w+)(?: ([\w./-]+))?", command)
    if called:
        name, argument = called.groups()
        assert name in cli_commands()
        if name in ("train", "plan") and argument and not argument.startswith(("-", "my.")):
            assert (ROOT / "recipes" / f"{argument}.toml").exists(), argument
        options = set(re.findall(r"(?<=\s)--[a-z][\w.-]*", command)) - {"--nproc-per-node"}
        assert options <= known_options(name), options - known_options(name)


def braces(path: str) -> list[str]:
    """As bash expands one {a,b}."""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", path)
    return [found[1] + part + found[3] for part in found[2].split(",")] if found else [path]


def cli_commands() -> set[str]:
    from tests.test_public import COMMANDS as commands

    return set(commands)


def known_options(command: str) -> set[str]:
    from tests.test_public import options

    return set(options(command)) | {"--output-dir", "--show", "--processes"}


# ---------------------------------------------------------------- names


def source_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    found = [path.with_suffix(".py"), path / "__init__.py", path / "__main__.py"]
    return next((file for file in found if file.exists()), None)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_folders_that_the_text_names_exist(page):
    for path in re.findall(rf"(?<![\w./$-])(?:{'|'.join(FOLDERS)})/[\w./*{{,}}-]*", TEXT[page]):
        for name in braces(path.rstrip(".,")):
            assert list(ROOT.glob(name)) if "*" in name else (ROOT / name).exists(), name


def test_files_of_csrc_that_its_page_names_exist():
    for name in re.findall(r"`([\w/]+\.(?:h|cu|cpp))`", TEXT["docs/csrc.md"]):
        folders = (ROOT, ROOT / "csrc", ROOT / "csrc" / "emulator")
        assert any((folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_names_that_the_text_gives_exist(page):
    """Read from the sources: verl and TRL cannot both be imported."""
    for dotted in re.findall(
        r"(?<![\w./-])((?:oisd|oisd_kernels|benchmarks)(?:\.\w+)+)", TEXT[page]
    ):
        parts = dotted.split(".")
        length = max(n for n in range(1, len(parts) + 1) if source_of(".".join(parts[:n])))
        source = source_of(".".join(parts[:length])).read_text(encoding="utf-8")
        words = set(re.findall(r"\w+", source)) | {
            node.name for node in ast.walk(ast.parse(source)) if hasattr(node, "name") and node.name
        }
        assert set(parts[length : length + 1]) <= words, dotted


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).strip().replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_every_page_is_in_the_table_of_contents():
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        if page.startswith("docs/"):
            assert f": {page.removeprefix('docs/')}\n" in contents, page


# ---------------------------------------------------------------- length, version, wheel


@pytest.mark.parametrize("page, most", [("README.md", 250), ("CONTRIBUTING.md", 110)])
def test_pages_stay_short(page, most):
    assert len(TEXT[page].splitlines()) <= most


def test_one_version():
    version = PROJECT["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation
    newest = re.search(r"^## (\S+) \((\d\S+)\)$", TEXT["CHANGELOG.md"], re.MULTILINE)
    assert newest[1] == version and f"\ndate-released: {newest[2]}\n" in citation


def test_the_wheel_has_types_recipes_and_cuda_sources(tmp_path, monkeypatch):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    monkeypatch.chdir(ROOT)
    (file,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(file).namelist())
    assert {"oisd/py.typed", "oisd_kernels/py.typed", "oisd/recipes/qwen3-4b.toml"} <= names
    assert "oisd_kernels/csrc/attention.cu" in names and "oisd/cli.py" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"oisd", "oisd_kernels", f"oisd-{PROJECT['version']}.dist-info"}
    assert not any("emulator" in name or "__pycache__" in name for name in names)
