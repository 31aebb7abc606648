"""The verbs and their options."""

import argparse
from collections.abc import Callable
from pathlib import Path

from advebm import __version__
from advebm.cli.commands import (
    run_app,
    run_compare,
    run_demo,
    run_diagnose,
    run_doctor,
    run_edit,
    run_evaluate,
    run_export,
    run_list,
    run_probe,
    run_push,
    run_report,
    run_reproduce,
    run_run,
    run_sample,
    run_toy,
    run_train,
    run_tune,
)
from advebm.cli.options import BLOCKS, Overrides, Parser
from advebm.core.config import KINDS

JUDGES = (  # for --features
    "what judges the samples: the classifier of a run or model (its own by default), pixels, inception (downloads its "
    "weights once), or inception:PATH of torch-fidelity's weight file"
)
WAYS = "auto, off, fold, compile, bf16 or bf16+compile"  # for --fast


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
