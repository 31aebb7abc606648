"""BibTeX entries for exactly the methods that a recipe uses."""

import dataclasses
import re
from collections.abc import Iterable
from importlib.resources import files
from typing import Any


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
    """Return authors, title and year of each key, in a line."""
    lines, entries = [], _entries()
    for key in keys:
        entry = entries.get(key, "")
        parts = [
            re.search(rf"(?m)^\s*{name}\s*=\s*[{{\"](.+?)[}}\"],?\s*$", entry) for name in ("author", "title", "year")
        ]
        lines.append(". ".join(re.sub(r"[{}]", "", part[1]).replace(" and ", "; ") for part in parts if part) or key)
    return lines


def bibtex(thing: Any) -> str:
    entries = _entries()
    return "\n".join(entries.get(key, f"% {key}: cited by a method that is not part of advebm") for key in keys(thing))
