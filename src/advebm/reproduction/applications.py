"""Experiments on image edits: translation, restoration, counterfactuals."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from advebm.core import config
from advebm.data import pictures
from advebm.data.sources import Data
from advebm.edits.transform import Translate
from advebm.evaluation import compare, evaluate
from advebm.evaluation.compare import Records, Wanted
from advebm.metrics.base import Record, proportion
from advebm.metrics.keys import Key, key_of
from advebm.metrics.restoration import Counterfactuals, Restoration
from advebm.metrics.robustness import Accuracy
from advebm.reporting import figure_store, figures
from advebm.reproduction.experiment import Experiment, Options, Results
from advebm.reproduction.study import DIGITS_L2, find_recipe, measure_missing
from advebm.runs.find_space import find_space
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.sampling import generate
from advebm.workflows.sample import draw_set

HALVES = [{"kind": "classes", "source": "digits", "count": 5, "rest": rest} for rest in (False, True)]
AMOUNTS = (0.0, 0.25, 0.5, 1.0, 2.0)


def digits_applications(folder: Path, options: Options) -> Experiment:
    """Restoration and counterfactuals on digits beside other ways; translation by critics of half of the classes each.

    For each half two critics are trained: one with patches of photographs as p0, one with these and the other half.
    """
    recipes = {m: find_recipe(f"digits-{m}", options, **DIGITS_L2) for m in ("standard", "at", "binary-at")}
    for half, (own, other) in {"first": HALVES, "second": HALVES[::-1]}.items():
        for p0, outside in {"patches": "patches", "both": {"kind": "mixture", "sources": ["patches", other]}}.items():
            changes = {"data": own, "outside": outside, "train__images": 24_000, **DIGITS_L2}
            recipes[f"{half}-{p0}"] = find_recipe("digits-binary-at", options, **changes)

    def measure(runs: Mapping[str, Run]) -> Results:
        judge, results = runs["standard"].folder, {}
        for title, run in runs.items():
            if title in ("standard", "at", "binary-at"):
                metrics: Wanted = {Key("PSNR", set="inpainting", by="energy"): Restoration()}
                if title != "binary-at":
                    metrics |= {Key("counterfactual reached"): Counterfactuals(), Key("accuracy"): Accuracy()}
                measure_missing(run, metrics, judge)
                counterfactuals = tuple(f"counterfactual {what}" for what in ("reached", "distance", "named so"))
                shown = ("PSNR", "SSIM", "accuracy", *counterfactuals)
                results[title] = [r for r in evaluate.newest_records(run.records()) if key_of(r).quantity in shown]
            else:
                other = HALVES[0] if title.startswith("second") else HALVES[1]
                results[title] = measure_translation(run, config.build(other, "source").load(), judge)
        return results

    return Experiment(recipes, measure)


def measure_translation(run: Run, source: Data, judge: Path) -> Records:
    """Return, for each amount of translation, the share of ``source``'s test images that a judge takes for the target.

    The target is the data that the critic is trained on.  Save a figure of some translations, Binary-AT figure 7.
    """
    classes = tuple(int(name) for name in run.data.classes)
    space, sampler, records = find_space(judge).load("cpu"), run.recipe.sampler, []
    assert space.logits is not None
    model, films = run.model()[0], torch.empty(0)
    for amount in AMOUNTS:
        method = Translate(steps=sampler.steps, step_size=sampler.step_size, amount=amount)
        edited = method(model, source.test.x)
        predicted = space.logits(space.of(edited.x, torch.device("cpu"))).argmax(1)
        hits = torch.isin(predicted, torch.tensor(classes))
        records.append(Record(f"named as the target, amount {amount:g}", *proportion(hits)))
        films = edited.film[:: len(edited.x) // 10][:10] if amount == 1 else films
    own_kind = ", ".join(map(str, classes))
    text = f"from {source.name}, a row an image, from left to right; the critic's own kind: {own_kind}"
    picture = pictures.encode_png(pictures.grid(films, tile=48))
    figure_store.save_figure(run, "translation", picture, "Translation", text)
    return [dataclasses.asdict(record) for record in records]


FIGURE4 = (("at", "jeat-16"), ("at", "jeat-17"), ("prejeat", "jeat-17"))  # panels from left to right


def jeat_figure4(folder: Path, options: Options) -> Experiment:
    """Ten ships by equations 16 and 17 from AT and by 17 from PreJEAT, from the same seeds: the shape of JEAT figure 4.

    The paper states neither steps nor step size.  At temperature 1, as printed, noise hides the images.
    """
    recipes = {"at": find_recipe("cifar10-at-small", options), "prejeat": find_recipe("cifar10-prejeat-small", options)}

    def measure(runs: Mapping[str, Run]) -> Results:
        classes = runs["at"].data.classes
        ships = (classes.index("ship"),) if "ship" in classes else None
        panels, texts = {}, {}
        for title, kind in FIGURE4:
            settings = [("steps", 100), ("step_size", 0.05), ("temperature", 1e-4), ("start", "class")]
            overrides = [("sampler", kind), *((f"sampler.{name}", value) for name, value in settings)]
            sampler = resolve(config.describe(runs[title].recipe), overrides).sampler
            x = generate.read_set(draw_set(runs[title], kind, sampler, 10, classes=ships)).x
            panels[f"{title}, {kind}"] = x[:10].view(2, 5, *x.shape[1:])
            texts[f"{title}, {kind}"] = ["the same seeds"]
        text = "Equation 16 descends E(x, y) - E(x), 17 descends E(x, y); 100 steps of 0.05 at temperature 1e-4."
        figure_store.save_figure(runs["at"], "jeat-figure4", figures.grids(panels, texts), "JEAT figure 4", text)
        return {title: measure_missing(run, compare.accuracy_metrics(())) for title, run in runs.items()}

    return Experiment(recipes, measure)
