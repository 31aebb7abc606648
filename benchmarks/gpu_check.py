"""``make gpu-check``: what is asked of a GPU in one go, within nine minutes; one JSON and one picture come of it.

1. The device tests on the device.
2. Speed: searches and training steps of a ResNet-18 and a WRN-28-10, ours in every ``--fast`` beside the peers.
3. Adversarial training of a ResNet-18 on CIFAR-10, linf 8/255, in the minutes that are left: seconds to 40 and 45 % of
   validation images under PGD-20.
4. AutoAttack on 256 test images beside the authors', a grid of samples, a report.

``--pack ZIP``         make the file of images from ADVEBM_DATA, on a machine that has them: JPEGs of 48,000 training
                       images, PNGs of 2,000 validation and 2,000 test images, less than 60 MB
``--images ZIP``       that file
``--out FOLDER``       receives check.json, grid.png and report.html (runs/gpu-check)
``--minutes 9``        for all of it
``--device cuda``      ``cpu --quick`` tries everything out where there is no GPU: small batches, few steps
"""

import argparse
import io
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from advebm.data.readers import Cifar10
from advebm.data.sources import Images
from advebm.models.inference import BACKENDS
from benchmarks.__main__ import machine
from benchmarks.tasks import TASKS, Contest, Setting

GOALS = (0.40, 0.45)  # shares of validation images that withstand PGD-20
TURNS = 5
TESTS = 90  # most seconds for the device tests
CLOSING = 75  # seconds kept for step 4
WAYS = tuple(f"advebm {way}" for way in BACKENDS)
EAGER = tuple(way for way in WAYS if "compile" not in way)
ROWS = {
    "PGD-20, ResNet-18, batch 256": (
        {"task": "pgd", "net": "resnet-18", "batch": 256},
        ("torchattacks", "plain loop", *WAYS),
    ),
    "PGD-20, WRN-28-10, batch 128": (
        {"task": "pgd", "net": "wide-resnet-28"},
        ("torchattacks", "plain loop", *EAGER),
    ),
    "AT step, PGD-7, ResNet-18, batch 256": (
        {"task": "at", "net": "resnet-18", "batch": 256, "steps": 7},
        ("plain loop", *EAGER),
    ),
    "AT step, PGD-7, WRN-28-10, batch 128": (
        {"task": "at", "net": "wide-resnet-28", "steps": 7},
        ("plain loop", *EAGER),
    ),
    "SGLD-20, ResNet-18, batch 128": ({"task": "sgld", "net": "resnet-18"}, ("JEM loop", *EAGER)),
    "Binary-AT step, K = 5, ResNet-18, batch 128 + 128": (
        {"task": "binary-at", "net": "resnet-18", "batch": 256, "steps": 5},
        ("AT-EBMs loop", *EAGER),
    ),
}


class Check(NamedTuple):
    """What is asked for: the device, where results go, the end of the time, and whether it is a trial only."""

    device: str
    out: Path
    deadline: float
    quick: bool

    @property
    def left(self) -> float:
        """Return how many seconds remain until the deadline."""
        return self.deadline - time.monotonic()


# Images ---------------------------------------------------------------------------------------------------------------


def pack(where: Path, tests: int = 2_000) -> None:
    """Write training images as JPEGs, validation and some test images as PNGs into folders of an archive by class."""
    data = Cifar10().load()
    with zipfile.ZipFile(where, "w", zipfile.ZIP_STORED) as archive:
        for split, images, options in (
            ("train", data.train, {"format": "JPEG", "quality": 75}),
            ("val", data.val, {"format": "PNG"}),
            ("test", data.test.take(slice(tests)), {"format": "PNG"}),
        ):
            _write_images(archive, split, images, data.classes, options)
    print(f"{where}: {where.stat().st_size / 1e6:.1f} MB")


def _write_images(
    archive: zipfile.ZipFile, split: str, images: Images, classes: tuple[str, ...], options: dict[str, Any]
) -> None:
    for number, (x, label) in enumerate(zip(images.x, images.y.tolist(), strict=True)):
        file = io.BytesIO()
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(file, **options)
        archive.writestr(f"{split}/{classes[label]}/{number:05}.{options['format'].lower()}", file.getvalue())


# Speed ----------------------------------------------------------------------------------------------------------------


def race(setting: dict[str, Any], sides: tuple[str, ...], check: Check) -> dict[str, dict[str, Any]]:
    """Take turns of every side in this process, interleaved; a side that fails says why."""
    contests: dict[str, Contest] = {}
    found: dict[str, dict[str, Any]] = {}
    for who in sides:
        try:
            contest = TASKS[setting["task"]](Setting(who=who, device=check.device, **setting))
            _timed(contest, check.device)  # compiles, and chooses algorithms
        except Exception as error:  # whatever it is, the others go on
            found[who] = {"failed": (str(error).splitlines() or [type(error).__name__])[0][:200]}
        else:
            contests[who] = contest
    times = {who: list[tuple[float, float]]() for who in contests}
    for _ in range(1 if check.quick else TURNS):
        for who, contest in contests.items():
            times[who].append(_timed(contest, check.device))
    for who, contest in contests.items():
        seconds, memory = (statistics.median(values) for values in zip(*times[who], strict=True))
        rate = contest.flops * contest.work / seconds
        found[who] = {"seconds": seconds, "peak_mib": memory, "flop_per_second": rate, **contest.quality()}
    return found


def _timed(contest: Contest, device: str) -> tuple[float, float]:
    """Return the seconds of a turn, and the most MiB of a GPU that it took."""
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begun = time.perf_counter()
    contest.turn()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun, torch.cuda.max_memory_allocated() / 2**20 if is_cuda else 0.0


