"""Checkpoints: whole or absent, checked when read, the last two and the best kept.

``checkpoints/<images>/`` is the folder of a published model plus ``state/`` (optimiser, progress, every stream's
state).  It is written under another name, renamed, and only then named in ``checkpoints/LATEST``, one line replaced in
one step.  So at any moment LATEST names a whole checkpoint.
"""

import dataclasses
import hashlib
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from advebm import files
from advebm.errors import UserError
from advebm.models import network
from advebm.models.ema import EMA
from advebm.models.network import Architecture, Network
from advebm.training.engine import Engine


@dataclasses.dataclass
class Progress:
    """Where a run is.

    Attributes:
        images: seen so far.
        attempt: number of rollbacks; other attempts draw other random numbers.
        rate: factor on the learning rate, lowered by rollbacks.
        best: highest validation score so far, -1 before the first.
        best_images: when it was reached.
        seconds: of training, over all sessions.
    """

    images: int = 0
    attempt: int = 0
    rate: float = 1.0
    best: float = -1.0
    best_images: int = 0
    seconds: float = 0.0

    def passed(self, every: int, before: int, total: int) -> bool:
        """Whether a multiple of ``every`` images, or the end, lies between ``before`` and now."""
        return before // every != self.images // every or self.images >= total


class Checkpoints:
    """The ``checkpoints`` folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, which: str = "latest") -> Path:
        """The checkpoint that LATEST or BEST names, or the one of some number of images; whole, or an error."""
        name = which
        if which in ("latest", "best"):
            pointer = self.folder / which.upper()
            if not pointer.exists():
                raise UserError(f"{self.folder} has no {which} checkpoint yet")
            name = pointer.read_text().strip()
        path = self.folder / name
        if not path.is_dir():
            raise UserError(f"there is no checkpoint {path}; there is {', '.join(self.names()) or 'none'}")
        self._verify(path)
        return path

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
        return Progress(**files.read_json(path / "state" / "progress.json"))

    def _publish(self, draft: Path, name: str, progress: Progress) -> None:
        written = sorted(p for p in draft.rglob("*") if p.is_file())
        files.write_json(draft / "state" / "sha256.json", {str(p.relative_to(draft)): _digest(p) for p in written})
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed before LATEST named it
        draft.rename(target)
        previous = (self.folder / "LATEST").read_text().strip() if (self.folder / "LATEST").exists() else name
        files.write(self.folder / "LATEST", name + "\n")
        if progress.best_images == progress.images and progress.best >= 0:
            files.write(self.folder / "BEST", name + "\n")
        best = (self.folder / "BEST").read_text().strip() if (self.folder / "BEST").exists() else name
        for old in set(self.names()) - {name, previous, best}:
            shutil.rmtree(self.folder / old)

    def _verify(self, path: Path) -> None:
        digests: dict[str, str] = files.read_json(path / "state" / "sha256.json")
        for file, digest in digests.items():
            if not (path / file).exists() or _digest(path / file) != digest:
                others = [name for name in self.names() if name != path.name]
                fix = f"; to go on from {others[-1]}: echo {others[-1]} > {self.folder / 'LATEST'}" if others else ""
                raise UserError(f"checkpoint {path} is damaged: {file} is not what was written{fix}")


def _pack(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
