"""Experiments on classifiers: JEAT's tables and figures, CEM's claims."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.nn.functional import cosine_similarity

from advebm.attacks.projected import Attack
from advebm.core import config, rng
from advebm.core.checks import device
from advebm.core.errors import UserError
from advebm.diagnostics.cem_gradient import draw_langevin_negatives, split_likelihood_gradient
from advebm.evaluation import compare, evaluate
from advebm.evaluation.compare import Records, Wanted
from advebm.metrics.base import Record
from advebm.metrics.energy import Energies
from advebm.metrics.keys import Key, attack_key
from advebm.metrics.robustness import TargetedAccuracy
from advebm.models.modes import searching
from advebm.objectives.at import AT
from advebm.reporting import figures
from advebm.reproduction.experiment import Experiment, Options, Results
from advebm.reproduction.study import compare_all, draw_if_missing, find_recipe, measure_missing, train_or_resume
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run

AT_LINF = {"objective": {"kind": "at", "attack": {"norm": "linf", "eps": 0.2, "steps": 7}}}
LINF = {"threat__norm": "linf", "threat__eps": 0.2, "threat__step_size": 0.025, "sampler__start": "global"}
ADVERSARIAL = ("fast", "free", "trades", "weat", "at-awp", "trades-awp", "prejeat", "jeat")
SUPERVISED = ("standard", "at", "noise", *ADVERSARIAL, "jem", "persistent-mle", "short-run-mle", "rst-awp")


def supervised(method: str, folder: Path, options: Options) -> Recipe:
    """Return the recipe of a supervised method on digits, linf 0.2."""
    changes = {"standard": LINF, "at": {**AT_LINF, **LINF}, "rst-awp": teacher_option(folder)}
    return find_recipe(f"digits-{method}", options, **changes.get(method, {}))


def teacher_option(folder: Path) -> dict[str, Any]:
    """Return the option of RST that names its teacher; see :func:`train_teacher`."""
    return {"objective__objective__teacher": str(folder / "teacher")}


def train_teacher(recipes: Mapping[str, Recipe], folder: Path) -> None:
    """Train the teacher of ``rst-awp`` if that is among the recipes: ``standard`` on the same labels."""
    if "rst-awp" in recipes:
        data = recipes["rst-awp"].data
        train_or_resume(dataclasses.replace(recipes["standard"], name="teacher", data=data), folder / "teacher")


def digits_supervised(folder: Path, options: Options) -> Experiment:
    """Every supervised method on 8x8 digits, linf 0.2: the shape of JEAT tables 2 and 3 and figure 6."""
    recipes = {method: supervised(method, folder, options) for method in SUPERVISED}
    measure = lambda runs: compare_all(runs, "standard", recipes["standard"].threat)
    return Experiment(recipes, measure, per_class=50, prepare=lambda: train_teacher(recipes, folder))


def attacks_on(recipes: Mapping[str, Recipe]) -> Experiment:
    """Return an experiment: normal and energy attack, by one step and by the steps of the first recipe's threat."""
    threat = next(iter(recipes.values())).threat
    many_steps = [dataclasses.replace(threat, loss=loss) for loss in ("cross-entropy", "energy")]
    one_step = [dataclasses.replace(a, steps=1, step_size=threat.eps, start="clean") for a in many_steps]
    metrics = compare.accuracy_metrics((*one_step, *many_steps))
    return Experiment(recipes, lambda runs: {label: measure_missing(run, metrics) for label, run in runs.items()})


def jeat_figure5(folder: Path, options: Options) -> Experiment:
    """Noise injection at 8, 16 and 24/255, read as deviation and as variance: the shape of JEAT figure 5."""
    recipes = {"standard": find_recipe("cifar10-standard-small", options)}
    for level in (8, 16, 24):
        for reading, std in (("deviation", level / 255), ("variance", (level / 255) ** 0.5)):
            recipes[f"{reading}-{level}"] = find_recipe("cifar10-noise-small", options, objective__std=std)

    def measure(runs: Mapping[str, Run]) -> Results:
        judge = runs["standard"].folder
        for run in runs.values():
            metrics = {**compare.accuracy_metrics(()), **compare.quality_metrics(run, judge)}
            measure_missing(run, metrics, judge)
        return {label: evaluate.newest_records(run.records()) for label, run in runs.items()}

    return Experiment(recipes, measure, per_class=20)


def cem_claims(folder: Path, options: Options) -> Experiment:
    """CEM sections 3 and 4.1 on digits: how often P-CEM by Langevin diverges, and what targets do to an attack."""
    common = {"threat__norm": "linf", "threat__eps": 0.2, "threat__step_size": 0.025, "train__rollbacks": 20}
    langevin = {"objective": {"kind": "jeat", "attack": {"eps": 0.0, "steps": 1, "loss": "energy"}}}
    langevin["objective"]["negatives"] = {"buffer": 2000}
    # same network, optimiser and learning rate, so that only the negatives differ
    shared = {"backbone__norm": "none", "train__images": 40_000, "optimizer__lr": 0.1}
    recipes = {
        "at": find_recipe("digits-at", options, **AT_LINF, **common, **shared),
        "p-cem-langevin": find_recipe("digits-at", options, **langevin, **common, **shared),
    }

    threat = recipes["at"].threat
    targeted: Wanted = {Key("accuracy", attack_key(threat, targeted=True)): TargetedAccuracy(threat)}

    def stability(run: Run) -> Records:
        events = [line["attempt"] for line in run.history() if line.get("event") == "rollback"]
        count = Record("rollbacks", max(events, default=0), 0.0, 1)
        return [dataclasses.asdict(count), *measure_missing(run, targeted)]

    def measure(runs: Mapping[str, Run]) -> Results:
        for kind in ("ta", "cs"):
            draw_if_missing(runs["at"], resolve(config.describe(runs["at"].recipe), [("sampler", kind)]), 100)
        records = compare_all(runs, "at", threat)
        results = {label: [*records[label], *stability(run)] for label, run in runs.items()}
        # CEM section 4.1: TA pushes up E(x), CS does not
        keys = [Key("E(x)", set="test images"), *(Key("E(x)", samples=name) for name in ("ta-class", "cs-class"))]
        results["at"] += measure_missing(runs["at"], dict.fromkeys(keys, Energies()))
        return results

    return Experiment(recipes, measure)


