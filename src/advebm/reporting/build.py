"""Write ``report.html`` from the files of a run."""

import base64
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files as resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
from torch import Tensor
from torch.nn import functional

from advebm.core import citations, config, files
from advebm.data import pictures
from advebm.evaluation import compare, evaluate
from advebm.metrics.keys import key_of
from advebm.metrics.texts import as_text, caution
from advebm.papers import render
from advebm.reporting import figure_store, figures, overview
from advebm.reporting.records import MEASURES, best_set, pivot, rate_sets
from advebm.runs.recipe import dump
from advebm.runs.run import Run
from advebm.sampling import generate

STARTS = {
    "class": "class Gaussians",
    "global": "a global Gaussian",
    "outside": "outside images",
    "buffer": "the replay buffer",
}
ROWS = 10  # of pictures in a panel, at most
WIDTH = 940  # of all panels side by side, in pixels of a page
RECORDED = 64  # pixels that an image of a panel has in the file, at most


def report(
    run: Run,
    *,
    beside: Iterable[Run] = (),
    out: Path | None = None,
    title: str | None = None,
    sentence: str | None = None,
    shown: Mapping[str, bytes] = MappingProxyType({}),
    summary: Mapping[str, Any] | None = None,
    compared: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType({}),
) -> Path:
    """Write a self-contained HTML report of everything that the run contains so far.  Return its path.

    Args:
        run: the run to report on.
        beside: other runs whose samples, training diagnostics, robustness, figures and records are shown as well.
        out: path of the report; default: ``report.html`` in the run's folder.
        title: title of the page; default: the names of the run's folder and of its data.
        sentence: what is found; default: :func:`advebm.reporting.overview.describe`.
        shown: PNG figures by title, placed at the top of the page.
        summary: a table of :func:`advebm.papers.render.summarize`, placed at the top.
        compared: records of runs by title, placed at the top as a table.
    """
    recipe, data, history = run.recipe, run.data, run.history()
    runs = compare.by_title([run, *beside])
    records = {title: evaluate.newest_records(r.records()) for title, r in runs.items()}
    own_title, own_records = next(iter(records.items()))

    def label(run_title: str, name: str) -> str:
        return f"{run_title} · {name}" if len(runs) > 1 else name

    def plot_each_run(plot: Callable[[Run], bytes | None]) -> list[dict[str, str | None]]:
        plots = {title: plot(r) for title, r in runs.items()}
        return [{"title": title, "image": _uri(png)} for title, png in plots.items() if png is not None]

    best = _choose_sets(runs, records)
    real = data.train if len(data.train) else data.test
    tile, columns = _panel_size(min(len(data.classes), ROWS), 1 + sum(name is not None for name in best.values()))
    make_panel = lambda title, text, x, y: _panel(title, text, x, y, data.classes, tile, columns)
    panels = [make_panel("Real images", data.name, real.x, real.y)]
    others: list[dict[str, Any]] = []
    films: list[dict[str, Any]] = []
    for run_title, r in runs.items():
        for name, folder in r.samples().items():
            drawn = generate.read_set(folder)
            panel = make_panel(label(run_title, name), describe_sampler(drawn.manifest), drawn.x, drawn.y)
            (panels if best[run_title] == name else others).append(panel)
            if run_title == own_title and (folder / "film.png").exists():
                steps, film = ", ".join(map(str, drawn.manifest.get("film", []))), (folder / "film.png").read_bytes()
                films.append({"title": name, "text": f"steps {steps}", "image": _uri(film)})
    robustness = figures.robustness(records, config.describe(recipe.threat))
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
        resources("advebm.reporting").joinpath("template.html").read_text()
    )
    page = template.render(
        title=title or _title(list(runs.values())),
        subtitle=_subtitle(run, history),
        warnings=overview.find_warnings(run, history, own_records),
        sentence="" if summary else sentence or overview.describe(runs, records),
        paper=summary and _paper(summary),
        compared=_side_by_side(compared),
        shown=[{"title": title, "image": _uri(figure)} for title, figure in shown.items()],
        panels=panels,
        others=others,
        qualities=_quality_tables(records),
        films=films,
        curves=_uri(figures.curves(history)),
        shifts=plot_each_run(lambda r: figures.shifts(r.history(), max(1, len(data.train)))),
        moves=plot_each_run(lambda r: figures.moves(r.history())),
        robustness=_uri(robustness),
        energies=_uri(figures.energies(own_records)),
        reliability=_uri(figures.reliability(own_records)),
        detection=_uri(figures.detection(own_records)),
        gallery=[
            {**figure, "title": label(title, figure["title"]), "image": _uri(figure["picture"])}
            for title, r in runs.items()
            for figure in figure_store.load_figures(r)
        ],
        tables=[{"name": name, "rows": [as_text(r) for r in rows]} for name, rows in records.items() if rows],
        config=dump(recipe),
        environment=json.dumps(files.read_json(run.folder / "env.json", default={}), indent=2),
        citations=citations.bibtex(recipe),
    )
    path = out or run.folder / "report.html"
    files.write(path, page)
    return path


