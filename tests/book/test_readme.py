"""README and the pages beside it cannot go stale.

Their commands are parsed by the real parsers or run, their files and tests exist, their tables are
what the files say. A command that trains is run with the options that it names, on smaller data
and a smaller model (SMALL), in one process.
"""

import importlib
import importlib.util
import os
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from query_detr import cli, launch
from query_detr.data.shapes import ShapesDataset
from query_detr.model import QueryDETR
from query_detr.run.checkpoints import save
from query_detr.run.recipes import recipe_named, recipes, set_fields
from query_detr.use import predict

ROOT = Path(__file__).parents[2]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", "docs/runs.md")
}
SMALL = ["--epochs", "1", "--batch-size", "2", "--limit-train", "4", "--limit-val", "2"]
SMALL_MODEL = [
    "queries=8",
    "width=16",
    "heads=2",
    "encoder_layers=1",
    "decoder_layers=2",
    "feedforward=16",
    "backbone=resnet10",
    "stages=2",
    "norm=group",
    "freeze_stem=false",
    "backbone_bf16=false",
    "eval_batch_size=2",
    "augmentation=flip",
    "short_side=64",
    "longest_side=96",
]
SOURCE = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("query_detr/**/*.py"))


# --- reading the pages ---


def blocks(page: str) -> list[str]:
    """List a page's pieces of shell."""
    return re.findall(r"(?ms)^```(?:sh|bash)\n(.*?)^```", PAGES[page])


PROGRAMS = {
    *("bash", "basedpyright", "head", "jupyter", "nbdev_clean", "nbdev_export", "nbdev_test"),
    *("pip", "pytest", "python", "python3", "query-detr", "ruff", "scontrol", "srun", "torchrun"),
}
STAND_IN = """#!/bin/bash
{ printf '%s\\t' "${0##*/}" "$@"; echo; } >> "$CALLS"
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Let bash itself read a block, with stand-ins for all programs that note how they are called.

    A program that has no stand-in ends the block with an error.
    """
    folder = tmp_path_factory.mktemp("stand-ins")
    for name in PROGRAMS:
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()

    def called(block: str) -> list[list[str]]:
        calls = folder / "calls"
        calls.write_text("")
        outside = dict(PATH=str(folder), CALLS=str(calls), SLURM_NNODES="2")
        run = ["/bin/bash", "-e", "-c", block]
        subprocess.run(run, cwd=folder, env=outside, check=True, timeout=60)
        return [line.rstrip("\t").split("\t") for line in calls.read_text().splitlines()]

    return called


# --- what a command must fulfil ---


def check_launch(words: list[str]) -> None:
    """Parse a line of torchrun and what it starts; look up recipe and fields."""
    started = torchrun_parser().parse_args(words)
    assert started.training_script == "query_detr/launch.py"
    given = launch.make_parser().parse_args(started.training_script_args)
    named = [name for name in (given.recipe, given.print_recipe, given.against) if name]
    for name in named:
        recipe_named(name)
    set_fields(recipe_named(named[0]), given.set_ or [])


def check_python(words: list[str]) -> None:
    """Parse a line of `python -m`, or find the script."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
    elif words[1] != "venv":
        importlib.import_module(words[1]).make_parser().parse_args(words[2:])


def check_install(words: list[str]) -> None:
    """Find the extras that pip is asked for."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    for extras in re.findall(r"\[(.*)\]", words[-1]):
        for extra in extras.split(","):
            assert f"{extra}_requirements" in parser["DEFAULT"]


def check_paths(words: list[str]) -> None:
    """Find the files that other programs are given."""
    for word in words:
        assert "/" not in word or (ROOT / word).exists(), word


CHECKS = {
    "srun": lambda words: check_launch(words[1:]),
    "torchrun": check_launch,
    "query-detr": cli.parse,
    "python": check_python,
    "python3": check_python,
    "pip": check_install,
}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page, commands):
    for block in blocks(page):
        for program, *words in commands(block):
            CHECKS.get(program, check_paths)(words)


