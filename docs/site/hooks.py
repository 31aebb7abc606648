"""What MkDocs adds to the pages in ``docs``: recipes and the API from the package, the notes of ``results``."""

import ast
import re
from pathlib import Path

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "advebm"
SINGLE = {"api": ("api",), "energies": ("energies", "descent", "starts")}  # pages of modules that are not in a folder
PACKAGES = ("attacks", "objectives", "samplers", "edits", "metrics", "models", "data", "diagnostics")
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>(~?)([^<]+)</code>")
SEARCH = {  # how generated pages stand in the search, beside 1 of those that are written to be read
    "api": "{boost: 0.1}",
    "results": "{boost: 0.3}",
    "recipes.md": "{boost: 0.5}",
    "contributing.md": "{boost: 0.3}",
    "changelog.md": "{boost: 0.1}",
}
FAMILIES = {
    "digits": "8x8 digits, offline",
    "mnist": "28x28 digits, offline",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the files of ``results`` that pages show or link."""
    pages = {"recipes.md": recipes(), "changelog.md": (ROOT / "CHANGELOG.md").read_text()}
    pages["contributing.md"] = (ROOT / "CONTRIBUTING.md").read_text()
    pages |= {f"api/{name}.md": api(name, modules) for name, modules in SINGLE.items()}
    pages |= {f"api/{name}.md": api(name, modules_of(name)) for name in PACKAGES}
    pages |= {
        f"results/notes/{path.name}": path.read_text() for path in sorted((ROOT / "results" / "notes").glob("*.md"))
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=f"---\nsearch: {SEARCH[name.split('/')[0]]}\n---\n{text}"))
    for path in sorted((ROOT / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where files are on the site, rather than in the repository."""
    if page.file.src_uri.startswith("results/"):
        return markdown.replace("](../../docs/", "](../../").replace("](../../README.md", "](../../index.md")
    markdown = markdown.replace("](../results/", "](results/").replace("](docs/", "](")
    return re.sub(r"\]\((?:\.\./)?(CONTRIBUTING|CHANGELOG)\.md", lambda link: f"]({link[1].lower()}.md", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the references of docstrings, such as ``:class:`~advebm.data.Images```, as names."""
    return ROLE.sub(lambda role: f"<code>{role[2].rpartition('.')[2] if role[1] else role[2]}</code>", html)


def recipes() -> str:
    """Return the page of all recipes, by the opening comments of their files."""
    lines = [
        "# Recipes",
        "",
        "`advebm train --recipe NAME` trains one; any option changes it (`--train.images 50000`), `--print_config`",
        "shows all of them and `--dry-run` how long it takes. The head of each gives its source, what is published and",
        "what was measured here. One on top of another is what that one is, but for the options shown.",
    ]
    paths = sorted((SOURCE / "recipes").glob("*.yaml"))
    for family, title in FAMILIES.items():
        lines += ["", f"## {title}"]
        for path in (p for p in paths if p.stem.split("-")[0] == family):
            lines += recipe(path)
    others = [path for path in paths if path.stem.split("-")[0] not in FAMILIES]
    lines += ["", "## Others", *(line for path in others for line in recipe(path))]
    return "\n".join(lines) + "\n"


def recipe(path: Path) -> list[str]:
    """Return the lines of a recipe: name, head, and its options."""
    text = path.read_text().splitlines()
    end = next(i for i, line in enumerate(text) if not line.startswith("#"))
    head = " ".join(line.removeprefix("#").strip() for line in text[:end])
    base = yaml.safe_load("\n".join(text)).get("base")
    on = f" On top of [`{base}`](#{base})." if base else ""
    return ["", f"### {path.stem}", "", f"{head}{on}", "", "```yaml", *text[end:], "```"]


def api(name: str, modules: tuple[str, ...]) -> str:
    """Return the page of some modules' public classes and functions."""
    lines = [f"# {'advebm' if name == 'api' else f'advebm.{name}'}", ""]
    if name in PACKAGES:
        lines += [
            docstring(SOURCE / name / "__init__.py"),
            "",
            f"Names are imported from `advebm.{name}`, or their modules.",
        ]
    for module in modules:
        path = f"advebm.{module}"
        heading = () if len(modules) == 1 else (f"## {module.rpartition('.')[2].replace('_', ' ')}",)
        lines += ["", *heading, "", f"::: {path}"]
    return "\n".join(lines) + "\n"


def modules_of(package: str) -> tuple[str, ...]:
    """Return a folder's modules, the one of base classes first."""
    names = sorted(path.stem for path in (SOURCE / package).glob("[a-z]*.py"))
    return tuple(f"{package}.{name}" for name in sorted(names, key=lambda name: name != "base"))


def docstring(path: Path) -> str:
    """Return a module's docstring."""
    return ast.get_docstring(ast.parse(path.read_text())) or ""
