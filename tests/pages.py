"""What is in a page of HTML, for the tests of reports."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

_VOID = {"meta", "link", "img", "input", "br", "hr"}

ALLOWED = """
    html head meta title style body script header nav main section footer div p span h1 h2 h3 h4 ul
    ol li dl dt dd a b code pre bdi del ins blockquote article details summary table thead tbody tr
    th td time textarea svg g path rect line polygon text strong
    """
"""Elements that our templates write."""

HOSTILE = (
    "<script>document.title='HOSTILE'</script>",
    "</textarea><img src=x onerror=alert(1)>",
    "]]></style><style>body{display:none}</style>",
    "\"' onmouseover=alert(1) x='\"",
    "<!-- --><a href='javascript:alert(1)'>x</a>",
    "{{ 7*7 }}{% raw %}${7*7}",
    "&lt;b&gt;&amp;#60;",
    "\u202egnirts\u2066 \u0000\u0007\u001b[31m\u2028",
)
"""Texts that would like to be more than texts."""


class Page(HTMLParser):
    """A page, taken apart."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        """Element, name, value."""
        self.ids: list[str] = []
        self.inside: dict[str, list[str]] = {}
        """Element to the texts of its occurrences, in order."""
        self._open: list[tuple[str, list[str]]] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {[name for name, _ in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in _VOID:
            self._open.append((tag, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        name, texts = self._open.pop()
        assert name == tag, f"</{tag}> closes <{name}>"
        self.inside.setdefault(tag, []).append("".join(texts))

    def handle_data(self, data: str) -> None:
        for _, texts in self._open:
            texts.append(data)

    @property
    def words(self) -> str:
        """All text a reader sees, spaces folded."""
        return " ".join(self.inside["body"][0].split())

    def section(self, anchor: str) -> str:
        """The text of a section, spaces folded."""
        part = re.search(rf'<section id="{anchor}">.*?</section>', self.html, re.DOTALL)
        assert part is not None, anchor
        return " ".join(Page(part[0]).inside["section"][0].split())

    def check(self) -> None:
        """That it needs nothing beside it, allows nothing but its own, and is well-formed."""
        assert set(self.tags) - set(ALLOWED.split()) == set()
        assert len(self.ids) == len(set(self.ids))
        links = {value for _, name, value in self.attributes if name in ("href", "src")}
        assert {link[:1] for link in links} <= {"#"}
        assert {link[1:] for link in links} <= set(self.ids)
        names = {name for _, name, _ in self.attributes}
        assert not {name for name in names if name.startswith("on") or name == "style"}
        (policy,) = (v for _, name, v in self.attributes if v.startswith("default-src"))
        digests = [
            "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            for text in (*self.inside["style"], *self.inside["script"])
        ]
        assert policy == (
            f"default-src 'none'; style-src '{digests[0]}'; script-src '{digests[1]}'; "
            "base-uri 'none'; form-action 'none'"
        )
        assert "http" not in self.inside["style"][0] + self.inside["script"][0]
