"""The command line: parse, call, print.  Nothing that imports torch is imported before a verb needs it."""

import argparse
import ast
import atexit
import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from advebm import __version__, processes, recipes
from advebm.allocator import tune_cpu_allocator
from advebm.config import KINDS
from advebm.errors import Diverged, Interrupted, Lost, UserError, suggest, unknown
from advebm.threads import bound_waiting, use_threads

Overrides = list[tuple[str, Any]]

# Blocks of a recipe that a kind can be given for, as in --objective at; any other option has a dot in its name.
BLOCKS = {"data": "source", "backbone": "backbone", "objective": "objective", "sampler": "sampler"}
BLOCKS |= {"optimizer": "optimizer", "schedule": "schedule", "outside": "source", "extra": "source"}
JUDGES = (  # for --features
    "what judges the samples: the classifier of a run or model (its own by default), pixels, inception (downloads its "
    "weights once), or inception:PATH of torch-fidelity's weight file"
)


GRACE = 3.0  # seconds that other processes leave the main one to say what is wrong
WAYS = "auto, off, fold, compile, bf16 or bf16+compile"  # for --fast


class Parser(argparse.ArgumentParser):
    """One-line errors, no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise, so that :func:`main` prints it like every other mistake."""
        if bad := re.search(r"invalid choice: '([^']*)'.*choose from (.*)\)", message):
            known = [word.strip(" '") for word in bad[2].split(",")]
            raise UserError(f"no command {bad[1]!r}{suggest(bad[1], known)}; there is {', '.join(known)}")
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 (diverged, faults), 2 (a mistake in what was asked for), 130."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # for package.module:Class of one's own
    warnings.showwarning = lambda message, *rest: _say(f"warning: {message}")
    tune_cpu_allocator()
    bound_waiting()
    rank, world = processes.launched()
    with contextlib.redirect_stdout(io.StringIO()) if rank else contextlib.nullcontext():
        return _main(sys.argv[1:] if argv is None else argv, world)


def _main(argv: Sequence[str], world: int) -> int:
    try:
        plain, overrides = split_overrides(argv)
        args, unexpected = build_parser().parse_known_args(plain)
        check_options(args, unexpected, overrides)
        if world > 1 and not args.shared:
            raise UserError(f"{args.verb} takes one process, and there are {world}; run it without torchrun")
        if (threads := getattr(args, "threads", None)) is not None:
            use_threads(threads)
        status = args.call(args, overrides) or 0
        if world > 1:
            from advebm.training.engine import leave

            atexit.register(leave)
        return status
    except UserError as error:
        return _fail(error, 2)
    except (Diverged, Lost) as error:
        return _fail(error, 1)
    except Interrupted as error:
        _say(str(error))
        return 130
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0


def _fail(error: Exception, status: int) -> int:
    text = f"error: {' '.join(str(error).split())}"
    if rank := processes.launched()[0]:
        time.sleep(GRACE)  # the main process says the same, and this one is ended then
        print(f"advebm: process {rank}: {text}", file=sys.stderr)
    _say(text)
    return status


def _say(text: str) -> None:
    """To people, from the main process."""
    if not processes.launched()[0]:
        print(f"advebm: {text}", file=sys.stderr)


