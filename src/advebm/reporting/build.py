"""Write ``report.html`` from the files of a run."""

import base64
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files as resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2

from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.base import ball_text
from advebm.attacks.projected import Attack
from advebm.core import citations, config, files
from advebm.data import pictures
from advebm.evaluation import compare, evaluate
from advebm.metrics.keys import Key, attack_key, key_of
from advebm.papers import render
from advebm.reporting import figure_store, figures
from advebm.reporting.records import as_text, caution
from advebm.runs.find_model import trained_threat
from advebm.runs.recipe import dump
from advebm.runs.run import Run
from advebm.sampling import generate


def report(
    run: Run,
    *,
    beside: Iterable[Run] = (),
    out: Path | None = None,
    title: str | None = None,
    shown: Mapping[str, bytes] = MappingProxyType({}),
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Write a self-contained HTML report of everything that the run contains so far.  Return its path.

    Args:
        run: the run to report on.
        beside: other runs whose samples, training diagnostics, robustness, figures and records are shown as well.
        out: path of the report; default: ``report.html`` in the run's folder.
        title: title of the page; default: the recipe's name.
        shown: PNG figures by title, placed at the top of the page.
        summary: a table of :func:`advebm.papers.render.summarize`, placed at the top instead of the run's main numbers.
    """
    recipe, data, history = run.recipe, run.data, run.history()
    runs = compare.by_title([run, *beside])
    records = {title: evaluate.newest_records(r.records()) for title, r in runs.items()}
    own_records = next(iter(records.values()))
    count = len(data.classes)

    def label(run_title: str, name: str) -> str:
        return f"{run_title} · {name}" if len(runs) > 1 else name

    def plot_each_run(plot: Callable[[Run], bytes | None]) -> list[dict[str, str | None]]:
        plots = {title: plot(r) for title, r in runs.items()}
        return [{"title": title, "image": _uri(png)} for title, png in plots.items() if png is not None]

    real = pictures.rows_by_class(data.train.x, data.train.y, count)
    samples = [{"title": "training images", "text": data.name, "image": _grid_uri(real)}]
    films = []
    for name, folder in {label(title, n): f for title, r in runs.items() for n, f in r.samples().items()}.items():
        sample_set = generate.read_set(folder)
        grid = _grid_uri(pictures.rows_by_class(sample_set.x, sample_set.y, count))
        samples.append({"title": name, "text": describe_sampler(sample_set.manifest), "image": grid})
        if (folder / "film.png").exists() and folder.parent.parent == run.folder:
            steps = ", ".join(map(str, sample_set.manifest.get("film", [])))
            films.append({"title": name, "text": f"steps {steps}", "image": _uri((folder / "film.png").read_bytes())})
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
        resources("advebm.reporting").joinpath("template.html").read_text()
    )
    page = template.render(
        title=title or recipe.name,
        subtitle=_subtitle(run, history),
        events=[line for line in history if "event" in line],
        cards=[] if summary else _cards(own_records, recipe.threat),
        warnings=_warnings(own_records, trained_threat(recipe)),
        paper=summary and _paper(summary),
        shown=[{"title": title, "image": _uri(figure)} for title, figure in shown.items()],
        samples=samples if len(samples) > 1 else [],
        films=films,
        curves=_uri(figures.curves(history)) if any("train/loss" in line for line in history) else None,
        shifts=plot_each_run(lambda r: figures.shifts(r.history(), len(data.train))),
        moves=plot_each_run(lambda r: figures.moves(r.history())),
        robustness=_uri(figures.robustness(records, config.describe(recipe.threat))),
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
    if "images" in manifest:
        return f"from {manifest['images']}"
    sampler = manifest["sampler"]
    parts = [
        f"{sampler['kind'].upper()}: {sampler['steps']} {sampler['direction']} steps of {sampler['step_size']:g} "
        f"from {sampler['start']} seeds"
    ]
    parts += [f"ball {sampler['radius']:g}"] if sampler["radius"] else []
    parts += [f"noise {sampler['noise']:g}"] if sampler["noise"] else []
    parts += [f"temperature {sampler['temperature']:g}"] if sampler.get("temperature") is not None else []
    parts += [f"momentum {sampler['momentum']:g}"] if sampler.get("momentum") else []
    parts += ["Gaussians of test images"] if sampler.get("fit") == "test" else []
    parts += ["tuned on validation images"] if "tuned" in manifest else []
    return ", ".join(parts)


def _cards(records: Iterable[Mapping[str, Any]], threat: Attack) -> list[dict[str, str]]:
    """Return clean accuracy, accuracy under the threat and under AutoAttack, and the lowest sound Fréchet distance."""
    records_with_keys = [(key_of(record), record) for record in records]
    attacks = (threat, AutoAttack(threat.eps, threat.norm))
    keys = (Key("accuracy"), *(Key("accuracy", attack_key(attack)) for attack in attacks))
    chosen = [record for key in keys for k, record in records_with_keys if k == key]
    distances = [record for k, record in records_with_keys if k.quantity == "FD" and not caution(record)]
    chosen += sorted(distances, key=lambda r: r["value"])[:1]
    cards = []
    for text in map(as_text, chosen):
        name = " · ".join(filter(None, [text["name"], text["samples"]]))
        cards.append({"value": text["value"], "name": f"{name}, n = {text['count']}"})
    return cards


def _warnings(records: Iterable[Mapping[str, Any]], trained: Attack | None) -> list[str]:
    """Return what a reader of the numbers must know: accuracies under other threats than the model was trained for."""
    measured: dict[str, set[float]] = {}
    for record in records:
        attack = record["settings"].get("attack")
        if key_of(record).quantity == "accuracy" and isinstance(attack, Mapping) and attack.get("eps"):
            measured.setdefault(attack["norm"], set()).add(attack["eps"])
    if trained is None:
        return []
    known = [(norm, eps) for norm, radii in measured.items() for eps in sorted(radii)]
    other = [
        ball_text(eps, norm)
        for norm, eps in known
        if norm != trained.norm or not any(math.isclose(r, trained.eps, rel_tol=0.01) for r in measured[norm])
    ]
    if not other:
        return []
    names = ", ".join(other[:3]) + ", …" * (len(other) > 3)
    theirs = ball_text(trained.eps, trained.norm)
    return [f"Accuracy under {names}: not the threat that the model was trained for, {theirs}."]


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
    return f"{run.folder.resolve().name} · {source} · {time_written}"


def _grid_uri(rows: Any) -> str:
    return str(_uri(pictures.encode_png(pictures.grid(rows, tile=32))))


def _uri(png: bytes | None) -> str | None:
    return None if png is None else "data:image/png;base64," + base64.b64encode(png).decode()
