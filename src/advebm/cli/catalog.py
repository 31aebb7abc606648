"""``advebm list``: list recipes and kinds from static text and source files, without importing any method."""

import argparse
import ast
import functools
import importlib.util
from pathlib import Path

from advebm import recipes
from advebm.cli.options import Commands, Overrides
from advebm.core.config import KINDS
from advebm.core.errors import unknown_name


def add_list(verbs: Commands) -> None:
    parser = verbs.add("list", print_list, "What there is: recipes, objectives, samplers, metrics, …")
    parser.add_argument("what", nargs="?", metavar="WHAT", help=f"recipe, {', '.join(KINDS)}")


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
