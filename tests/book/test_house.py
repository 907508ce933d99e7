"""The house is in order: public names are described, shown and built upon lower chapters only;
notebooks are small, quiet and linked; what is said about the project agrees."""

import ast
import io
import json
import re
import tokenize
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MODULES = {path.stem: path for path in sorted((ROOT / "query_detr").glob("[!_]*.py"))}
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "nbs").glob("[!_]*.ipynb"))}
SHAPE = re.compile(r"\[[^\]]*\]|as in `|as for `|scalar|any shape|a number")


@cache
def notebook(name: str) -> dict:
    return json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))


def cells(name: str, kind: str) -> list[str]:
    return [
        "".join(cell["source"]) for cell in notebook(name)["cells"] if cell["cell_type"] == kind
    ]


def outputs(name: str) -> list[tuple[str, dict]]:  # (id of the cell, output)
    return [
        (cell["id"], output)
        for cell in notebook(name)["cells"]
        for output in cell.get("outputs", [])
    ]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def public(module: str) -> list[str]:
    """Names of a module's `__all__`."""
    return next(
        ast.literal_eval(node.value)
        for node in tree(module).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )


def definitions(module: str) -> list[ast.AST]:
    """Public functions and classes of a module."""
    return [
        node
        for node in tree(module).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public(module)
    ]


def own_module(name: str) -> str:
    """The module that a notebook exports, or nothing."""
    return next(
        (
            match[1]
            for source in cells(name, "code")
            if (match := re.search(r"(?m)^#\| *default_exp (\w+)", source))
        ),
        "",
    )


CHAPTER_OF = {own_module(name): name for name in NOTEBOOKS if own_module(name)}


def listed(faults: list[str]) -> str:
    """What a failing test says."""
    return f"{len(faults)}:\n" + "\n".join(faults)


# --- the package
# -------------------------------------------------------------------------------------


def test_every_module_is_a_chapter_of_its_name():
    assert sorted(MODULES) == sorted(CHAPTER_OF)
    assert not (
        faults := [
            f"{module} is exported by {chapter}"
            for module, chapter in CHAPTER_OF.items()
            if chapter.partition("_")[2] != module
        ]
    ), listed(faults)


def test_every_public_function_and_class_is_described():
    assert not (
        faults := [
            f"{module}.{node.name} has no docstring"
            for module in MODULES
            for node in definitions(module)
            if not ast.get_docstring(node)
        ]
    ), listed(faults)


def comments_of(module: str) -> dict[int, str]:
    """Line → its comment."""
    tokens = tokenize.generate_tokens(
        io.StringIO(MODULES[module].read_text(encoding="utf-8")).readline
    )
    return {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}


def is_tensor(annotation: ast.AST | None) -> bool:
    """Whether an annotation is Tensor, or an optional or a container of tensors."""
    return (
        annotation is not None
        and not isinstance(annotation, ast.Constant)
        and re.search(r"(?<![\w.])(torch\.)?Tensor\b", ast.unparse(annotation)) is not None
        and "Callable" not in ast.unparse(annotation)
    )


def test_every_tensor_of_a_public_signature_has_its_shape_beside_it():
    faults = []
    for module in MODULES:
        comments = comments_of(module)
        for node in definitions(module):
            if isinstance(node, ast.FunctionDef):
                named = [
                    (a.arg, a.annotation, a.annotation.end_lineno if a.annotation else 0)
                    for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                ]
            else:
                named = [
                    (field.target.id, field.annotation, field.end_lineno)
                    for field in node.body
                    if isinstance(field, ast.AnnAssign)
                ]
            faults += [
                f"{module}.{node.name}: {name}"
                for name, annotation, line in named
                if is_tensor(annotation) and not SHAPE.search(comments.get(line, ""))
            ]
    assert not faults, listed(faults)


