"""The tab Robustness: an image, the perturbation that an attack finds, and the model's outputs for both images."""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from advebm import energies
from advebm.attacks.apgd import APGD
from advebm.attacks.base import ball_text
from advebm.attacks.projected import Attack
from advebm.attacks.square import Square
from advebm.core.errors import UserError, unknown_name
from advebm.core.rng import generator
from advebm.models.modes import searching
from advebm.samplers.base import marginal
from advebm.web import views
from advebm.web.inputs import parse_integer, parse_number
from advebm.web.jobs import Job
from advebm.web.studio import Studio

STEPS = 500  # upper limit of the tab
AttackFactory = Callable[[float, Any, int], Any]  # (eps, norm, steps) -> Adversary

ATTACKS: MappingProxyType[str, AttackFactory] = MappingProxyType(
    {
        "PGD": lambda eps, norm, steps: Attack(eps=eps, norm=norm, steps=steps),
        "energy attack": lambda eps, norm, steps: Attack(eps=eps, norm=norm, steps=steps, loss="energy"),
        "margin (C&W)": lambda eps, norm, steps: Attack(eps=eps, norm=norm, steps=steps, loss="margin"),
        "APGD": lambda eps, norm, steps: APGD(eps=eps, norm=norm, steps=steps),
        "Square (no gradients)": lambda eps, norm, steps: Square(eps=eps, norm=norm, queries=10 * steps),
    }
)
TARGETED_PGD = "PGD to a class"
RAISE_ENERGY = "raise E(x)"  # the only attack on a critic


class AttackShown(NamedTuple):
    """What an attack on one image shows: the image before and after, the change, a figure, numbers, a sentence."""

    before: Image
    after: Image
    added: Image
    figure: Image | None
    table: list[list[str]]
    note: str


def attack_names(studio: Studio) -> list[str]:
    """Return the names of the attacks that fit the model."""
    return [RAISE_ENERGY] if studio.critic else [*ATTACKS, TARGETED_PGD]


def attack(
    studio: Studio, x: Tensor, label: int, name: str, norm: str, eps: Any, steps: Any, target: str, seed: Any, job: Job
) -> AttackShown:
    """Attack an image (C, H, W) with its label; -1: the class that the model predicts."""
    if name not in attack_names(studio):
        raise unknown_name("attack", name, attack_names(studio))
    if norm not in ("linf", "l2"):
        raise unknown_name("norm", norm, ("linf", "l2"))
    radius = parse_number(eps, "eps, the radius", 0, 1.0 if norm == "linf" else math.sqrt(x.numel()))
    ball = (radius, norm, parse_integer(steps, "the number of steps", 1, STEPS))
    pgd = ATTACKS["PGD"](*ball)
    draws = generator(parse_integer(seed, "the seed", 0, 2**31), "page-attack", device=studio.device)
    with studio.search(job) as model, searching(model) as f:
        image = x[None].to(studio.device)
        if studio.critic:
            x_adv = pgd.minimize(lambda z: -marginal(f)(z), image, draws)
        else:
            y = torch.tensor([label if label >= 0 else int(f(image).argmax())], device=studio.device)
            if name == TARGETED_PGD:
                goal = torch.tensor([studio.data.number(target)], device=studio.device)
                if goal == y:
                    raise UserError(f"the image is of class {target} already; choose another class to attack towards")
                x_adv = pgd.minimize(lambda z: energies.conditional(f(z), goal), image, draws)
            else:
                x_adv = ATTACKS[name](*ball).find(f, image, y, draws)
        return _show_attack(studio, image, x_adv, None if studio.critic else y, radius, norm)


def _show_attack(studio: Studio, image: Tensor, x_adv: Tensor, y: Tensor | None, eps: float, norm: str) -> AttackShown:
    change = (x_adv - image).flatten()
    distance = f"{change.norm():.3g}" if norm == "l2" else f"{change.abs().max() * 255:.3g}/255"
    added, factor = views.difference(image[0], x_adv[0])
    both = torch.cat([image, x_adv])
    energy = studio.energy(both)
    table = [["E(x), nats", f"{energy[0]:.4g}", f"{energy[1]:.4g}"]]
    change_of_energy = energy[1] - energy[0]
    verdict = f"E(x) {'rises' if change_of_energy > 0 else 'falls'} by {change_of_energy.abs():.3g} nats."
    figure = None
    if y is not None:
        probabilities, joint = studio.probabilities(both), studio.joint(both, y.repeat(2))
        predicted = [studio.name(int(k)) for k in probabilities.argmax(1)]
        table.append([f"E(x, {studio.name(int(y))}), nats", f"{joint[0]:.4g}", f"{joint[1]:.4g}"])
        table.append(["taken for", *predicted])
        table.append(["with probability", *(f"{100 * p:.1f} %" for p in probabilities.amax(1).tolist())])
        figure = views.beside(studio.data.classes, probabilities[0], probabilities[1], "probabilities")
        before, after = predicted
        verdict = f"Taken for {after} instead of {before}." if before != after else f"Still taken for {before}."
        if int(probabilities[0].argmax()) != int(y):
            verdict = f"Taken for {before} before any attack, and its class is {studio.name(int(y))}."
    text = f"The change has {norm} length {distance} ({ball_text(eps, norm)} is allowed); it is shown x {factor:.1f}."
    note = f"**{verdict}** {text if change.any() else 'The attack changed nothing.'}"
    return AttackShown(views.enlarge(image[0]), views.enlarge(x_adv[0]), added, figure, table, note)
