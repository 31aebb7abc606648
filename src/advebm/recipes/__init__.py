"""The built-in recipes: YAML files whose opening comment gives the source and the results."""

from importlib.resources import files
from typing import Any

import yaml

from advebm.core.config import merge
from advebm.core.errors import unknown_name

RECOMMENDED = (  # to begin with: the methods' families, on digits in minutes and on CIFAR-10 in up to two hours
    "digits-at",
    "digits-standard",
    "digits-binary-at",
    "digits-acl",
    "mnist-5k-at",
    "cifar10-at-small",
    "cifar10-at-2h",
    "cifar10-standard-small",
    "cifar10-jem-30min",
    "cifar10-binary-at-small",
)


def names() -> list[str]:
    """Return the names that ``--recipe`` accepts."""
    return sorted(f.name.removesuffix(".yaml") for f in files(__name__).iterdir() if f.name.endswith(".yaml"))


def find(name: str) -> dict[str, Any]:
    """Return a recipe as plain data, with the options of its ``base`` filled in."""
    return complete(yaml.safe_load(_text(name)))


def complete(plain: dict[str, Any]) -> dict[str, Any]:
    """Fill in the options that a recipe leaves out from the recipe that it names as its ``base``, if any."""
    rest = {key: value for key, value in plain.items() if key != "base"}
    return merge(find(plain["base"]), rest) if "base" in plain else rest


def header(name: str) -> list[str]:
    """Return the lines of a recipe's opening comment."""
    lines = _text(name).splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def _text(name: str) -> str:
    if name not in names():
        raise unknown_name("recipe", name, names())
    return files(__name__).joinpath(f"{name}.yaml").read_text()
