"""Runs of several processes that are killed, stopped or lose a node, and go on."""

import json
import os
import signal
import socket
import time

import pytest
from kill import differing, killed_run, start, workers

pytestmark = pytest.mark.slow

SHORT = [
    "--recipe",
    "shapes_group_dn",
    "--limit-train",
    "96",
    "--limit-val",
    "6",
    "--batch-size",
    "4",
    "--epochs",
    "2",
    "--save-every",
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
    "hide_padding=true",
]


def said(folder):
    return (folder / "output.txt").read_text()


def steps_in(folder):
    """The newest step in the log of a run."""
    try:
        return max(
            json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
        )
    except (OSError, ValueError):
        return 0


def wait_for_checkpoint(run, folder):
    until = time.time() + 120
    while not (folder / "checkpoint_previous.pt").exists():
        assert run.poll() is None, said(folder)
        assert time.time() < until, said(folder)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    assert start(folder, *SHORT).wait(300) == 0, said(folder)
    return folder


def test_killed_runs_end_like_the_uninterrupted_one(straight, tmp_path):
    killed_run(tmp_path, 2, *SHORT, shortest=5.0, longest=6.0)
    assert not differing(straight, tmp_path)


def test_sigterm_saves_and_torchrun_turns_it_into_a_continuation(straight, tmp_path):
    run = start(
        tmp_path, *SHORT, how=("--standalone", "--nproc_per_node", "2", "--max-restarts", "1")
    )
    wait_for_checkpoint(run, tmp_path)
    os.kill(workers(run)[0], signal.SIGTERM)
    assert run.wait(300) == 0, said(tmp_path)
    assert "as asked (SIGTERM) and saved" in said(tmp_path)
    assert "Going on from" in said(tmp_path)
    assert not differing(straight, tmp_path)


def test_two_nodes_train_and_go_on_after_one_loses_its_process(straight, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    how = (
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"127.0.0.1:{port}",
        "--max-restarts",
        "1",
    )
    nodes = [start(tmp_path, *SHORT, how=how) for _ in range(2)]
    wait_for_checkpoint(nodes[0], tmp_path)
    os.kill(workers(nodes[1])[0], signal.SIGKILL)
    assert [node.wait(300) for node in nodes] == [0, 0], said(tmp_path)
    assert "Going on from" in said(tmp_path)
    assert said(tmp_path).count("Recipe shapes_group_dn") == 1
    assert not differing(straight, tmp_path)


def test_eight_processes_make_one_checkpoint_and_one_table(tmp_path):
    run = start(
        tmp_path,
        *SHORT,
        "--batch-size",
        "8",
        "--limit-train",
        "200",
        how=("--standalone", "--nproc_per_node", "8"),
    )
    assert run.wait(300) == 0, said(tmp_path)
    assert steps_in(tmp_path) == 50
    assert said(tmp_path).count("Recipe shapes_group_dn") == 1
    assert said(tmp_path).count("AP50 ") == 3
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint.pt",
        "checkpoint_previous.pt",
        "best.pt",
        "model.safetensors",
        "model.json",
        "recipe.json",
        "metrics.jsonl",
        "detections.png",
        "curves.png",
        "output.txt",
    }
