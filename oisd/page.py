"""Web pages of one file each, from the templates in oisd/templates; they load nothing.

`page.html` is the skeleton of all of them: colours for light, dark and print. Whatever a template
shows is escaped, since tokens and completions may hold HTML.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write the page that a template of that name makes of `values`; returns its path.

    Through a temporary file, so that a browser never reads half a page.
    """
    text = _TEMPLATES.get_template(template).render(values)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
