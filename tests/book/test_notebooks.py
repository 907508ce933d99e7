"""Notebooks and the package that they export: described, small, quiet, linked, in their order."""

import ast
import json
import re
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "nbs").rglob("[!_.]*.ipynb"))}
PACKAGE = ROOT / "query_detr"


@cache
def cells(name: str) -> list[dict]:
    return json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))["cells"]


def sources(name: str, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == kind]


def outputs(name: str) -> list[tuple[str, dict]]:  # (id of the cell, output)
    return [(cell["id"], output) for cell in cells(name) for output in cell.get("outputs", [])]


def exported_module(name: str) -> str:
    """The module that a notebook exports, or nothing."""
    found = re.findall(r"(?m)^#\| *default_exp ([\w.]+)", "\n".join(sources(name, "code")))
    return found[0] if found else ""


CHAPTERS = {exported_module(name): name for name in NOTEBOOKS if exported_module(name)}


@cache
def module(name: str) -> ast.Module:
    path = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def definitions(name: str) -> list[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module."""
    nodes = [n for n in module(name).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return [node for node in nodes if not node.name.startswith("_")]


# --- the package ---


def test_every_module_is_exported_by_a_chapter():
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("[!_]*.py")]
    assert {".".join(path.with_suffix("").parts) for path in paths} == set(CHAPTERS)


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_public_function_and_class_is_described(name):
    assert [node.name for node in definitions(name) if not is_described(node)] == []


def is_described(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether a definition has a docstring, or consists of options that help pages describe."""
    if ast.get_docstring(node):
        return True
    return all(isinstance(part, ast.AnnAssign) for part in node.body)


def bare_tensors(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """Parameters and fields that are tensors and do not say which shape they have."""
    if isinstance(node, ast.FunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        annotated = [(argument.arg, argument.annotation) for argument in arguments]
    else:
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        annotated = [(ast.unparse(field.target), field.annotation) for field in fields]
    bare = [name for name, note in annotated if note and ast.unparse(note) in BARE]
    return [f"{node.name}: {name}" for name in bare]


BARE = {"Tensor", "Tensor | None", "torch.Tensor"}


@pytest.mark.parametrize(
    "name", [name for name in CHAPTERS if "." not in name and name != "launch"]
)
def test_every_tensor_of_the_ground_floor_says_its_shape(name):
    assert [fault for node in definitions(name) for fault in bare_tensors(node)] == []


def imported_by(name: str) -> set[str]:
    """Modules of the package that the exported cells of a chapter import."""
    found = set()
    for source in sources(CHAPTERS[name], "code"):
        if not source.startswith("#| export"):
            continue
        for node in ast.walk(ast.parse(source)):
            targets = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                targets = [node.module or ""]
            inside = [t.removeprefix("query_detr.") for t in targets if t.startswith("query_detr.")]
            found |= set(inside)
    return found


DRAWING = {"use.plots", "data.shapes"}  # whose pictures and scenes appear in every part
DOORS = {"launch", "cli"}  # which open every room


def number(name: str) -> int:
    """The number of the chapter that exports a module."""
    return int(CHAPTERS[name].split("_")[0])


@pytest.mark.parametrize("name", [name for name in CHAPTERS if name not in DOORS])
def test_a_chapter_builds_on_chapters_before_it(name):
    imported = [other for other in imported_by(name) - DRAWING if other in CHAPTERS]
    later = [other for other in imported if number(other) >= number(name)]
    assert later == []


# --- the notebooks ---


def test_notebooks_are_small():
    sizes = {name: path.stat().st_size / 1e6 for name, path in NOTEBOOKS.items()}
    assert sum(sizes.values()) <= 15
    assert {name: size for name, size in sizes.items() if size > 2} == {}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_hold_no_error_and_no_warning(name):
    noisy = [
        cell
        for cell, output in outputs(name)
        if output["output_type"] == "error" or output.get("name") == "stderr"
    ]
    assert noisy == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_picture_has_an_alternative_text(name):
    for cell, output in outputs(name):
        if "image/png" in output.get("data", {}):
            text = output.get("metadata", {}).get("image/png", {}).get("alt", "")
            assert len(text) >= 10, f"{name}, cell {cell}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_link_between_notebooks_leads_somewhere(name):
    tables = [
        "".join(output["data"]["text/markdown"])
        for _, output in outputs(name)
        if "text/markdown" in output.get("data", {})
    ]
    for text in sources(name, "markdown") + tables:
        prose = re.sub(r"(?s)```.*?```|\$[^$\n]*\$", "", text)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if target.startswith(("http", "#", "data:")):
                continue
            assert (NOTEBOOKS[name].parent / target.partition("#")[0]).exists(), target


# --- what is said about the project ---


@pytest.fixture
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def test_citation_and_changes_name_the_present_version(settings):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["title"] == settings["title"]
    assert str(cited["version"]) == settings["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"(?m)^## {re.escape(settings['version'])}\b", changes)


def test_generated_folders_are_ignored(settings):
    quarto = yaml.safe_load((ROOT / "nbs" / "_quarto.yml").read_text(encoding="utf-8"))
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {f"nbs/{name}" for name in quarto["metadata-files"]} <= set(ignored)
    assert {"_docs/", "_proc/", "_book/"} <= set(ignored)