def build_parser() -> Parser:
    """All verbs."""
    parser = Parser(prog="advebm", description="Adversarially trained energy-based models.")
    parser.add_argument("--version", action="version", version=f"advebm {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(
        name: str, call: Callable[[argparse.Namespace, Overrides], int | None], about: str, more: str = ""
    ) -> Parser:
        sub = verbs.add_parser(name, help=about, description=f"{about} {more}".strip())
        sub.set_defaults(verb=name, call=call, takes=(), options=sub._option_string_actions)
        sub.set_defaults(shared=name in ("train", "run", "sample", "evaluate"))
        return sub

    sub = verb("demo", run_demo, "Train on digits, draw images, evaluate and report: a minute on a laptop.")
    sub.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="where the runs go (runs)")
    sub.add_argument("--seed", type=int, default=0)

    sub = verb(
        "toy",
        run_toy,
        "Train on densities of the plane and draw what is learnt: a density or its support.",
        "Binary adversarial training from both p0 and maximum likelihood; with --method or --p0 that one alone.",
    )
    sub.add_argument(
        "density", nargs="?", metavar="DENSITY", help="gaussian (default), eight-gaussians, rings, moons or pinwheel"
    )
    sub.add_argument("--all", action="store_true", help="every density")
    sub.add_argument("--method", metavar="NAME", help="binary-at or mle")
    sub.add_argument("--p0", metavar="NAME", help="where contrastive points begin: uniform or concentrated")
    sub.add_argument("--out", type=Path, default=Path("runs/toy"), metavar="DIR", help="where pictures go (runs/toy)")
    sub.add_argument("--seed", type=int, default=0)

    options = (
        "Any option of a recipe can be given as --block.option VALUE, as in --objective.attack.eps 8/255; "
        "--print_config shows them all."
    )
    train = verb("train", run_train, "Train a recipe, or go on with a run.", options)
    whole = verb("run", run_run, "Train, sample, evaluate and report, in one command.", options)
    for sub in (train, whole):
        sub.set_defaults(takes=(*BLOCKS, "train", "threat", "metrics", "normalise", "before"))
        source = sub.add_mutually_exclusive_group()
        source.add_argument("--recipe", metavar="NAME", help="a recipe of the package; see advebm list")
        source.add_argument("--config", type=Path, metavar="FILE", help="a recipe as YAML, such as a run's config.yaml")
        source.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run where its last checkpoint is")
        sub.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/NAME-TIME)")
        sub.add_argument("--model", metavar="PACKAGE.MODULE:FACTORY", help="train a torch module of your own")
        sub.add_argument(
            "--init", metavar="RUN", help="begin with the weights of a run, a model or a file; other classes: new head"
        )
        sub.add_argument("--seed", type=int)
        sub.add_argument("--device", metavar="NAME", help="cpu, cuda, …; the best there is by default")
        sub.add_argument("--fast", metavar="WAY", help=f"how searches compute the network: {WAYS}; --train.fast")
        sub.add_argument("--print_config", "--print-config", action="store_true", help="print the recipe and stop")
        sub.add_argument(
            "--dry-run",
            nargs="?",
            const="",
            metavar="MACHINE",
            help="print passes, FLOP, memory and hours of training: here (default), or on a100, h100, h200, rtx4090",
        )
    train.add_argument("--labels", choices=("none",), help="none: train an encoder or a critic on the images alone")
    whole.set_defaults(labels=None)  # what it measures needs them
    whole.add_argument("--per-class", type=int, default=10, metavar="N", help="images to draw of each class (10)")
    whole.add_argument("--features", metavar="RUN", help=JUDGES)

    sub = verb(
        "sample",
        run_sample,
        "Draw images from a run into RUN/samples.",
        "Takes --sampler.option VALUE. Stopped, the same command goes on and ends with the same bytes.",
    )
    sub.set_defaults(takes=("sampler",))
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("--method", metavar="NAME", help=f"{', '.join(KINDS['sampler'])}; the recipe's by default")
    sub.add_argument("--per-class", type=int, default=10, metavar="N", help="images of each class (10)")
    sub.add_argument("--steps", type=int, metavar="K", help="short for --sampler.steps, at least 1")
    sub.add_argument("--untuned", action="store_true", help="the recipe's settings, whatever tune-sampler found")
    sub.add_argument("--classes", metavar="K,K", help="their numbers; all by default")
    sub.add_argument("--fast", default="auto", metavar="WAY", help=f"how the network is computed: {WAYS}")
    sub.add_argument("--name", help="of the set, METHOD-START by default; replaces a set of that name")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or a number of images")
    sub.add_argument("--processes", type=int, default=1, metavar="N", help="that share the work; the same bytes (1)")
    sub.add_argument("--batch", type=int, metavar="N", help="images the network sees at once (500); changes rounding")
    sub.add_argument("--trajectory", action="store_true", help="also film.gif, a chain a class")
    sub.add_argument("--compare", metavar="A,B", help="draw by several methods from the same seeds and judge them")
    sub.add_argument("--seeds", type=int, metavar="N", help="with --compare: sampling seeds; mean and deviation (1)")
    sub.add_argument("--features", metavar="RUN", help=f"with --compare: {JUDGES}")

    sub = verb(
        "tune-sampler",
        run_tune,
        "Search step size, ball, noise and steps by a distance to validation images; sample then takes the best.",
        "Lists are such as 0.05,0.1 and none,2; without them step size and steps are halved and doubled. Takes "
        "--sampler.option VALUE. Several processes may share one search; stopped, the same command goes on.",
    )
    sub.set_defaults(takes=("sampler",))
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("--method", metavar="NAME", help="as for sample; the recipe's by default")
    for name in ("step-size", "radius", "noise", "steps"):
        sub.add_argument(f"--{name}", metavar="LIST")
    sub.add_argument("--by", choices=("KID", "FD"), default="KID", help="the distance; KID is unbiased (KID)")
    sub.add_argument("--features", metavar="RUN", help=JUDGES)
    sub.add_argument("--per-class", type=int, default=20, metavar="N", help="images of each class in a trial (20)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or a number of images")

    sub = verb(
        "diagnose",
        run_diagnose,
        "Why a model generates, or does not: figures and numbers, side by side for several runs.",
        "They go into the first RUN's figures and its report. Takes --sampler.option VALUE.",
    )
    sub.set_defaults(takes=("sampler",))
    sub.add_argument("runs", type=Path, metavar="RUN", nargs="+")
    sub.add_argument(
        "--what",
        metavar="A,B",
        help="landscape, gradients, energies, neighbours, interpolation, chains, saliency, inversion; all by default",
    )
    sub.add_argument("--method", metavar="NAME", help="of the chains; the first run's sampler by default")
    sub.add_argument("--images", type=int, default=100, metavar="N", help="test images behind the numbers (100)")
    sub.add_argument("--along", choices=("random", "gradient", "pca"), default="random", help="of landscapes (random)")
    sub.add_argument("--reach", type=float, default=2.0, metavar="R", help="of landscapes, pixels of [0, 1], l2 (2)")
    sub.add_argument("--steps", type=int, default=1000, metavar="K", help="of long chains (1000)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or a number of images")

    sub = verb(
        "evaluate",
        run_evaluate,
        "Measure a run and its samples; appends to RUN/metrics.json.",
        "Takes --threat.option VALUE, --metrics NAME,NAME and --metrics.NUMBER.option VALUE; with --model also --data "
        "and --normalise.option. A stopped evaluation goes on in the run's folder.",
    )
    sub.set_defaults(takes=("threat", "metrics", "data", "normalise"))
    sub.add_argument("run", type=Path, nargs="?", metavar="RUN")
    sub.add_argument(
        "--model",
        metavar="MODEL",
        help="PACKAGE.MODULE:FACTORY, a model's folder or hf:USER/NAME; becomes a run in --out",
    )
    sub.add_argument("--out", type=Path, metavar="DIR", help="with --model: the run's folder (runs/model-TIME)")
    sub.add_argument("--suite", metavar="NAME", help="robustbench, jeat, cem, binary-at or all, instead of --metrics")
    sub.add_argument("--tier", metavar="NAME", help="of a suite: quick, standard (default) or full")
    sub.add_argument(
        "--samples", type=Path, action="append", default=[], metavar="DIR", help="images to judge as samples; repeat"
    )
    sub.add_argument("--features", metavar="RUN", help=JUDGES)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or a number of images")
    sub.add_argument("--json", action="store_true", help="print records as JSON, one a line")

    sub = verb(
        "probe",
        run_probe,
        "Fit a linear classifier on a run's frozen features; it becomes a run that every other command takes.",
        "Measures it, and the nearest neighbours in the features. Takes --threat.option VALUE.",
    )
    sub.set_defaults(takes=("threat",))
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("--out", type=Path, metavar="DIR", help="the classifier's run (RUN-probe)")
    sub.add_argument("--c", type=float, default=1.0, metavar="C", help="inverse weight of the l2 penalty (1)")
    sub.add_argument(
        "--branch", default="clean", metavar="NAME", help="of dual batch norms: clean or adversarial (clean)"
    )
    sub.add_argument("--neighbours", type=int, default=20, metavar="K", help="that vote (20)")
    sub.add_argument("--seed", type=int, default=0, help="of the attack")
    sub.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or a number of images")

    sub = verb(
        "edit",
        run_edit,
        "Edit images with a run's model, or say how unusual they are.",
        "WHAT is translate, inpaint, paint, denoise, upsample, compose, interpolate, counterfactual or score; takes "
        "--edit.option VALUE. Without --image the images are the run's own: spoilt first for what restores them, and "
        "results are then compared with them; seeds, for compose and interpolate.",
    )
    sub.set_defaults(takes=("edit",))
    sub.add_argument("what", metavar="WHAT")
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("--image", type=Path, nargs="+", metavar="PATH", help="files, and folders of them")
    sub.add_argument("--fit", action="store_true", help="cut, scale and convert images that the model does not take")
    sub.add_argument("--split", choices=("test", "val"), help="images of the run's data, one class after the other")
    sub.add_argument("--from", dest="source", metavar="RUN", help="with --split: another run's data, to translate")
    sub.add_argument("--count", type=int, default=8, metavar="N", help="of --split, or of seeds (8)")
    sub.add_argument("--class", dest="goal", metavar="K", help="the class to move to, by name or number; none: E(x)")
    sub.add_argument("--mask", type=Path, metavar="FILE", help="white where pixels are to be made: inpaint, paint")
    sub.add_argument("--box", metavar="L,T,R,B", help="a rectangle as the mask; the middle half for inpaint")
    sub.add_argument(
        "--with", dest="others", type=Path, action="append", default=[], metavar="RUN", help="compose: too"
    )
    sub.add_argument("--classes", metavar="K,K", help="compose: a class a model, or several of the one")
    sub.add_argument("--amount", metavar="A", help="translate: short for --edit.amount; 0 nothing, 1 all steps")
    sub.add_argument("--film", action="store_true", help="also film.gif")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where results go (RUN/edits/WHAT)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or a number of images")

    sub = verb(
        "doctor",
        run_doctor,
        "Look for what spoils a model's energies and the attacks on it; say what to do.",
        "Exit status 1 where there are faults. A run has its images and its threat; any other model takes --data NAME. "
        "Takes --data.option VALUE and --threat.option VALUE.",
    )
    sub.set_defaults(takes=("data", "threat"))
    sub.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a run, a model's folder, hf:USER/NAME or PACKAGE.MODULE:FACTORY of your own",
    )
    sub.add_argument(
        "--machine",
        action="store_true",
        help="check this machine instead: its speed, and the convolutions of MODEL (of CIFAR-10 recipes) by float64",
    )
    sub.add_argument("--images", type=int, default=300, metavar="N", help="test images to try it on (300)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or a number of images")
    sub.add_argument("--json", action="store_true", help="print findings as JSON, one a line")

    sub = verb("report", run_report, "Write RUN/report.html.")
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("--beside", type=Path, action="append", default=[], metavar="RUN", help="compare with a run")

    sub = verb(
        "compare",
        run_compare,
        "Measure runs alike, print one table and write one report.",
        "Clean, PGD-10, PGD-50 and energy-attack accuracy, sample quality, cost. Takes --threat.option VALUE.",
    )
    sub.set_defaults(takes=("threat",))
    sub.add_argument("runs", type=Path, metavar="RUN", nargs="+")
    sub.add_argument("--features", metavar="RUN", help=JUDGES)
    sub.add_argument("--out", type=Path, default=Path("comparison.html"), metavar="FILE", help="comparison.html")
    sub.add_argument("--seed", type=int, default=0)

    sub = verb(
        "reproduce",
        run_reproduce,
        "Carry out an experiment of the papers at a size for two CPU cores, or a table at a scale, or on where it was.",
        "Takes --data.path and other options of a recipe, for all that it trains. A table ends beside the paper's.",
    )
    sub.set_defaults(takes=(*BLOCKS, "train", "threat", "normalise"))
    sub.add_argument("experiment", nargs="?", metavar="NAME", help="see --list")
    sub.add_argument("--list", action="store_true", help="every figure, table and algorithm, and what makes it")
    sub.add_argument(
        "--scale", metavar="SCALE", help="of a table: full, gpu-30min, cpu-2h, cpu-30min or digits; docs/results.md"
    )
    sub.add_argument("--seeds", type=int, default=1, metavar="N", help="training seeds; tables give mean and deviation")
    sub.add_argument("--quick", action="store_true", help="shorter training, where an experiment has that; labelled so")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where the runs go (runs/NAME, runs/NAME-SCALE)")

    sub = verb(
        "app",
        run_app,
        "Serve a page for the browser: draw, edit, explain, attack, look at energies and reports.",
        "On this machine alone unless --host says otherwise; needs pip install 'advebm[app]'.",
    )
    sub.add_argument("runs", type=Path, metavar="RUN", nargs="+")
    sub.add_argument("--host", default="127.0.0.1", metavar="NAME", help="the address to answer at (127.0.0.1)")
    sub.add_argument("--port", type=int, default=7860, metavar="N", help="the port to answer at (7860)")
    sub.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or a number of images")

    for name, call, about in (
        ("export", run_export, "Write the model of a run by itself: its weights, and a card with what was measured."),
        ("push", run_push, "Publish what export writes on the Hub, where hf:USER/NAME finds it."),
    ):
        sub = verb(name, call, about)
        sub.add_argument("run", type=Path, metavar="RUN")
        sub.add_argument("--weights", default="float32", metavar="KIND", help="float32, float16 or bfloat16 (float32)")
        sub.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or a number of images")
    verbs.choices["export"].add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty one")
    verbs.choices["push"].add_argument("name", metavar="USER/NAME")
    verbs.choices["push"].add_argument("--private", action="store_true", help="for those with access only")

    sub = verb("list", run_list, "What there is: recipes, objectives, samplers, metrics, …")
    sub.add_argument("what", nargs="?", metavar="WHAT", help=f"recipe, {', '.join(KINDS)}")
    for name in ("sample", "tune-sampler", "diagnose", "edit", "evaluate", "probe", "doctor", "compare", "app"):
        verbs.choices[name].add_argument("--device", metavar="NAME", help="cpu, cuda, …; the best there is by default")
    for name in verbs.choices.keys() - {"report", "export", "push", "list"}:
        verbs.choices[name].add_argument("--threads", type=int, metavar="N", help="of the CPU; all cores by default")
    return parser


