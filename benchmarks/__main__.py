"""``python -m benchmarks``: every row in turns, medians and ratios, in benchmarks/results/.

Attacks on a ResNet-8 are on one that is trained first, adversarially on CIFAR-10 (some minutes, once), where
ADVEBM_DATA names the data; else on fresh weights, and AutoAttack on a network trained on digits.  Other ResNets have
fresh weights.  AT_EBMS_SRC names a checkout of AT-EBMs, whose own search then takes part.

``--rows WORD,WORD``   only rows whose name holds one of the words
``--repeats 5``        turns of each side
``--quick``            one turn, small batches, few steps: whether everything runs
``--curves``           the scaling curves, too
``--device cuda``      elsewhere than on the CPU
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from advebm.models.precision import multiplies_bfloat16, usable_precision
from advebm.training.hardware import rates
from benchmarks import show
from benchmarks.tasks import Setting, trained

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("advebm", "torch", "torchattacks", "foolbox", "adversarial-robustness-toolbox", "torchebm", "pyautoattack")
OURS = ("advebm off", "advebm fold", "advebm bf16")
COMPILED = ("advebm compile", "advebm bf16+compile")


class Row(NamedTuple):
    """A task at one size; the first peer is what the ratios are to."""

    name: str
    setting: dict[str, Any]
    peers: tuple[str, ...]
    ours: tuple[str, ...] = OURS
    repeats: int = 100  # at most


ATTACKERS = ("torchattacks", "foolbox", "art")
ROWS = [
    Row("PGD-20, digits CNN, batch 256", {"task": "pgd", "net": "digits", "batch": 256}, ATTACKERS, OURS + COMPILED),
    Row("PGD-20, ResNet-8 w16, batch 128", {"task": "pgd"}, ATTACKERS, OURS + COMPILED),
    Row("PGD-20, ResNet-18, batch 16", {"task": "pgd", "net": "resnet-18", "batch": 16}, ATTACKERS, OURS + COMPILED),
    Row(
        "APGD-CE and APGD-T, trained, 128 images",
        {"task": "autoattack", "steps": 0, "batch": 128},
        ("official",),
        OURS[1:],
        3,
    ),
    Row(
        "AutoAttack standard, trained, 48 images",
        {"task": "autoattack", "steps": 1, "batch": 48},
        ("official",),
        OURS[1:],
        2,
    ),
    Row("SGLD-20, ResNet-8 w16, batch 64", {"task": "sgld", "batch": 64}, ("JEM loop", "torchebm"), OURS + COMPILED),
    Row(
        "50,000 digits sampled, TA-10, batch 500",
        {"task": "sampling", "batch": 500, "size": 50_000, "steps": 10},
        ("plain loop",),
        OURS,
        3,
    ),
    Row("Binary-AT step, K = 5, batch 64 + 64", {"task": "binary-at", "steps": 5}, ("AT-EBMs loop",), OURS + COMPILED),
    Row(
        "Binary-AT step, K = 25, batch 64 + 64", {"task": "binary-at", "steps": 25}, ("AT-EBMs loop",), OURS + COMPILED
    ),
    Row("AT step, PGD-7, batch 128", {"task": "at", "steps": 7}, ("plain loop",), OURS + COMPILED),
    Row("TRADES step, 10, batch 128", {"task": "trades", "steps": 10}, ("TRADES loop",), OURS + COMPILED),
    Row("JEM step, 20, batch 64", {"task": "jem", "batch": 64}, ("JEM loop",), OURS + COMPILED),
    Row(
        "Frechet distance, 2 x 10,000 x 2048",
        {"task": "fid", "size": 2048, "batch": 10_000},
        ("scipy sqrtm",),
        OURS[:1],
    ),
]
SMALL = {"pgd": 2, "sgld": 2, "sampling": 2, "binary-at": 2, "at": 2, "trades": 2, "jem": 2}  # steps of --quick
CURVES = {
    "batch": (8, 16, 32, 64, 128, 256),
    "steps": (5, 10, 20, 40, 80),
    "width": (8, 16, 32, 64),
    "size": (32, 64, 128, 256),
}
BESIDE = ("torchattacks", "advebm off", "advebm bf16")


class Side:
    """A worker and what it said."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.seconds: list[float] = []
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(setting._asdict())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.about = self._hear()

    def turn(self) -> None:
        """One turn, timed by the worker."""
        self.begin()
        self.wait()

    def begin(self) -> None:
        """Begin a turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def wait(self) -> None:
        """Wait for its end."""
        self.seconds.append(self._hear()["seconds"])

    def end(self) -> dict[str, Any]:
        """Everything that is known of it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        said = self._hear()
        self.process.wait()
        times = {"median": statistics.median(self.seconds), "best": min(self.seconds), "seconds": self.seconds}
        return {"setting": self.setting._asdict(), **times, **self.about, **said}

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(self.process.stderr.read()[-2000:])


def measure(settings: dict[str, Setting], repeats: int) -> dict[str, dict[str, Any]]:
    """Every side in a process of its own, turn by turn; a side that fails says why."""
    sides, results = {}, dict[str, dict[str, Any]]()
    for name, setting in settings.items():
        print(f"  {name} gets ready", flush=True)
        try:
            sides[name] = Side(setting)
        except RuntimeError as error:
            results[name] = {"failed": str(error)}
            print(f"  {name} fails: {str(error).strip().splitlines()[-1]}", flush=True)
    for turn in range(repeats):
        for name, side in sides.items():
            side.turn()
            print(f"  turn {turn + 1} of {repeats}: {name} {side.seconds[-1]:.3g} s", flush=True)
    return results | {name: side.end() for name, side in sides.items()}