def speeds(check: Check, until: float) -> dict[str, Any]:
    """Return the seconds of all sides of each row that begins before ``until`` seconds are left."""
    found = {}
    for name, (setting, sides) in ROWS.items():
        if check.left < until:
            found[name] = {"left out": "no time"}
            continue
        if check.quick:
            setting = {**setting, "net": "resnet-8", "batch": 8, "steps": 2}
            sides = tuple(side for side in sides if "compile" not in side)
        found[name] = race(setting, sides, check)
        base = next((side["seconds"] for side in found[name].values() if "seconds" in side), 0.0)
        for who, side in found[name].items():
            shown = side.get("failed") or f"{side['seconds']:.4g} s, {base / side['seconds']:.2f} x"
            print(f"  {name}: {who} {shown}", flush=True)
    return found


# Training -------------------------------------------------------------------------------------------------------------


def train(check: Check, images: Path, rate: float) -> dict[str, Any]:
    """Train until the time is up but for the closing; return accuracies of validation images by seconds.

    ``rate`` is how many images a second the steps of the speed test take; a shorter run is planned, and measured.
    """
    run, limit = check.out / "run", check.left - CLOSING
    count = 256 if check.quick else int(0.7 * rate * limit) // 256 * 256
    options: dict[str, Any] = {
        "data": f"folder:{images}",
        "objective.attack.eps": 8 / 255,  # said anew, as it is for these images, whatever they are called
        "threat.eps": 8 / 255,
        "data.augment.x.crop": 4,
        "data.augment.x.flip": True,
        "backbone.depth": 8 if check.quick else 18,
        "backbone.width": 16 if check.quick else 64,
        "train.images": count,
        "train.batch": 64 if check.quick else 256,
        "train.validate_every": max(256, count // 16),
        "train.validate_with": 32 if check.quick else 1_000,
        "train.checkpoint_every": count,
    }
    words = ["train", "--recipe", "cifar10-at-small", "--out", run, "--device", check.device]
    words += list(itertools.chain.from_iterable((f"--{name}", value) for name, value in options.items()))
    begun, points, lines = time.monotonic(), list[dict[str, float]](), 0
    with subprocess.Popen([sys.executable, "-m", "advebm", *map(str, words)]) as process:
        while process.poll() is None:
            time.sleep(0.5)
            if check.left < CLOSING - 20:  # it is slower than was planned
                process.send_signal(signal.SIGINT)
                process.wait()
            history = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
            for line in map(json.loads, history[lines:]):
                if "val/robust_accuracy" in line:
                    points.append({"seconds": time.monotonic() - begun, **line})
            lines = len(history)
    reached = {
        f"{goal:.0%}": next((p["seconds"] for p in points if p["val/robust_accuracy"] >= goal), None) for goal in GOALS
    }
    return {"images": count, "status": process.returncode, "seconds to": reached, "points": points}


def close(check: Check) -> dict[str, Any]:
    """Compare with the authors' AutoAttack, draw a grid and write a report of the trained run."""
    run = check.out / "run"
    found: dict[str, Any] = {}
    if check.left > CLOSING / 2:
        setting = {"task": "autoattack", "steps": 0, "batch": 16 if check.quick else 256, "run": str(run)}
        found["APGD-CE and APGD-T"] = race(
            setting, ("official", "advebm fold", "advebm bf16"), check._replace(quick=True)
        )
    draw = ("sample", run, "--per-class", "2" if check.quick else "10", "--steps", "20", "--name", "grid")
    for words in ((*draw, "--device", check.device), ("report", run)):
        subprocess.run([sys.executable, "-m", "advebm", *map(str, words)], check=False)
    for path in (run / "samples" / "grid" / "grid.png", run / "report.html"):
        if path.exists():
            shutil.copy(path, check.out)
    return found


def run_tests(check: Check) -> dict[str, Any]:
    """Run the device tests on the device, for at most :data:`TESTS` seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_devices.py", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "ADVEBM_TEST_DEVICE": check.device},
            capture_output=True,
            text=True,
            timeout=TESTS,
        )
    except subprocess.TimeoutExpired:
        return {"status": f"not done in {TESTS} s"}
    print(done.stdout[-2000:], flush=True)
    return {"status": done.returncode, "said": done.stdout.strip().splitlines()[-5:]}


def main() -> None:
    """Do one after the other, and write what is known so far after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.pack:
        pack(args.pack)
        return
    if args.images is None or not zipfile.is_zipfile(args.images):
        parser.error("--images takes the file that --pack has made")
    check = Check(args.device, args.out, time.monotonic() + 60 * args.minutes, args.quick)
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"quick": args.quick, "machine": machine(args.device)}
    steps: dict[str, Callable[[Path], Any]] = {
        "tests": lambda images: run_tests(check),
        "speed": lambda images: speeds(check, 0.55 * 60 * args.minutes),
        "training": lambda images: train(check, images, _rate(result["speed"])),
        "closing": lambda images: close(check),
    }
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(args.images) as archive:
        archive.extractall(folder)
        for name, step in steps.items():
            print(f"{name}, {check.left:.0f} s left", flush=True)
            result[name] = step(Path(folder))
            (args.out / "check.json").write_text(json.dumps(result, indent=1))
    print(args.out / "check.json")


def _rate(speed: dict[str, Any]) -> float:
    """Return how many images a second the fastest of our adversarial training steps of a ResNet-18 takes."""
    sides = speed.get("AT step, PGD-7, ResNet-18, batch 256", {})
    times = [side["seconds"] for who, side in sides.items() if "seconds" in side and who.startswith("advebm")]
    return 256 / min(times) if times else 500.0


if __name__ == "__main__":
    main()
