"""The experiment's runs are kept, continued and compared as it says; the stored results agree
with the variants, the tables with the results."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import query_detr.lab.experiments as experiments
from query_detr.batch import InputError
from query_detr.denoising import Denoising
from query_detr.lab.experiments import (
    CLAIM,
    VARIANTS,
    Variant,
    command_line,
    compare,
    compared_settings,
    curve_of,
    keep,
    mean_curve,
    measure_costs,
    read_results,
    result_path,
    run_one,
    step_costs,
    steps_to_reach,
)
from query_detr.run.recipes import differences, recipe_named, sibling

ROOT = Path(__file__).parents[2]
STORED = ROOT / "results"


@pytest.fixture
def tiny(small, monkeypatch):
    """Three variants that train in about a second."""
    base = replace(
        recipe_named("shapes_demo"),
        name="conditional",
        model=small,
        epochs=3,
        drop_epoch=2,
        evaluate_every=1,
        batch_size=4,
        warmup=2,
    )
    anchored = sibling(base, "dab", "", reference="anchor", activation="prelu")
    chosen = (
        Variant(base, "points", "tab:blue"),
        Variant(anchored, "anchors", "tab:cyan"),
        Variant(
            sibling(base, "conditional_groups5", "", groups=2),
            "+ groups",
            "tab:purple",
            "conditional",
        ),
        Variant(
            sibling(anchored, "dab_noise5", "", denoising=Denoising(sets=2)),
            "+ noise",
            "tab:orange",
            "dab",
        ),
    )
    monkeypatch.setattr(experiments, "VARIANTS", {v.recipe.name: v for v in chosen})
    (
        monkeypatch.setattr(experiments, "TRAIN_SCENES", 12),
        monkeypatch.setattr(experiments, "VAL_SCENES", 6),
    )
    return experiments.VARIANTS


def without_times(result):
    """What must not depend on the machine's mood."""
    curve = [{k: v for k, v in point.items() if k != "seconds"} for point in result["curve"]]
    return {k: v for k, v in result.items() if k not in ("seconds_per_step", "command")} | {
        "curve": curve
    }


def made_up(aps, steps=(10, 20, 30, 40), seconds=0.1, name="conditional", seed=0):
    return dict(
        variant=name,
        seed=seed,
        seconds_per_step=seconds,
        curve=[
            dict(epoch=i + 1, step=s, seconds=s * seconds, AP=ap)
            for i, (s, ap) in enumerate(zip(steps, aps))
        ],
        instability=[
            dict(epoch=i, step=s, all=0.1, matched=0.5) for i, s in enumerate(steps[1:], 2)
        ],
    )


# --- what a run keeps


def test_seconds_are_those_of_the_training_steps_alone():
    records = [
        dict(step=50, loss=1.0, images_per_second=100.0),
        dict(step=75, loss=1.0, images_per_second=50.0),
        dict(
            epoch=1, step=75, seconds=99.0, AP=0.1, **dict.fromkeys(experiments.METRICS[1:6], 0.0)
        ),
        dict(step=100, loss=1.0, images_per_second=25.0),
        dict(
            epoch=2, step=100, seconds=99.0, AP=0.2, **dict.fromkeys(experiments.METRICS[1:6], 0.0)
        ),
    ]
    assert [(p["step"], p["AP"], p["seconds"]) for p in curve_of(records, 8)] == [
        (75, 0.1, 4 + 4),
        (100, 0.2, 4 + 4 + 8),
    ]  # 50 · 8 / 100 + 25 · 8 / 50, then + 25 · 8 / 25


def test_run_is_kept_and_not_repeated(tiny, tmp_path, monkeypatch):
    result = run_one("dab_noise5", 3, tmp_path, tmp_path / "work")
    stored = json.loads((tmp_path / "dab_noise5-seed3.json").read_text())
    assert stored == result
    assert stored["command"] == "python -m query_detr.lab.experiments --only dab_noise5 --seeds 3"
    assert [p["step"] for p in stored["curve"]] == [3, 6, 9]
    assert [p["epoch"] for p in stored["instability"]] == [2, 3]
    assert stored["recipe"] == compared_settings(tiny["dab_noise5"].recipe)
    assert stored["images"] == dict(train=12, val=6)
    monkeypatch.setattr(experiments, "fit", None)  # a second training would fail
    assert run_one("dab_noise5", 3, tmp_path, tmp_path / "work") == result


def test_seed_decides_the_run(tiny, tmp_path):
    first, same, other = (
        run_one("conditional", seed, tmp_path / folder, tmp_path / f"{folder}-work")
        for seed, folder in ((0, "a"), (0, "b"), (1, "a"))
    )
    assert without_times(first) == without_times(same)
    assert [p["AP"] for p in first["curve"]] != [p["AP"] for p in other["curve"]] or first[
        "instability"
    ] != other["instability"]


