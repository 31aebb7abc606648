"""Properties of the code base itself: layers, citations, the README's example."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import advebm
from advebm import citations, cli, config, published, recipes
from advebm.training.recipe import resolve
from tests.helpers import default

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "advebm"

LAYERS = [
    {"config", "errors", "seeds", "files", "citations", "recipes", "allocator", "threads", "processes"},
    {"energies", "descent", "starts", "modes", "checks"},
    {"models", "data", "pictures", "densities"},
    {"objectives", "samplers", "attacks", "metrics", "apps"},
    {
        "training",
        "evaluation",
        "generation",
        "drawing",
        "editing",
        "chains",
        "tuning",
        "diagnostics",
        "comparison",
        "published",
        "suites",
        "doctor",
        "toy",
    },
    {
        "cli",
        "api",
        "demo",
        "console",
        "stages",
        "tables",
        "reporting",
        "reproduce",
        "scales",
        "results",
        "web",
        "__main__",
    },
]


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


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
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in imports(path):
        assert layer(name) <= layer(own), f"{own} (layer {layer(own)}) imports {name} (layer {layer(name)})"


def test_accelerate_is_known_to_one_file():
    users = [p for p in MODULES if re.search(r"^\s*(from|import) accelerate", p.read_text(), re.M)]
    assert users == [SOURCE / "training" / "engine.py"]


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
    entries = re.findall(r"^@\w+\{([^,]+),", (SOURCE / "citations.bib").read_text(), re.M)
    assert len(entries) == len(set(entries))


def readme_example() -> str:
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, small_run):
    """As printed, in a folder where the run it names has been trained."""
    code = readme_example()
    (name,) = set(re.findall(r'"(runs/[\w-]+)"', code))
    target = tmp_path / name
    target.parent.mkdir(parents=True)
    target.symlink_to(small_run.folder)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code, scope)
    assert scope["energy"].shape == (len(scope["data"].test),)
    assert scope["images"].shape == (10, 1, 8, 8)


def test_the_layers_are_those_of_the_contributors_page():
    rows = re.findall(r"^\| \d \|.*\| `(.*)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert [set(row.replace("/", "").split()) for row in reversed(rows)] == LAYERS


def test_the_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path
    for verb in re.findall(r"^advebm ([\w-]+)", text, re.M):
        assert f'"{verb}"' in (SOURCE / "cli.py").read_text(), verb


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
        assert published.find(name).share(scale) > 0


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
    source, page = (SOURCE / "doctor.py").read_text(), (ROOT / "docs" / "doctor.md").read_text()
    names = set(re.findall(r'(?:fault|Finding)\(\s*"([\w-]+)"', source)) | set(
        re.findall(r'^ {8}"(.+)": \(', source, re.M)
    )
    assert {"shape", "train-mode", "range-255", "chance", "large-radius"} <= names
    table = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([\w-]+)`", table)) == names


def test_versions_agree():
    assert advebm.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert advebm.__version__ in (ROOT / "CITATION.cff").read_text()
