"""Export a model for publication: its weights, and a model card."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from advebm import recipes
from advebm.core import config, files
from advebm.core.errors import UserError, unknown_name
from advebm.evaluation import evaluate
from advebm.models import network
from advebm.models.network import Architecture, Weights
from advebm.reporting.build import describe_sampler
from advebm.reporting.records import as_text, class_tables, markdown
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run


def write_model(run: Run, folder: Path, *, checkpoint: str = "latest", weights: Weights = "float32") -> Path:
    """Write the weights of a run's model (averaged, if the run averages them) and a card with its evaluation results.

    Args:
        run: the trained run.
        folder: a new or empty folder.
        checkpoint: ``latest``, ``best`` or a number of training images.
        weights: data type of the saved weights; float16 takes half the space of float32 and rounds less than bfloat16.

    Returns:
        The folder, which :func:`advebm.load` accepts.

    Raises:
        UserError: a folder that is not empty or not writable, an unknown type of weights, weights too large for that
            type, or a user-defined network, whose code others do not have.
    """
    if weights not in get_args(Weights):
        raise unknown_name("kind of weights", weights, get_args(Weights))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; choose another")
    path = run.checkpoints.path(checkpoint)
    network.read_architecture(path)  # raises if loading would import user code
    model, architecture = run.model(checkpoint)
    known = files.read_json(path / "config.json")
    records = evaluate.newest_records(
        r for r in run.records() if r.get("checkpoint") == path.name and _own(r, path.name)
    )
    own = ("name", "value", "error", "count")
    numbers = [{**{k: r[k] for k in own}, "samples": r["settings"].get("samples")} for r in records]
    options = _public(config.describe(run.recipe))
    extra = {**{k: v for k, v in known.items() if k not in ("advebm", "architecture")}, "options": options}
    rounded = "" if weights == "float32" else f" Weights were rounded to {weights} after what is below was measured."
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as draft:
            network.save(
                Path(draft) / "model",
                model,
                architecture,
                title=run.recipe.name,
                summary=_trained(run, path, known["data"]) + rounded,
                more=_use(architecture, run.recipe, known) + _measured(records),
                weights=weights,
                extra={**extra, "measured": numbers},
            )
            (Path(draft) / "model").replace(folder)
    except OSError as error:
        raise files.as_user_error(folder, error) from None
    return folder


def _own(record: Mapping[str, Any], checkpoint: str) -> bool:
    """Return whether a record is about the model itself or about samples of this checkpoint, not about other images."""
    settings = record["settings"]
    return "samples" not in settings or settings.get("checkpoint") == checkpoint


def _public(options: Any) -> Any:
    """Return options with local paths replaced by None."""
    if isinstance(options, Mapping):
        hidden = {k for k in ("path", "init", "teacher") if not str(options.get(k)).startswith("hf:")}
        return {k: None if k in hidden else _public(v) for k, v in options.items()}
    return [_public(option) for option in options] if isinstance(options, list) else options


def _trained(run: Run, path: Path, data: str) -> str:
    """Return a sentence on the training of a checkpoint: each stage with its images and minutes, and the machine."""
    parts = []
    for stage in run.stages:
        recipe, at = stage.recipe, path if stage is run else stage.checkpoints.path()
        options = _public(config.describe(recipe))
        same = recipe.name in recipes.names() and options == _public(
            config.describe(resolve(recipes.find(recipe.name)))
        )
        progress = files.read_json(at / "state" / "progress.json")
        about = f"objective `{options['objective']['kind']}`, {progress['images']:,} images"
        own = "" if same else ", options in `config.json`"
        start = ", beginning with other weights" if recipe.init is not None else ""
        parts.append(f"`{recipe.name}` ({about}, {progress['seconds'] / 60:.0f} minutes{start}{own})")
    machine = files.read_json(run.folder / "env.json")
    cores = f"{machine.get('threads')} of {machine.get('cores')} cores, {machine.get('system')}"
    where = f" On {machine['device']} ({cores}, torch {machine.get('torch')}), {machine['started'][:10]}."
    return f"Trained on {data}: {', then '.join(parts)}." + where


def _use(architecture: Architecture, recipe: Recipe, known: Mapping[str, Any]) -> str:
    """Return Markdown that says how to make a run of a published classifier; empty for other models."""
    if architecture.hidden is not None or architecture.outputs != len(known["classes"]):
        return ""
    kind = config.describe(recipe.data)["kind"]
    command = f"advebm evaluate --model PATH --data {kind} --metrics accuracy --out RUN"
    return f"For drawing, editing and measuring, make it a run:\n\n```\n{command}\n```\n\n"


def _measured(records: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown of evaluation records: a table, the sampler settings, and how samples of each class classify."""
    if not records:
        return ""
    texts = [as_text(record) for record in records]
    keys = {"name": "measured", "samples": "samples", "value": "value", "count": "n"}
    parts = ["## Measured", "± standard error.", markdown([*keys.values()], [[t[k] for k in keys] for t in texts])]
    drawn = {t["samples"]: r["settings"] for t, r in zip(texts, records, strict=True) if t["samples"]}
    if drawn:
        parts.append("\n".join(f"- {name}: {describe_sampler(settings)}." for name, settings in drawn.items()))
    parts += [markdown(*table) for table in class_tables(records)]
    return "\n\n".join(parts)
