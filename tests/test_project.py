"""Properties of the code base itself: layers, citations, the README's example."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import advebm
from advebm import cli, recipes
from advebm.core import citations, config
from advebm.papers import inventory
from advebm.runs.recipe import resolve
from advebm.training.loop import train
from tests.helpers import default, tiny
from tests.mutants import mutants

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "advebm"

# Folders and the modules beside them, from the ground up: each imports only what stands above it in this list.
LAYERS = [
    "core",
    "recipes",
    "energies",
    "descent",
    "starts",
    "data",
    "models",
    "attacks",
    "objectives",
    "samplers",
    "edits",
    "metrics",
    "papers",
    "runs",
    "sampling",
    "training",
    "evaluation",
    "diagnostics",
    "reporting",
    "toy",
    "workflows",
    "reproduction",
    "web",
    "cli",
    "api",
]
FREE = {"__main__"}  # which holds nothing but an import


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("advebm"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("advebm.")}
    return found - {"__version__"}


MODULES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_downwards(path):
    """Strictly, lazy imports included: what two folders share lies below both."""
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own in FREE:
        return
    for name in imports(path) - {own}:
        assert LAYERS.index(name) < LAYERS.index(own), f"{own} imports {name}, which does not lie below it"


def test_every_folder_says_what_lives_there_and_imports_no_torch():
    for path in SOURCE.glob("*/__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        assert path.parent.name in LAYERS
        code = "import sys, importlib; importlib.import_module(sys.argv[1]); assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code, f"advebm.{path.parent.name}"], check=False)
        assert done.returncode == 0, path


def test_accelerate_is_known_to_two_files():
    users = [p for p in MODULES if re.search(r"^\s*(from|import) accelerate", p.read_text(), re.M)]
    assert users == [SOURCE / "runs" / "engine.py", SOURCE / "runs" / "tracking.py"]


def test_gradio_is_known_to_two_files():
    users = [
        p for p in MODULES if re.search(r"^\s*(from|import) (gradio|fastapi|starlette|uvicorn)", p.read_text(), re.M)
    ]
    assert users == [SOURCE / "web" / "page.py", SOURCE / "web" / "server.py"]


def test_nothing_in_the_package_needs_torchvision():
    for path in [*MODULES, ROOT / "pyproject.toml"]:
        assert "torchvision" not in path.read_text(), path


def test_every_citation_is_in_the_bibliography():
    for role, kinds in config.KINDS.items():
        for kind in kinds:
            thing = default(role, kind)
            assert citations.bibtex(thing).count("@") == len(citations.keys(thing))
    recipe = resolve(recipes.find("digits-at"))
    assert {"madry2018", "cem-workshop", "heusel2017", "digits1998"} <= set(citations.keys(recipe))
    assert "Madry" in citations.bibtex(recipe)
    entries = re.findall(r"^@\w+\{([^,]+),", (SOURCE / "core" / "citations.bib").read_text(), re.M)
    assert len(entries) == len(set(entries))


def python_example(path: Path) -> str:
    return re.search(r"```python\n(.*?)```", path.read_text(), re.S)[1]


def test_the_example_of_the_commands_page_runs(tmp_path, monkeypatch, small_run):
    """As printed, in a folder where the run it names has been trained."""
    code = python_example(ROOT / "docs" / "commands.md")
    (name,) = set(re.findall(r'"(runs/[\w-]+)"', code))
    target = tmp_path / name
    target.parent.mkdir(parents=True)
    target.symlink_to(small_run.folder)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code, scope)
    assert scope["energy"].shape == (len(scope["data"].test),)
    assert scope["images"].shape == (10, 1, 8, 8)


def test_the_map_of_the_contributors_page_is_the_tree():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == LAYERS
    there = {p.name.removesuffix(".py") for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert there - {"__init__"} == {*LAYERS, *FREE}


def extending() -> str:
    return (ROOT / "docs" / "extending.md").read_text()


def test_what_extensions_import_is_there():
    rows = re.findall(r"^\| `(advebm\.\w+)` \| (.*) \|$", extending(), re.M)
    assert len(rows) == 10
    for module, names in rows:
        for name in re.match(r"`(.*?)`", names)[1].split():
            assert getattr(importlib.import_module(module), name).__name__ == name
    with pytest.raises(AttributeError, match=r"'advebm.samplers' has no attribute 'CT'; there is"):
        importlib.import_module("advebm.samplers").CT  # noqa: B018


def test_the_objective_of_the_documents_trains(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text(re.search(r"```python\n(.*?)```", extending(), re.S)[1])
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tiny(objective="halfway:Halfway", train__images=512, train__log_every=256)
    assert train(recipe, tmp_path / "run", device="cpu").finished


def test_the_text_of_every_mutant_stands_once_in_its_file():
    for mutant in mutants():
        assert (SOURCE / mutant.file).read_text().count(mutant.text) == 1, mutant
        assert mutant.instead != mutant.text
        assert (ROOT / mutant.test_file).exists(), mutant


def test_the_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path


def documents():
    recipes = sorted((SOURCE / "recipes").glob("*.yaml"))
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *recipes]


def test_the_commands_that_documents_name_are_understood(capsys):
    """Recipes resolve with the options that stand beside them; a published table has the scale."""
    trained, tables = [], []
    for path in documents():
        text = path.read_text()
        found = re.findall(r"advebm ((?:train|run) --recipe [^#`;\n]+)", text)
        trained += [line.split("  ")[0] for line in found if not re.search(r"RECIPE|NAME|mine:", line)]
        tables += re.findall(r"advebm reproduce ([a-z0-9-]+) --scale ([a-z0-9-]+)", text)
    assert len(trained) > 15
    for line in trained:
        assert not cli.main([*shlex.split(line), "--print_config"]), f"{line}: {capsys.readouterr().err}"
    assert len(tables) > 10
    for name, scale in tables:
        assert inventory.find_table(name).images(scale) >= 0


@pytest.mark.parametrize("begun", [False, True])
def test_the_slurm_script_is_understood(begun, tmp_path, capsys):
    """By bash, with a stand-in for SLURM that prints the command, and then by torchrun and advebm."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
    run = tmp_path / "run"
    if begun:
        run.mkdir()
        (run / "config.yaml").touch()
    slurm = "srun() { echo $TORCH_DISABLE_SHARE_RDZV_TCP_STORE $@; }; scontrol() { echo node0; echo node1; }\n"
    script = slurm + script.replace("/shared/runs/at", str(run))
    known = {"PATH": os.environ["PATH"], "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-eu", "-c", script], env=known, capture_output=True, text=True, check=True)
    variable, program, *words = done.stdout.split()
    assert (variable, program) == ("1", "torchrun")
    asked = get_args_parser().parse_args(words)
    assert (asked.nnodes, asked.rdzv_endpoint, asked.module, asked.training_script) == (
        "2",
        "node0:29500",
        True,
        "advebm",
    )
    assert asked.training_script_args[1] == ("--resume" if begun else "--recipe")
    assert str(run) in asked.training_script_args
    if not begun:
        assert not cli.main([*asked.training_script_args, "--print_config"]), capsys.readouterr().err


@pytest.mark.parametrize("name", recipes.names())
def test_the_options_that_a_recipe_names_in_its_head_exist(name):
    head = re.findall(r"^#.*", (SOURCE / "recipes" / f"{name}.yaml").read_text(), re.M)
    plain = config.describe(resolve(recipes.find(name)))
    blocks = "|".join(key for key, value in plain.items() if isinstance(value, dict))
    for option in re.findall(rf"--((?:{blocks}|outside|extra)\.[\w.]*\w)", " ".join(head)):
        at = plain
        for key in option.split("."):
            assert key in (at or {}), f"--{option}"
            at = at[key]


def test_every_finding_of_the_doctor_is_documented():
    source, page = (SOURCE / "diagnostics" / "doctor.py").read_text(), (ROOT / "docs" / "doctor.md").read_text()
    names = set(re.findall(r'(?:fault|Finding)\(\s*"([\w-]+)"', source)) | set(
        re.findall(r'^ {8}"(.+)": \(', source, re.M)
    )
    assert {"shape", "train-mode", "range-255", "chance", "large-radius"} <= names
    table = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([\w-]+)`", table)) == names


def test_versions_agree():
    assert advebm.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert advebm.__version__ in (ROOT / "CITATION.cff").read_text()