LANGEVIN_STEP = 8e-4  # its noise, 0.04 a pixel, is about as long in l2 as a step of the attack
GRADIENT_IMAGES = 512  # of the training split, the same at every point of training


def cem_gradients(folder: Path, options: Options) -> Experiment:
    """CEM section 3 on digits: consistency and contrastive gradient over training, PGD and Langevin negatives.

    The network has group norm rather than batch norm, so that an image's logits depend on that image alone, and the
    contrastive gradient with PGD negatives is that of training itself.
    """
    changes = {"backbone__norm": "group", "schedule": "steps", "train__images": 65_536, "train__ema": 0}
    whole = find_recipe("digits-at", options, **changes)
    if not isinstance(whole.objective, AT):
        kind = type(whole.objective).__name__
        raise UserError(f"cem-gradients measures adversarial training, objective at, got {kind}; leave out --objective")
    attack, recipes = whole.objective.attack, {"at": whole}
    # The learning rate is constant, so shorter runs are the beginnings of longer ones.
    for count in (whole.train.images >> halvings for halvings in range(1, 8)):
        if count >= whole.train.batch:
            recipes[f"at@{count}"] = dataclasses.replace(whole, train=dataclasses.replace(whole.train, images=count))
    return Experiment(
        recipes,
        lambda runs: {label: gradient_records(run, recipes[label].train.images, attack) for label, run in runs.items()},
        figures=gradient_figures,
        conclude=conclude_gradients,
    )


def gradient_records(run: Run, images: int, attack: Attack) -> Records:
    """Return norms and cosines of the likelihood gradient's parts after ``images`` of adversarial training.

    The negatives are adversarial images, and samples of Langevin dynamics with as many steps.
    """
    model = run.model()[0].to(device())
    batch = run.data.train.take(slice(GRADIENT_IMAGES))
    x, y = batch.float().to(device()), batch.y.to(device())
    generators = [rng.generator("cem-gradients", name, device=device()) for name in ("PGD", "Langevin")]
    with searching(model) as f:
        pgd = attack.raise_loss(f, x, y, generators[0])
    langevin = draw_langevin_negatives(model, x, steps=attack.steps, step_size=LANGEVIN_STEP, generator=generators[1])
    at_update = split_likelihood_gradient(model, x, y, pgd).contrastive
    records = []
    for name, negatives in (("PGD", pgd), ("Langevin", langevin)):
        gradient = split_likelihood_gradient(model, x, y, negatives)
        values = {
            "norm of consistency": gradient.consistency.norm(),
            "norm of contrastive": gradient.contrastive.norm(),
            "cosine of both": cosine_similarity(gradient.consistency, gradient.contrastive, dim=0),
            "cosine of contrastive with AT": cosine_similarity(gradient.contrastive, at_update, dim=0),
            "cosine of sum with AT": cosine_similarity(gradient.total, at_update, dim=0),
        }
        settings = {"training images": images, "negatives": name}
        records += [Record(f"{key}, {name}", float(value), 0.0, len(x), settings) for key, value in values.items()]
    return [dataclasses.asdict(record) for record in records]


def gradient_figures(results: Results) -> dict[str, bytes]:
    """Return figures of norms and cosines of the likelihood gradient's parts against training images."""

    def plot(prefix: str, ylabel: str) -> bytes:
        curves: dict[str, dict[float, tuple[float, float]]] = {}
        for record in (r for records in results.values() for r in records if r["name"].startswith(prefix)):
            point = {record["settings"]["training images"]: (record["value"], record["error"])}
            curves.setdefault(record["name"].removeprefix(prefix), {}).update(point)
        return figures.lines(curves, "training images", ylabel, log=True)

    whole = "Cosine of the likelihood's whole gradient and adversarial training's update"
    return {
        "Norms of the likelihood's consistency and contrastive gradient": plot("norm of ", "l2 norm"),
        "Cosine of the consistency and the contrastive gradient": plot("cosine of both, ", "cosine"),
        whole: plot("cosine of sum with AT, ", "cosine"),
    }


def conclude_gradients(results: Results) -> list[str]:
    """Return in words how the parts of the likelihood's gradient, and AT's update, compare at the end of training."""
    value = {record["name"]: record["value"] for record in results["at"]}
    images = results["at"][0]["settings"]["training images"]
    parts = [
        f"{value[f'norm of consistency, {name}']:.3g} and {value[f'norm of contrastive, {name}']:.3g} with {name} "
        f"negatives (cosine {value[f'cosine of both, {name}']:.2f})"
        for name in ("PGD", "Langevin")
    ]
    whole = " and ".join(f"{value[f'cosine of sum with AT, {name}']:.2f}" for name in ("PGD", "Langevin"))
    return [
        f"After {images:,} images of AT the norms of the consistency and the contrastive gradient are "
        f"{' and '.join(parts)}; AT's update, the contrastive gradient with PGD negatives, has a cosine of {whole} "
        "with the sum of both."
    ]