def describe_sampler(manifest: Mapping[str, Any]) -> str:
    """Return the sampler settings of a set of samples as one line, from its manifest."""
    if "sampler" not in manifest:
        return f"from {manifest['images']}"
    sampler = manifest["sampler"]
    parts = [
        f"{sampler['kind'].upper()}: {sampler['steps']} {sampler['direction']} steps of {sampler['step_size']:g} "
        f"from {STARTS.get(sampler['start'], sampler['start'])}"
    ]
    parts += [f"ball {sampler['radius']:g}"] if sampler["radius"] else []
    parts += [f"noise {sampler['noise']:g}"] if sampler["noise"] else []
    parts += [f"temperature {sampler['temperature']:g}"] if sampler.get("temperature") is not None else []
    parts += [f"momentum {sampler['momentum']:g}"] if sampler.get("momentum") else []
    parts += ["Gaussians of test images"] if sampler.get("fit") == "test" else []
    parts += ["tuned on validation images"] if "tuned" in manifest else []
    return ", ".join(parts)


def _title(runs: Sequence[Run]) -> str:
    first, *others = [run.folder.resolve().name for run in runs]
    beside = f" beside {' and '.join(others) if len(others) < 3 else f'{len(others)} others'}" if others else ""
    return f"{first}{beside} on {runs[0].data.name}"


def _choose_sets(runs: Mapping[str, Run], records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str | None]:
    """Return the set of each run that is shown first; None for a run without samples.

    It is the set of the lowest FD that says enough, else the one of the same name as the first run's, else the first.
    """
    spaces = rate_sets(records)
    chosen: dict[str, str | None] = {}
    for title, run in runs.items():
        names = list(run.samples())
        ours = [[s for s in sets if s.run == title and s.name in names] for sets in spaces.values()]
        best = next((best.name for sets in ours if (best := best_set(sets))), None)
        same = next(iter(chosen.values()), None)
        chosen[title] = best or (same if same in names else next(iter(names), None))
    return chosen


def _panel_size(rows: int, count: int) -> tuple[int, int]:
    """Return the width of an image in pixels of the page, and the columns of each of ``count`` panels side by side."""
    tile = min(56, 320 // max(rows, 5))
    return tile, max(4, min(10, WIDTH // (min(count, 4) * tile)))


def _panel(
    title: str, text: str, x: Tensor, y: Tensor, classes: Sequence[str], tile: int, columns: int
) -> dict[str, Any]:
    """Return the first images of each class as rows, in the order in which they are, with the names of the classes."""
    rows = min(len(classes), ROWS) if (y >= 0).any() else ROWS
    images = pictures.rows_by_class(x, y, rows, columns)
    if (largest := max(images.shape[-2:])) > RECORDED:
        size = [max(1, round(side * RECORDED / largest)) for side in images.shape[-2:]]
        flat = functional.interpolate(images.flatten(0, 1), size=size, mode="area")
        images = flat.unflatten(0, images.shape[:2])
    return {
        "title": title,
        "text": text,
        "image": _uri(pictures.encode_png(pictures.grid(images, tile=RECORDED))),
        "names": classes[:rows] if (y >= 0).any() and len(classes) > 1 else [],
        "width": tile * columns,
    }


def _side_by_side(compared: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Return the measurements of runs themselves as a table; sets of samples have one of their own."""
    table = pivot({title: [r for r in rs if "samples" not in r["settings"]] for title, rs in compared.items()})
    if not table.cells:
        return None
    if len(table.titles) > 3:
        heads, rows = table.runs_down(list(table.cells))
    else:
        heads, rows = ["", *table.titles], [[name, *cells] for name, _, *cells in table.quantities_down()[1]]
    return {"heads": heads, "rows": rows}


def _quality_tables(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return a table for each feature space: a row for each set of samples, a column for each measure."""
    tables = []
    for space, sets in rate_sets(records).items():
        measures = [m for m in MEASURES if any(m in s.records for s in sets)]
        best = {m: best_set(sets, m) if len(sets) > 1 else None for m in measures}
        groups: dict[str, list[dict[str, Any]]] = {}
        for s in sets:
            cells = [{"text": _cell(s.records.get(m)), "best": best[m] is s} for m in measures]
            groups.setdefault(s.run, []).append({"name": s.name + " *" * s.judges_itself, "cells": cells})
        counts = [r["count"] for s in sets for m, r in s.records.items() if m in ("FD", "KID")] or [0]
        tables.append(
            {
                "space": space,
                "heads": measures,
                "groups": groups,
                "count": " to ".join(dict.fromkeys((f"{min(counts):,}", f"{max(counts):,}"))),
                "own": any(s.judges_itself for s in sets),
                "few": any(r["settings"].get("few") for s in sets for r in s.records.values()),
            }
        )
    return tables


def _cell(record: Mapping[str, Any] | None) -> str:
    """Return the value of a measure of samples; † marks a distance of too few images."""
    if record is None:
        return ""
    if key_of(record).is_share:
        return f"{100 * record['value']:.1f} %"
    return f"{record['value']:.3g}" + " †" * (record["settings"].get("few", False) and caution(record) != "")


def _paper(summary: Mapping[str, Any]) -> dict[str, Any]:
    where, verdict = render.text_lines(summary)
    heads, rows = render.text_table(summary)
    return {"where": where, "verdict": verdict, "heads": heads, "rows": rows}


def _subtitle(run: Run, history: Iterable[Mapping[str, Any]]) -> str:
    images = max((line["images"] for line in history), default=0)
    time_written = time.strftime("written %Y-%m-%d %H:%M")
    source = f"{images:,} training images seen"
    if run.recipe.train.images == 0:
        source = (
            f"weights of {Path(run.recipe.init).name}" if run.recipe.init else "a module that was trained elsewhere"
        )
    return f"recipe {run.recipe.name} · {source} · {time_written}"


def _uri(png: bytes | None) -> str | None:
    return None if png is None else "data:image/png;base64," + base64.b64encode(png).decode()
