"""BibTeX entries for exactly the methods that a recipe uses."""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

# LaTeX's accents, as Unicode combines them with the letter before
ACCENTS = {'"': "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303"}


def keys(thing: Any) -> list[str]:
    """Return the citation keys of a method object and of everything inside it, without duplicates."""
    parts = list(thing) if isinstance(thing, tuple) else []
    if dataclasses.is_dataclass(thing):
        parts = [getattr(thing, field.name) for field in dataclasses.fields(thing)]
    return list(dict.fromkeys([*getattr(thing, "cites", ()), *(key for part in parts for key in keys(part))]))


def _entries() -> dict[str, str]:
    text = files("advebm.core").joinpath("citations.bib").read_text()
    return {key: entry for entry, key in re.findall(r"(?ms)^(@\w+\{([^,]+),.*?\n\})", text)}


def titles(keys: Iterable[str]) -> list[str]:
    """Return authors, title and year of each key, in a line, with letters in the place of LaTeX's accents."""
    entries = _entries()
    lines = []
    for key in keys:
        fields = dict(re.findall(r"(?m)^\s*(\w+) = \{(.+?)\},?$", entries.get(key, "")))
        authors = fields.get("author", "").replace(" and others", " et al.").replace(" and ", "; ").removesuffix(".")
        parts = [_as_letters(part) for part in (authors, fields.get("title", ""), fields.get("year", "")) if part]
        lines.append(re.sub(r"([?!])\.", r"\1", ". ".join(parts)) or key)
    return lines


def _as_letters(text: str) -> str:
    """Return BibTeX's text as it is printed: ``{\\"a}`` is ä, ``\\%`` is %; braces that keep capitals are dropped."""
    text = re.sub(r"\\(.)(\w)", lambda m: unicodedata.normalize("NFC", m[2] + ACCENTS[m[1]]), text.replace("\\l}", "ł"))
    return re.sub(r"[{}]", "", text.replace("\\%", "%"))


def bibtex(thing: Any) -> str:
    entries = _entries()
    return "\n".join(entries.get(key, f"% {key}: cited by a method that is not part of advebm") for key in keys(thing))
