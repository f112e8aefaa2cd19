"""A page read back: well-formed or refused, its tables, its text, what it would load."""

from html.parser import HTMLParser

_VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Reads a page; AssertionError if tags do not match, or an id occurs twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: set[str] = set()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.parts: list[str] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        if "id" in found:
            assert found["id"] not in self.ids, f"id {found['id']!r} twice"
            self.ids.add(found["id"])
        if tag == "caption":
            self._caption = ""
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        if tag in ("td", "th"):
            self.tables[self._caption][-1].append("")
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-1:]}"
        self.stack.pop()

    def handle_data(self, data):
        if "style" in self.stack or "script" in self.stack:
            return
        self.parts.append(data)
        if self.stack and self.stack[-1] == "caption":
            self._caption += data
        elif self.stack and ("td" in self.stack or "th" in self.stack):
            self.tables[self._caption][-1][-1] += data

    def loads(self) -> list[str]:
        """What the page would fetch or link to, other than places in itself."""
        names = ("src", "href", "xlink:href", "data", "action", "srcset")
        return [value for _, found in self.tags for name in names
                if (value := found.get(name)) and not value.startswith("#")]  # fmt: skip
