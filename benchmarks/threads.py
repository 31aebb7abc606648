"""``python -m benchmarks.threads [TURNS]``: images a second of digits' adversarial training, by threads and their wait.

Every setting in turn, alone and beside two processes that compute without end: medians, the least and the most.
300,000 turns of waiting are OpenMP's own.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from advebm.core.threads import SPINS

LINES = 20  # of the log, of 256 images each, that are looked at; the first three are not
PATIENCE = 60.0  # seconds for them
SETTINGS = {"1 thread": (1, "300000"), "2 threads": (2, "300000"), f"2 threads, {SPINS} turns": (2, SPINS)}


def speed(threads: int, spins: str) -> float:
    """The median over a run's lines."""
    options = {"recipe": "digits-at", "train.images": 1_000_000, "train.log_every": 256, "threads": threads}
    options |= {"train.validate_every": 1_000_000, "train.checkpoint_every": 1_000_000, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "advebm", "train", *words, "--out", f"{folder}/run"]
        environment = {**os.environ, "GOMP_SPINCOUNT": spins}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log, end, found = Path(folder, "run", "metrics.jsonl"), time.monotonic() + PATIENCE, list[float]()
        while len(found) < LINES and time.monotonic() < end:
            time.sleep(0.5)
            lines = log.read_text().splitlines() if log.exists() else []
            found = [json.loads(line).get("perf/img_per_s") for line in lines if line.endswith("}")]
            found = [value for value in found if value]
        process.kill()
        process.wait()
    return statistics.median(found[3:]) if len(found) > 3 else float("nan")


def main() -> None:
    """Measure and print."""
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(turns):
        for load, count in (("alone", 0), ("beside two busy processes", 2)):
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
            for name, setting in SETTINGS.items():
                found.setdefault((load, name), []).append(speed(*setting))
            for process in busy:
                process.kill()
                process.wait()
    print(f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for (load, name), values in found.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"{load:28}{name:28}{statistics.median(values):7,.0f} images a second ({spread}, {turns} turns)")


if __name__ == "__main__":
    main()
