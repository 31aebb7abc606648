"""``advebm list`` and ``explain``: what there is, from static text and source files, and what one of it is."""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from advebm import recipes
from advebm.cli.options import BLOCKS, Commands, Overrides
from advebm.core import citations, config, files
from advebm.core.config import KINDS
from advebm.core.errors import UserError, unknown_name
from advebm.metrics.keys import key_of
from advebm.metrics.texts import as_text
from advebm.models.hub import bundled_models

ROLES = {  # what can be listed
    "recipe": "a training: its images, network, method and measurements",
    "source": "where images come from",
    "backbone": "a network",
    "objective": "a training method",
    "optimizer": "how weights are updated",
    "schedule": "the learning rate in the course of a training",
    "sampler": "a way to draw images from a model",
    "edit": "a change of given images",
    "adversary": "an attack",
    "metric": "a measurement of a model or of its samples",
    "space": "features in which samples are compared with data",
    "score": "how unusual an image is, to detect outliers",
    "outlier": "images on which that detection is tested",
}


def add_list(verbs: Commands) -> None:
    parser = verbs.add("list", print_list, "What there is: recipes to begin with, models, and how to list the rest.")
    parser.add_argument("what", nargs="?", metavar="WHAT", help=", ".join(ROLES))


def add_explain(verbs: Commands) -> None:
    parser = verbs.add("explain", explain, "What a method, a metric, a network, … is: its options, source and recipes.")
    parser.add_argument("kind", metavar="NAME", help="as advebm list prints it, such as at, cs or apgd; or a recipe")


# advebm list ----------------------------------------------------------------------------------------------------------


def print_list(args: argparse.Namespace, overrides: Overrides) -> None:
    what = None if args.what is None else args.what.rstrip("s")
    if what is None:
        _print_overview()
    elif what == "recipe":
        _print_recipes(recipes.names())
    elif what in KINDS:
        print(f"{what}: {ROLES[what]}; more of each: advebm explain NAME")
        for kind, target in KINDS[what].items():
            print(f"  {kind:20} {_first_line_of_docstring(target)}")
    else:
        raise unknown_name("kind of thing", args.what, ROLES)


def _print_overview() -> None:
    """Print a screenful: where to begin, and how to see the rest."""
    _print_recipes(recipes.RECOMMENDED, "recipes to begin with", _width())
    print("models of the package, which take the place of a run: advebm sample NAME")
    for name, folder in bundled_models().items():
        about = files.read_json(folder / "config.json")
        network, threat = f"{about['architecture']['backbone']['kind']} for {about['data']}", about["threat"]
        trained = f"trained against {threat['norm']} {_as_written(threat['eps'])}"
        if "probed" in about:
            trained = "a linear probe, for --features"
        print(f"  {name:23} {network}, {trained}")
    print("all of a kind: advebm list WHAT; what one of them is: advebm explain NAME")
    for role, text in ROLES.items():
        count = len(recipes.names() if role == "recipe" else KINDS[role])
        print(f"  {role:10} {count:3}  {text}")


def _print_recipes(names: Sequence[str], title: str = "recipes", width: int | None = None) -> None:
    """Print a line for each recipe, cut to a width if one is given, and a line about its run if it has one."""
    print(f"{title}: advebm train --recipe NAME")
    column, runs = max(map(len, names)), _find_runs(Path("runs"))
    for name in names:
        line = recipes.header(name)[0]
        print(f"  {name:{column}} {textwrap.shorten(line, (width or 999) - column - 3, placeholder=' …')}")
        if name in runs:
            print(f"    run here: {_describe_run(runs[name])}")


