"""The recipes that come with the package: YAML files whose head says where each comes from and what it gave."""

from importlib.resources import files
from typing import Any

import yaml

from advebm.core.config import merge
from advebm.core.errors import unknown_name


def names() -> list[str]:
    """What ``--recipe`` takes."""
    return sorted(f.name.removesuffix(".yaml") for f in files(__name__).iterdir() if f.name.endswith(".yaml"))


def find(name: str) -> dict[str, Any]:
    """The plain data of a recipe."""
    return complete(yaml.safe_load(_text(name)))


def complete(plain: dict[str, Any]) -> dict[str, Any]:
    """A recipe that names another one as its ``base``, with what it leaves out as there."""
    rest = {key: value for key, value in plain.items() if key != "base"}
    return merge(find(plain["base"]), rest) if "base" in plain else rest


def header(name: str) -> list[str]:
    """The comment at the head of a recipe, a line each."""
    lines = _text(name).splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def _text(name: str) -> str:
    if name not in names():
        raise unknown_name("recipe", name, names())
    return files(__name__).joinpath(f"{name}.yaml").read_text()
