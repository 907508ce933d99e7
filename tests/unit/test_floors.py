"""The house has floors, and every import points down: ground floor ← data ← run ← use ← lab ← door.

The ground floor, the book's subject, knows no files, processes, command line or processor.
"""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "query_detr"
FLOORS = ["data", "run", "use", "lab"]  # folders, from below; what stands in none is ground floor …
DOOR = {"launch", "cli", "__init__", "__main__"}  # … or the door, which may open every room
GROUND_LIBRARIES = {"torch", "torchvision", "scipy", "numpy", "jaxtyping"}
MACHINERY = {"os", "sys", "pathlib", "subprocess", "multiprocessing", "socket", "shutil", "signal"}
ALLOWED_UP = {  # imports that point up today, each with its reason
    ("batch", "sys"),  # `exit_status`, which the one command replaces
    ("data.check", "use.plots"),  # the contact sheet
}


def modules() -> dict[str, ast.Module]:
    """Parse every module of the package, by its dotted name."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name not in ("_modidx.py",)]
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths}
    return {
        name: ast.parse(path.read_text(encoding="utf-8"))
        for path, name in names.items()
        if not name.endswith(".__init__")
    }


def floor(name: str) -> int:
    """Number the floor of a module: 0 for the ground floor, the door above all others."""
    first = name.split(".")[0]
    if first in DOOR:
        return len(FLOORS) + 1
    return FLOORS.index(first) + 1 if first in FLOORS else 0


def imports(name: str, tree: ast.Module) -> tuple[set[str], set[str]]:
    """List what a module imports: modules of the package, and other libraries."""
    inside, outside = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            parts = name.split(".")[: -node.level]
            targets = [".".join(["query_detr", *parts, *([node.module] if node.module else [])])]
        elif isinstance(node, ast.ImportFrom):
            targets = [node.module]
        else:
            continue
        for target in targets:
            package, _, rest = target.partition(".")
            if package == "query_detr" and rest:
                inside.add(rest)
            elif package != "query_detr":
                outside.add(package)
    return inside, outside


def upward(trees: dict[str, ast.Module]) -> set[tuple[str, str]]:
    """Find imports that point up, and ground-floor modules that import machinery."""
    found = set()
    for name, tree in trees.items():
        inside, outside = imports(name, tree)
        found |= {(name, target) for target in inside if floor(target) > floor(name)}
        if floor(name) == 0:
            strange = outside - GROUND_LIBRARIES - (sys.stdlib_module_names - MACHINERY)
            found |= {(name, library) for library in strange}
    return found


def test_every_import_points_down():
    assert upward(modules()) - ALLOWED_UP == set()


def test_no_exception_outlives_its_reason():
    assert ALLOWED_UP - upward(modules()) == set()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("boxes", "from .run.step import train_step"),
        ("matcher", "import subprocess"),
        ("decoder", "import matplotlib"),
        ("data.coco", "from ..run.recipes import Recipe"),
        ("run.step", "from ..lab.cpu import use_fast_kernels"),
        ("use.plots", "import query_detr.launch as launch"),
    ],
)
def test_an_import_that_points_up_is_noticed(name, line):
    tree = ast.parse(line)
    assert len(upward({name: tree})) == 1


def test_the_ground_floor_stays_small():
    """Two screens a module: what a student reads in an afternoon."""
    sizes = {path.stem: len(path.read_text().splitlines()) for path in PACKAGE.glob("*.py")}
    ground = {name: size for name, size in sizes.items() if name not in {*DOOR, "_modidx"}}
    assert len(ground) <= 13
    assert max(ground.values()) <= 300
