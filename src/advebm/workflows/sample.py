"""Draw samples, tune samplers and compare them, with progress bars."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from advebm.core import config, console, files, notebook
from advebm.core.errors import UserError
from advebm.core.processes import ALONE, Team
from advebm.data import pictures
from advebm.evaluation import compare, evaluate
from advebm.metrics.base import SampleSet, Subject
from advebm.metrics.keys import key_of
from advebm.metrics.quality import SampleQuality
from advebm.models.batching import batch_size_for
from advebm.reporting import figure_store, figures
from advebm.runs.find_space import feature_space, find_space
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.samplers.base import Sampler
from advebm.sampling import generate, job, tune
from advebm.workflows.devices import choose_device, join_team

Overrides = Iterable[tuple[str, Any]]
LEAK = "seeds are fitted on test images: what is measured against them is flattered"


def sample(
    run: Run,
    method: str | None = None,
    overrides: Overrides = (),
    *,
    name: str | None = None,
    replace: bool = False,
    per_class: int = 10,
    checkpoint: str = "latest",
    untuned: bool = False,
    device: str | None = None,
    **options: Any,
) -> Path:
    """Draw images of every class by one method and return the folder of the set.

    A set that was drawn with other settings is not overwritten: the default name then gets a number.

    Args:
        run: trained run.
        method: kind of sampler; None: the recipe's.
        overrides: options of the sampler.
        name: name of the set; None: ``METHOD-START``, or ``METHOD-START-2`` …
        replace: whether to replace a set of that name that was drawn with other settings.
        per_class: images of each class.
        checkpoint: ``latest``, ``best`` or a number of images.
        untuned: whether to use the recipe's settings even if ``tune-sampler`` found others.
        device: None: the best one available.
        options: further options of :func:`draw_set`.

    Raises:
        UserError: ``name`` is that of a set that was drawn with other settings.
    """
    team, device = join_team(device)
    sampler, about = choose_settings(run, method, overrides, checkpoint=checkpoint, untuned=untuned)
    if sampler.fit == "test":
        warnings.warn(LEAK, stacklevel=2)
    options |= {"checkpoint": checkpoint, "device": device, "team": team, "about": about}
    default = generate.set_name(sampler)
    if not replace:
        plan = _plan_set(run, sampler, per_class, options)
        for candidate in [name] if name else [default, *(f"{default}-{k}" for k in range(2, 1000))]:
            if not _is_other_set(run.folder / "samples" / candidate, plan):
                default = candidate
                break
        else:
            raise UserError(f"{run.folder} has samples {name}, drawn with other settings; another --name, or --replace")
    default = team.all_gather(default)[0]  # the others may see what the main process has begun
    return draw_set(run, name or default, sampler, per_class, **options)


def _plan_set(run: Run, sampler: Sampler, per_class: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that determine the images of a set, as its manifest has them."""
    known = {f.name for f in dataclasses.fields(job.SampleJob)}
    settings = {k: v for k, v in options.items() if k in known and k != "checkpoint"}
    checkpoint = run.checkpoints.path(str(options["checkpoint"])).name
    plan: dict[str, Any] = job.SampleJob(run, "", sampler, per_class, checkpoint=checkpoint, **settings).plan()
    return json.loads(json.dumps({k: v for k, v in plan.items() if k != "fast"}))


def is_drawn(run: Run, name: str, sampler: Sampler, per_class: int, **options: Any) -> bool:
    """Return whether the run has a finished set of that name, drawn with these settings; see :func:`draw_set`."""
    kept = files.read_json(run.folder / "samples" / name / "manifest.json", default={})
    plan = _plan_set(run, sampler, per_class, {"checkpoint": "latest", **options})
    return all(kept.get(key) == value for key, value in plan.items())


def _is_other_set(folder: Path, plan: Mapping[str, Any]) -> bool:
    """Return whether the folder has a set, finished or begun, that was drawn with other settings."""
    kept = [files.read_json(folder / name, default={}) for name in ("manifest.json", "plan.json")]
    return any(about and any(about.get(key) != value for key, value in plan.items()) for about in kept)


