"""Python beside the command line: every verb, the examples of docstrings, ``docs/python.md`` and the notebook."""

import argparse
import ast
import base64
import doctest
import inspect
import json
import re
import sys
import types

import matplotlib as mpl
import pytest
import torch
from PIL import Image

import advebm
from advebm.cli.parser import build_parser
from tests.helpers import few_samples
from tests.test_project import ROOT

PAGE = (ROOT / "docs" / "python.md").read_text()
NOTEBOOK = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
ROWS = {verb: text for verb, text in re.findall(r"^\| `([\w-]+)` \| (.*) \|$", PAGE, re.M) if verb != "command"}

# Options of commands that go by another name in Python; several names: any of these functions' parameters.
RENAMED = {"runs": "runs", "run": "run model", "recipe": "recipe", "experiment": "name", "class": "goal"}
RENAMED |= {"with": "others", "from": "source", "image": "images", "row": "rows", "neighbours": "neighbours"}
# Options that are no parameters, and why.
NOWHERE = {
    "help": "help(function)",
    "threads": "torch.set_num_threads",
    "json": "records and findings are data",
    "print_config": "load_recipe",
    "dry-run": "advebm.training.cost.estimates",
    "config": "recipes of the package only; a run's own by resume",
    "labels": "load_recipe(...).unlabelled()",
    "model": "option backbone; or, to evaluate, the model itself",
    "init": "option init",
    "list": "advebm reproduce --list",
    "compare": "advebm.workflows.sample.compare_methods",
    "machine": "advebm.workflows.doctor.check_machine",
    "amount": "a setting of the edit",
}
# Options of one command that are no parameters of its functions.
NOWHERE_OF = {
    "sweep": {"fast": "option train.fast"},
    "train": {"seed": "option seed", "out": "folder", "fast": "option train.fast"},
    "sample": {"seeds": "compare_methods", "features": "compare_methods", "steps": "a setting of the sampler"},
    "evaluate": {"out": "the folder of a run around a model: open_run"},
}


def verbs():
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def functions(verb):
    return [getattr(advebm, name) for name in re.findall(r"`advebm\.(\w+)`", ROWS[verb]) if name in advebm.__all__]


def test_every_verb_has_a_function_or_a_reason():
    assert set(ROWS) == set(verbs())
    for verb, text in ROWS.items():
        assert bool(functions(verb)) != text.startswith("none: "), verb
    named = {name for verb in ROWS for f in functions(verb) for name in [f.__name__]}
    rest = PAGE.partition("Without a command:")[2].partition("\n\n")[0]
    assert named | set(re.findall(r"advebm\.(\w+)", rest)) | {"tune_cpu_allocator"} == set(advebm.__all__)


@pytest.mark.parametrize("verb", [verb for verb in ROWS if not ROWS[verb].startswith("none: ")])
def test_every_option_of_a_verb_is_a_parameter(verb):
    parameters = {name for f in functions(verb) for name in inspect.signature(f).parameters}
    for action in verbs()[verb]._actions:
        option = next((s.removeprefix("--") for s in action.option_strings if s.startswith("--")), action.dest)
        if option in NOWHERE or option in NOWHERE_OF.get(verb, {}):
            continue
        names = {option.replace("-", "_"), *RENAMED.get(option, "").split()}
        assert names & parameters, f"advebm {verb} has {option}, {[f.__name__ for f in functions(verb)]} have not"


def test_docstrings_say_what_each_parameter_is():
    for name in sorted(set(advebm.__all__) - {"Attack", "tune_cpu_allocator"}):
        function = getattr(advebm, name)
        text = inspect.getdoc(function)
        arguments = re.split(r"\n\n(?:Returns|Raises):", text.partition("Args:")[2])[0]
        said = {word for names in re.findall(r"^    (\w[\w, ]*): ", arguments, re.M) for word in names.split(", ")}
        assert set(inspect.signature(function).parameters) == said, name
        assert "Raises:" in text, name
        assert ">>> " in text.partition("Examples:")[2], name


