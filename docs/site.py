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
PICTURES = "benchmarks/results/cpu-quick/*.png"


def on_files(files: Any, config: Any) -> Any:
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    for picture in ROOT.glob(PICTURES):
        name = str(picture.relative_to(ROOT))
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links from docs/ to the root, whose pages are beside it here."""
    return markdown.replace("](../README.md", "](index.md").replace("](../", "](")
