"""Hand-made mutants of ``mutants.yaml``: with each in place some test must fail.

``make mutants`` copies the package, applies one mutant at a time and runs the tests that should notice.  A mutant that
survives means that a test is missing.  ``python tests/mutants.py WORD`` runs those whose name or file holds WORD.
"""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    """A text that stands once in a file of the package, what to put in its place, and the tests that should notice."""

    name: str
    file: str
    text: str
    instead: str
    tests: str  # folder/name of tests/folder/test_name.py

    @property
    def test_file(self) -> Path:
        """Relative to the repository."""
        path = Path("tests", self.tests)
        return path.with_name(f"test_{path.name}.py")


def mutants() -> list[Mutant]:
    return [Mutant(**row) for row in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())]


def apply(mutant: Mutant, package: Path) -> None:
    path = package / mutant.file
    text = path.read_text()
    if text.count(mutant.text) != 1:
        raise SystemExit(f"mutant {mutant.name!r}: its text stands {text.count(mutant.text)} times in {mutant.file}")
    path.write_text(text.replace(mutant.text, mutant.instead))


def killer(mutant: Mutant) -> str:
    """The test that fails with the mutant in place, or the empty string."""
    with tempfile.TemporaryDirectory() as folder:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "src", Path(folder, "src"), ignore=ignore)
        shutil.copytree(ROOT / "tests", Path(folder, "tests"), ignore=ignore)
        apply(mutant, Path(folder, "src", "advebm"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(mutant.test_file)]
        environment = {**os.environ, "PYTHONPATH": str(Path(folder, "src")), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.M)
        if done.returncode not in (0, 1) or (done.returncode == 1 and not found):
            raise SystemExit(f"{mutant.name!r}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return found[1] if found else ""


def main(words: list[str]) -> int:
    chosen = [m for m in mutants() if all(word in m.name or word in m.file for word in words)]
    begun, survivors = time.perf_counter(), []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, test in zip(chosen, pool.map(killer, chosen), strict=True):
            print(f"{'killed  ' if test else 'SURVIVED'}  {mutant.file:28} {mutant.name:42} {test}", flush=True)
            survivors += [] if test else [mutant.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed in {time.perf_counter() - begun:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