def compare_methods(
    run: Run,
    methods: Sequence[str],
    overrides: Overrides,
    *,
    per_class: int,
    seeds: int,
    checkpoint: str,
    untuned: bool,
    device: str | None,
    steps: Sequence[int] = (),
    **options: Any,
) -> tuple[dict[str, compare.Records], Path]:
    """Draw by several methods, from the same seeds if their starts agree, and judge: see :func:`compare_sets`.

    With ``steps`` each method draws once for each of these numbers of steps, so that the records show quality by cost.
    """
    device = choose_device(device)
    settings: dict[str, Any] = {"checkpoint": checkpoint, "untuned": untuned}
    chosen = {m: choose_settings(run, m, overrides, **settings, label=f"{m}: ") for m in methods}
    samplers = {method: sampler for method, (sampler, _) in chosen.items()}
    if len({sampler.start for sampler in samplers.values()}) > 1:
        starts = ", ".join(f"{method} from {sampler.start}" for method, sampler in samplers.items())
        console.say(f"seeds differ: {starts}; --sampler.start sets all")
    if any(sampler.fit == "test" for sampler in samplers.values()):
        warnings.warn(LEAK, stacklevel=2)
    about = {method: how for method, (_, how) in chosen.items()}
    if steps:
        about = {f"{method}-{k}-steps": how for method, how in about.items() for k in steps}
        samplers = {f"{m}-{k}-steps": dataclasses.replace(s, steps=k) for m, s in samplers.items() for k in steps}
    options |= {"checkpoint": checkpoint, "device": device, "about": about}
    return compare_sets(run, samplers, per_class, seeds, say=console.say, **options)


class Tuning(NamedTuple):
    """A search of a sampler's settings.

    Attributes:
        trials: the trials, best first: ``sampler`` has the settings, ``value`` the distance called ``name``.
        best: path of the best settings, which ``sample`` then takes; not there before all trials are finished.
        figure: path of a figure of the trials.
    """

    trials: list[dict[str, Any]]
    best: Path
    figure: Path

    def rows(self, count: int = 10) -> dict[str, dict[str, float]]:
        """Return distance and settings of the best ``count`` trials, by their rank from 1."""
        settings = lambda trial: {name: v for name in tune.SETTINGS if (v := trial["sampler"][name]) is not None}
        return {str(i): {t["name"]: t["value"], **settings(t)} for i, t in enumerate(self.trials[:count], 1)}

    def __repr__(self) -> str:
        best = ", ".join(f"{name} {value:.3g}" for name, value in self.rows(1)["1"].items())
        return f"Tuning: {len(self.trials)} trials, the best: {best}"

    def _repr_html_(self) -> str:
        rows = self.rows()
        heads = list(dict.fromkeys(name for row in rows.values() for name in row))
        cells = [[rank, *(f"{row[h]:.3g}" if h in row else "" for h in heads)] for rank, row in rows.items()]
        return notebook.line(self) + notebook.table(["", *heads], cells)


def tune_sampler(
    run: Run,
    method: str | None,
    overrides: Overrides,
    values: Mapping[str, Sequence[Any]],
    *,
    device: str | None,
    **options: Any,
) -> Tuning:
    """Search a sampler's settings.

    Args:
        run: trained run.
        method: kind of sampler; None: the recipe's.
        overrides: options of the sampler.
        values: values to try for each setting, such as ``{"step_size": (0.05, 0.1)}``.
        device: None: the best one available.
        options: further options of :func:`search_settings`.
    """
    sampler = choose_sampler(run, method, overrides)
    plain = config.describe(sampler)
    listed = {
        name: [getattr(config.build({**plain, name: v}, "sampler"), name) for v in chosen]
        for name, chosen in values.items()
    }
    trials, figure = search_settings(run, tune.settings_grid(sampler, listed), device=choose_device(device), **options)
    return Tuning(trials, tune.result_path(run, sampler), figure)


def choose_sampler(run: Run, method: str | None, overrides: Overrides = ()) -> Sampler:
    """Return the run's sampler, or another method with its settings, with ``overrides`` applied."""
    if method is not None:
        return run.recipe.with_sampler(method, overrides).sampler
    return resolve(config.describe(run.recipe), overrides).sampler


def choose_settings(
    run: Run, method: str | None, overrides: Overrides, *, checkpoint: str, untuned: bool, label: str = ""
) -> tuple[Sampler, dict[str, Any]]:
    """Return :func:`choose_sampler`'s sampler with the settings of ``tune-sampler``, if any, and how it found them."""
    overrides = list(overrides)
    sampler = choose_sampler(run, method, overrides)
    if untuned or (tuned := tune.find_tuned(run, sampler)) is None:
        return sampler, {}
    best, how = tuned
    if how["checkpoint"] != run.checkpoints.path(checkpoint).name:
        warnings.warn(f"tune-sampler looked at checkpoint {how['checkpoint']}; its settings are left", stacklevel=2)
        return sampler, {}
    console.say(f"{label}settings of tune-sampler; --untuned takes the recipe's")
    plain = {**config.describe(run.recipe), "sampler": config.describe(best)}
    return resolve(plain, overrides).sampler, {"tuned": {**how, "changed": [name for name, _ in overrides]}}


