"""A page as a browser would have it: its elements and its text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "img", "hr", "link", "input"}


@dataclass
class Parsed(HTMLParser):
    """Elements with their attributes, the text between them, and faults of nesting."""

    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style",):
            self.words.append(data)

    @property
    def text(self) -> str:
        """All text, white space made one."""
        return re.sub(r"\s+", " ", " ".join(self.words))

    def named(self, tag: str) -> list[dict[str, str]]:
        """Attributes of every ``tag``."""
        return [attributes for name, attributes in self.tags if name == tag]


def parse(path: Path) -> Parsed:
    """Parse a page; fails on elements that are not closed, or closed twice."""
    page = Parsed()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert not page.faults
    assert not page._open
    return page


def assert_loads_nothing(path: Path) -> None:
    """No address, no script, no frame: whatever the page shows is in it."""
    content = path.read_text(encoding="utf-8")
    page = parse(path)
    assert not re.search(r"https?:|//[a-z]|@import|srcset", re.sub(r"base64,[A-Za-z0-9+/=]*", "", content))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    for attributes in (attributes for _, attributes in page.tags):
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert "href" not in attributes
    policies = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    for address in re.findall(r"url\(([^)]*)\)", content):
        assert address.startswith("#")
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
