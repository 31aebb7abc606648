"""Checkpoints: whole or absent, checked when read; the last two and the best are kept.

``checkpoints/<images>/`` is the folder of a published model plus ``state/`` (optimiser, progress, every stream's
state).  It is written under another name, renamed, and only then named in ``checkpoints/LATEST``, one line replaced in
one step.  So at any moment LATEST names a whole checkpoint.
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
    """Where a run is.

    Attributes:
        images: seen so far.
        attempt: number of rollbacks; other attempts draw other random numbers.
        rate: factor on the learning rate, lowered by rollbacks.
        best: highest validation scores so far, robust accuracy first, then clean; -1 before the first.
        best_images: when they were reached.
        seconds: of training that led here, over all sessions.
    """

    images: int = 0
    attempt: int = 0
    rate: float = 1.0
    best: tuple[float, float] = (-1.0, -1.0)
    best_images: int = 0
    seconds: float = 0.0

    @property
    def at_best(self) -> bool:
        """Whether the highest scores were reached just now."""
        return self.best_images == self.images

    def due_after(self, batch: int, total: int) -> Callable[[int], bool]:
        """Whether a multiple of so many images, or the end of ``total``, comes within the next ``batch``."""
        before, after = self.images, self.images + batch
        return lambda every: before // every != after // every or after >= total


class Checkpoints:
    """The ``checkpoints`` folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, which: str = "latest") -> Path:
        """A whole checkpoint: the ``latest``, the ``best`` so far, or the one of some number of images."""
        name = self.latest() if which in ("latest", "best") else which
        if name not in self.names():
            there, hint = ", ".join(self.names()) or "none", self._way_out(name) if which == "latest" else ""
            raise UserError(f"there is no checkpoint {name!r} in {self.folder}; there is {there}{hint}")
        if which == "best":
            name = str(files.read_json(self._verified(name) / "state" / "progress.json")["best_images"])
        return self._verified(name)

    def latest(self) -> str:
        """What LATEST says; the empty string before there is one."""
        try:
            name = (self.folder / "LATEST").read_text().strip()
        except FileNotFoundError:
            if self.names() in ([], ["0"]):  # killed before the first checkpoint was named
                return ""
            name = ""
        except (OSError, UnicodeDecodeError):
            name = ""
        if not name.isdigit():
            there = self._way_out("") or "; there is no whole checkpoint"
            raise UserError(f"{self.folder / 'LATEST'} is damaged: it names no checkpoint{there}")
        return name

    def names(self) -> list[str]:
        """Whole checkpoints, oldest first."""
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
        """Write a checkpoint of this moment; every process calls this, with the states of its own streams."""
        name, draft = str(progress.images), self.folder / f".{progress.images}.tmp"
        try:
            if engine.main:
                shutil.rmtree(draft, ignore_errors=True)
                (draft / "state").mkdir(parents=True)
            engine.barrier()
            for stream, state in states.items():
                if state is not None:
                    files.write(draft / "state" / f"stream-{stream}.pt", _pack(state.state_dict()))
            if engine.main:
                average = None if ema is None else ema.state_dict()
                network.save(draft, model, architecture, title=title, summary="A checkpoint.", ema=average, extra=extra)
                files.write(draft / "state" / "optimizer.pt", _pack(optimizer.state_dict()))
                files.write_json(draft / "state" / "progress.json", dataclasses.asdict(progress))
            engine.barrier()
            if engine.main:
                self._publish(draft, name, progress)
        except OSError as error:
            raise files.unwritable(self.folder / name, error) from None
        finally:
            if engine.main:
                shutil.rmtree(draft, ignore_errors=True)  # published by now, or not to be
        engine.barrier()

    def load(
        self,
        model: Network,
        ema: EMA | None,
        optimizer: torch.optim.Optimizer,
        states: Mapping[int, Any],
    ) -> Progress:
        """Put everything back as it was at the latest checkpoint."""
        path = self.path()
        network.load_weights(model, path / "model.safetensors")
        if ema is not None:
            network.load_weights(ema.module, path / "ema.safetensors")
        optimizer.load_state_dict(torch.load(path / "state" / "optimizer.pt", weights_only=True))
        for stream, state in states.items():
            if state is not None:
                state.load_state_dict(torch.load(path / "state" / f"stream-{stream}.pt", weights_only=True))
        progress = Progress(**files.read_json(path / "state" / "progress.json"))
        progress.best = (progress.best[0], progress.best[1])
        return progress

    def _publish(self, draft: Path, name: str, progress: Progress) -> None:
        written = sorted(p for p in draft.rglob("*") if p.is_file())
        files.write_json(draft / "state" / "sha256.json", {str(p.relative_to(draft)): _digest(p) for p in written})
        target, previous = self.folder / name, self.latest()
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed before LATEST named it
        draft.rename(target)
        files.write(self.folder / "LATEST", name + "\n")
        for old in set(self.names()) - {name, previous, str(progress.best_images)}:
            shutil.rmtree(self.folder / old)

    def _verified(self, name: str) -> Path:
        """The folder of a checkpoint, if every file in it is what was written."""
        path = self.folder / name
        digests = files.read_json(path / "state" / "sha256.json", default={})
        if not isinstance(digests, dict) or not digests.keys() >= NEEDED:
            raise UserError(f"checkpoint {path} is damaged: state/sha256.json is not whole{self._way_out(name)}")
        for file, digest in digests.items():
            if not (path / file).exists() or _digest(path / file) != digest:
                raise UserError(f"checkpoint {path} is damaged: {file} is not what was written{self._way_out(name)}")
        return path

    def _way_out(self, name: str) -> str:
        others = [other for other in self.names() if other != name]
        return f"; to go on from {others[-1]}: echo {others[-1]} > {self.folder / 'LATEST'}" if others else ""


NEEDED = {"model.safetensors", "config.json", "state/optimizer.pt", "state/progress.json"}


def _pack(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def weights(path: Path) -> str:
    """The sha256 of the weights that a model of a whole checkpoint has: the averaged ones where there are any."""
    digests = files.read_json(path / "state" / "sha256.json")
    return digests.get("ema.safetensors", digests["model.safetensors"])


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