def draw_set(
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
    """Draw ``per_class`` images of every class, and a film of one chain per class; return the folder of the set.

    If neither energy nor seeds depend on the class, the total numbers of images and chains are the same.  The folder is
    the run's ``samples/NAME``, unless ``options``, those of :class:`advebm.sampling.job.SampleJob`, say otherwise.
    """
    if Path(name).name != name or name in (".", ".."):
        raise UserError(f"--name is the name of a folder in {run.folder / 'samples'}, got {name!r}")
    checkpoint_name = run.checkpoints.path(checkpoint).name
    sample_job = job.SampleJob(run, name, sampler, per_class, checkpoint=checkpoint_name, **options)
    with console.bar(name, per_class * len(sample_job.classes or run.data.classes)) as progress:
        return job.draw_set(sample_job, processes=processes, team=team, trajectory=trajectory, progress=progress)


def search_settings(
    run: Run,
    samplers: Sequence[Sampler],
    *,
    features: str | Path | None = None,
    checkpoint: str = "latest",
    device: str = "cpu",
    **options: Any,
) -> tuple[list[dict[str, Any]], Path]:
    """Call :func:`advebm.sampling.tune.tune`; return all trials, best first, and the path of a figure of them."""
    if features is None:
        space = feature_space(evaluate.OWN_FEATURES, run.model(checkpoint)[0].to(device))
    else:
        space = find_space(features).load(device)
    options |= {"judge": compare.feature_weights(features), "checkpoint": checkpoint, "device": device}
    with console.bar("tune, steps", tune.count_steps(samplers)) as progress:
        trials = tune.tune(run, samplers, space, progress=progress, **options)
    if not trials:
        raise UserError("other processes are at all trials; wait for them")
    best, name = trials[0], trials[0]["name"]
    text = f"{len(trials)} settings, {best['per_class']} images a class each, against {best['reference_count']} images"
    picture = figures.responses(tune.response_curves(trials), name)
    text += f"; best {name} {best['value']:.3g}"
    return trials, figure_store.save_figure(run, "tuning", picture, "Sampler settings", text, {"best": best["sampler"]})


def compare_sets(
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
    """Draw by several methods from the same seeds; return their records, and the path of a figure of grids and scores.

    CEM's table 2 has this form.  Sets and records (``comparison.json``) go into the run's folder ``comparison``, the
    figure into ``figures``.  With several sampling ``seeds`` the records are means with standard deviations over them.
    ``about`` holds what the manifests say about each method's settings.
    """
    recipe, device = run.recipe, str(options.get("device", "cpu"))
    data = run.data
    model = run.model(str(options.get("checkpoint", "latest")))[0].to(device)
    about = about or {}
    own_space = feature_space(evaluate.OWN_FEATURES, model)
    space = own_space if features is None else find_space(features).load(device)
    sets: dict[str, SampleSet] = {}
    numbers = range(seed, seed + seeds)
    for number in numbers:
        for method, sampler in samplers.items():
            name = f"{method}-{number}"
            common: dict[str, Any] = {"seed": number, "within": "comparison", "about": about.get(method, {}), **options}
            sets[name] = generate.read_set(draw_set(run, name, sampler, per_class, **common))
    first_sets = {m: sets[f"{m}-{seed}"] for m in samplers}
    panels = {m: pictures.rows_by_class(s.x, s.y, len(data.classes)) for m, s in first_sets.items()}
    say(f"judging {len(sets)} sets")
    subject = Subject(model, data, data.test, recipe.threat, sets, space, batch_size_for(data.shape, model))
    records = [dataclasses.asdict(r) for r in evaluate.evaluate(subject, [SampleQuality()], seed=seed)]
    records_of = lambda m, name: [
        {**r, "settings": {**r["settings"], "samples": m}} for r in records if r["settings"]["samples"] == name
    ]
    rows = compare.over_seeds([{m: records_of(m, f"{m}-{number}") for m in samplers} for number in numbers])
    quantities = ("FD", "KID", "class score", "intended class", "recall")
    files.write_json(run.folder / "comparison" / "comparison.json", rows)
    rows = {m: [{**r, "settings": {}} for r in rs if key_of(r).quantity in quantities] for m, rs in rows.items()}
    texts = {m: [f"{r['name'].split(' (')[0]} {r['value']:.3g} ± {r['error']:.2g}" for r in rows[m]] for m in panels}
    text = f"{per_class * len(data.classes):,} images each, the first of them shown; in {space.name}; ± "
    text += "deviation over sampling seeds" if seeds > 1 else "standard error"
    picture = figures.grids(panels, texts)
    return rows, figure_store.save_figure(run, "comparison", picture, "Samplers from the same seeds", text)
