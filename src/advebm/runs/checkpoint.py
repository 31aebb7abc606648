"""Checkpoints, written atomically and verified when read; the last two and the best are kept.

``checkpoints/<images>/`` is the folder of a published model plus ``state/`` (optimiser, progress, every stream's
state).  It is written under a temporary name and renamed, and then ``checkpoints/LATEST`` is replaced atomically by its
name.  So LATEST always names a complete checkpoint.
"""

import dataclasses
import hashlib
import io
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from advebm.core import files
from advebm.core.errors import UserError
from advebm.models import network
from advebm.models.ema import EMA
from advebm.models.network import Architecture, Network
from advebm.runs.engine import Engine


@dataclasses.dataclass
class Progress:
    """The progress of a run.

    Attributes:
        images: images seen so far.
        attempt: number of rollbacks; each attempt draws different random numbers.
        rate: factor on the learning rate, lowered by rollbacks.
        best: two numbers of the best validation so far, see :func:`advebm.training.validate.rank`: larger is better,
            and the second decides if the first are equal; None before the first.
        best_images: images seen when they were reached.
        seconds: training time up to here, over all sessions.
    """

    images: int = 0
    attempt: int = 0
    rate: float = 1.0
    best: tuple[float, float] | None = None
    best_images: int = 0
    seconds: float = 0.0

    @property
    def at_best(self) -> bool:
        """Whether the best scores were reached at the current number of images."""
        return self.best_images == self.images

    def due_after(self, batch: int, total: int) -> Callable[[int], bool]:
        """Return a function that tells whether a multiple of a period, or ``total``, lies in the next ``batch``."""
        before, after = self.images, self.images + batch
        return lambda every: before // every != after // every or after >= total


class Checkpoints:
    """The ``checkpoints`` folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, which: str = "latest") -> Path:
        """Return the folder of a verified checkpoint: ``latest``, ``best``, or a number of images such as ``20000``."""
        name = self.latest() if which in ("latest", "best") else which
        if name not in self.names():
            existing, hint = ", ".join(self.names()) or "none", self._recovery(name) if which == "latest" else ""
            raise UserError(f"there is no checkpoint {name!r} in {self.folder}; there is {existing}{hint}")
        if which == "best":
            name = str(files.read_json(self._verify(name) / "state" / "progress.json")["best_images"])
        return self._verify(name)

    def latest(self) -> str:
        """Return the name in LATEST; an empty string before the first checkpoint."""
        path = self.folder / "LATEST"
        try:
            name = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            if isinstance(error, FileNotFoundError) and self.names() in ([], ["0"]):  # interrupted before the first
                return ""
            name = ""
        if not name.isdigit():
            hint = self._recovery("") or "; there is no whole checkpoint"
            raise UserError(f"{path} is damaged: it names no checkpoint{hint}")
        return name

    def names(self) -> list[str]:
        """Return the names of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted((p.name for p in self.folder.iterdir() if p.is_dir() and p.name.isdigit()), key=int)

    def save(
        self,
        engine: Engine,
        model: Network,
        ema: EMA | None,
        architecture: Architecture,
        optimizer: torch.optim.Optimizer,
        states: Mapping[int, Any],
        progress: Progress,
        *,
        title: str,
        extra: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint; every process calls this, with the states of its own streams."""
        name, draft = str(progress.images), self.folder / f".{progress.images}.tmp"
        try:
            if engine.main:
                shutil.rmtree(draft, ignore_errors=True)
                (draft / "state").mkdir(parents=True)
            engine.barrier()
            for stream, state in states.items():
                if state is not None:
                    files.write(draft / "state" / f"stream-{stream}.pt", _serialize(state.state_dict()))
            if engine.main:
                average = None if ema is None else ema.state_dict()
                network.save(draft, model, architecture, title=title, summary="A checkpoint.", ema=average, extra=extra)
                files.write(draft / "state" / "optimizer.pt", _serialize(optimizer.state_dict()))
                files.write_json(draft / "state" / "progress.json", dataclasses.asdict(progress))
            engine.barrier()
            if engine.main:
                self._publish(draft, name, progress)
        except OSError as error:
            raise files.as_user_error(self.folder / name, error) from None
        finally:
            if engine.main:
                shutil.rmtree(draft, ignore_errors=True)  # it was renamed, or writing failed
        engine.barrier()

    def load(
        self, model: Network, ema: EMA | None, optimizer: torch.optim.Optimizer, states: Mapping[int, Any]
    ) -> Progress:
        """Load the latest checkpoint into the arguments, and return its progress."""
        path = self.path()
        network.load_weights(model, path / "model.safetensors")
        if ema is not None:
            network.load_weights(ema.module, path / "ema.safetensors")
        optimizer.load_state_dict(_on_host(path / "state" / "optimizer.pt"))
        for stream, state in states.items():
            if state is not None:
                state.load_state_dict(_on_host(path / "state" / f"stream-{stream}.pt"))
        progress = Progress(**files.read_json(path / "state" / "progress.json"))
        progress.best = progress.best and (progress.best[0], progress.best[1])
        return progress

    def _publish(self, draft: Path, name: str, progress: Progress) -> None:
        paths = sorted(p for p in draft.rglob("*") if p.is_file())
        files.write_json(draft / "state" / "sha256.json", {str(p.relative_to(draft)): _sha256(p) for p in paths})
        target, previous = self.folder / name, self.latest()
        shutil.rmtree(target, ignore_errors=True)  # left by a process that was killed before it wrote LATEST
        draft.rename(target)
        files.write(self.folder / "LATEST", name + "\n")
        for old in set(self.names()) - {name, previous, str(progress.best_images)}:
            shutil.rmtree(self.folder / old)

    def _verify(self, name: str) -> Path:
        """Return the folder of a checkpoint; raise ``UserError`` if a file differs from its sha256."""
        path = self.folder / name
        digests = files.read_json(path / "state" / "sha256.json", default={})
        if not isinstance(digests, dict) or not digests.keys() >= NEEDED:
            raise UserError(f"checkpoint {path} is damaged: state/sha256.json is not whole{self._recovery(name)}")
        for file, digest in digests.items():
            if not (path / file).is_file() or _sha256(path / file) != digest:
                raise UserError(f"checkpoint {path} is damaged: {file} is not what was written{self._recovery(name)}")
        return path

    def _recovery(self, name: str) -> str:
        others = [other for other in self.names() if other != name]
        return f"; to go on from {others[-1]}: echo {others[-1]} > {self.folder / 'LATEST'}" if others else ""


NEEDED = {"model.safetensors", "config.json", "state/optimizer.pt", "state/progress.json"}


def _serialize(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _on_host(path: Path) -> Any:
    """Return what :func:`_serialize` wrote, on the CPU, whichever device the run was on; its owner moves it."""
    return torch.load(path, weights_only=True, map_location="cpu")


def weights(path: Path) -> str:
    """Return the sha256 of the weights that are loaded from a checkpoint: the averaged ones if it has any."""
    digests = files.read_json(path / "state" / "sha256.json")
    return digests.get("ema.safetensors", digests["model.safetensors"])


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
