"""Records as text, as tables of the terminal, reports, model cards and notebooks show them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from advebm.core import notebook
from advebm.metrics.keys import key_of


def as_text(record: Mapping[str, Any]) -> dict[str, str]:
    """Return ``name``, ``samples``, ``value``, ``count``, ``caution``; shares in percent, others with 3 decimals."""
    share = key_of(record).is_share
    scale, unit = (100, " %") if share else (1, "")
    value, error = record["value"] * scale, record["error"] * scale
    digits = 1 if share else 3
    text = f"{value:.{digits}f} ± {error:.{digits}f}{unit}"
    if error == 0 and not share and not record["settings"]:  # a count
        text = f"{value:,.0f}" if value == round(value) or value > 100 else f"{value:.1f}"
    return {
        "name": record["name"],
        "value": text,
        "count": f"{record['count']:,}",
        "samples": str(record["settings"].get("samples", "")),
        "caution": caution(record),
    }


def caution(record: Mapping[str, Any]) -> str:
    """Return why a distance between features says little, else the empty string."""
    if key_of(record).quantity != "FD":
        return ""
    if record["settings"].get("few"):
        return "no more images than dimensions"
    return "in the model's own features" if judges_itself(record) else ""


def judges_itself(record: Mapping[str, Any]) -> bool:
    """Return whether samples are judged in the features of the model that they were drawn from."""
    settings = record["settings"]
    return settings.get("space") == "own features" or bool(settings.get("own_features"))


def short_text(record: Mapping[str, Any]) -> str:
    """Return value ± standard error, with as many digits as the error allows."""
    if key_of(record).is_share:
        return f"{100 * record['value']:.1f} ± {100 * record['error']:.1f} %"
    digits = max(0, -math.floor(math.log10(record["error"]))) if record["error"] > 0 else 3
    return f"{record['value']:.{digits}f} ± {record['error']:.{digits}f}"


def html_table(records: Iterable[Mapping[str, Any]]) -> str:
    """Return HTML with a row for each record, for notebooks; columns that are empty throughout are left out."""
    heads = {"name": "measured", "samples": "samples", "value": "value", "count": "n", "caution": "but"}
    rows = list(map(as_text, records))
    columns = [key for key in heads if key == "name" or any(row[key] for row in rows)]
    return notebook.table([heads[key] for key in columns], [[row[key] for key in columns] for row in rows])
