"""The tab Toy: train energies of points in the plane and show the progress."""

from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from PIL.Image import Image

from advebm.toy import figures, train
from advebm.web import views
from advebm.web.inputs import parse_integer
from advebm.web.jobs import Job

UPDATES = 2000  # upper limit of the tab

ABOUT = {
    "D on support": "1/2 at best",
    "deviation": "of D; 0 at best",
    "D off support": "at most 1/2",
    "highest off": "at most 1/2",
    "highest unvisited": "where p0 never is",
    "objective": "-1.386 at best",
    "correlation": "of -E with log p",
    "slope": "1: log p, 0: flat",
}


class ToyShown(NamedTuple):
    """What a training on a 2-D density shows: its picture, the film of its course, numbers, a sentence."""

    picture: Image
    film: Image | None
    table: list[list[str]] | None
    note: str


def train_density(density: str, method: str, p0: str, updates: Any, seed: Any, job: Job) -> ToyShown:
    """Train an energy on a density, reporting a picture of every recorded frame."""
    total = parse_integer(updates, "the number of updates", 1, UPDATES)
    number = parse_integer(seed, "the seed", 0, 2**31)

    def watch(frame: train.Frame) -> None:
        so_far = train.ToyRun(density, method, p0, (frame,), train.plane_points()[..., 0] > 0)
        job.tell(ToyShown(panel(so_far), None, None, f"update {frame.update} of {total}"))

    result = train.train_toy(density, method, p0, seed=number, updates=total, watch=watch)
    numbers = train.summarize(result, seed=number)
    with views.PYPLOT_LOCK:
        film = figures.film(result)
    rows = [[name, f"{value:.3f}", ABOUT[name]] for name, value in numbers.items()]
    return ToyShown(panel(result), views.to_picture(film), rows, f"{total} updates of {method} from {p0} points")


def panel(play: train.ToyRun) -> Image:
    """Draw the last frame of a training."""
    with views.PYPLOT_LOCK, plt.rc_context(figures.PLANE):
        figure, axis = plt.subplots(figsize=(4.6, 4.7))
        figures.panel(axis, play, play.frames[-1])
        axis.set_title(f"{play.density}, {play.method}, update {play.frames[-1].update}")
        return views.to_picture(figure)
