"""README and the pages beside it cannot go stale: their commands run or are parsed by the real
parsers, their files and tests exist, their tables are what the files say.

A command that trains is run with the options that it names, on smaller data and a smaller model
(SMALL), in one process.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from query_detr import cli, launch
from query_detr.data.shapes import ShapesDataset
from query_detr.lab import experiments
from query_detr.model import QueryDETR
from query_detr.run.checkpoints import save
from query_detr.run.recipes import recipe_named, recipes, set_fields, settings
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
NAMES = {
    path: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "query_detr").rglob("*.py")
}
MODULES = {
    name: importlib.import_module(name)
    for path, name in NAMES.items()
    if "def make_parser(" in path.read_text(encoding="utf-8")
}
EXTRAS = {"dev", "export", "widgets"}


# --- reading the pages
# -------------------------------------------------------------------------------


def blocks(page: str) -> list[str]:
    return re.findall(r"(?ms)^```(?:sh|bash)\n(.*?)^```", PAGES[page])


def commands(block: str) -> list[list[str]]:
    """Split a code block into commands of words; comments are dropped, assignments are put in."""
    given, found = {}, []
    for line in block.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if assignment := re.fullmatch(r'(\w+)="([^"$]*)"', line):
            given[assignment[1]] = assignment[2]
            continue
        for name, value in given.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        while "&&" in words:
            found.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        found.append(words)
    return found


ALL = [(page, words) for page in PAGES for block in blocks(page) for words in commands(block)]


# --- what a command must fulfil
# ----------------------------------------------------------------------


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def check_launch(words: list[str]) -> argparse.Namespace:
    """Parse a line of torchrun and what it starts; look up recipe and fields."""
    started = torchrun_parser().parse_args(
        ["2" if word == "$SLURM_NNODES" else word for word in words]
    )
    assert started.training_script == "query_detr/launch.py"
    assert (ROOT / started.training_script).exists()
    given = launch.make_parser().parse_args(started.training_script_args)
    named = [name for name in (given.recipe, given.print_recipe, given.against) if name]
    for name in named:
        recipe_named(name)
    set_fields(recipe_named(named[0]), given.set_ or [])
    return given


def check_module(words: list[str]) -> None:
    """Parse a line of `python -m`."""
    assert words[0] == "-m", words
    assert words[1] in MODULES, words
    parser = MODULES[words[1]].make_parser()
    given = parser.parse_args(words[2:])
    if hasattr(given, "only"):
        assert all(experiments.variant_named(name) for name in given.only)
    if hasattr(given, "recipe"):
        recipe_named(given.recipe)


def installs(words: list[str]) -> bool:
    """Whether pip is asked for this project with extras that it has."""
    if words[:3] == ["pip", "install", "-e"]:
        return words[3] == "." or set(re.fullmatch(r"\.\[(.*)\]", words[3])[1].split(",")) <= EXTRAS
    return words[:2] == ["pip", "install"] and words[2] in development_tools()


def development_tools() -> set[str]:
    """What the extra dev brings."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    assert all(f"{extra}_requirements" in parser["DEFAULT"] for extra in EXTRAS)
    assert '("dev", "export", "widgets")' in (ROOT / "setup.py").read_text()
    return {
        re.split("[<>=]", requirement)[0]
        for requirement in parser["DEFAULT"]["dev_requirements"].split()
    }


def is_program(name: str) -> bool:
    return bool(importlib.metadata.entry_points(group="console_scripts", name=name))


def check_command(words: list[str]) -> None:
    """Refuse what no parser, file or program answers to."""
    program, *rest = words
    if program == "srun":
        check_command(rest)
    elif program == "torchrun":
        check_launch(rest)
    elif program == "query-detr":
        cli.parse(rest)
    elif program == "python" and rest[0] == "-m":
        check_module(rest)
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), rest[0]
    elif program == "bash":
        assert subprocess.run(["bash", "-n", ROOT / rest[0]]).returncode == 0
    elif program == "pip":
        assert installs(words), words
    elif program == "python3":
        assert rest == ["-m", "venv", ".venv"]
    elif program == ".":
        assert rest == [".venv/bin/activate"]
    elif program == "export" or re.match(r"first=", program):
        pass
    elif program in ("pytest", "jupyter", "nbdev_test", "nbdev_export", "nbdev_clean"):
        assert is_program(program)
        for word in rest:
            if "/" in word or word == "nbs":
                assert (ROOT / word).exists(), word
    else:
        raise AssertionError(f"nothing checks this: {' '.join(words)}")