def test_the_two_commands_are_the_first(commands):
    first, second = (commands(block)[-1] for block in blocks("README.md")[:2])
    assert first == ["torchrun", "query_detr/launch.py", "--recipe", "shapes_demo"]
    assert second == ["bash", "tests/run.sh"]


# --- commands that run ---


def shrink(words: list[str]) -> list[str]:
    """Give the options of a line of torchrun, with smaller data and a smaller model behind."""
    options = torchrun_parser().parse_args(words).training_script_args
    given = launch.make_parser().parse_args(options)
    if given.check_data:
        return options
    recipe = recipe_named(given.recipe)
    small = SMALL[:4] if given.overfit else SMALL
    if recipe.backbone_weights == "imagenet" and not given.checkpoint:
        small = [*small, "--backbone-weights", "none"]
    sides = ("short_side=", "longest_side=")
    fields = [f for f in SMALL_MODEL if recipe.data == "coco" or not f.startswith(sides)]
    return [*options, *small, "--set", *fields]


def run_small(words: list[str]) -> int:
    """Run what a line of torchrun starts, smaller; give its exit status."""
    return launch.command_line(shrink(words))


@pytest.fixture
def line(commands):
    """Find the one line of README that starts launch with these words."""

    def find(*wanted: str) -> list[str]:
        lines = [words for block in blocks("README.md") for words in commands(block)]
        launches = [words[1:] for words in lines if words[0] == "torchrun"]
        (found,) = [words for words in launches if set(wanted) <= set(words)]
        return found

    return find


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to run commands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QUERY_DETR_COCO", raising=False)
    return tmp_path


def test_first_command_trains_and_leaves_what_is_said(line, elsewhere):
    assert run_small(line("shapes_demo", "--recipe")) == 0
    left = {path.name for path in Path("runs/shapes_demo").iterdir()}
    assert {"recipe.json", "metrics.jsonl", "checkpoint.pt", "curves.png", "detections.png"} <= left


def test_one_group_is_evaluated(line, elsewhere):
    fields = [field for field in SMALL_MODEL if "side" not in field]
    recipe = set_fields(recipe_named("shapes_group"), fields)
    Path("runs/shapes_group").mkdir(parents=True)
    save({"model": QueryDETR(recipe.model).state_dict()}, "runs/shapes_group/checkpoint.pt")
    assert run_small(line("--group")) == 0


def test_recipes_are_compared(line, elsewhere, capsys):
    assert launch.command_line(line("--print-recipe")[1:]) == 0
    assert capsys.readouterr().out.endswith("model.groups = 3  (shapes_demo: 1)\n")


def write_coco(folder: Path, images: int) -> None:
    """Draw a small data set in COCO's layout."""
    for split, seed in (("train2017", 1), ("val2017", 0)):
        ShapesDataset(images, seed).write_coco(folder / "path" / "to" / "coco", split)


def test_training_on_coco(line, elsewhere):
    write_coco(elsewhere, 4)
    assert run_small(line("--nproc_per_node", "--coco")) == 0
    assert Path("runs/group_detr_12ep/checkpoint.pt").exists()


def test_evaluation_of_a_checkpoint(line, elsewhere):
    words = line("--eval-only", "--coco")
    write_coco(elsewhere, 2)
    recipe = set_fields(recipe_named("group_detr_12ep"), [*SMALL_MODEL, "classes=5"])
    save({"model": QueryDETR(recipe.model).state_dict()}, words[words.index("--checkpoint") + 1])
    assert run_small(words) == 0
    assert not Path("runs").exists()