def split_overrides(argv: Sequence[str]) -> tuple[list[str], Overrides]:
    """Take ``--a.b value``, ``--a.b=value`` and ``--objective value`` out of the words: what is left, and pairs."""
    words, plain, overrides = list(argv), [], []
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not ("." in name or name in (*BLOCKS, "metrics")):
            plain.append(word)
            continue
        if not equals:
            if not words:
                raise UserError(f"{word} needs a value")
            value = words.pop(0)
        overrides.append((name, value))
    return plain, overrides


def check_options(args: argparse.Namespace, unexpected: Sequence[str], overrides: Overrides) -> None:
    """Refuse words that the command does not take."""
    allowed = ", ".join(f"--{block}.…" for block in args.takes)
    more = f"; options of a recipe have a dot, as in {allowed}" if allowed else ""
    if unexpected:
        word = unexpected[0].partition("=")[0]
        raise UserError(f"unexpected {word!r}{suggest(word, args.options)}{more}")
    for name, _ in overrides:
        block = name.partition(".")[0]
        if block not in args.takes:
            what = f"this command takes {allowed}" if allowed else "this command takes no options of a recipe"
            raise UserError(f"no option --{name}{suggest(block, args.takes)}; {what}")


def device(name: str | None) -> str:
    """As :func:`advebm.checks.device`, and said; torch is imported when it is wanted."""
    from advebm import checks, console
    from advebm.training.machine import describe

    found = checks.device(name)
    console.computing_on(describe(found))
    return found


