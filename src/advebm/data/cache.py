"""What was computed from images once and is kept in the cache folder."""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from advebm.core import files
from advebm.core.errors import UserError
from advebm.data.decode import READER

Value = TypeVar("Value")


def cached(content: Iterable[bytes], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the result of ``make``, cached on disk under the hash of ``content``.

    The folder is ``ADVEBM_CACHE``, else ``advebm`` in the user's cache folder.  If the cache cannot be written, a
    warning is given; a damaged cache file is replaced.
    """
    digest = hashlib.sha256(READER)
    for piece in content:
        digest.update(hashlib.sha256(piece).digest())
    path = cache_folder() / f"{digest.hexdigest()[:32]}.safetensors"
    try:
        return safetensors.load_file(path)
    except (OSError, SafetensorError):
        made = {name: value.contiguous() for name, value in make().items()}
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.save_file(made, draft)
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        warnings.warn(f"decoded images are not cached: {files.as_user_error(path, OSError(str(error)))}", stacklevel=2)
    return made


def cache_folder() -> Path:
    chosen = os.environ.get("ADVEBM_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "advebm"


def remember(question: str, answer: Callable[[], Value]) -> Value:
    """Return ``answer()``, a value that JSON holds, computed once and kept in the cache under its ``question``."""
    path = cache_folder() / f"{hashlib.sha256(READER + question.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    value = answer()
    with contextlib.suppress(UserError):
        files.write_json(path, value)
    return value
