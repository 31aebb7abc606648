"""``advebm list`` and ``explain``: what there is, from static text and source files, and what one of it is."""

import argparse
import ast
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from advebm import recipes
from advebm.cli.options import Commands, Overrides
from advebm.core.config import KINDS
from advebm.core.errors import UserError, unknown_name


def add_list(verbs: Commands) -> None:
    parser = verbs.add("list", print_list, "What there is: recipes, objectives, samplers, metrics, …")
    parser.add_argument("what", nargs="?", metavar="WHAT", help=f"recipe, {', '.join(KINDS)}")


def add_explain(verbs: Commands) -> None:
    parser = verbs.add("explain", explain, "What a method, a metric, a network, … is: its options, source and recipes.")
    parser.add_argument("kind", metavar="NAME", help="as advebm list prints it, such as at, cs or apgd; or a recipe")


def explain(args: argparse.Namespace, overrides: Overrides) -> None:
    """Print what is known of a kind, in each role that has it, or of a recipe."""
    roles = [role for role, kinds in KINDS.items() if args.kind in kinds and role != "outlier"]
    if args.kind in recipes.names():
        print("\n".join(recipes.header(args.kind)))
        print(f"\nadvebm train --recipe {args.kind}; --print_config shows every option")
    elif not roles:
        known = sorted({*recipes.names(), *(kind for kinds in KINDS.values() for kind in kinds)})
        near = difflib.get_close_matches(args.kind, known, n=5, cutoff=0.4)
        raise UserError(f"nothing is called {args.kind!r}; near it are {', '.join(near) or 'none'}; see advebm list")
    for role in roles:
        _explain_kind(role, args.kind)


def _explain_kind(role: str, kind: str) -> None:
    from advebm.core import citations, config

    cls = config.lookup(role, kind)
    print(f"{kind}: {role}, {cls.__module__}.{cls.__name__}\n")
    print(textwrap.indent(re.sub(r":\w+:`~?([\w.]+)`", r"\1", inspect.getdoc(cls) or "").replace("``", ""), "  "))
    fields = [field for field in dataclasses.fields(cls) if field.init]
    needed = {field.name: "has to be given" for field in fields if _is_needed(field)}
    values = {f.name: _default(f) for f in fields if f.name not in needed}
    defaults = {name: config.describe(value, type(value)) for name, value in values.items()}
    if fields:
        print("\noptions and their defaults")
        for name, value in (*needed.items(), *_flatten(defaults)):
            print(f"  {name:24} {_as_written(value)}")
    if keys := getattr(cls if needed else cls(), "cites", ()):
        print("\nsource\n  " + "\n  ".join(citations.titles(keys)))
    if names := [name for name in recipes.names() if _uses(recipes.find(name), role, kind)]:
        print(
            "\nrecipes\n"
            + textwrap.fill(", ".join(names), 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        )
    print()


def _as_written(value: Any) -> str:
    """Return a default as it can be typed: ``none``, and ``8/255`` for such a number."""
    if isinstance(value, float) and len(str(value)) > 8 and abs(value * 255 - round(value * 255)) < 1e-9:
        return f"{round(value * 255)}/255"
    return "none" if value is None else str(value)


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _flatten(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _uses(recipe: Any, role: str, kind: str) -> bool:
    """Return whether a recipe's plain data names the kind in a block of the role."""
    blocks = {"source": ("data", "outside", "extra"), "metric": ("metrics",)}.get(role, (role,))
    parts: list[Any] = []
    for block in blocks:
        part = recipe.get(block)
        parts += part if isinstance(part, list) else [part]
    return any((part.get("kind") if isinstance(part, Mapping) else part) == kind for part in parts)


def print_list(args: argparse.Namespace, overrides: Overrides) -> None:
    what = None if args.what is None else args.what.rstrip("s")
    if what is not None and what not in ("recipe", *KINDS):
        raise unknown_name("kind of thing", args.what, ["recipe", *KINDS])
    if what in (None, "recipe"):
        print("recipe (advebm train --recipe NAME)")
        width = max(map(len, recipes.names()))
        for name in recipes.names():
            print(f"  {name:{width}} {recipes.header(name)[0]}")
    for role, kinds in KINDS.items():
        if what in (None, role):
            print(role)
            for kind, target in kinds.items():
                print(f"  {kind:20} {_first_line_of_docstring(target)}")


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
