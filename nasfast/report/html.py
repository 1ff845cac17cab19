"""Elements of a page: HTML and SVG as trees, so that whatever text they hold is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element

__all__ = ["element", "figure", "legend", "legend_key", "table", "terms"]


def element(tag: str, *children: Element | str, **attributes: object) -> Element:
    """An HTML or SVG element; `class_` and `stroke_width` name "class" and "stroke-width".

    Text is escaped when the tree is serialised, so no string can break out of its place.
    """
    node = Element(
        tag, {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items()}
    )
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            node.append(child)
            last = child
        elif last is None:
            node.text = (node.text or "") + child
        else:
            last.tail = (last.tail or "") + child
    return node


def figure(content: Element, caption: str) -> Element:
    """Content that may be wider than the page, with a caption below."""
    return element("figure", element("div", content, class_="wide"), element("figcaption", caption))


def table(head: Sequence[str], rows: Sequence[Sequence[Element | str]], kind: str) -> Element:
    """A table; without a header row where `head` is empty."""
    content = [element("tbody", *(_cells("td", row) for row in rows))]
    if head:
        content.insert(0, element("thead", _cells("th", head)))
    return element("div", element("table", *content, class_=kind), class_="wide")


def terms(meanings: Mapping[str, str]) -> Element:
    """What words mean, a line each."""
    lines = (
        element("div", element("dt", word), element("dd", meaning))
        for word, meaning in meanings.items()
    )
    return element("dl", *lines, class_="terms")


def legend(*keys: Element) -> Element:
    """A row of legend keys."""
    return element("ul", *keys, class_="legend")


def legend_key(text: str, *marks: Element) -> Element:
    """What marks, drawn in 14 x 10 units, stand for."""
    return element("li", element("svg", *marks, viewBox="0 0 14 10", width=14, height=10), text)


def _cells(tag: str, contents: Sequence[Element | str]) -> Element:
    return element("tr", *(element(tag, content) for content in contents))