# --- commands
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page, words", ALL, ids=[f"{page}: {' '.join(words)[:70]}" for page, words in ALL]
)
def test_every_command_is_understood(page, words):
    check_command(words)


def test_the_two_commands_are_the_first():
    first, second = (commands(block)[-1] for block in blocks("README.md")[:2])
    assert first == ["torchrun", "query_detr/launch.py", "--recipe", "shapes_demo"]
    assert second == [
        "bash",
        "tests/run.sh",
    ]


def test_shell_scripts_are_shell():
    for page in PAGES:
        for block in blocks(page):
            assert (
                subprocess.run(
                    ["bash", "-n"], input=block.replace("IMAGE …", "IMAGE"), text=True
                ).returncode
                == 0
            )


def run_small(words: list[str]) -> int:
    """Run what a line of torchrun starts with its own options, smaller."""
    own = torchrun_parser().parse_args(words).training_script_args
    given = launch.make_parser().parse_args(own)
    small = [] if given.check_data else SMALL[:4] if given.overfit else SMALL
    pretrained = (
        ["--backbone-weights", "none"]
        if given.recipe
        and recipe_named(given.recipe).backbone_weights == "imagenet"
        and not given.checkpoint
        else []
    )
    kept = [
        field
        for field in SMALL_MODEL
        if field.partition("=")[0] not in ("short_side", "longest_side")
        or recipe_named(given.recipe).data == "coco"
    ]
    return launch.command_line(
        [*own, *small, *pretrained, *([] if given.check_data else ["--set", *kept])]
    )


def lines_with(*wanted: str) -> list[list[str]]:
    """Lines of README that start launch with these words."""
    return [
        words[1:]
        for page, words in ALL
        if page == "README.md" and words[0] == "torchrun" and all(word in words for word in wanted)
    ]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to run commands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QUERY_DETR_COCO", raising=False)
    return tmp_path


def test_first_command_trains_and_leaves_what_is_said(elsewhere):
    (line,) = lines_with("shapes_demo", "--recipe")
    assert run_small(line) == 0
    left = {path.name for path in Path("runs/shapes_demo").iterdir()}
    assert {"recipe.json", "metrics.jsonl", "checkpoint.pt", "curves.png", "detections.png"} <= left


def test_one_group_is_evaluated_and_recipes_are_compared(elsewhere, capsys):
    recipe = set_fields(
        recipe_named("shapes_group"), [field for field in SMALL_MODEL if "side" not in field]
    )
    Path("runs/shapes_group").mkdir(parents=True)
    save({"model": QueryDETR(recipe.model).state_dict()}, "runs/shapes_group/checkpoint.pt")
    assert run_small(lines_with("--group")[0]) == 0
    (line,) = lines_with("--print-recipe")
    assert launch.command_line(line[1:]) == 0
    assert capsys.readouterr().out.endswith("model.groups = 3  (shapes_demo: 1)\n")


def test_training_on_coco(elsewhere):
    (line,) = lines_with("--nproc_per_node", "--coco")
    for split, seed in (("train2017", 1), ("val2017", 0)):
        ShapesDataset(4, seed).write_coco(elsewhere / "path" / "to" / "coco", split)
    assert run_small(line) == 0
    assert Path("runs/group_detr_12ep/checkpoint.pt").exists()


def test_evaluation_of_a_checkpoint(elsewhere):
    (line,) = lines_with("--eval-only", "--coco")
    for split, seed in (("train2017", 1), ("val2017", 0)):
        ShapesDataset(2, seed).write_coco(elsewhere / "path" / "to" / "coco", split)
    recipe = set_fields(recipe_named("group_detr_12ep"), SMALL_MODEL)
    small = set_fields(recipe, ["classes=5"])
    save({"model": QueryDETR(small.model).state_dict()}, line[line.index("--checkpoint") + 1])
    assert run_small(line) == 0
    assert not Path("runs").exists()


