"""Write ``report.html`` from the files of a run."""

import base64
import json
import time
from collections.abc import Iterable, Mapping
from importlib.resources import files as resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2

from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.projected import Attack
from advebm.core import citations, config, files
from advebm.data import pictures
from advebm.evaluation import compare, evaluate
from advebm.metrics.keys import Key, attack_key, key_of
from advebm.papers import render
from advebm.reporting import figure_store, figures
from advebm.reporting.records import as_text
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
    recipe, history = run.recipe, run.history()
    data = run.data
    runs = compare.by_title([run, *beside])
    everyone = {title: evaluate.newest_records(r.records()) for title, r in runs.items()}
    own = next(iter(everyone.values()))
    count = len(data.classes)
    sets = {f"{title} · {n}" if len(runs) > 1 else n: f for title, r in runs.items() for n, f in r.samples().items()}
    real = pictures.rows_by_class(data.train.x, data.train.y, count)
    samples = [{"title": "training images", "text": data.name, "image": _picture(real)}]
    films = []
    for name, folder in sets.items():
        drawn = generate.read_set(folder)
        text = describe_sampler(drawn.manifest)
        samples.append(
            {"title": name, "text": text, "image": _picture(pictures.rows_by_class(drawn.x, drawn.y, count))}
        )
        if (folder / "film.png").exists() and folder.parent.parent == run.folder:
            steps = ", ".join(map(str, drawn.manifest.get("film", [])))
            films.append({"title": name, "text": f"steps {steps}", "image": _uri((folder / "film.png").read_bytes())})
    html = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
        resources("advebm.reporting").joinpath("template.html").read_text()
    )
    page = html.render(
        title=title or recipe.name,
        subtitle=_subtitle(run, history),
        events=[line for line in history if "event" in line],
        cards=[] if summary else _cards(own, recipe.threat),
        paper=summary and _paper(summary),
        shown=[{"title": title, "image": _uri(figure)} for title, figure in shown.items()],
        samples=samples if sets else [],
        films=films,
        curves=_uri(figures.curves(history)) if any("train/loss" in line for line in history) else None,
        shifts=[
            {"title": title, "image": _uri(figure)}
            for title, r in runs.items()
            if (figure := figures.shifts(r.history(), len(data.train))) is not None
        ],
        moves=[
            {"title": title, "image": _uri(figure)}
            for title, r in runs.items()
            if (figure := figures.moves(r.history())) is not None
        ],
        robustness=_uri(figures.robustness(everyone, config.describe(recipe.threat))),
        energies=_uri(figures.energies(own)),
        reliability=_uri(figures.reliability(own)),
        detection=_uri(figures.detection(own)),
        gallery=[
            {**f, "title": f"{title} · {f['title']}" if len(runs) > 1 else f["title"], "image": _uri(f["picture"])}
            for title, r in runs.items()
            for f in figure_store.load_figures(r)
        ],
        tables=[{"name": name, "rows": [as_text(r) for r in records]} for name, records in everyone.items() if records],
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
    s = manifest["sampler"]
    parts = [f"{s['kind'].upper()}: {s['steps']} {s['direction']} steps of {s['step_size']:g} from {s['start']} seeds"]
    parts += [f"ball {s['radius']:g}"] if s["radius"] else []
    parts += [f"noise {s['noise']:g}"] if s["noise"] else []
    parts += [f"temperature {s['temperature']:g}"] if s.get("temperature") is not None else []
    parts += [f"momentum {s['momentum']:g}"] if s.get("momentum") else []
    parts += ["Gaussians of test images"] if s.get("fit") == "test" else []
    parts += ["tuned on validation images"] if "tuned" in manifest else []
    return ", ".join(parts)


def _cards(records: Iterable[Mapping[str, Any]], threat: Attack) -> list[dict[str, str]]:
    """Return clean accuracy, accuracy under the threat and under AutoAttack, and the lowest Fréchet distance."""
    keyed = [(key_of(record), record) for record in records]
    attacks = (threat, AutoAttack(threat.eps, threat.norm))
    wanted = (Key("accuracy"), *(Key("accuracy", attack_key(attack)) for attack in attacks))
    shown = [record for key in wanted for k, record in keyed if k == key]
    shown += sorted((record for k, record in keyed if k.quantity == "FD"), key=lambda r: r["value"])[:1]
    cards = []
    for text in map(as_text, shown):
        name = " · ".join(filter(None, [text["name"], text["samples"]]))
        cards.append({"value": text["value"], "name": f"{name}, n = {text['count']}"})
    return cards


def _paper(summary: Mapping[str, Any]) -> dict[str, Any]:
    where, verdict = render.text_lines(summary)
    heads, rows = render.text_table(summary)
    return {"where": where, "verdict": verdict, "heads": heads, "rows": rows}


def _subtitle(run: Run, history: Iterable[Mapping[str, Any]]) -> str:
    images = max((line["images"] for line in history), default=0)
    written = time.strftime("written %Y-%m-%d %H:%M")
    parts = [run.folder.resolve().name, f"{images:,} training images seen", written]
    return " · ".join(parts)


def _picture(rows: Any) -> str:
    return str(_uri(pictures.encode_png(pictures.grid(rows, tile=32))))


def _uri(png: bytes | None) -> str | None:
    return None if png is None else "data:image/png;base64," + base64.b64encode(png).decode()