def test_stopped_run_is_continued(tiny, tmp_path, monkeypatch):
    straight = run_one("conditional_groups5", 0, tmp_path, tmp_path / "work")
    whole_fit, steps = experiments.fit, []

    def stopped(*arguments):
        whole_fit(*arguments[:-1], replace(arguments[-1], stop_after=1))
        raise KeyboardInterrupt

    def counted(progress, *arguments):
        steps.append(progress.step)
        return whole_fit(progress, *arguments)

    monkeypatch.setattr(experiments, "fit", stopped)
    options = [
        "--only",
        "conditional_groups5",
        "--seeds",
        "0",
        "--results",
        str(tmp_path / "again"),
        "--work",
        str(tmp_path / "again-work"),
    ]
    assert command_line(options) == 130
    assert not list((tmp_path / "again").glob("*.json"))
    monkeypatch.setattr(experiments, "fit", counted)
    assert command_line(options) == 0
    assert steps == [3]  # not from the beginning
    again = json.loads((tmp_path / "again" / "conditional_groups5-seed0.json").read_text())
    assert without_times(again)["curve"] == without_times(straight)["curve"]


def test_result_of_other_settings_is_refused(tiny, tmp_path, monkeypatch, capsys):
    run_one("conditional", 0, tmp_path, tmp_path / "work")
    changed = replace(tiny["conditional"], recipe=replace(tiny["conditional"].recipe, lr=1e-5))
    monkeypatch.setitem(tiny, "conditional", changed)
    assert command_line(["--only", "conditional", "--seeds", "0", "--results", str(tmp_path)]) == 2
    assert (
        "conditional-seed0.json is of other settings (lr was 0.0004, is 1e-05)"
        in capsys.readouterr().err
    )


def test_result_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "a.json"
    keep(dict(curve=[dict(step=1, AP=0.5)], seed=1), path)
    with pytest.raises(TypeError):
        keep(dict(curve=object()), path)
    assert json.loads(path.read_text()) == dict(curve=[dict(step=1, AP=0.5)], seed=1)


@pytest.mark.parametrize(
    "options, said",
    [
        (
            ["--only", "nobody"],
            "no variant is called 'nobody': choose from conditional, conditional_groups5",
        ),
        (["--results", "RESULTS", "--seeds"], "expected at least one argument"),
    ],
)
def test_wrong_options_are_named(options, said, tmp_path, capsys):
    options = [str(tmp_path) if o == "RESULTS" else o for o in options]
    try:
        status = command_line(options)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_missing_results_name_the_command(tmp_path):
    with pytest.raises(
        InputError, match="python -m query_detr.lab.experiments --only conditional dab makes them"
    ):
        read_results(tmp_path, ("conditional", "dab"))


def test_run_shows_its_curves(tiny, tmp_path, capsys):
    assert (
        command_line(
            [
                "--only",
                "conditional",
                "conditional_groups5",
                "--seeds",
                "0",
                "--results",
                str(tmp_path / "r"),
                "--work",
                str(tmp_path / "w"),
            ]
        )
        == 0
    )
    assert (tmp_path / "w" / "conditional.png").exists()
    assert "+ groups" in capsys.readouterr().out
    assert command_line(["--list", "--results", str(tmp_path / "r")]) == 0
    listed = capsys.readouterr().out
    assert "conditional with model.groups = 2" in listed
    assert listed.count("seeds stored: 0") == 2


def test_costs_are_measured_side_by_side(tiny, tmp_path):
    costs = measure_costs(["conditional", "dab_noise5"], tmp_path, steps=2, unused=1)[
        "seconds_per_step"
    ]
    assert json.loads((tmp_path / "cost.json").read_text())["seconds_per_step"] == costs
    assert all(c["median"] > 0 for c in costs.values())
    runs = [made_up([0.1] * 4, seconds=s) for s in (100.0, 500.0, 200.0)]
    assert step_costs(dict(conditional=runs), tmp_path) == dict(conditional=costs["conditional"])
    mixed = step_costs(
        dict(conditional=runs, conditional_groups5=runs), tmp_path
    )  # groups were not measured: then both from their runs
    assert mixed == dict(conditional=dict(median=200.0), conditional_groups5=dict(median=200.0))


# --- the comparison is fair


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.baseline])
def test_partners_differ_in_what_is_added_and_in_nothing_else(name):
    variant = VARIANTS[name]
    differing = set(differences(VARIANTS[variant.baseline].recipe, variant.recipe))
    assert differing
    assert differing <= {"model.groups", "model.denoising.sets"}


