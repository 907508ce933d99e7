"""Runs from the command line as a user starts them: one process and several, training,
evaluation, and going on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = str(ROOT / "query_detr" / "launch.py")
TINY = [
    "--recipe",
    "shapes_demo",
    "--limit-train",
    "8",
    "--limit-val",
    "6",
    "--batch-size",
    "4",
    "--epochs",
    "2",
    "--set",
    "queries=8",
    "width=16",
    "heads=2",
    "encoder_layers=1",
    "decoder_layers=2",
    "feedforward=16",
    "stages=2",
    "norm=group",
    "backbone_bf16=false",
    "evaluate_every=1",
    "eval_batch_size=2",
]


def start(*options, processes=1, cwd):
    """Start a run, with torchrun if it has several processes."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes > 1
        else []
    )
    return subprocess.Popen(
        [sys.executable, *torchrun, LAUNCH, *options],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def finished(*options, processes=1, cwd):
    run = start(*options, processes=processes, cwd=cwd)
    output, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return output


def table(output):
    return {
        line.split()[0]: -1.0 if line.split()[1] == "–" else float(line.split()[1])
        for line in output.splitlines()
        if line.startswith(("AP", "AR"))
    }


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which one process has trained a tiny model."""
    folder = tmp_path_factory.mktemp("one")
    output = finished(*TINY, cwd=folder)
    return folder, output


def test_run_folder_holds_recipe_numbers_weights_and_pictures(trained):
    folder, output = trained
    run = folder / "runs" / "shapes_demo"
    assert {p.name for p in run.iterdir()} == {
        "recipe.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "checkpoint_previous.pt",
        "best.pt",
        "model.safetensors",
        "model.json",
        "detections.png",
        "curves.png",
    }
    assert json.loads((run / "recipe.json").read_text())["model"]["width"] == 16
    evaluations = [r for r in records(run) if "AP" in r]
    assert [r["epoch"] for r in evaluations] == [1, 2]
    assert len(table(output)) == 12
    assert table(output)["AP_small"] == pytest.approx(evaluations[-1]["AP_small"], abs=6e-4)


def test_evaluation_gives_the_same_numbers_on_two_processes(trained):
    folder, _ = trained
    how = [*TINY, "--eval-only", "--checkpoint", "runs/shapes_demo/checkpoint.pt"]
    one, two = (table(finished(*how, processes=n, cwd=folder)) for n in (1, 2))
    assert len(one) == 12
    assert one == two
    assert not (folder / "runs" / "shapes_demo-2").exists()


def test_two_processes_train_as_one_run(trained, tmp_path):
    output = finished(*TINY, processes=2, cwd=tmp_path)
    assert output.count("Recipe shapes_demo") == 1
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["shapes_demo"]
    ours, theirs = (records(folder / "runs" / "shapes_demo") for folder in (tmp_path, trained[0]))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    losses = [[r["loss"] for r in run if "loss" in r] for run in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the same steps, up to rounding


def test_killed_run_goes_on_with_resume(trained, tmp_path):
    run = start(*TINY, cwd=tmp_path)
    checkpoint = tmp_path / "runs" / "shapes_demo" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    output = finished(*TINY, "--resume", cwd=tmp_path)
    assert table(output) == table(trained[1])
    steps = [r["step"] for r in records(checkpoint.parent) if "loss" in r]
    assert steps == sorted(set(steps)) == [2, 4]


@pytest.mark.slow
def test_groups_and_noise_train_on_two_processes_and_log_instability(tmp_path):
    how = [
        "--recipe",
        "shapes_group_dn",
        *TINY[2:],
        "activation=prelu",
        "--limit-val",
        "2",
    ]  # one batch: the second process has none
    finished(*how, "--log-instability", processes=2, cwd=tmp_path)
    run = tmp_path / "runs" / "shapes_group_dn"
    logged = [r for r in records(run) if "objects_of_queries" in r]
    assert [r["epoch"] for r in logged] == [1, 2]
    assert len(logged[0]["objects_of_queries"]) == 8
    assert "instability" not in logged[0]
    assert 0 <= logged[1]["instability"] <= logged[1]["instability_of_matched"] <= 1
    assert all(r["noise_l1_loss"] > 0 for r in records(run) if "loss" in r)
    evaluated = [*how, "--eval-only", "--checkpoint", str(run / "checkpoint.pt")]
    first, zero, one = (
        table(finished(*evaluated, *group, cwd=tmp_path))
        for group in ([], ["--group", "0"], ["--group", "1"])
    )
    assert len(first) == 12
    assert first == zero
    assert one.keys() == first.keys()