def test_own_data_from_the_check_to_the_pictures(commands, elsewhere):
    (block,) = [block for block in blocks("README.md") if "--train-json" in block]
    for name, seed in (("train", 1), ("val", 0)):
        ShapesDataset(8, seed).write_coco(elsewhere / "drawn", name)
        (elsewhere / "drawn" / name).rename(name)
        (elsewhere / "drawn" / "annotations" / f"instances_{name}.json").rename(f"{name}.json")
    *training, predicting = commands(block)
    for words in training:
        assert run_small(words[1:]) == 0
    assert sorted(os.listdir("runs")) == ["overfit", "shapes_dn"]
    assert Path("data_check/train.png").exists()
    images = [str(path) for path in sorted(Path("val").iterdir())[:2]]
    at = predicting.index("IMAGE")
    assert predict.command_line([*predicting[3:at], *images, *predicting[at + 2 :]]) == 0
    assert Path("found/detections.json").exists()


# --- everything else that a page names ---


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", PAGES[page]):
        assert ((ROOT / page).parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_files_tests_options_and_recipes_exist(page):
    families = tuple(name.rpartition("_")[0] for name in recipes)
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", PAGES[page])):
        for option in re.findall(r"(?<![\w-])--([a-z][\w-]*)", code):
            assert re.search(rf"\b{option.replace('-', '[-_]')}\b", SOURCE), code
        if re.match(r"(nbs|tests|docs|results|query_detr|\.ci|\.github)/[\w./-]*$", code):
            assert (ROOT / code).exists(), code
        if match := re.match(r"(?:tests/\w+/)?(test_\w+)(?:\.py)?(?:::(\w+))?$", code):
            (path,) = (ROOT / "tests").rglob(f"{match[1]}.py")
            assert f"def {match[2] or 'test_'}" in path.read_text(encoding="utf-8"), code
        if re.match(r"(shapes|\w+_detr)_\w+$", code) and code.startswith(families):
            assert code in recipes, code


def test_siblings_differ_as_the_table_says():
    said = {
        "groups": "model.groups",
        "anchors": "model.reference",
        "PReLU": "model.activation",
        "temperature": "model.temperature",
        "noise sets": "model.denoising.sets",
    }
    rows = re.findall(r"(?m)^\| `(shapes_\w+)` \| `(shapes_\w+)` \| ([^|]+) \|", PAGES["README.md"])
    assert len(rows) == 4
    for name, partner, text in rows:
        differing = launch.recipes.differences(recipes[name], recipes[partner])
        assert {field for word, field in said.items() if word in text} == set(differing)
        numbers = [new for new, _ in differing.values() if isinstance(new, (int, float))]
        assert [number for number in numbers if str(int(number)) not in text] == []


def tables():
    """The tool that writes the tables, as a module."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_current():
    assert tables().written(PAGES["README.md"]) == PAGES["README.md"], "run: python docs/tables.py"


def test_every_line_of_the_ledger_is_in_the_table():
    table = tables().ledger()
    lines = tables().ledger_lines()
    assert len(lines) >= 22
    for what, _, limit, seen, _ in lines:
        assert float(seen) <= float(limit), what
        assert f"| {'0' if float(seen) == 0 else seen} " in table, what


def test_published_numbers_are_in_the_table_once_each():
    in_table = {}
    for row in tables().models().splitlines()[2:]:
        _, _, names, *columns = row.split(" | ")
        numbers = [column.strip(" |") for column in columns if column.strip(" |")]
        in_table |= zip(re.findall(r"`(\w+)`", names), numbers, strict=True)
    coco = [recipe for recipe in recipes.values() if recipe.data == "coco"]
    assert in_table == {recipe.name: str(recipe.published_ap or "none") for recipe in coco}


def test_picture_is_small_and_described():
    ((text, file),) = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", PAGES["README.md"])
    assert (ROOT / file).stat().st_size <= 150_000
    assert len(text) > 100


def test_the_pages_name_no_place_of_their_making():
    for page, text in PAGES.items():
        assert not re.search(r"(?<![\w./:~…!-])/\w+/\w+|/(tmp|root|home)\b", text), page
