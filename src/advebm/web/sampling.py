"""The tab Sample: draw images from a model and show them while the chains run."""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from advebm.core import config
from advebm.models.batching import batch_size_for
from advebm.samplers.base import Sampler
from advebm.web import views
from advebm.web.inputs import parse_integer, parse_number
from advebm.web.jobs import Job
from advebm.web.studio import EVERY, Studio

STEPS, COUNT = 1000, 100  # upper limits of the tab
FIRST = 20  # images that are there when the page opens
CHAINS, MOMENTS = 5, 9  # shown in the film
PAUSE = 0.1  # minimum seconds between two intermediate pictures


class Sampled(NamedTuple):
    """Contents of the tab, ``images`` as HTML; None leaves a part as it is."""

    images: str
    film: Image | None
    figure: Image | None
    note: str


def build_sampler(studio: Studio, method: str, start: str, alpha: Any, beta: Any, eta: Any, steps: Any) -> Sampler:
    """Return a sampler with other settings α, β (0 for no ball), η and K; raise UserError if one is invalid."""
    sampler = studio.sampler(method)
    noise = parse_number(eta, "η, the noise", 0, 1)
    settings: dict[str, Any] = {
        "step_size": parse_number(alpha, "α, the step size", 1e-9, 1e3),
        "radius": parse_number(beta, "β, the radius", 0, 1e3) or None,
        "steps": parse_integer(steps, "K, the number of steps", 0, STEPS),
        "start": start,
    }
    if noise != sampler.noise:
        settings["noise"] = noise
        if noise and sampler.temperature is not None:
            settings["temperature"] = None
    return config.build({**config.describe(sampler), **settings}, "sampler")


def sample_first(studio: Studio, job: Job) -> Sampled:
    """Return images of every class by the model's own sampler; they are drawn once and kept."""
    count = min(FIRST, batch_size_for(studio.data.shape, studio.model))
    return studio.keep("sample", lambda: sample(studio, studio.sampler(), EVERY, count, 0, job), job)


def sample(studio: Studio, sampler: Sampler, kind: str, count: float, seed: float, job: Job) -> Sampled:
    """Draw ``count`` images of a class, or of every class in turn, and report intermediate images."""
    y = studio.labels(kind, parse_integer(count, "the number of images", 1, COUNT))
    captions = ["" if studio.critic else studio.name(label) for label in y.tolist()]
    start, last, total = time.perf_counter(), 0.0, sampler.steps
    frame_steps = {round(k) for k in np.linspace(0, total, MOMENTS)}
    frames: list[Tensor] = []
    values: list[Tensor] = []

    def observe(k: int, x: Tensor, value: Tensor) -> None:
        nonlocal last
        values.append(value.cpu())
        if k in frame_steps:
            frames.append(x[:CHAINS].cpu())
        if k < total and (now := time.perf_counter()) - last > PAUSE:
            last = now
            note = f"step {k} of {total}, energy {views.short(value.mean().item())} nats"
            job.tell(Sampled(views.tiles(x, captions), None, None, note))

    with studio.search(job) as model:
        initial, draws = studio.seeds(sampler, y, parse_integer(seed, "the seed", 0, 2**31))
        batch = batch_size_for(studio.data.shape, studio.model)
        x = sampler(model, y.to(initial.device), initial, generator=draws, observe=observe, batch=batch)
        observe(total, x, studio.descended(sampler, x, y))
        seconds = time.perf_counter() - start
        notes = [f"{len(x)} images in {seconds:.1f} s"]
        if not studio.critic:
            hits = int((studio.probabilities(x).argmax(1) == y).sum())
            notes.append(f"the model takes {hits} of {len(x)} for their class")
        energies = [views.short(energy.mean().item()) for energy in (values[0], values[-1])]
        notes.append(f"energy {' → '.join(energies)} nats")
    film = views.film_sheet(torch.stack(frames, 1))
    figure = views.descents(torch.stack(values), f"the energy that {type(sampler).__name__} lowers")
    return Sampled(views.tiles(x, captions), film, figure, ", ".join(notes))
