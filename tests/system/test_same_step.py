"""A step is the same however many processes and micro-batches share it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conditions import relative_difference
from step_worker import CASES, IMAGES, gradients

from query_detr.run.distributed import DistContext

WORKER = Path(__file__).parents[1] / "step_worker.py"


def in_processes(number, micro_batch, folder, case):
    output = folder / "gradients.pt"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(number),
        WORKER,
        output,
        str(micro_batch),
        case,
    ]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=300)
    return torch.load(output, weights_only=True)


SAME = [case for case in CASES if case != "visible padding"]


@pytest.mark.parametrize("case", SAME)
def test_accumulated_micro_batches_give_the_gradients_of_the_whole_batch(case):
    whole = gradients(DistContext(), IMAGES, case)
    assert all(g is not None and g.isfinite().all() for g in whole.values())
    assert relative_difference(gradients(DistContext(), 4, case), whole) <= 1
    assert relative_difference(gradients(DistContext(), 1, case), whole) <= 1


@pytest.mark.parametrize("case", SAME)
def test_two_processes_give_the_gradients_of_one(case, tmp_path):
    assert (
        relative_difference(
            in_processes(2, 4, tmp_path, case), gradients(DistContext(), IMAGES, case)
        )
        <= 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes, micro_batch", [(4, 2), (2, 2), (8, 1)])
def test_more_processes_and_accumulation_give_the_gradients_of_one(
    processes, micro_batch, tmp_path
):
    case = "groups and noise"
    assert (
        relative_difference(
            in_processes(processes, micro_batch, tmp_path, case),
            gradients(DistContext(), IMAGES, case),
        )
        <= 1
    )


def test_padding_slots_that_are_visible_make_a_step_depend_on_its_micro_batches():
    """As in the authors' code: how many empty slots an image's noise sees depends on the fullest
    image beside it."""
    assert (
        relative_difference(
            gradients(DistContext(), 2, "visible padding"),
            gradients(DistContext(), IMAGES, "visible padding"),
        )
        > 100
    )
