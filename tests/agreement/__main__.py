"""``python -m tests.agreement``: attacks and metrics beside their references, one table.

Without arguments three small networks are trained on scikit-learn's digits first, a minute each.  Options:

``--run RUN``      other models, trained runs; may be repeated
``--images 512``   how many images the attacks are compared on
``--standard``     all of AutoAttack, timed in turns; long
``--only WORD``    only the parts whose name holds it: architectures, quality, speed, attacks
"""

import argparse
import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from advebm.recipes import find
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.workflows.train import fit
from tests.agreement import architectures, attacks, quality
from tests.agreement.rows import Row

DIGITS = ("digits-standard", "digits-at", "digits-trades")


def models(given: list[Path], where: Path) -> Iterator[Run]:
    """The runs that are named, or three on digits, trained where they are not yet."""
    if given:
        yield from map(Run.open, given)
        return
    for name in DIGITS:
        folder = where / name
        ready = (folder / "config.yaml").exists()
        run = Run.open(folder) if ready else None
        yield run if run is not None and run.finished else fit(resolve(find(name)), folder, resume=ready, device="cpu")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, action="append", default=[])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--standard", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("runs/agreement"))
    args = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{os.cpu_count()} cores, {platform.machine()}")  # fmt: skip
    print(f"{'what':78} {'peer':24} {'theirs':>12} {'ours':>12}  difference")
    if args.only in "architectures":
        show(architectures.rows())
    if args.only in "quality":
        show(quality.rows())
    if args.only in "speed":
        show(quality.frechet_speed())
    if args.only in "attacks":
        for run in models(args.run, args.out):
            compare(run, args)


def compare(run: Run, args: argparse.Namespace) -> None:
    """The attacks on one run's model, at the radius of its threat, and in l2 at a radius that breaks about half."""
    recipe, model = run.recipe, run.model()[0]
    data = recipe.data.load()
    images = data.test if len(data.test) >= args.images else data.train
    part = images.take(slice(0, args.images))
    x, y, eps, norm = part.float(), part.y, recipe.threat.eps, recipe.threat.norm
    if args.standard:
        show(attacks.standard(recipe.name, model, x, y, eps, norm, args.batch))
        return
    show(attacks.same_draws(recipe.name, model, x, y, eps, norm))
    other = ("l2", 0.5) if norm == "linf" else ("linf", 8 / 255)
    show(attacks.same_draws(recipe.name, model, x, y, other[1], other[0]))
    if norm == "linf":
        show(attacks.torchattacks(recipe.name, model, x, y, eps))


def show(rows: Iterable[Row]) -> None:
    """A line each."""
    for r in rows:
        difference = f"{r.difference:.3g} {r.unit}" if r.unit else f"{r.difference:.1e}"
        print(f"{r.metric:78} {r.peer:24} {r.theirs:12.6g} {r.ours:12.6g}  {difference}", flush=True)


if __name__ == "__main__":
    main()