def imports_of(body: ast.AST) -> list[str]:
    """Modules of the package that a piece of code imports."""
    found = []
    for node in ast.walk(body):
        if isinstance(node, ast.ImportFrom) and (
            node.level == 1 or (node.module or "").startswith("query_detr")
        ):
            name = (node.module or "").removeprefix("query_detr").strip(".")
            found += [name] if name else [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            found += [
                alias.name.removeprefix("query_detr.")
                for alias in node.names
                if alias.name.startswith("query_detr.")
            ]
    return found


def test_modules_import_only_modules_of_lower_chapters():
    def rank(module):
        return int(CHAPTER_OF[module].split("_")[0])

    assert not (
        faults := [
            f"{module} ({rank(module)}) imports {other} ({rank(other)})"
            for module in MODULES
            for other in imports_of(tree(module))
            if rank(other) >= rank(module)
        ]
    ), listed(faults)


def parsed(source: str) -> ast.Module:
    """Parse a cell, without magics and shell commands."""
    return ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source))


def shown_in(name: str) -> set[tuple[str, str]]:
    """(module, name) of everything of the package that the unexported cells of a notebook use."""
    of_names, of_aliases, used = {}, {}, set()
    if own_module(name) in MODULES:
        of_names = {
            public_name: (own_module(name), public_name) for public_name in public(own_module(name))
        }
    for source in cells(name, "code"):
        body = parsed(source)
        for node in ast.walk(body):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("query_detr"):
                module = node.module.removeprefix("query_detr").strip(".")
                for alias in node.names:
                    if module:
                        of_names[alias.asname or alias.name] = (module, alias.name)
                    else:
                        of_aliases[alias.asname or alias.name] = alias.name
            if isinstance(node, ast.Import):
                of_aliases |= {
                    alias.asname: alias.name.removeprefix("query_detr.")
                    for alias in node.names
                    if alias.asname and alias.name.startswith("query_detr.")
                }
    for source in cells(name, "code"):
        if re.search(r"(?m)^#\| *(export|hide)", source):
            continue
        for node in ast.walk(parsed(source)):
            if (
                isinstance(node, ast.Name)
                and isinstance(node.ctx, ast.Load)
                and node.id in of_names
            ):
                used.add(of_names[node.id])
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in of_aliases
            ):
                used.add((of_aliases[node.value.id], node.attr))
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Attribute)
                and ast.unparse(node.value).startswith("query_detr.")
            ):
                used.add((node.value.attr, node.attr))
        used |= {
            (match[1], match[2]) for match in re.finditer(r"query_detr\.(\w+)\.(\w+)", source)
        } | {(match[1], "main") for match in re.finditer(r"-m query_detr\.(\w+)", source)}
    return used


def named_in(module: str, body: ast.AST) -> set[tuple[str, str]]:
    """(module, name) of everything of the package that a piece of a module uses."""
    of_names, of_aliases = {name: (module, name) for name in definitions_by_name(module)}, {}
    for node in tree(module).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            of_names |= {
                alias.asname or alias.name: (node.module, alias.name) for alias in node.names
            }
        if isinstance(node, ast.Import):
            of_aliases |= {
                alias.asname: alias.name.removeprefix("query_detr.")
                for alias in node.names
                if alias.asname and alias.name.startswith("query_detr.")
            }
    names = {
        of_names[node.id]
        for node in ast.walk(body)
        if isinstance(node, ast.Name) and node.id in of_names
    }
    return names | {
        (of_aliases[node.value.id], node.attr)
        for node in ast.walk(body)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in of_aliases
    }


@cache
def definitions_by_name(module: str) -> dict[str, ast.Module]:
    """Everything that a module defines, private names too, with all statements that do so."""
    found = {}
    for node in tree(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(node.name, []).append(node)
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AugAssign)
            else []
        )
        for name in (
            name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
        ):
            found.setdefault(name.id, []).append(node)
    return {name: ast.Module(body=nodes, type_ignores=[]) for name, nodes in found.items()}


def test_every_public_name_is_used_by_an_example_or_by_something_that_is():
    reached, new = set(), set().union(*map(shown_in, NOTEBOOKS))
    while new := {(module, name) for module, name in new - reached if module in MODULES}:
        reached |= new
        new = set().union(
            *(
                named_in(module, definitions_by_name(module)[name])
                for module, name in new
                if name in definitions_by_name(module)
            )
        )
    assert not (
        faults := [
            f"{module}.{name}"
            for module in MODULES
            for name in public(module)
            if (module, name) not in reached
        ]
    ), listed(faults)


# --- the notebooks
# -----------------------------------------------------------------------------------


