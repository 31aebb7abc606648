"""Published models, in the package and on the Hugging Face Hub, whose slow client is imported on first use."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import advebm
from advebm.core import files
from advebm.core.errors import UserError

EXCERPT = "excerpt.safetensors"  # see models.excerpt
# Files of a published model (see network.save); nothing else is transferred, in particular no training state.
FILES = ["config.json", "model.safetensors", "ema.safetensors", "README.md", EXCERPT]
DRAWING_MODEL = "cifar10-jeat-30min"  # of the package, for `advebm sample` without a model
EDITING_MODEL = "cifar10-at-2h"  # for `advebm app`: it fills holes better


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload a published model as one commit; a file of :data:`FILES` that ``folder`` lacks is removed from the Hub.

    Args:
        folder: a folder that :func:`advebm.models.network.save` wrote, such as a checkpoint.
        name: ``user/name``; created if it does not exist.
        private: create the model as private.

    Returns:
        The address of the model's page.

    Raises:
        UserError: ``folder`` is not a model, nobody is logged in, the login may not write there, the Hub cannot be
            reached, or ``private`` was asked for and the model is public already.
    """
    _check_model(folder, "is not a published model")
    configuration = files.read_json(folder / "config.json")
    if not isinstance(configuration, dict) or "architecture" not in configuration:
        raise UserError(f"{folder} is not a published model: config.json has no architecture")
    _check_name(name)
    from huggingface_hub import HfApi, get_token

    with _as_user_error(name, f"cannot push {name}"):
        if get_token() is None:
            raise UserError("nobody is logged in to the Hub; run: hf auth login")
        api = HfApi()
        page = api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:
            raise UserError(f"{name} is on the Hub already, and public; choose another name or leave out --private")
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=FILES,
            delete_patterns=FILES,  # load would prefer averaged weights of an earlier push to these
            commit_message="Upload an advebm model",
        )
    return str(page)


def pull(name: str, *, revision: str | None = None) -> Path:
    """Download a published model into the Hub client's cache, or find it there when the Hub cannot be reached.

    Args:
        name: ``user/name``.
        revision: branch, tag or commit; None: the newest.

    Returns:
        The folder in the cache, which holds only :data:`FILES`; do not write to it.

    Raises:
        UserError: no such model or revision, no access to it, not a model of advebm, or no Hub and no cached copy.
    """
    folder = pull_files(name, FILES, revision=revision)
    _check_model(folder, f"is {name} of the Hub, which is not a model of advebm")
    return folder


def read_configuration(name: str) -> Any:
    """Return the content of ``config.json`` of a model on the Hub, of any library; empty if there is no such file.

    Raises:
        UserError: no such model, no access to it, or no Hub and no cached copy.
    """
    return files.read_json(pull_files(name, ["config.json"]) / "config.json", default={})


def pull_files(name: str, wanted: list[str], *, revision: str | None = None) -> Path:
    """Download some files of a model into the Hub client's cache, and return the folder there."""
    _check_name(name)
    from huggingface_hub import HfApi

    with _as_user_error(name, f"cannot pull {name}" + (f" at {revision}" if revision else "")):
        return Path(HfApi().snapshot_download(name, revision=revision, allow_patterns=wanted))


def bundled_models() -> dict[str, Path]:
    """Return the folders of the models that come with the package, by name."""
    package = Path(advebm.__file__).parent
    for root in (package / "bundled", package.parents[1] / "models"):  # installed, or in a checkout
        if found := {path.parent.name: path.parent for path in sorted(root.glob("*/config.json"))}:
            return found
    return {}


def _check_model(folder: Path, otherwise: str) -> None:
    if missing := [file for file in FILES[:2] if not (folder / file).is_file()]:
        raise UserError(f"{folder} {otherwise}: {' and '.join(missing)} missing")


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(f"a model on the Hub is called user/name, of letters, digits, '-', '_' and '.', got {name!r}")


@contextmanager
def _as_user_error(name: str, what: str) -> Iterator[None]:
    """Turn errors of the Hub's client into a one-line :class:`UserError` that names the cause."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as error:
        causes = [e for e in (error, error.__cause__) if e is not None]
        status = next((e.response.status_code for e in causes if isinstance(e, errors.HfHubHTTPError)), None)
        unreached = (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError)
        if isinstance(error, errors.RevisionNotFoundError):
            reason = "there is no such revision"
        elif status == 404 or isinstance(error, errors.RepositoryNotFoundError):
            reason = "there is no such model, or it is not open to you; if it should be, run: hf auth login"
        elif status == 401:
            reason = "the Hub does not accept the login; run: hf auth login"
        elif status == 403:
            reason = f"the login may not do that; {name.split('/')[0]} has to be you, with a token that may write"
        elif status is None and any(isinstance(e, unreached) for e in causes):
            reason = "the Hub cannot be reached; check the connection and HF_HUB_OFFLINE"
        else:
            reason = " ".join(" ".join(map(str, causes)).split())
        raise UserError(f"{what}: {reason}") from None
