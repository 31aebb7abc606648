"""Training and sampling behind a progress bar: what the command line and the demo share."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from advebm import checks, comparison, config, console, drawing, evaluation, files, generation, pictures, tuning
from advebm.data.files import read_folder
from advebm.errors import UserError
from advebm.evaluation import is_factory
from advebm.metrics.base import SampleSet, Subject, label, together
from advebm.metrics.probing import Probe
from advebm.metrics.quality import SampleQuality
from advebm.models import network
from advebm.models.precision import precision_label
from advebm.processes import ALONE, Team
from advebm.reporting import figures, gallery
from advebm.samplers import Sampler
from advebm.training.loop import train
from advebm.training.machine import describe
from advebm.training.recipe import Recipe, resolve
from advebm.training.run import Run


def fit(recipe: Recipe, folder: Path, *, resume: bool = False, device: str | None = None) -> Run:
    """:func:`advebm.training.loop.train` behind a progress bar."""
    where = checks.device(device)
    kind = precision_label(recipe.train.precision, torch.device(where))
    console.computing_on(f"{describe(where)}, {kind}")
    seen: dict[str, float] = {}
    total = sum(stage.train.images for stage in (*recipe.before, recipe))
    done = sum(min(run.images, run.recipe.train.images) for run in Run.open(folder).stages) if resume else 0
    with console.bar(recipe.name, total, done) as tell:
        return train(
            recipe,
            folder,
            resume=resume,
            device=device,
            report=lambda line: tell(line["images"], console.training_note(line, seen)),
            tick=lambda images: tell(images, console.training_note({}, seen)),
        )


def adopt(where: str, folder: Path, overrides: Iterable[tuple[str, Any]]) -> Run:
    """A run around a model that is there already: nothing is trained, everything else works on it.

    A folder that holds it from an earlier call is opened as it is.

    Args:
        where: ``PACKAGE.MODULE:FACTORY``, a model's or run's folder, or ``hf:USER/NAME``.
        folder: of the new run.
        overrides: ``data``, and other options of a recipe.

    Raises:
        UserError: no model there, no data, data of other classes or another shape, or a folder that holds another run.
    """
    overrides = list(overrides)
    if not any(name.partition(".")[0] == "data" for name, _ in overrides):
        raise UserError("a model of its own needs --data NAME, and --data.path where that takes one")
    architecture = None
    if is_factory(where):
        plain = {"backbone": {"kind": "own", "path": where}, "normalise": {"mean": [0.0], "std": [1.0]}}
    else:
        at, foreign = network.locate(where)
        architecture = network.read_architecture(at, foreign=foreign)
        if architecture.hidden is not None:
            raise UserError(f"{where} is an encoder, which has no logits; advebm probe makes a classifier of its run")
        plain = {"backbone": config.describe(architecture.backbone), "init": where}
        plain |= {"normalise": {"mean": list(architecture.mean), "std": list(architecture.std)}}
    recipe = _adopting(folder.name, plain, overrides)
    if architecture is not None:
        data = recipe.data.load()
        ours = (architecture.outputs, architecture.channels, architecture.size)
        if ours != (theirs := (len(data.classes), *data.shape[:2])):
            words = "{} classes of {} x {} x {}".format
            raise UserError(
                f"{where} is for {words(*ours, ours[-1])}, {data.name} has {words(*theirs, theirs[-1])}; "
                "evaluate it on data like its own"
            )
    if (folder / "config.yaml").is_file():
        run = Run.open(folder)
        same = [getattr(run.recipe, n) == getattr(recipe, n) for n in ("data", "backbone", "init", "normalise")]
        if not all(same):
            raise UserError(f"{folder} holds another model or other data; choose another --out")
        return run
    return fit(recipe, folder)


def _adopting(name: str, plain: Mapping[str, Any], overrides: Iterable[tuple[str, Any]]) -> Recipe:
    """The recipe of a run of a classifier that is there already, of which ``plain`` says which."""
    rest: dict[str, Any] = {"name": name, "objective": "standard", "threat": {}, "sampler": "cs", "data": "digits"}
    rest |= {"metrics": ["accuracy", "robust-accuracy"], "train": {"images": 0}}
    return resolve({**rest, **plain}, overrides)


def probe(
    run: Run,
    folder: Path,
    *,
    by: Probe,
    overrides: Iterable[tuple[str, Any]] = (),
    checkpoint: str = "latest",
    device: str = "cpu",
) -> Run:
    """A linear classifier on a run's frozen features, published in ``RUN/probe``, as a run of its own in ``folder``.

    Args:
        run: of any network with features: an encoder above all.
        folder: of the new run.
        by: how the classifier is fitted, on the training split.
        overrides: options of the new run's recipe, such as another threat.
        checkpoint: of the run.
        device: where to compute.

    Raises:
        UserError: data without labels, a network without features, a wrong option, or a folder that holds something.
    """
    recipe, data = run.recipe, run.recipe.data.load()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another --out")
    if not data.train.labelled:
        raise UserError(f"a probe is fitted on labels, and {data.name} has none")
    model, architecture = run.model(checkpoint)
    described, title = config.describe(recipe), f"{recipe.name}-probe"
    options: dict[str, Any] = {name: described[name] for name in ("data", "threat")}
    options["sampler"] = config.switch(described["sampler"], "sampler", "cs")
    pairs = [("name", title), *options.items(), *overrides]
    _adopting(title, {"backbone": described["backbone"]}, pairs)  # a wrong option is noticed before anything is fitted
    classifier = by.classifier(model.to(device), data.train, len(data.classes), together(data.shape))
    plain = dataclasses.replace(architecture, outputs=len(data.classes), hidden=None)
    about = {"data": data.name, "classes": data.classes, "probe": config.describe(by), "recipe": recipe.name}
    where = run.folder / "probe"
    network.save(where, classifier, plain, title=title, summary=f"A linear probe of {recipe.name}.", extra=about)
    return adopt(str(where), folder, pairs)


def take_in(run: Run, folder: Path) -> str:
    """Images from a folder as a set of samples of a run, under the folder's name, which is returned."""
    data, name = run.recipe.data.load(), folder.resolve().name
    images = read_folder(folder, data.classes, data.shape)
    about = {"images": str(folder.resolve())}
    if name in run.samples() and generation.read(run.samples()[name]).manifest.get("images") != about["images"]:
        raise UserError(f"{run.folder} has samples called {name} already; rename {folder}")
    generation.write(run.folder / "samples" / name, SampleSet(images.float(), images.y, about), len(data.classes))
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
    :class:`advebm.drawing.Drawing`.
    """
    if Path(name).name != name or name in (".", ".."):
        raise UserError(f"--name is the name of a folder in {run.folder / 'samples'}, got {name!r}")
    number = run.checkpoints.path(checkpoint).name
    wanted = drawing.Drawing(run.folder, name, sampler, per_class, checkpoint=number, **options)
    with console.bar(name, per_class * len(wanted.classes or run.recipe.data.load().classes)) as tell:
        return drawing.draw(wanted, processes=processes, team=team, trajectory=trajectory, progress=tell)


def search(
    run: Run,
    samplers: Sequence[Sampler],
    *,
    features: str | Path | None = None,
    checkpoint: str = "latest",
    device: str = "cpu",
    **options: Any,
) -> tuple[list[dict[str, Any]], Path]:
    """:func:`advebm.tuning.tune` behind a progress bar: all trials, the best first, and a figure of the responses."""
    if features is None:
        space = evaluation.feature_space(evaluation.OWN, run.model(checkpoint)[0].to(device))
    else:
        space = evaluation.find_space(features).load(device)
    options |= {"judge": comparison.judge(features), "checkpoint": checkpoint, "device": device}
    with console.bar("tune", len(samplers)) as tell:
        trials = tuning.tune(run, samplers, space, progress=tell, **options)
    if not trials:
        raise UserError("other processes are at all trials; wait for them")
    best, name = trials[0], trials[0]["name"]
    text = f"{len(trials)} settings, {best['per_class']} images a class each, against {best['reference_count']} images"
    picture = figures.responses(tuning.curves(trials), name)
    text += f"; best {name} {best['value']:.3g}"
    return trials, gallery.hang(run, "tuning", picture, "Sampler settings", text, {"best": best["sampler"]})


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
) -> tuple[dict[str, comparison.Records], Path]:
    """Several methods from the same seeds: their records, and a picture of a grid each with its scores.

    ``about`` is what manifests say of each method's settings.  CEM's table 2 has this form.  Everything goes into the
    run's ``comparison``, numbers into ``comparison.json`` there.  Returns mean and deviation over the sampling
    ``seeds``, where there are several, and the picture's path.
    """
    recipe, device = run.recipe, str(options.get("device", "cpu"))
    data = recipe.data.load()
    model = run.model(str(options.get("checkpoint", "latest")))[0].to(device)
    about = about or {}
    own = evaluation.feature_space(evaluation.OWN, model)
    space = own if features is None else evaluation.find_space(features).load(device)
    sets: dict[str, SampleSet] = {}
    numbers = range(seed, seed + seeds)
    for number in numbers:
        for method, sampler in samplers.items():
            name = f"{method}-{number}"
            known: dict[str, Any] = {"seed": number, "within": "comparison", "about": about.get(method, {}), **options}
            sets[name] = generation.read(draw(run, name, sampler, per_class, **known))
    firsts = {m: sets[f"{m}-{seed}"] for m in samplers}
    panels = {m: pictures.by_class(s.x, s.y, len(data.classes)) for m, s in firsts.items()}
    say(f"judging {len(sets)} sets")
    subject = Subject(model, data, data.test, recipe.threat, sets, space, together(data.shape))
    records = [dataclasses.asdict(r) for r in evaluation.evaluate(subject, [SampleQuality()], seed=seed)]
    of = lambda m, name: [
        {**r, "settings": {**r["settings"], "samples": m}} for r in records if r["settings"]["samples"] == name
    ]
    rows = comparison.over_seeds([{m: of(m, f"{m}-{number}") for m in samplers} for number in numbers])
    shown = [label(kind, space.name) for kind in ("FD", "KID", "class score", "intended class")]
    files.write_json(run.folder / "comparison" / "comparison.json", rows)
    rows = {m: [{**r, "settings": {}} for r in rs if r["name"] in shown] for m, rs in rows.items()}
    texts = {m: [f"{r['name'].split(' (')[0]} {r['value']:.3g} ± {r['error']:.2g}" for r in rows[m]] for m in panels}
    text = f"{per_class * len(data.classes):,} images each, the first of them shown; in {space.name}; ± "
    text += "deviation over sampling seeds" if seeds > 1 else "standard error"
    picture = figures.grids(panels, texts)
    return rows, gallery.hang(run, "comparison", picture, "Samplers from the same seeds", text)