def test_notebooks_are_small():
    sizes = {name: path.stat().st_size for name, path in NOTEBOOKS.items()}
    assert sum(sizes.values()) <= 15e6, f"{sum(sizes.values()) / 1e6:.1f} MB in all"
    assert not (
        faults := [f"{name}: {size / 1e6:.2f} MB" for name, size in sizes.items() if size > 2e6]
    ), listed(faults)
    assert not (
        faults := [
            f"{name}: {len(notebook(name)['cells'])} cells"
            for name in NOTEBOOKS
            if len(notebook(name)["cells"]) > 60
        ]
    ), listed(faults)


def test_outputs_hold_no_error_and_no_warning():
    assert not (
        faults := [
            f"{name}, cell {cell}"
            for name in NOTEBOOKS
            for cell, output in outputs(name)
            if output["output_type"] == "error" or output.get("name") == "stderr"
        ]
    ), listed(faults)


def test_every_picture_has_an_alternative_text():
    def alternative(output):
        return output.get("metadata", {}).get("image/png", {}).get("alt", "")

    assert not (
        faults := [
            f"{name}, cell {cell}: {alternative(output)!r}"
            for name in NOTEBOOKS
            for cell, output in outputs(name)
            if "image/png" in output.get("data", {}) and len(alternative(output)) < 10
        ]
    ), listed(faults)


def test_every_link_between_notebooks_leads_somewhere():
    faults = []
    for name, path in NOTEBOOKS.items():
        texts = cells(name, "markdown") + [
            "".join(output["data"]["text/markdown"])
            for _, output in outputs(name)
            if "text/markdown" in output.get("data", {})
        ]
        targets = [
            target
            for text in texts
            for target in re.findall(
                r"\]\(([^)\s]+)\)", re.sub(r"(?s)```.*?```|\$[^$\n]*\$", "", text)
            )
            if not target.startswith(("http", "#", "data:"))
        ]
        faults += [
            f"{name}: {target}"
            for target in targets
            if not (path.parent / target.partition("#")[0]).exists()
        ]
    assert not faults, listed(faults)


def test_every_notebook_begins_with_its_title_and_what_it_is_about():
    assert not (
        faults := [
            name for name in NOTEBOOKS if not re.match(r"# .+\n\n> .+", cells(name, "markdown")[0])
        ]
    ), listed(faults)


# --- what is said about the project
# --------------------------------------------------------------------


@pytest.fixture
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def test_citation_names_the_project_as_it_is_and_the_papers(settings):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (
        cited["cff-version"] == "1.2.0"
        and cited["title"] == settings["title"]
        and str(cited["version"]) == settings["version"]
        and cited["authors"]
        and cited["message"]
    )
    titles = " ".join(paper["title"] for paper in cited["references"])
    assert len(cited["references"]) == 5 and all(
        word in titles
        for word in ("Transformers", "Conditional DETR", "DAB-DETR", "DN-DETR", "Group DETR")
    )
    assert all(paper["authors"] and paper["year"] and paper["url"] for paper in cited["references"])


def test_changes_name_the_present_version(settings):
    assert re.search(
        rf"(?m)^## {re.escape(settings['version'])}\b",
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    )


def test_workflow_runs_what_a_reviewer_runs(settings):
    workflow = yaml.safe_load(
        (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    )
    job = workflow["jobs"]["test"]
    assert (
        job["steps"][-1]["run"] == "bash .ci/run"
        and settings["min_python"] in job["strategy"]["matrix"]["python"]
    )


def test_extras_are_part_of_the_development_tools(settings):
    def names(extra):
        return {
            re.split(r"[<>=]", requirement)[0]
            for requirement in settings[f"{extra}_requirements"].split()
        }

    assert names("export") | names("widgets") <= names("dev")


def test_docs_are_configured_and_what_is_generated_is_not_committed():
    quarto = yaml.safe_load((ROOT / "nbs" / "_quarto.yml").read_text(encoding="utf-8"))
    ignored = (ROOT / ".gitignore").read_text().split()
    assert all(f"nbs/{name}" in ignored for name in quarto["metadata-files"]) and {
        "_docs/",
        "_proc/",
        "_book/",
    } <= set(ignored)
    assert (ROOT / "nbs" / quarto["format"]["html"]["css"]).exists()