def contestants(row: Row, cifar: str, digits: str, device: str, quick: bool) -> dict[str, Setting]:
    """The sides of a row: peers, ours in every way, the last eager and compiled ones also with the allocator tuned."""
    plain, peers = {**row.setting, "device": device}, row.peers
    if plain["task"] == "binary-at" and os.environ.get("AT_EBMS_SRC"):
        peers = ("AT-EBMs", *peers)
    if quick:
        task = plain["task"]
        plain |= {"batch": min(plain.get("batch", 128), 8)} | ({"steps": SMALL[task]} if task in SMALL else {})
        plain |= {"batch": 512, "size": 256} if task == "fid" else {}
        plain |= {"size": 16} if task == "sampling" else {}
    match plain["task"], plain.get("net", "resnet-8"):
        case ("sampling", _) | ("pgd", "digits"):
            plain["run"] = digits
        case "autoattack", _:
            plain["run"] = cifar or digits
        case "pgd", "resnet-8":
            plain["run"] = cifar
    ours = [way for way in row.ours if not quick or "compile" not in way]
    if not multiplies_bfloat16(torch.device(device)):  # emulated it shows nothing
        ours = [way for way in ours if "bf16" not in way]
    sides = {who: Setting(who=who, **plain) for who in (*peers, *ours)}
    last = {"compile" in way: way for way in ours}
    return sides | {f"{way}, allocator": Setting(who=way, tuned=True, **plain) for way in last.values()}


def curves(repeats: int, device: str, quick: bool) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """PGD on a ResNet-8 against one size at a time: seconds, and memory at the peak."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for axis, values in CURVES.items():
        found[axis] = {who: [] for who in BESIDE}
        for value in values[:2] if quick else values:
            base = {"batch": 8 if quick or axis == "size" else 64, "steps": 5, "device": device, axis: value}
            sides = measure({who: Setting("pgd", who, **base) for who in BESIDE}, repeats)
            for who, side in sides.items():
                found[axis][who].append({"value": value, "seconds": side["median"], "peak_mib": side["peak_mib"]})
            shown = "  ".join(f"{who} {side['median']:.3g} s {side['peak_mib']:.0f} MiB" for who, side in sides.items())
            print(f"{axis} {value}: {shown}", flush=True)
    cores = torch.get_num_threads()
    found["processes"] = {who: [] for who in BESIDE}
    for value in dict.fromkeys((1, cores // 2 or 1, cores)):
        for who in BESIDE:
            share = Setting("pgd", who, batch=(16 if quick else 64 * cores) // value, steps=5, threads=cores // value)
            found["processes"][who].append({"value": value, **together([share] * value, repeats)})
        print(
            f"processes {value}: " + "  ".join(f"{w} {v[-1]['seconds']:.3g} s" for w, v in found["processes"].items())
        )
    return found


def together(settings: list[Setting], repeats: int) -> dict[str, float]:
    """Processes that share the work: median seconds until the last is done, and their memory together."""
    sides, seconds = [Side(setting) for setting in settings], list[float]()
    for _ in range(repeats):
        begun = time.perf_counter()
        for side in sides:
            side.begin()
        for side in sides:
            side.wait()
        seconds.append(time.perf_counter() - begun)
    return {"seconds": statistics.median(seconds), "peak_mib": sum(side.end()["peak_mib"] for side in sides)}


def machine(device: str) -> dict[str, Any]:
    """Hardware, versions, date, and the rates that nothing here can exceed."""
    versions = {name: metadata.version(name) for name in PACKAGES if _installed(name)}
    cpu = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if "model name" in line]
    kinds = dict.fromkeys(("float32", usable_precision("bfloat16", torch.device(device))))
    print(f"peak in {' and '.join(kinds)}", flush=True)
    peak = {kind: rates(getattr(torch, kind), device) for kind in kinds}
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions,
        "peak": peak,
    }


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    words, repeats = args.rows.lower().split(","), 1 if args.quick else args.repeats
    if not any(word in row.name.lower() for word in words for row in ROWS):
        parser.error(f"no row holds {args.rows!r}; there is {'; '.join(row.name for row in ROWS)}")
    print("networks that are attacked, trained where they are not there yet", flush=True)
    digits = trained("digits-at", [("train.images", 20_000)])
    narrow = [("backbone.width", 16), ("backbone.activation", "relu"), ("train.images", 100_000)]
    cifar = trained("cifar10-at-small", narrow) if os.environ.get("ADVEBM_DATA") and not args.quick else ""
    about = machine(args.device)
    print(json.dumps(about, indent=1), flush=True)
    rows: list[dict[str, Any]] = []
    result = {"machine": about, "quick": args.quick, "repeats": repeats, "rows": rows}
    for row in ROWS:
        if any(word in row.name.lower() for word in words):
            print(row.name, flush=True)
            sides = measure(contestants(row, cifar, digits, args.device, args.quick), min(repeats, row.repeats))
            rows.append({"name": row.name, "peer": next(iter(sides)), "sides": sides})
            print(show.row(rows[-1], about["peak"]), flush=True)
            show.write(args.out, result)
    if args.curves:
        result["curves"] = curves(min(repeats, 3), args.device, args.quick)
    print(*show.write(args.out, result), sep="\n")


if __name__ == "__main__":
    main()
