"""HTML as escaped text: every string is escaped on its way into a tag, unless it is `Markup` made here.

A page holds all that it shows: no script, no request, no file beside it; its content security policy forbids both.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from autopar.report.page_style import STYLE

EMPTY = frozenset({"meta", "rect", "line", "circle"})
"""Tags that may be without content; those of SVG are closed at once then."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]"
)


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """Text with everything that means something in HTML made harmless; control characters become U+FFFD."""
    return text if isinstance(text, Markup) else Markup(html.escape(_UNPRINTABLE.sub("\ufffd", text)))


def joined(parts: Iterable[str]) -> Markup:
    """Escaped where they are no markup, one after another."""
    return Markup("".join(map(escaped, parts)))


def tag(name: str, /, *content: str, **attributes: str) -> Markup:
    """`<name attributes>content</name>`. In the name of an attribute, `_` stands for `-`; a last one is dropped."""
    words = "".join(f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"' for key, value in attributes.items())
    if not content and name in EMPTY:
        return Markup(f"<{name}{words}>" if name == "meta" else f"<{name}{words}/>")
    return Markup(f"<{name}{words}>{joined(content)}</{name}>")


def section(title: str, sentence: str, *content: str) -> Markup:
    """A part of the page: what it is called, one sentence on what it shows, and that."""
    return tag("section", tag("h2", title), tag("p", sentence, class_="about"), *content)


def table(caption: str, heading: Sequence[str], rows: Sequence[Sequence[str]], words: Iterable[int] = (0,)) -> Markup:
    """Rows below a heading; columns `words` are aligned to the left, and the first names the row."""
    left = frozenset(words)

    def cell(name: str, column: int, content: str, **attributes: str) -> Markup:
        return tag(name, content, **attributes, **({"class_": "word"} if column in left else {}))

    head = tag("tr", *(cell("th", i, name, scope="col") for i, name in enumerate(heading)))
    body = [
        tag("tr", cell("th", 0, row[0], scope="row"), *(cell("td", i, c) for i, c in enumerate(row[1:], start=1)))
        for row in rows
    ]
    found = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", found, class_="scroll", tabindex="0", role="region", aria_label=caption)


def definitions(pairs: Iterable[tuple[str, str]]) -> Markup:
    """Names with their words; a name of "" continues the one before."""
    found = []
    for name, words in pairs:
        found += [tag("dt", name)] if name else []
        found.append(tag("dd", words))
    return tag("dl", *found)


def page(title: str, *content: str) -> str:
    """The whole document."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', tag('main', *content)), lang='en')}\n"
