"""The command query-detr and the front door: short help, near misses, exit codes, lazy imports."""

import doctest
import io
import subprocess
import sys
from contextlib import redirect_stdout

import pytest

import query_detr
from query_detr import cli

PAGES = ("", "train", "evaluate", "predict", "recipes", "data", "data check", "data download")
PAGES += ("import", "export", "replay", "bench", "experiment")


def utf8():
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def help_page(page):
    """Give a help page as a terminal shows it."""
    with redirect_stdout(utf8()) as shown, pytest.raises(SystemExit) as stop:
        cli.main([*page.split(), "--help"])
    assert stop.value.code == 0
    return shown.buffer.getvalue().decode()


def run(line, capsys):
    try:
        status = cli.main(line.split())
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture(autouse=True)
def screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("page", PAGES)
def test_help_fits_a_screen(page):
    text = help_page(page)
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 100


def test_every_option_of_a_page_is_explained():
    for page in PAGES:
        lines = help_page(page).splitlines()
        rows = [line.strip("│ ") for line in lines if line.startswith("│ --")]
        assert all(len(row.split("  ", 1)) == 2 for row in rows), page


def test_recipe_fields_have_their_own_page(capsys):
    status, text, _ = run("train shapes_dn --help-recipe", capsys)
    assert status == 0
    assert "model.denoising.sets=2" in text
    names = {line.partition("=")[0] for line in text.splitlines()}
    assert not names & {"name", "source", "note", "published_ap"}
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("trian shapes_demo", "Did you mean train?"),
        ("data dwnload coco", "Did you mean download?"),
        ("train shapes_demo --epoch 3", "Did you mean --epochs?"),
        ("train shapes_demo --epochs three", "--epochs takes a whole number, not 'three'"),
        ("train shapes_demo --seed x", "--seed takes a whole number, not 'x'"),
        ("predict m p --output o --threshold high", "--threshold takes a number, not 'high'"),
        ("train shapes_demo --kernels fast", "'measured', 'on', 'off'"),
        ("train", "query-detr recipes lists all"),
        ("recipes shapes_dem", "did you mean shapes_demo?"),
        ("recipes shapes_demo --set widht=3", "near it are width"),
        ("evaluate shapes_demo no.pt", "no.pt"),
        ("predict no_model no.jpg --output o", "no.jpg does not exist"),
        ("predict no_model --output o", "no pictures were named"),
        ("replay no.pt", "no.pt does not exist"),
        ("bench --features 25", "HEIGHTxWIDTH"),
        ("experiment --only nothing", "nothing"),
        ("export no_model out", "no_model"),
        ("import no.pt out", "no.pt"),
        ("data download somewhere --what tarin", "tarin"),
        ("data", "check, download"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(line, word, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, said = run(line, capsys)
    assert status == 2
    assert said.startswith("error: ")
    assert word in said
    assert "Traceback" not in said


def test_several_set_are_joined():
    command = cli.parse(["train", "a", "--set", "x=1", "y=2", "--set", "z=3"])
    assert cli.assignments(command.about_recipe.set) == ["x=1", "y=2", "z=3"]


def test_two_recipes_are_compared(capsys):
    status, text, _ = run("recipes shapes_dn --against shapes_dab", capsys)
    assert status == 0
    assert text == "model.denoising.sets = 2  (shapes_dab: 0)\n"


def test_every_option_of_launch_main_is_passed_on(monkeypatch):
    given = {}
    monkeypatch.setattr("query_detr.launch.main", lambda **options: given.update(options))
    assert cli.main(["train", "shapes_demo", "--epochs=3", "--set", "width=8", "--coco", "c"]) == 0
    assert (given["recipe"], given["epochs"], given["coco"]) == ("shapes_demo", 3, "c")
    assert given["set_"] == ["width=8"]


def test_faults_keep_their_exit_status(monkeypatch, capsys):
    from query_detr.run.faults import Preempted, TrainingError

    for error, expected in ((TrainingError("broken"), 1), (Preempted("saved"), 143)):

        def stop(error=error, **options):
            raise error

        monkeypatch.setattr("query_detr.launch.main", stop)
        assert run("train shapes_demo", capsys)[0] == expected


def python(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_help_does_not_import_torch():
    script = "import sys, query_detr; from query_detr import cli\ntry: cli.main(['--help'])\n"
    assert python(f"{script}except SystemExit: print('torch' in sys.modules)")[-1] == "False"


def test_the_front_door_opens_every_name():
    for name in query_detr.__all__:
        assert getattr(query_detr, name) is not None
        assert name in dir(query_detr)
    with pytest.raises(AttributeError, match="nothing"):
        _ = query_detr.nothing


def test_the_front_door_is_cheap():
    script = "import time, torch; start = time.process_time(); import query_detr; "
    assert float(python(f"{script}print(time.process_time() - start)")[0]) < 2


def test_the_example_runs():
    results = doctest.testmod(query_detr)
    assert results.attempted == 3
    assert results.failed == 0