def test_own_data_from_the_check_to_the_pictures(elsewhere):
    (block,) = [block for block in blocks("README.md") if "--train-json" in block]
    for name, seed in (("train", 1), ("val", 0)):
        ShapesDataset(8, seed).write_coco(elsewhere / "drawn", name)
        (elsewhere / "drawn" / name).rename(name)
        (elsewhere / "drawn" / "annotations" / f"instances_{name}.json").rename(f"{name}.json")
    *training, predicting = commands(block)
    assert [run_small(words[1:]) for words in training] == [0] * 3
    assert sorted(path.name for path in Path("runs").iterdir()) == ["overfit", "shapes_dn"]
    assert Path("data_check/train.png").exists()
    images = [str(path) for path in sorted(Path("val").iterdir())[:2]]
    at = predicting.index("IMAGE")
    assert predict.command_line([*predicting[3:at], *images, *predicting[at + 2 :]]) == 0
    assert Path("found/detections.json").exists()


# --- everything else that a page names
# -------------------------------------------------------------------


def code_of(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", PAGES[page]))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = [
        link for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if not link.startswith("http")
    ]
    assert not [
        link for link in links if not ((ROOT / page).parent / link.partition("#")[0]).exists()
    ]


@pytest.mark.parametrize("page", PAGES)
def test_options_files_tests_recipes_and_functions_exist(page):
    options = set().union(
        options_of(torchrun_parser()),
        *(options_of(module.make_parser()) for module in MODULES.values()),
    )
    fields = {name.rpartition(".")[2] for name in settings(recipe_named("shapes_demo"))} | {"FIELD"}
    families = tuple(name.rpartition("_")[0] for name in recipes)
    for code in code_of(page):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert option in options, option
        for field in re.findall(r"(?<![\w.\]])(\w+)=(?!=)", code):
            assert field in fields | {"requires_grad", "auxiliary_loss"}, field
        if re.match(r"(nbs|tests|docs|results|query_detr|\.ci|\.github)/[\w./-]*$", code):
            assert (ROOT / code).exists(), code
        if match := re.match(r"(?:tests/)?(test_\w+)(\.py)?(?:::(\w+))?$", code):
            paths = list((ROOT / "tests").rglob(f"{match[1]}.py"))
            assert paths, code
            if match[3]:
                text = paths[0].read_text(encoding="utf-8")
                assert re.search(rf"(?m)^def {match[3]}\(", text), code
        if match := re.match(r"query_detr\.(\w+)\.(\w+)$", code):
            assert hasattr(importlib.import_module(f"query_detr.{match[1]}"), match[2]), code
        if re.match(r"(shapes|\w+_detr)_\w+$", code) and code.startswith(families):
            assert code in recipes, code
        if code.startswith(("python docs", "python tests", "python -m", "pytest", "bash", "pip")):
            check_command(shlex.split(code))


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
        assert all(
            str(int(new)) in text for new, _ in differing.values() if isinstance(new, (int, float))
        )


def tables():
    """The tool that writes the tables, as a module."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_what_recipes_results_and_chapter_30_say():
    assert tables().written(PAGES["README.md"]) == PAGES["README.md"], "run: python docs/tables.py"


def test_every_line_of_the_ledger_is_in_the_table():
    made, lines = tables().ledger(), tables().ledger_lines()
    assert len(lines) >= 22
    assert all(float(seen) <= float(limit) for _, _, limit, seen, _ in lines)
    assert sum(
        len(re.findall(rf"\| {re.escape('0' if float(seen) == 0 else seen)} ", made)) > 0
        for *_, seen, _ in lines
    ) == len(lines)


def test_published_numbers_are_in_the_table_once_each():
    rows = [row.split(" | ") for row in tables().models().splitlines()[2:]]
    found = {
        name: ap
        for _, _, names, *aps in rows
        for name, ap in zip(
            re.findall(r"`(\w+)`", names), (ap.strip(" |") for ap in aps if ap.strip(" |"))
        )
    }
    assert found == {
        recipe.name: str(recipe.published_ap or "none")
        for recipe in recipes.values()
        if recipe.data == "coco"
    }


def test_picture_is_small_and_described():
    ((text, file),) = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", PAGES["README.md"])
    assert (ROOT / file).stat().st_size <= 150_000
    assert len(text) > 100


def test_the_pages_name_no_place_of_their_making():
    for page, text in PAGES.items():
        assert not re.search(r"(?<![\w./:~…!-])/\w+/\w+|/(tmp|root|home)\b", text), page
