"A step is the same however many processes and micro-batches share it."
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from step_worker import CASES, IMAGES, gradients

from query_detr.train import Process

WORKER = Path(__file__).with_name("step_worker.py")


def relative_difference(ours, theirs):
    "Largest difference of two gradients, in units of 1e-5 · max(1, max |g|)."
    return max(((ours[k] - theirs[k]).abs().max() / (1e-5 * max(1, theirs[k].abs().max()))).item() for k in theirs)


def in_processes(number, micro_batch, folder, case):
    output = folder / "gradients.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number), WORKER, output, str(micro_batch), case]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=300)
    return torch.load(output, weights_only=True)


ROUNDING = 3  # the first convolution sums over every pixel; elsewhere the difference stays below 0.1
SAME = [case for case in CASES if case != "visible padding"]


@pytest.mark.parametrize("case", SAME)
def test_accumulated_micro_batches_give_the_gradients_of_the_whole_batch(case):
    whole = gradients(Process(), IMAGES, case)
    assert all(g is not None and g.isfinite().all() for g in whole.values())
    assert relative_difference(gradients(Process(), 2, case), whole) <= ROUNDING
    assert relative_difference(gradients(Process(), 1, case), whole) <= ROUNDING


@pytest.mark.parametrize("case", SAME)
def test_two_processes_give_the_gradients_of_one(case, tmp_path):
    whole = gradients(Process(), IMAGES, case)
    assert relative_difference(in_processes(2, 2, tmp_path, case), whole) <= ROUNDING
    if case == "points": assert relative_difference(in_processes(2, 1, tmp_path, case), whole) <= ROUNDING


def test_padding_slots_that_are_visible_make_a_step_depend_on_its_micro_batches():
    "As in the authors' code: how many empty slots an image's noise sees depends on the fullest image beside it."
    assert relative_difference(gradients(Process(), 2, "visible padding"), gradients(Process(), IMAGES, "visible padding")) > 100
