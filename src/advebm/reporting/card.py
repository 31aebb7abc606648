"""Export a model for publication: its weights, and a model card."""

import dataclasses
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from advebm import recipes
from advebm.core import config, files
from advebm.core.errors import Notice, UserError, unknown_name
from advebm.data.readers import Cifar10, Cifar100
from advebm.evaluation import evaluate
from advebm.metrics.texts import as_text
from advebm.models import hub, network
from advebm.models.excerpt import Published, is_public, original_data, write_excerpt
from advebm.models.factory import Own
from advebm.models.network import Architecture, Weights, locate
from advebm.models.zoo.transformers import Transformers
from advebm.reporting.build import describe_sampler
from advebm.reporting.records import class_tables, markdown
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.sampling.tune import find_tuned

HUB_DATASETS = {"cifar10": Cifar10.hub, "cifar100": Cifar100.hub}
QUANTITIES = ("accuracy", "FD", "FID", "KID")  # that a card's metadata list
PUBLIC_IMAGES = 4  # of each class, of public data sets


def write_model(
    run: Run,
    folder: Path,
    *,
    checkpoint: str = "latest",
    weights: Weights = "float32",
    images: int | None = None,
    license: str | None = None,
) -> Path:
    """Write the weights of a run's model (averaged, if the run averages them) and a card with its evaluation results.

    Args:
        run: the trained run.
        folder: a new or empty folder.
        checkpoint: ``latest``, ``best`` or a number of training images.
        weights: data type of the saved weights; float16 takes half the space of float32 and rounds less than bfloat16.
        images: test images of each class that go along, with Gaussians of the training images, so that the model can be
            sampled where its data are not; 0: neither.  None: 4 of public data sets, 0 of other data.
        license: an identifier that the Hub knows, such as ``mit`` or ``cc-by-4.0``, for the card; None: it names none.

    Returns:
        The folder, which :func:`advebm.load` accepts.

    Raises:
        UserError: a folder that is not empty or not writable, an unknown type of weights, weights too large for that
            type, or a user-defined class of backbones or a network of a local folder, which others do not have.
    """
    if weights not in get_args(Weights):
        raise unknown_name("kind of weights", weights, get_args(Weights))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; choose another")
    path = run.checkpoints.path(checkpoint)
    model, architecture = run.model(checkpoint)
    if isinstance(architecture.backbone, Own):
        architecture = dataclasses.replace(architecture, backbone=Own(architecture.backbone.path))  # without its folder
    elif isinstance(architecture.backbone, Transformers) and Path(architecture.backbone.name).is_dir():
        raise UserError(
            f"the network of {run.folder} is described in {architecture.backbone.name}, which others do not have; "
            "publish that folder by transformers' push_to_hub, and adopt it as hf:USER/NAME"
        )
    else:
        network.read_architecture(path)  # raises if loading would import a class of the user's
    saved = files.read_json(path / "config.json")
    records = evaluate.newest_records(
        r for r in run.records() if r.get("checkpoint") == path.name and _describes_checkpoint(r, path.name)
    )
    fields = ("name", "value", "error", "count")
    extra = {key: value for key, value in saved.items() if key not in ("advebm", "architecture")}
    options = config.describe(run.recipe)
    if isinstance(run.recipe.data, Published):  # the data are those of the model that the run was made around
        published = locate(run.recipe.data.model)[0]
        extra |= {k: v for k, v in files.read_json(published / "config.json").items() if k in ("data", "images_digest")}
        options["data"] = original_data(published)
    if (probed := _probed(run)) is not None:
        extra["probed"] = probed.recipe.name
    tuned = find_tuned(run, run.recipe.sampler)
    if tuned is not None and tuned[1]["checkpoint"] == path.name:
        options["sampler"] = config.describe(tuned[0])
    extra["options"] = _hide_local_paths(options)
    extra["measured"] = [{**{k: r[k] for k in fields}, "samples": r["settings"].get("samples")} for r in records]
    rounded = "" if weights == "float32" else f" Weights were rounded to {weights} after what is below was measured."
    if images is None:
        images = PUBLIC_IMAGES if is_public(options["data"]) and _has_data(run) else 0
    if images and not isinstance(run.recipe.data, Published):  # whose digest is that of its own model
        extra["images_digest"] = run.data.digest()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            network.save(
                Path(temporary) / "model",
                model,
                architecture,
                title=run.recipe.name,
                summary=_training_sentence(run, path, saved["data"]) + rounded,
                metadata=hub_metadata(run.recipe.name, architecture, options["data"], records, license),
                more=_usage(architecture, extra, images) + _results_section(records),
                weights=weights,
                extra=extra,
            )
            if images:
                write_excerpt(Path(temporary) / "model", run.data, images)
            (Path(temporary) / "model").replace(folder)
    except OSError as error:
        raise files.as_user_error(folder, error) from None
    return folder


