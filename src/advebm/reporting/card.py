"""A model as it is published: its weights by themselves, and a card that says what they are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from advebm import config, evaluation, files, recipes
from advebm.errors import UserError, unknown
from advebm.models import network
from advebm.models.network import Weights
from advebm.reporting.build import describe_sampler, row
from advebm.tables import class_tables, markdown
from advebm.training.recipe import resolve
from advebm.training.run import Run


def publish(run: Run, folder: Path, *, checkpoint: str = "latest", weights: Weights = "float32") -> Path:
    """The model of a run by itself, for others: averaged weights, the architecture, a card with what was measured.

    Args:
        run: that was trained.
        folder: a new or empty one.
        checkpoint: ``latest``, ``best`` or a number of images.
        weights: what they are kept in; float16 takes half of the space and rounds less than bfloat16.

    Returns:
        The folder, which :func:`advebm.load` takes.

    Raises:
        UserError: a folder that holds something, weights of no such kind, or a network of one's own, whose code others
            do not have.
    """
    if weights not in get_args(Weights):
        raise unknown("kind of weights", weights, get_args(Weights))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; choose another")
    recipe, path = run.recipe, run.checkpoints.path(checkpoint)
    before = "".join(f" after `{stage.name}`" for stage in recipe.before)
    listed, options = recipe.name in recipes.names(), _plain(config.describe(recipe))
    same = listed and options == _plain(config.describe(resolve(recipes.find(recipe.name))))
    changed = "" if same else ", with options of its own (in config.json)"
    network.read_architecture(path)  # refuses what would import code
    model, architecture = run.model(checkpoint)
    known = files.read_json(path / "config.json")
    progress = files.read_json(path / "state" / "progress.json")
    machine = files.read_json(run.folder / "env.json", default={})
    records = [r for r in evaluation.latest(run.records()) if r.get("checkpoint") == path.name]
    trained = (
        f"Recipe `{recipe.name}`{changed}: objective `{options['objective']['kind']}` on {known['data']}{before}, "
        f"{progress['images']:,} training images, {progress['seconds'] / 60:.0f} minutes on {machine.get('device')} "
        f"({machine.get('threads')} of {machine.get('cores')} cores, {machine.get('system')}, torch "
        f"{machine.get('torch')}, begun {str(machine.get('started'))[:10]}). Weights in {weights}, measured in float32."
    )
    plain = [{k: r[k] for k in ("name", "value", "error", "count")} for r in records]
    measured = [{**p, "samples": r["settings"].get("samples")} for p, r in zip(plain, records, strict=True)]
    again = f"advebm train --recipe {recipe.name} --init PATH --train.images 0 --out RUN"
    use = f"Everything else (drawing, editing, measuring) works on a run:\n\n```\n{again}\n```\n\n"
    network.save(
        folder,
        model,
        architecture,
        title=recipe.name,
        summary=trained,
        more=use * listed + _measured(records),
        weights=weights,
        extra={
            **{k: v for k, v in known.items() if k not in ("advebm", "architecture")},
            "options": options,
            "measured": measured,
        },
    )
    return folder


def _plain(options: Any) -> Any:
    """Options without places on somebody's machine."""
    if isinstance(options, Mapping):
        return {k: None if k in ("path", "init", "teacher") else _plain(v) for k, v in options.items()}
    return [_plain(option) for option in options] if isinstance(options, list) else options


def _measured(records: Sequence[Mapping[str, Any]]) -> str:
    """Evaluation records for a card: a table, how samples were drawn, and what classes they are taken for."""
    if not records:
        return ""
    texts = [row(record) for record in records]
    keys = {"name": "measured", "samples": "samples", "value": "value", "count": "n"}
    parts = ["## Measured", "± standard error.", markdown([*keys.values()], [[t[k] for k in keys] for t in texts])]
    drawn = {t["samples"]: r["settings"] for t, r in zip(texts, records, strict=True) if t["samples"]}
    if drawn:
        parts.append("\n".join(f"- {name}: {describe_sampler(settings)}." for name, settings in drawn.items()))
    parts += [markdown(*table) for table in class_tables(records)]
    return "\n\n".join(parts)