@pytest.fixture
def desk(tmp_path, monkeypatch, small_run):
    """A folder in which the run that examples name has been trained; no other data are known."""
    (tmp_path / "runs").mkdir()
    folder = tmp_path / "runs" / "digits-at"
    folder.mkdir()
    for name in ("config.yaml", "checkpoints", "env.json"):
        (folder / name).symlink_to(small_run.folder / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADVEBM_DATA", raising=False)
    return tmp_path


@few_samples
@pytest.mark.parametrize("name", sorted(set(advebm.__all__) - {"Attack", "tune_cpu_allocator"}))
def test_the_example_of_a_docstring_runs(name, desk):
    (example,) = doctest.DocTestFinder(recurse=False).find(
        getattr(advebm, name), name, globs={"advebm": advebm, "torch": torch}
    )
    told: list[str] = []
    failures, tried = doctest.DocTestRunner().run(example, out=told.append)
    assert not failures, "".join(told)
    assert tried or name in ("push", "reproduce")


def python_blocks():
    return "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S))


@few_samples
@pytest.mark.slow
def test_the_page_of_python_runs(desk):
    """As printed; every function of the table is called there or named in the text below."""
    scope: dict = {}
    exec(python_blocks(), scope)
    assert scope["filled"].x.shape == (20, 1, 8, 8)
    assert 0 <= scope["records"][0].value <= 1
    assert (desk / "denoised" / "edit.png").is_file()
    assert (desk / "attacked.png").is_file()
    assert scope["samples"].y.bincount().tolist() == [30] * 10
    assert list(scope["comparison"].records) == ["digits-standard", "digits-standard-probe"]
    assert scope["comparison"].report.is_file()
    assert advebm.load("published").head.out_features == 10
    for verb in ROWS:
        assert all(f"advebm.{f.__name__}(" in PAGE for f in functions(verb)), verb


# The notebook ---------------------------------------------------------------------------------------------------------


def test_the_notebook_is_one_without_outputs():
    assert NOTEBOOK["nbformat"] == 4
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(ids) == len(set(ids))
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        assert "".join(cell["source"]).strip()
        if cell["cell_type"] == "code":
            assert (cell["execution_count"], cell["outputs"]) == (None, [])
        for target in re.findall(r"\]\((?!http)([^)]+)\)", "".join(cell["source"])):
            assert (ROOT / "docs" / target).exists(), target


@few_samples
@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """From top to bottom, in an empty folder without data, as Jupyter does; what cells end with can be shown."""
    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADVEBM_DATA", raising=False)
    kernel = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", kernel)
    shown, pages = [], []
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, cell["id"], "exec"), kernel.__dict__)
            if last is not None:
                shown.append(eval(compile(ast.Expression(last.value), cell["id"], "eval"), kernel.__dict__))
                pages += [shown[-1]._repr_html_()] if hasattr(shown[-1], "_repr_html_") else []
    made = kernel.__dict__
    y = made["y"]
    with torch.no_grad():
        right = lambda x, classes=y: (made["model"](x).argmax(1) == classes).float().mean().item()
    assert right(made["images"]) == 1
    assert right(made["x_adv"]) < right(made["x"])
    assert right(made["aimed"], (y + 1) % 10) >= 0.9
    assert (made["x_adv"] - made["x"]).flatten(1).norm(dim=1).max() <= 0.5 + 1e-5
    assert made["values"][7, 7] == 0
    assert made["values"][0, 7] < 0 < made["values"][-1, 7]  # along the gradient it rises
    outside = torch.ones(32, 32, dtype=bool)
    outside[10:22, 10:22] = False
    assert torch.equal(made["filled"].x[..., outside], made["x"][..., outside])
    assert made["moved"].numbers["confidence after"].min() > 0.5
    assert made["run"].finished
    records = shown[-2]
    assert records[0].value > 0.8
    assert sum(isinstance(value, Image.Image) for value in shown) == 2
    assert sum("<img " in page for page in pages) == 4  # data, two edits, the run
    for png in re.findall(r'base64,([^"]+)"', "".join(pages)):
        assert base64.b64decode(png).startswith(b"\x89PNG")
