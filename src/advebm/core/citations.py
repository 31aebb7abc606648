"""BibTeX entries for exactly the methods that a recipe uses."""

import dataclasses
import re
from importlib.resources import files
from typing import Any


def keys(thing: Any) -> list[str]:
    """Return the citation keys of a method object and of everything inside it, without duplicates."""
    parts = list(thing) if isinstance(thing, tuple) else []
    if dataclasses.is_dataclass(thing):
        parts = [getattr(thing, field.name) for field in dataclasses.fields(thing)]
    return list(dict.fromkeys([*getattr(thing, "cites", ()), *(key for part in parts for key in keys(part))]))


def bibtex(thing: Any) -> str:
    text = files("advebm.core").joinpath("citations.bib").read_text()
    entries = {key: entry for entry, key in re.findall(r"(?ms)^(@\w+\{([^,]+),.*?\n\})", text)}
    return "\n".join(entries.get(key, f"% {key}: cited by a method that is not part of advebm") for key in keys(thing))
