"""Hook of mkdocs: pages and pictures of the site that lie outside docs/.

GitHub shows README.md, CONTRIBUTING.md and CHANGELOG.md at the root of the repository, and reads
their links from there; the site shows them beside the other pages. The links are rewritten here.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
FILES = ["CITATION.cff", *ROOT.glob("benchmarks/results/cpu-quick/*.png")]


def on_files(files: Any, config: Any) -> Any:
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        text = text.replace("](docs/", "](").replace("](README.md", "](index.md")
        files.append(File.generated(config, page, content=text))
    for file in FILES:
        path = ROOT / file
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links from docs/ to the root, whose pages are beside it here."""
    return markdown.replace("](../README.md", "](index.md").replace("](../", "](")