def test_variants_have_their_own_colours_and_names():
    drawn = [v for v in VARIANTS.values() if v.recipe.data == "shapes"]
    assert len({v.colour for v in drawn}) == len(drawn)
    assert len({v.label for v in VARIANTS.values()}) == len(VARIANTS)
    assert all(v.recipe.name == name for name, v in VARIANTS.items())
    assert set(CLAIM) <= set(VARIANTS)


def test_marks_of_the_budget():
    baseline, better = (
        [made_up([0.1, 0.2, 0.3, 0.4]), made_up([0.0, 0.1, 0.2, 0.3])],
        [made_up([0.2, 0.3, 0.5, 0.6]), made_up([0.1, 0.2, 0.4, 0.4])],
    )
    assert mean_curve(baseline) == [
        (0, 0.0),
        (10, 0.05),
        (20, pytest.approx(0.15)),
        (30, 0.25),
        (40, 0.35),
    ]
    assert steps_to_reach(better, 0.35) == pytest.approx(25)  # 0.25 at step 20, 0.45 at step 30
    assert steps_to_reach(better, 0.24) == pytest.approx(19)
    assert steps_to_reach(better, 0.25) == pytest.approx(20)
    assert steps_to_reach(baseline, 0.36) is None
    rows = compare(
        dict(conditional=baseline, conditional_groups5=better),
        dict(conditional=dict(median=0.1), conditional_groups5=dict(median=0.25)),
        "conditional",
    )
    assert [r.label for r in rows] == ["Conditional DETR", "+ 5 groups"]
    assert rows[0].time == 1
    assert rows[1].quarter == pytest.approx((0.15, 0.1, 0.2))
    assert rows[1].half == pytest.approx((0.25, 0.2, 0.3))
    assert rows[1].whole == pytest.approx((0.5, 0.4, 0.6))
    assert rows[1].cost == pytest.approx(2.5)
    assert rows[1].time == pytest.approx(25 * 2.5 / 40)


# --- the stored results

stored_files = sorted(STORED.glob("*-seed*.json"))


@pytest.mark.parametrize("path", stored_files, ids=lambda path: path.stem)
def test_stored_result_is_complete_and_of_the_present_variant(path):
    result = json.loads(path.read_text())
    recipe = VARIANTS[result["variant"]].recipe
    assert path == result_path(STORED, result["variant"], result["seed"])
    experiments.check_settings(result, recipe, path)
    assert len(result["curve"]) == recipe.epochs // recipe.evaluate_every
    assert result["curve"][-1]["step"] == recipe.epochs * (
        result["images"]["train"] // recipe.batch_size
    )
    assert {"command", "versions", "machine", "seconds_per_step", "instability"} <= set(result)
    assert set(result["machine"]) in ({"processor", "threads"}, {"gpu"})
    assert path.stat().st_size < 10_000


@pytest.mark.skipif(not stored_files, reason="no results are stored")
def test_table_of_the_reading_notebook_agrees_with_the_files():
    """Read the saved table of chapter 14 and work its numbers out again, by other means."""
    notebook = json.loads((ROOT / "nbs" / "book" / "14_claim.ipynb").read_text())
    printed = "".join(
        text
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        for text in output.get("text", [])
    )
    for name, variant in VARIANTS.items():
        runs = [
            json.loads(path.read_text())
            for path in stored_files
            if json.loads(path.read_text())["variant"] == name
        ]
        if not runs or (name not in CLAIM and not variant.baseline):
            continue
        last = runs[0]["curve"][-1]["step"]
        at = [
            [next(p["AP"] for p in run["curve"] if p["step"] == last * part // 4) for run in runs]
            for part in (1, 2, 4)
        ]
        wanted = r"\s+".join(
            [
                re.escape(variant.label.removesuffix(", blood cells")),
                str(len(runs)),
                *(re.escape(f"{np.mean(aps):.3f} ({min(aps):.3f}–{max(aps):.3f})") for aps in at),
            ]
        )
        assert re.search(wanted, printed), (
            f"chapter 14 does not show {name} as its files have it: run the notebook again"
        )


@pytest.mark.skipif(not stored_files, reason="no results are stored")
def test_claim_is_stored_with_three_seeds_each():
    results = read_results(STORED, CLAIM)
    assert {name: [run["seed"] for run in runs] for name, runs in results.items()} == {
        name: [0, 1, 2] for name in CLAIM
    }
    budgets = {
        (
            run["curve"][-1]["step"],
            json.dumps(run["images"]),
            run["recipe"]["batch_size"],
            run["recipe"]["lr"],
        )
        for runs in results.values()
        for run in runs
    }
    assert len(budgets) == 1
