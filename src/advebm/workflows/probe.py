"""Fit linear probes and wrap them in runs."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from advebm.core import config, console
from advebm.core.errors import UserError
from advebm.evaluation.evaluate import evaluate_run
from advebm.metrics.base import Records
from advebm.metrics.probing import NearestNeighbours, Probe
from advebm.models import network
from advebm.models.batching import batch_size_for
from advebm.runs.run import Run
from advebm.workflows.adopt import adopt, untrained_recipe


class Probed(NamedTuple):
    """A linear probe.

    Attributes:
        run: the classifier, a run like any other.
        records: its accuracies, and that of nearest neighbours in the same features.
    """

    run: Run
    records: Records


def probe(
    run: Run,
    folder: Path | None = None,
    *,
    by: Probe,
    overrides: Iterable[tuple[str, Any]] = (),
    checkpoint: str = "latest",
    device: str = "cpu",
) -> Run:
    """Fit a linear classifier on a run's frozen features, save it in ``RUN/probe`` and return a new run around it.

    Args:
        run: run whose network has features, typically an encoder.
        folder: folder of the new run; None: ``RUN-probe``, beside the run.
        by: how the classifier is fitted, on the training split.
        overrides: options of the new run's recipe, such as another threat.
        checkpoint: checkpoint of ``run``.
        device: where to compute.

    Raises:
        UserError: the data has no labels, the network no features, an option is wrong, or ``folder`` is not empty.
    """
    recipe, data = run.recipe, run.data
    folder = folder or run.folder.with_name(f"{run.folder.resolve().name}-probe")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another --out")
    if not data.train.labelled:
        raise UserError(f"a probe is fitted on labels, and {data.name} has none")
    model, architecture = run.model(checkpoint)
    described, title = config.describe(recipe), f"{recipe.name}-probe"
    options: dict[str, Any] = {name: described[name] for name in ("data", "threat")}
    options["sampler"] = config.switch(described["sampler"], "sampler", "cs")
    pairs = [("name", title), *options.items(), *overrides]
    untrained_recipe(title, {"backbone": described["backbone"]}, pairs)  # raises for wrong options before the fit
    classifier = by.classifier(model.to(device), data.train, len(data.classes), batch_size_for(data.shape, model))
    plain = dataclasses.replace(architecture, outputs=len(data.classes), hidden=None)
    about = {"data": data.name, "classes": data.classes, "probe": config.describe(by), "recipe": recipe.name}
    where = run.folder / "probe"
    network.save(where, classifier, plain, title=title, summary=f"A linear probe of {recipe.name}.", extra=about)
    return adopt(str(where), folder, pairs, device=device)


def measure_probe(
    run: Run,
    probed: Run,
    neighbours: NearestNeighbours,
    *,
    checkpoint: str = "latest",
    seed: int = 0,
    device: str = "cpu",
) -> Records:
    """Return the records of ``probed``, and of nearest neighbours in the features of ``run``."""
    options: dict[str, Any] = {"seed": seed, "device": device, "progress": console.say}
    records = evaluate_run(probed, bar=console.bar, **options)
    neighbours_only = dataclasses.replace(run.recipe, metrics=(neighbours,))
    return Records([*records, *evaluate_run(run, recipe=neighbours_only, checkpoint=checkpoint, **options)])
