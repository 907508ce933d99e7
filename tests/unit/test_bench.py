"""What the measurements claim."""

import json

import pytest
import torch

from query_detr.batch import InputError
from query_detr.lab import bench
from query_detr.lab.bench import (
    Workload,
    count,
    measure,
    measure_against,
    measure_growth,
    measure_matching,
)

TINY = Workload("shapes_group", features=(4, 5), boxes=3, threads=1)
# targets with more objects than the model has queries are meant here
MORE_OBJECTS = pytest.mark.filterwarnings("ignore:an image has more objects")


def test_parts_of_a_step_add_up_to_it():
    found = measure(TINY, repeat=2, memory=False)
    parts = [part["least"] for name, part in found["step"].items() if name != "step"]
    assert {"encoder", "decoder", "matching", "loss", "backward", "optimiser", "step"} == set(
        found["step"]
    )
    assert 0 < sum(parts) <= found["step"]["step"]["most"]
    assert found["rate"]["fp32"] > 1e9
    assert found["operations"]["step"] > 2 * found["operations"]["inference"] > 0
    assert "TFLOP/s" in bench.table(found)


def test_operations_are_those_of_the_formula():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    assert count(lambda: a @ b).operations == 2 * 3 * 5 * 7
    assert count(lambda: (a @ b).sum().backward()).operations == 2 * 2 * 3 * 5 * 7


def test_inference_of_groups_runs_what_a_single_group_runs():
    group, single = (
        count(bench.Subject(Workload(recipe, features=(4, 5), threads=1)).infer)
        for recipe in ("shapes_group", "shapes_demo")
    )
    training = [
        count(bench.Subject(Workload(recipe, features=(4, 5), threads=1)).step).operations
        for recipe in ("shapes_group", "shapes_demo")
    ]
    assert group.operators == single.operators
    assert group.operations == single.operations
    assert training[0] > training[1]


@MORE_OBJECTS
def test_matching_finds_the_pairs_of_the_plain_way():
    found = measure_matching(
        Workload("shapes_group", threads=1), boxes=(1, 8, 40), repeat=1
    )  # 40: more objects than queries
    assert all(row["same"] for row in found["rows"])
    assert [row["boxes"] for row in found["rows"]] == [1, 8, 40]


def test_wrong_pairs_are_noticed(monkeypatch):
    right = bench.match

    def other(*arguments):
        found = right(*arguments)
        found.query[0, 0] = (found.query[0, 0] + 1) % 25
        return found

    monkeypatch.setattr(bench, "match", other)
    assert not measure_matching(Workload("shapes_group", threads=1), boxes=(8,), repeat=1)["rows"][
        0
    ]["same"]


@pytest.mark.parametrize("recipe", ["shapes_demo", "shapes_dab"])
def test_twin_of_transformers_computes_the_same(recipe):
    pytest.importorskip("transformers")
    found = measure_against(Workload(recipe, features=(4, 5), boxes=3, threads=1), repeat=1)
    assert found["outputs_differ"] < 1e-4
    assert found["step"]["ratio"] > 0


def test_groups_have_no_twin():
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="--groups 1"):
        measure_against(TINY, repeat=1)


def test_growth_is_fitted():
    found = measure_growth(
        Workload("shapes_group", features=(4, 5), boxes=3, threads=1),
        "groups",
        repeat=1,
        memory=False,
    )
    assert found["sizes"] == [25 * k for k in (1, 3, 5, 11, 13)]
    assert len(found["seconds"]) == 5
    assert "fit" in bench.table_growth(found)


@MORE_OBJECTS
def test_numbers_go_into_a_file(tmp_path, capsys):
    arguments = [
        "--recipe",
        "shapes_group",
        "--features",
        "4x5",
        "--boxes",
        "3",
        "--threads",
        "1",
        "--matching",
        "--repeat",
        "1",
        "--device",
        "cpu",
        "--output",
    ]
    assert bench.command_line([*arguments, str(tmp_path / "found.json")]) == 0
    assert [row["boxes"] for row in json.loads((tmp_path / "found.json").read_text())["rows"]] == [
        20,
        60,
        100,
    ]
    assert "same pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", ["--matching --growth groups", "--boxes 0", "--recipe nothing", "--repeat 0"]
)
def test_mistakes_are_told_in_a_line(arguments, capsys):
    assert bench.command_line(arguments.split()) == 2
    assert capsys.readouterr().err.startswith("error: ")