def team(name: str | None) -> tuple[processes.Team, str]:
    """The processes that share the command, and the device of this one."""
    if processes.launched()[1] == 1:
        return processes.ALONE, device(name)
    from advebm.training.engine import Engine

    engine = Engine(name)
    return engine, str(engine.device)


def run_demo(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm demo``."""
    from advebm.demo import demo
    from advebm.tables import side_by_side
    from advebm.training.run import new_folder

    begun = time.perf_counter()
    path, records = demo(new_folder(args.out, "demo"), seed=args.seed)
    side_by_side(records)
    print(f"{time.perf_counter() - begun:.0f} s; report: {path}")


def run_toy(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm toy``."""
    from advebm import console, toy
    from advebm.densities import DENSITIES
    from advebm.reporting.planes import draw
    from advebm.tables import numbers_table

    if args.all and args.density:
        raise UserError("--all is every density; leave out the name or --all")
    rows: dict[str, dict[str, float]] = {}
    written: list[Path] = []
    for density in DENSITIES if args.all else [args.density or "gaussian"]:
        console.say(density)
        plays, paths = draw(density, args.out, method=args.method, p0=args.p0, seed=args.seed)
        rows |= {f"{play.density} {play.method} {play.p0}": toy.numbers(play, seed=args.seed) for play in plays}
        written += paths
    numbers_table(rows)
    for path in written:
        print(path)


def run_train(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm train``."""
    if (folder := _train(args, overrides)) is not None:
        print(folder)


def _train(args: argparse.Namespace, overrides: Overrides) -> Path | None:
    """Train as the options say; the run's folder, or None where only the recipe was asked for."""
    from advebm import console
    from advebm.stages import fit
    from advebm.training.recipe import dump, read, resolve
    from advebm.training.run import Run, new_folder

    if args.resume is not None:
        if overrides or args.out or args.init or args.model or args.fast or args.labels or args.seed is not None:
            raise UserError("a resumed run keeps its own recipe and folder; leave the other options out")
        begun = Run.open(args.resume)
        recipe, folder = begun.recipe, args.resume
        if args.threads is None and (threads := begun.environment.get("threads")):  # sums are rounded in their order
            if threads <= (cores := os.cpu_count() or 1):
                use_threads(threads)
            elif not begun.finished:
                what = f"{args.resume} was begun with {threads} threads, and there are {cores} cores"
                console.say(f"{what}: its results will differ by rounding")
    else:
        if (args.recipe or args.config) is None:
            raise UserError(
                f"train takes --recipe NAME, --config FILE or --resume RUN; recipes: {', '.join(recipes.names())}"
            )
        plain = recipes.find(args.recipe) if args.recipe else read(args.config)
        if args.model:
            overrides = [*overrides, ("backbone", {"kind": "own", "path": args.model})]
        if args.fast:
            overrides = [*overrides, ("train.fast", args.fast)]
        given = {"seed": args.seed, "init": args.init}
        recipe = resolve({**plain, **{k: v for k, v in given.items() if v is not None}}, overrides)
        if args.labels == "none":
            recipe = recipe.unlabelled()
        folder = args.out or new_folder(Path("runs"), recipe.name)
    if args.print_config:
        print(dump(recipe), end="")
        return None
    if args.dry_run is not None:
        from advebm.tables import costs_table
        from advebm.training import cost, machine

        if args.dry_run:
            found = machine.find(args.dry_run)
            stages = cost.estimates(recipe)
            costs_table(stages, [found] * len(stages))
        else:
            where = device(args.device)
            stages = cost.estimates(recipe.computed_on(where))
            costs_table(stages, [cost.measured_here(stage, where) for stage in stages])
        return None
    return fit(recipe, folder, resume=args.resume is not None, device=args.device).folder


def run_run(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm run``."""
    from advebm.evaluation import find_space

    if args.per_class < 1:
        raise UserError(f"--per-class is at least 1, got {args.per_class}")
    if args.features:
        find_space(args.features).load("cpu")  # rather now than after training
    folder = _train(args, overrides)
    if folder is None:
        return
    where = [f"--device={args.device}"] if args.device else []
    judge = [f"--features={args.features}"] if args.features else []
    way = [f"--fast={args.fast}"] if args.fast else []
    for verb, options in (
        ("sample", [*where, *way, f"--per-class={args.per_class}"]),
        ("evaluate", [*where, *judge]),
        ("report", []),
    ):
        if verb == "report" and processes.launched()[0]:
            return
        following = build_parser().parse_args([verb, str(folder), *options])
        following.call(following, [])


def run_sample(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm sample``."""
    from advebm import console
    from advebm.generation import set_name
    from advebm.stages import contrast, draw
    from advebm.tables import one_a_line
    from advebm.training.run import Run

    for name in ("per_class", "steps", "processes", "batch", "seeds"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is at least 1, got {value}")
    if (args.seeds or args.features) and not args.compare:
        raise UserError("--seeds and --features go with --compare")
    if args.compare and (args.method or args.name):
        raise UserError("--compare names the methods, and each set after its own; leave --method and --name out")
    if processes.launched()[1] > 1 and (args.compare or args.processes > 1):
        raise UserError("--compare and --processes take one process; leave them out, or run it without torchrun")
    run = Run.open(args.run)
    members, where = team(args.device)
    if args.steps:
        overrides = [*overrides, ("sampler.steps", args.steps)]
    options = {"seed": args.seed, "checkpoint": args.checkpoint, "device": where, "batch": args.batch}
    options |= {"processes": args.processes, "trajectory": args.trajectory, "classes": _numbers(args.classes)}
    options["way"] = args.fast
    leak = "seeds are fitted on test images: what is measured against them is flattered"
    if args.compare:
        chosen = {method: _settled(run, method, overrides, args) for method in args.compare.split(",")}
        samplers = {method: sampler for method, (sampler, _) in chosen.items()}
        if len({sampler.start for sampler in samplers.values()}) > 1:
            starts = ", ".join(f"{method} from {sampler.start}" for method, sampler in samplers.items())
            console.say(f"seeds differ: {starts}; --sampler.start sets all")
        if any(sampler.fit == "test" for sampler in samplers.values()):
            warnings.warn(leak, stacklevel=1)
        seeds = args.seeds or 1
        options["about"] = {method: about for method, (_, about) in chosen.items()}
        rows, path = contrast(run, samplers, args.per_class, seeds, features=args.features, say=console.say, **options)
        one_a_line(rows)
        print(path)
        return
    sampler, about = _settled(run, args.method, overrides, args)
    if sampler.fit == "test":
        warnings.warn(leak, stacklevel=1)
    options |= {"about": about, "team": members}
    print(draw(run, args.name or set_name(sampler), sampler, args.per_class, **options) / "grid.png")


def run_tune(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm tune-sampler``."""
    from advebm import config
    from advebm.stages import search
    from advebm.tables import numbers_table
    from advebm.training.run import Run
    from advebm.tuning import SETTINGS, grid, result

    if args.per_class < 1:
        raise UserError(f"--per-class is at least 1, got {args.per_class}")
    run = Run.open(args.run)
    sampler = _sampler(run, args.method, overrides)
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    plain = config.describe(sampler)
    values = {
        name: [getattr(config.build({**plain, name: v}, "sampler"), name) for v in text.split(",")]
        for name, text in given.items()
    }
    options = {"by": args.by, "features": args.features, "per_class": args.per_class, "seed": args.seed}
    options |= {"checkpoint": args.checkpoint, "device": device(args.device)}
    trials, path = search(run, grid(sampler, values), **options)
    rows = {}
    for number, trial in enumerate(trials[:10], 1):
        settings = {name: trial["sampler"][name] for name in SETTINGS}
        rows[str(number)] = {trial["name"]: trial["value"], **{k: v for k, v in settings.items() if v is not None}}
    numbers_table(rows)
    if (best := result(run, sampler)).exists():
        print(best)
    print(path)


def _sampler(run: Any, method: str | None, overrides: Overrides) -> Any:
    """The run's sampler, or another with its settings, with options changed."""
    from advebm import config
    from advebm.training.recipe import resolve

    return resolve(config.describe(run.recipe), [*([("sampler", method)] if method else []), *overrides]).sampler


def _settled(
    run: Any, method: str | None, overrides: Overrides, args: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """The same, with what ``tune-sampler`` found for that method and start; and how, where it did."""
    from advebm import config, console
    from advebm.training.recipe import resolve
    from advebm.tuning import tuned

    sampler = _sampler(run, method, overrides)
    if args.untuned or (found := tuned(run, sampler)) is None:
        return sampler, {}
    best, how = found
    if how["checkpoint"] != run.checkpoints.path(args.checkpoint).name:
        warnings.warn(f"tune-sampler looked at checkpoint {how['checkpoint']}; its settings are left", stacklevel=1)
        return sampler, {}
    console.say(f"{f'{method}: ' if args.compare else ''}settings of tune-sampler; --untuned takes the recipe's")
    plain = {**config.describe(run.recipe), "sampler": config.describe(best)}
    return resolve(plain, overrides).sampler, {"tuned": {**how, "changed": [name for name, _ in overrides]}}


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--classes takes numbers such as 0,3,7, got {text!r}") from None


def run_diagnose(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm diagnose``."""
    from advebm import console
    from advebm.comparison import titled
    from advebm.reporting.portraits import diagnose
    from advebm.tables import figures_list
    from advebm.training.run import Run

    for name in ("images", "steps"):
        if getattr(args, name) < 2:
            raise UserError(f"--{name} is at least 2, got {getattr(args, name)}")
    if not args.reach > 0:
        raise UserError(f"--reach is > 0, got {args.reach}")
    runs = [Run.open(path) for path in args.runs]
    options = {"count": args.images, "along": args.along, "reach": args.reach, "steps": args.steps, "seed": args.seed}
    options |= {"checkpoint": args.checkpoint, "device": device(args.device)}
    options["sampler"] = _sampler(runs[0], args.method, overrides)
    numbers, written = diagnose(
        titled(runs), args.what.split(",") if args.what else (), progress=console.say, **options
    )
    figures_list(numbers)
    for path in written:
        print(path)


def run_evaluate(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm evaluate``."""
    import dataclasses

    from advebm import config, console
    from advebm.attacks.projected import Attack
    from advebm.evaluation import evaluate_run
    from advebm.stages import adopt, take_in
    from advebm.suites import suite
    from advebm.tables import record_table
    from advebm.training.recipe import resolve
    from advebm.training.run import Run, new_folder

    if (args.run is None) == (args.model is None):
        raise UserError("evaluate takes a RUN, or --model and --data for a model without one")
    measured = [pair for pair in overrides if pair[0].partition(".")[0] in ("threat", "metrics")]
    if args.model is None and (args.out or measured != overrides):
        raise UserError("--out, --data and --normalise go with --model; a run has its own")
    if args.tier and not args.suite:
        raise UserError("--tier goes with --suite")
    if args.suite:
        if any(name.partition(".")[0] == "metrics" for name, _ in overrides):
            raise UserError("--suite says which metrics; leave --metrics out")
        suite(args.suite, Attack(), args.tier or "standard")  # a misspelt name is noticed before anything is written
    for folder in args.samples:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
    if args.model and processes.launched()[1] > 1:
        raise UserError("--model makes a run, which takes one process; evaluate that RUN with several")
    if args.model is None:
        run = Run.open(args.run)
    else:
        run = adopt(args.model, args.out or new_folder(Path("runs"), "model"), overrides)
        print(run.folder)
    recipe = resolve(config.describe(run.recipe), measured)
    if args.suite:
        recipe = dataclasses.replace(recipe, metrics=suite(args.suite, recipe.threat, args.tier or "standard"))
    members, where = team(args.device)
    for folder in args.samples if members.main else ():
        take_in(run, folder)
    members.share(None)  # they are there
    options = {"features": args.features, "checkpoint": args.checkpoint, "seed": args.seed}
    options |= {"device": where, "team": members}
    records = evaluate_run(run, recipe=recipe, **options, progress=console.say, bar=console.bar)
    if args.json:
        for record in records:
            print(json.dumps(dataclasses.asdict(record)))
    else:
        record_table(records)


def run_probe(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm probe``."""
    import dataclasses

    from advebm import console
    from advebm.evaluation import evaluate_run
    from advebm.metrics.probing import NearestNeighbours, Probe
    from advebm.stages import probe
    from advebm.tables import record_table
    from advebm.training.run import Run

    run, by = Run.open(args.run), Probe(args.c, branch=args.branch)
    neighbours = NearestNeighbours(args.neighbours, args.branch)
    options = {"checkpoint": args.checkpoint, "device": device(args.device)}
    folder = args.out or run.folder.with_name(f"{run.folder.resolve().name}-probe")
    probed = probe(run, folder, by=by, overrides=overrides, **options)
    print(probed.folder)
    alone = dataclasses.replace(run.recipe, metrics=(neighbours,))
    records = evaluate_run(probed, device=options["device"], seed=args.seed, progress=console.say, bar=console.bar)
    record_table([*records, *evaluate_run(run, recipe=alone, seed=args.seed, progress=console.say, **options)])


def run_edit(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm edit``."""
    from advebm import config, console, editing
    from advebm.tables import numbers_table
    from advebm.training.run import Run

    if args.what not in ("score", *KINDS["edit"]):
        raise unknown("edit", args.what, ["score", *KINDS["edit"]])
    for name, takers in EDITS.items():
        if getattr(args, name) not in (None, []) and args.what not in takers:
            flag = {"goal": "class", "others": "with", "source": "from"}.get(name, name)
            raise UserError(f"--{flag} is for {', '.join(takers)}; {args.what} takes none")
    if args.count < 1:
        raise UserError(f"--count is at least 1, got {args.count}")
    if args.image and (args.split or args.source):
        raise UserError("--image or --split, not both; --from goes with --split")
    order = editing.Order(
        run=Run.open(args.run),
        others=tuple(Run.open(path) for path in args.others),
        source=Run.open(args.source) if args.source else None,
        images=tuple(args.image or ()),
        split=args.split,
        count=args.count,
        fit=args.fit,
        goal=args.goal,
        classes=tuple(args.classes.split(",")) if args.classes else (),
        mask=args.mask,
        box=args.box,
        seed=args.seed,
        checkpoint=args.checkpoint,
        device=device(args.device),
    )
    if args.what == "score":
        if overrides:
            raise UserError("score takes no --edit options")
        numbers_table(editing.score(order))
        return
    amount = [("edit.amount", args.amount)] if args.amount else []
    plain: Any = {"edit": config.describe(config.build(args.what, "edit"))}
    for name, value in [*overrides, *amount]:
        plain = config.override(plain, name, value)
    method = config.build(plain["edit"], "edit")
    with console.bar(args.what, len(editing.listed(order.images)) if order.images else args.count, 0) as tell:
        path, numbers = editing.edit(order, method, args.out, film=args.film, progress=tell)
    numbers_table(numbers)
    print(path)


EDITS = {  # options that only some take
    "mask": ("inpaint", "paint"),
    "box": ("inpaint", "paint"),
    "others": ("compose",),
    "classes": ("compose",),
    "amount": ("translate",),
    "source": ("translate", "counterfactual", "score"),
    "goal": ("translate", "inpaint", "paint", "denoise", "upsample", "counterfactual"),
}


def run_doctor(args: argparse.Namespace, overrides: Overrides) -> int:
    """``advebm doctor``: 1 where there are faults."""
    import dataclasses

    from advebm import config, console
    from advebm.attacks.base import radius
    from advebm.doctor import examine_split
    from advebm.evaluation import find_model
    from advebm.tables import findings_list
    from advebm.training.recipe import resolve
    from advebm.training.run import Run

    if args.machine:
        return _doctor_machine(args, overrides)
    if args.model is None:
        raise UserError("doctor takes a MODEL, or --machine to check this machine")
    if (Path(args.model) / "config.yaml").is_file():
        plain = config.describe(Run.open(args.model).recipe)
    elif "data" in dict(overrides):
        rest = {"backbone": "small-conv", "objective": "standard", "sampler": "ta", "metrics": []}
        plain = {"name": "doctor", "threat": {}, **rest}  # of which only images and threat are looked at
    else:
        raise UserError(f"{args.model} is not a run, which knows its images: give --data NAME, as in --data cifar10")
    recipe = resolve(plain, overrides)
    model = find_model(args.model, checkpoint=args.checkpoint).to(device(args.device))
    data, threat = recipe.data.load(), recipe.threat
    count = min(args.images, len(data.test))
    console.say(f"{args.model} on {count} test images of {data.name} at {radius(threat.eps, threat.norm)}")
    findings = examine_split(model, data.test, threat=threat, count=count, seed=args.seed, progress=console.say)
    if args.json:
        for finding in findings:
            print(json.dumps(dataclasses.asdict(finding)))
    else:
        findings_list(findings)
    return int(any(finding.severity == "fault" for finding in findings))


def _doctor_machine(args: argparse.Namespace, overrides: Overrides) -> int:
    """``advebm doctor --machine``: 1 where a convolution is computed wrongly."""
    from advebm import console
    from advebm.data.sources import outline
    from advebm.diagnostics.kernels import KNOWN, check, convolutions
    from advebm.evaluation import find_model
    from advebm.models import network
    from advebm.training import machine
    from advebm.training.recipe import resolve

    where = device(args.device)
    print(machine.report(where))
    if args.model is None:
        names = ("cifar10-at-small", "cifar10-at-2h")
        shape: tuple[int, ...] = (3, 32, 32)
        models = {name: resolve(recipes.find(name)).backbone.build(*shape[:2])[0].eval() for name in names}
    else:
        models = {args.model: find_model(args.model, checkpoint=args.checkpoint)}
        if dict(overrides).get("data"):
            plain = {
                "name": "doctor",
                "backbone": "small-conv",
                "objective": "standard",
                "sampler": "ta",
                "metrics": [],
            }
            shape = outline(resolve({**plain, "threat": {}}, overrides).data).shape
        else:
            architecture = network.read_architecture(*network.locate(args.model)[:1], foreign=True)
            shape = (architecture.channels, architecture.size, architecture.size)
    found = dict.fromkeys(c for model in models.values() for c in convolutions(model, shape, MACHINE_BATCH, "bfloat16"))
    with console.bar("convolutions", len(found) + 1, 0) as tell:
        known, *verdicts = check([KNOWN, *found], progress=tell)
    wrong = [verdict for verdict in verdicts if verdict.wrong]
    for verdict in wrong:
        print(f"fault: {verdict}")
    if known.wrong:
        print(f"warning: {known}; advebm's networks avoid it, training code of your own may not: docs/cpu.md")
    right = [max(v.errors) for v in verdicts if not v.wrong and v.convolution.dtype == "float32"]
    print(
        f"{len(verdicts) - len(wrong)} of {len(found)} convolutions of {', '.join(models)} agree with float64", end=""
    )
    print(f", in float32 to {max(right):.1g}" if right else "")
    if len(verdicts) < len(found):
        print(f"{len(found) - len(verdicts)} were not checked: time was up")
    return int(bool(wrong))


MACHINE_BATCH = 16  # images of the convolutions that are checked


def run_report(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm report``."""
    from advebm.reporting.build import report
    from advebm.training.run import Run

    print(report(Run.open(args.run), beside=[Run.open(path) for path in args.beside]))


def run_compare(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm compare``."""
    from advebm import config, console
    from advebm.comparison import compare
    from advebm.reporting.build import report
    from advebm.tables import one_a_line
    from advebm.training.recipe import resolve
    from advebm.training.run import Run

    runs = [Run.open(path) for path in args.runs]
    threat = resolve(config.describe(runs[0].recipe), overrides).threat
    options = {"features": args.features, "seed": args.seed, "device": device(args.device)}
    one_a_line(compare(runs, threat=threat, **options, progress=console.say, bar=console.bar))
    print(report(runs[0], beside=runs[1:], out=args.out))


def run_reproduce(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm reproduce``."""
    from advebm.published import papers, tables
    from advebm.reproduce import EXPERIMENTS, reproduce

    name = args.experiment
    if name is None and args.scale is not None:
        raise UserError(f"--scale is of a table; name one of {', '.join(tables())}")
    if args.list or name is None:
        for experiment, call in EXPERIMENTS.items():
            print(f"{experiment:20} {(call.__doc__ or '').splitlines()[0]}")
        for table in tables().values():
            print(f"{table.name:20} --scale {', '.join(table.scales)}: {table.what}")
        for paper in papers():
            print(f"\n{paper['key']}: {paper['title']}")
            for item in paper["items"]:
                print(f"  {item['id']:18} {item['status']:9} {item['what']}\n  {'':28} {item['how']}")
                for row in item.get("rows", []):
                    values = "  ".join(f"{k} {'-' if v is None else v}" for k, v in row["values"].items())
                    print(f"  {'':28} {row['status']:9} {row['name']}: {values}")
        return
    if args.scale is not None:
        from advebm.scales import replicate

        if args.quick:
            raise UserError("--quick is of experiments; a table has --scale alone")
        runs = tables()[name].runs if name in tables() else ""
        folder = args.out or Path("runs") / f"{runs or name}-{args.scale}"
        print(replicate(name, args.scale, folder, seeds=args.seeds, options=overrides))
        return
    if name in tables() and name not in EXPERIMENTS:
        raise UserError(f"{name} is a table; say how large with --scale, one of {', '.join(tables()[name].scales)}")
    folder = args.out or Path("runs") / f"{name}{'-quick' * args.quick}"
    print(reproduce(name, folder, seeds=args.seeds, quick=args.quick, options=overrides))


def run_app(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm app``."""
    from advebm.web.server import serve

    where = {"host": args.host, "port": args.port}
    serve(args.runs, **where, checkpoint=args.checkpoint, device=device(args.device), say=print)


def run_push(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm push``."""
    from advebm.models import hub
    from advebm.reporting.card import publish
    from advebm.training.run import Run

    with tempfile.TemporaryDirectory() as folder:
        publish(Run.open(args.run), Path(folder), checkpoint=args.checkpoint, weights=args.weights)
        print(hub.push(Path(folder), args.name, private=args.private))


def run_export(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm export``."""
    from advebm.reporting.card import publish
    from advebm.training.run import Run

    print(publish(Run.open(args.run), args.folder, checkpoint=args.checkpoint, weights=args.weights))


def run_list(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm list``: from static text and source files; imports no method."""
    what = None if args.what is None else args.what.rstrip("s")
    if what is not None and what not in ("recipe", *KINDS):
        raise unknown("kind of thing", args.what, ["recipe", *KINDS])
    if what in (None, "recipe"):
        print("recipe (advebm train --recipe NAME)")
        width = max(map(len, recipes.names()))
        for name in recipes.names():
            print(f"  {name:{width}} {recipes.header(name)[0]}")
    for role, kinds in KINDS.items():
        if what in (None, role):
            print(role)
            for kind, target in kinds.items():
                print(f"  {kind:20} {_summary(target)}")


def _summary(target: str) -> str:
    """The first line of a class's docstring, without importing its module."""
    module, _, name = target.partition(":")
    tree = _parsed(module)
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    return (ast.get_docstring(node) or "").splitlines()[0].replace("``", "") if node else ""


@functools.cache
def _parsed(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    return ast.Module([], []) if spec is None or spec.origin is None else ast.parse(Path(spec.origin).read_text())


if __name__ == "__main__":
    sys.exit(main())