def push_model(run: Run, name: str, *, private: bool = False, **options: Any) -> str:
    """Publish on the Hub, as ``hf:NAME``, what :func:`write_model` writes; return the address of the model's page.

    Args:
        run: the trained run.
        name: ``USER/NAME``.
        private: for those with access only.
        options: options of :func:`write_model`.

    Raises:
        UserError: what :func:`write_model` and :func:`advebm.models.hub.push` raise.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_model(run, Path(folder), **options)
        return hub.push(Path(folder), name, private=private)


def _has_data(run: Run) -> bool:
    """Return whether the run's images are at hand; if not, say that the model is written without them."""
    try:
        return bool(run.data.test)
    except UserError as error:
        warnings.warn(f"written without images and Gaussians to draw from: {error}", Notice, stacklevel=3)
        return False


def _describes_checkpoint(record: Mapping[str, Any], checkpoint: str) -> bool:
    """Return whether a record is about the model itself or about samples of this checkpoint, not about other images."""
    settings = record["settings"]
    return "samples" not in settings or settings.get("checkpoint") == checkpoint


def _hide_local_paths(options: Any) -> Any:
    """Return options with local paths replaced by None."""
    if isinstance(options, Mapping):
        hidden = {k for k in ("path", "root", "init", "teacher") if not str(options.get(k)).startswith("hf:")}
        if _is_on_hub(options):
            hidden.discard("path")
        return {k: None if k in hidden else _hide_local_paths(v) for k, v in options.items()}
    return [_hide_local_paths(option) for option in options] if isinstance(options, list) else options


def _is_on_hub(source: Mapping[str, Any]) -> bool:
    """Return whether a described source is a set of the Hub, rather than files on this machine."""
    return source.get("kind") == "hf" and not Path(str(source.get("path"))).exists()


def _training_sentence(run: Run, path: Path, data: str) -> str:
    """Return a sentence on the training of a checkpoint: each stage with its images and minutes, and the machine.

    Of a linear probe it is on the network that was probed.
    """
    if (probed := _probed(run)) is not None:
        head = "The head is a linear probe, fitted on the labels of the training images."
        return f"{_training_sentence(probed, probed.checkpoints.path(), data)} {head}"
    parts = []
    for stage in run.stages:
        recipe, checkpoint = stage.recipe, path if stage is run else stage.checkpoints.path()
        options = _hide_local_paths(config.describe(recipe))
        is_standard = recipe.name in recipes.names() and options == _hide_local_paths(
            config.describe(resolve(recipes.find(recipe.name)))
        )
        progress = files.read_json(checkpoint / "state" / "progress.json")
        training = f"objective `{options['objective']['kind']}`, {progress['images']:,} images"
        changed = "" if is_standard else ", options in `config.json`"
        start = ", beginning with other weights" if recipe.init is not None else ""
        parts.append(f"`{recipe.name}` ({training}, {progress['seconds'] / 60:.0f} minutes{start}{changed})")
    machine = files.read_json(run.folder / "env.json")
    cores = f"{machine.get('threads')} of {machine.get('cores')} cores, {machine.get('system')}"
    where = f" On {machine['device']} ({cores}, torch {machine.get('torch')}), {machine['started'][:10]}."
    return f"Trained on {data}: {', then '.join(parts)}." + where


