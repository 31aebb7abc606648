"""Drawing, tuning and comparing samples behind a progress bar."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advebm.core import console, files
from advebm.core.errors import UserError
from advebm.core.processes import ALONE, Team
from advebm.data import pictures
from advebm.data.readers import read_folder
from advebm.evaluation import compare, evaluate
from advebm.metrics.base import SampleSet, Subject, label
from advebm.metrics.quality import SampleQuality
from advebm.models.batching import together
from advebm.reporting import figure_store, figures
from advebm.runs.run import Run
from advebm.samplers.base import Sampler
from advebm.sampling import generate, job, tune


def take_in(run: Run, folder: Path) -> str:
    """Images from a folder as a set of samples of a run, under the folder's name, which is returned."""
    data, name = run.recipe.data.load(), folder.resolve().name
    images = read_folder(folder, data.classes, data.shape)
    about = {"images": str(folder.resolve())}
    if name in run.samples() and generate.read(run.samples()[name]).manifest.get("images") != about["images"]:
        raise UserError(f"{run.folder} has samples called {name} already; rename {folder}")
    generate.write(run.folder / "samples" / name, SampleSet(images.float(), images.y, about), len(data.classes))
    return name


def draw(
    run: Run,
    name: str,
    sampler: Sampler,
    per_class: int,
    *,
    checkpoint: str = "latest",
    processes: int = 1,
    team: Team = ALONE,
    trajectory: bool = False,
    **options: Any,
) -> Path:
    """Images of every class, and one chain a class as a film, into the run's ``samples/NAME``, which is returned.

    Where neither energy nor seeds are of a class, as many images and chains.  ``options`` are those of
    :class:`advebm.sampling.job.Drawing`.
    """
    if Path(name).name != name or name in (".", ".."):
        raise UserError(f"--name is the name of a folder in {run.folder / 'samples'}, got {name!r}")
    number = run.checkpoints.path(checkpoint).name
    wanted = job.Drawing(run.folder, name, sampler, per_class, checkpoint=number, **options)
    with console.bar(name, per_class * len(wanted.classes or run.recipe.data.load().classes)) as tell:
        return job.draw(wanted, processes=processes, team=team, trajectory=trajectory, progress=tell)


def search(
    run: Run,
    samplers: Sequence[Sampler],
    *,
    features: str | Path | None = None,
    checkpoint: str = "latest",
    device: str = "cpu",
    **options: Any,
) -> tuple[list[dict[str, Any]], Path]:
    """:func:`advebm.sampling.tune.tune` behind a progress bar: all trials, the best first, and a figure of them."""
    if features is None:
        space = evaluate.feature_space(evaluate.OWN, run.model(checkpoint)[0].to(device))
    else:
        space = evaluate.find_space(features).load(device)
    options |= {"judge": compare.judge(features), "checkpoint": checkpoint, "device": device}
    with console.bar("tune", len(samplers)) as tell:
        trials = tune.tune(run, samplers, space, progress=tell, **options)
    if not trials:
        raise UserError("other processes are at all trials; wait for them")
    best, name = trials[0], trials[0]["name"]
    text = f"{len(trials)} settings, {best['per_class']} images a class each, against {best['reference_count']} images"
    picture = figures.responses(tune.curves(trials), name)
    text += f"; best {name} {best['value']:.3g}"
    return trials, figure_store.hang(run, "tuning", picture, "Sampler settings", text, {"best": best["sampler"]})


def contrast(
    run: Run,
    samplers: Mapping[str, Sampler],
    per_class: int,
    seeds: int = 1,
    *,
    features: str | Path | None = None,
    seed: int = 0,
    about: Mapping[str, Mapping[str, Any]] | None = None,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> tuple[dict[str, compare.Records], Path]:
    """Several methods from the same seeds: their records, and a picture of a grid each with its scores.

    ``about`` is what manifests say of each method's settings.  CEM's table 2 has this form.  Everything goes into the
    run's ``comparison``, numbers into ``comparison.json`` there.  Returns mean and deviation over the sampling
    ``seeds``, where there are several, and the picture's path.
    """
    recipe, device = run.recipe, str(options.get("device", "cpu"))
    data = recipe.data.load()
    model = run.model(str(options.get("checkpoint", "latest")))[0].to(device)
    about = about or {}
    own = evaluate.feature_space(evaluate.OWN, model)
    space = own if features is None else evaluate.find_space(features).load(device)
    sets: dict[str, SampleSet] = {}
    numbers = range(seed, seed + seeds)
    for number in numbers:
        for method, sampler in samplers.items():
            name = f"{method}-{number}"
            known: dict[str, Any] = {"seed": number, "within": "comparison", "about": about.get(method, {}), **options}
            sets[name] = generate.read(draw(run, name, sampler, per_class, **known))
    firsts = {m: sets[f"{m}-{seed}"] for m in samplers}
    panels = {m: pictures.by_class(s.x, s.y, len(data.classes)) for m, s in firsts.items()}
    say(f"judging {len(sets)} sets")
    subject = Subject(model, data, data.test, recipe.threat, sets, space, together(data.shape))
    records = [dataclasses.asdict(r) for r in evaluate.evaluate(subject, [SampleQuality()], seed=seed)]
    of = lambda m, name: [
        {**r, "settings": {**r["settings"], "samples": m}} for r in records if r["settings"]["samples"] == name
    ]
    rows = compare.over_seeds([{m: of(m, f"{m}-{number}") for m in samplers} for number in numbers])
    shown = [label(kind, space.name) for kind in ("FD", "KID", "class score", "intended class")]
    files.write_json(run.folder / "comparison" / "comparison.json", rows)
    rows = {m: [{**r, "settings": {}} for r in rs if r["name"] in shown] for m, rs in rows.items()}
    texts = {m: [f"{r['name'].split(' (')[0]} {r['value']:.3g} ± {r['error']:.2g}" for r in rows[m]] for m in panels}
    text = f"{per_class * len(data.classes):,} images each, the first of them shown; in {space.name}; ± "
    text += "deviation over sampling seeds" if seeds > 1 else "standard error"
    picture = figures.grids(panels, texts)
    return rows, figure_store.hang(run, "comparison", picture, "Samplers from the same seeds", text)
