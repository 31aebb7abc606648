"""HTML that notebooks show of an object: tables and pictures, with all text escaped."""

import base64
from collections.abc import Iterable, Sequence
from html import escape


def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; numbers and texts of cells are aligned to the left, as names differ in length."""
    line = lambda cells, tag: "".join(f'<{tag} style="text-align:left">{escape(str(c))}</{tag}>' for c in cells)
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{line(heads, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def picture(png: bytes, about: str = "") -> str:
    """Return the bytes of a PNG file as a picture of the page, with a description for those who do not see it."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(about)}" src="data:image/png;base64,{data}">'


def line(text: object) -> str:
    """Return text as a line of HTML, escaped."""
    return f"<div>{escape(str(text))}</div>"