def _probed(run: Run) -> Run | None:
    """Return the run whose features ``advebm probe`` fitted the run's model on; None for other runs."""
    if run.recipe.init is None or not Path(run.recipe.init, "config.json").is_file():
        return None
    is_probe = "probe" in files.read_json(Path(run.recipe.init, "config.json"))
    return Run.open(Path(run.recipe.init).parent) if is_probe else None


def hub_metadata(
    name: str,
    architecture: Architecture,
    data: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    license: str | None = None,
) -> str:
    """Return a card's metadata for the Hub as YAML: task, data set, licence, and what was measured (``model-index``).

    Args:
        name: the model's name.
        architecture: tells an encoder (``image-feature-extraction``) from what classifies.
        data: description of the training data; only sets of the Hub are named.
        records: evaluation records.  Accuracies and distances of samples are listed.
        license: identifier of the licence; None: left out.
    """
    from huggingface_hub import EvalResult, ModelCardData

    kind = str(data.get("kind"))
    dataset = data["path"] if _is_on_hub(data) else HUB_DATASETS.get(kind)
    task = "image-classification" if architecture.hidden is None else "image-feature-extraction"
    if architecture.outputs == 1:  # a critic
        task = "unconditional-image-generation"
    results = []
    for record in records:
        quantity = next((q for q in QUANTITIES if re.fullmatch(rf"{q}( under .*| \(.*)?", record["name"])), None)
        if quantity is None:
            continue
        samples = record.get("samples") or record.get("settings", {}).get("samples")
        results.append(
            EvalResult(
                task_type="unconditional-image-generation" if samples else task,
                dataset_type=dataset or kind,
                dataset_name=kind,
                dataset_split="train" if samples else "test",  # samples are compared with the training images
                metric_type=quantity.lower(),
                metric_name=f"{record['name']}, {samples}" if samples else record["name"],
                metric_value=round(record["value"], 4),
            )
        )
    metadata = ModelCardData(
        library_name="advebm",
        license=license,
        tags=list(network.TAGS),
        datasets=[dataset] if dataset else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        pipeline_tag=task,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return metadata.to_yaml()


def _usage(architecture: Architecture, saved: Mapping[str, Any], images: int) -> str:
    """Return Markdown that says how to use a published classifier; empty for other models."""
    if architecture.hidden is not None or architecture.outputs != len(saved["classes"]):
        return ""
    where = "  # --data.path DIR says where its data are" if "path" in saved["options"]["data"] else ""
    text = "Every command takes it, in the place of a run:\n\n```\n"
    text += f"advebm sample PATH{'' if images else where}\nadvebm evaluate PATH{where}\n```\n\n"
    if images:
        text += "`excerpt.safetensors` holds what drawing and editing need where the data are not: Gaussians of the "
        text += "training images, and a few test images.\n\n"
    return text


def _results_section(records: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown of evaluation records: a table, the sampler settings, and how samples of each class classify."""
    if not records:
        return ""
    texts = [as_text(record) for record in records]
    keys = {"name": "measured", "samples": "samples", "value": "value", "count": "n"}
    parts = ["## Measured", "± standard error.", markdown([*keys.values()], [[t[k] for k in keys] for t in texts])]
    settings_of_sets = {t["samples"]: r["settings"] for t, r in zip(texts, records, strict=True) if t["samples"]}
    if settings_of_sets:
        parts.append("\n".join(f"- {name}: {describe_sampler(s)}." for name, s in settings_of_sets.items()))
    parts += [markdown(*table) for table in class_tables(records)]
    return "\n\n".join(parts)
