"""Properties of the code base itself: layers, citations, the README's example."""

import ast
import re
from pathlib import Path

import pytest

import advebm
from advebm import citations, config, recipes
from advebm.training.recipe import resolve
from tests.helpers import default

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "advebm"

LAYERS = [
    {"config", "errors", "seeds", "files", "citations", "recipes", "allocator", "processes"},
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


def test_the_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path
    for verb in re.findall(r"^advebm ([\w-]+)", text, re.M):
        assert f'"{verb}"' in (SOURCE / "cli.py").read_text(), verb


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