def _find_runs(folder: Path) -> dict[str, Path]:
    """Return the newest run of each recipe in a folder and the folders in it, preferring runs that were measured."""

    def rank(run: Path) -> tuple[bool, float]:
        return (run / "metrics.json").exists(), (run / "config.yaml").stat().st_mtime

    runs: dict[str, Path] = {}
    for path in (*folder.glob("*/config.yaml"), *folder.glob("*/*/config.yaml")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            name = re.search(r"(?m)^name: (\S+)$", path.read_text())
            if name and (name[1] not in runs or rank(path.parent) > rank(runs[name[1]])):
                runs[name[1]] = path.parent
    return runs


def _describe_run(run: Path) -> str:
    """Return a run's folder and, where it was measured, its newest accuracy under its threat, else on clean images."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):  # damaged
        threat = yaml.safe_load((run / "config.yaml").read_text())["threat"]
        if record := _newest_accuracy(files.read_json(run / "metrics.json", []), threat):
            return f"{run}, {record['name']} {as_text(record)['value']}"
    return str(run)


def _newest_accuracy(measured: Sequence[Mapping[str, Any]], threat: Mapping[str, Any]) -> Mapping[str, Any] | None:
    clean = None
    for record in reversed(measured):
        key, attack = key_of(record), record["settings"].get("attack")
        if key.quantity != "accuracy" or key.set or key.samples:
            continue
        if key.attack is None:
            clean = clean or record
            continue
        whole = key.attack.part is None and not key.attack.kind.startswith("targeted")
        if whole and (attack["norm"], attack["eps"]) == (threat["norm"], threat["eps"]):
            return record
    return clean


def _first_line_of_docstring(target: str) -> str:
    """Return the first line of the docstring of a class ``MODULE:NAME``, without importing the module."""
    module, _, name = target.partition(":")
    classes = (node for node in _parse_source(module).body if isinstance(node, ast.ClassDef))
    node = next((node for node in classes if node.name == name), None)
    return (ast.get_docstring(node) or "").splitlines()[0].replace("``", "") if node else ""


@functools.cache
def _parse_source(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    return ast.Module([], []) if spec is None or spec.origin is None else ast.parse(Path(spec.origin).read_text())


# advebm explain -------------------------------------------------------------------------------------------------------


def explain(args: argparse.Namespace, overrides: Overrides) -> None:
    """Print what is known of a kind, in each role that has it, or of a recipe."""
    roles = [role for role, kinds in KINDS.items() if args.kind in kinds and role != "outlier"]
    roles = roles or [role for role in KINDS if args.kind in KINDS[role]]  # noises are outliers only
    if args.kind in recipes.names():
        print("\n".join(recipes.header(args.kind)))
        print(f"\nadvebm train --recipe {args.kind}; --print_config shows every option")
        if run := _find_runs(Path("runs")).get(args.kind):
            print(f"run here: {_describe_run(run)}")
    elif not roles:
        known = sorted({*recipes.names(), *(kind for kinds in KINDS.values() for kind in kinds)})
        near = difflib.get_close_matches(args.kind, known, n=5, cutoff=0.0)
        raise UserError(f"nothing is called {args.kind!r}; near it are {', '.join(near)}; see advebm list")
    for role in roles:
        _explain_kind(role, args.kind)


def _explain_kind(role: str, kind: str) -> None:
    cls = config.lookup(role, kind)
    print(f"{kind}: {role} ({ROLES[role]}), {cls.__module__}.{cls.__name__}\n")
    text = re.sub(r"(?s)\n\nAttributes:\n.*?(?=\n\n|\Z)", "", inspect.getdoc(cls) or "")
    for paragraph in _plain(text).split("\n\n"):
        print((textwrap.indent(paragraph, "  ") if re.search(r"\n[ -]", paragraph) else _fill(paragraph)) + "\n")
    fields = [field for field in dataclasses.fields(cls) if field.init]
    if rows := list(_options(cls, {field.name: _default(field) for field in fields})):
        blocks = " or ".join(f"--{block}.NAME" for block, of in BLOCKS.items() if of == role)
        print(f"options and their defaults{blocks and f', set by {blocks}'}")
        names, values = (min(max(len(row[i]) for row in rows), limit) for i, limit in ((0, 24), (1, 16)))
        for name, value, meaning in rows:
            indent = " " * (names + values + 6)
            first = f"  {name:{names}}  {value:{values}}  "
            lines = textwrap.wrap(meaning, _width() - len(indent)) or [""]
            print("\n".join([(first + lines[0]).rstrip(), *(indent + line for line in lines[1:])]))
        print()
    if keys := getattr(cls if any(_is_needed(field) for field in fields) else cls(), "cites", ()):
        print("source")
        print("\n".join(map(_fill, citations.titles(keys))) + "\n")
    if names_of_recipes := [name for name in recipes.names() if _uses(recipes.find(name), role, kind)]:
        print("recipes")
        print(_fill(", ".join(names_of_recipes)) + "\n")


def _options(cls: type, values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield name, default and meaning of each option of a class, and of the options of options."""
    hints, meanings = typing.get_type_hints(cls), _meanings(cls)
    for name, value in values.items():
        meaning = meanings.get(name, "")
        if value is dataclasses.MISSING:
            yield prefix + name, "required", meaning
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield prefix + name, config.describe(value, hints[name]).get("kind", ""), meaning
            inner = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
            yield from _options(type(value), inner, f"{prefix}{name}.")
        else:
            yield prefix + name, _as_written(config.describe(value, hints[name])), meaning


def _meanings(cls: type) -> dict[str, str]:
    """Return what the docstrings of a class and of its bases say of each option."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("\n\nAttributes:\n")[2].partition("\n\n")[0]
        for names, text in re.findall(r"(?ms)^    (\w+(?:, \w+)*): (.*?)(?=^    \w|\Z)", section):
            for name in names.split(", "):
                other = re.match(r"see :class:`(\w+)`", text)
                if other and (cited := getattr(sys.modules[base.__module__], other[1], None)):
                    meanings[name] = _meanings(cited).get(name, "").removesuffix(".") + text[other.end() :]
                else:
                    meanings[name] = text
    return {name: " ".join(_plain(text).split()) for name, text in meanings.items()}


def _plain(text: str) -> str:
    """Return the text of a docstring without its markup."""
    return re.sub(r":\w+:`~?([\w.]+)`", r"\1", text).replace("``", "")


def _fill(text: str) -> str:
    """Return a paragraph of the terminal's width."""
    return textwrap.fill(text, _width(), initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _width() -> int:
    """Return the terminal's width, within what is easy to read; 80 where there is no terminal."""
    return min(max(shutil.get_terminal_size().columns, 80), 120)


def _as_written(value: Any) -> str:
    """Return a default as it can be typed: ``none``, and ``8/255`` for such a number."""
    if isinstance(value, float) and len(str(value)) > 8 and abs(value * 255 - round(value * 255)) < 1e-9:
        return f"{round(value * 255)}/255"
    return "none" if value is None else str(value)


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; ``MISSING``: it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _uses(recipe: Any, role: str, kind: str) -> bool:
    """Return whether a recipe's plain data names the kind in a block of the role."""
    blocks = {"source": ("data", "outside", "extra"), "metric": ("metrics",)}.get(role, (role,))
    parts: list[Any] = []
    for block in blocks:
        part = recipe.get(block)
        parts += part if isinstance(part, list) else [part]
    return any((part.get("kind") if isinstance(part, Mapping) else part) == kind for part in parts)
