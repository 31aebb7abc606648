"""Edit images by a run's model, with a progress bar."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from advebm.core import config, console, files
from advebm.core.config import KINDS
from advebm.core.errors import UserError, unknown_name
from advebm.edits.base import Edit
from advebm.sampling import edit_job

# Options that only some edits take.
TAKERS = {
    "mask": ("inpaint", "paint"),
    "box": ("inpaint", "paint"),
    "others": ("compose",),
    "classes": ("compose",),
    "amount": ("translate",),
    "source": ("translate", "counterfactual", "score"),
    "goal": ("translate", "inpaint", "paint", "denoise", "upsample", "counterfactual"),
}


def check_options(what: str, given: Mapping[str, Any]) -> None:
    """Raise UserError for an unknown edit, for options that it does not take, and for a count below 1."""
    if what not in ("score", *KINDS["edit"]):
        raise unknown_name("edit", what, ["score", *KINDS["edit"]])
    for name, takers in TAKERS.items():
        value = given.get(name)
        if value is not None and not (isinstance(value, list | tuple) and not value) and what not in takers:
            flag = {"goal": "class", "others": "with", "source": "from"}.get(name, name)
            raise UserError(f"--{flag} is for {', '.join(takers)}; {what} takes none")
    if given["count"] < 1:
        raise UserError(f"--count must be at least 1, got {given['count']}")
    if given.get("image") and (given.get("split") or given.get("source")):
        raise UserError("--image or --split, not both; --from goes with --split")


def find_edit(what: str, settings: Iterable[tuple[str, Any]] = ()) -> Edit:
    """Return an edit by its name, with settings such as ``("edit.steps", 60)``.

    Raises:
        UserError: there is no such edit, or it has no such setting.
    """
    plain: Any = {"edit": config.describe(config.build(what, "edit"))}
    for name, value in settings:
        plain = config.override(plain, name, value)
    method: Edit = config.build(plain["edit"], "edit")
    return method


def edit(request: edit_job.EditRequest, method: Edit) -> edit_job.EditedImages:
    """Edit images by :func:`advebm.sampling.edit_job.run_edit`, with a progress bar."""
    total = len(edit_job.list_images(request.images)) if request.images else request.count
    with console.bar(config.describe(method)["kind"], total, 0) as progress:
        return edit_job.run_edit(request, method, progress=progress)


def choose_folder(what: str, request: edit_job.EditRequest, out: Path | None, *, replace: bool = False) -> Path:
    """Return where results go: to ``out``, or to the run's ``edits/WHAT``, with a number if results are there.

    Raises:
        UserError: ``out`` has results and ``replace`` is false, or it holds something other than an edit.
    """
    finished = lambda folder: "models" in edit_job.check_folder(folder)
    default = request.run.folder / "edits" / what
    folder = files.new_path(out or default, named=out is not None, replace=replace, taken=finished)
    edit_job.check_folder(folder)
    return folder
