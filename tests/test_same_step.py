"A step is the same however many processes and micro-batches share it."
import subprocess
import sys
from pathlib import Path

import torch
from step_worker import IMAGES, gradients

from query_detr.train import Process

WORKER = Path(__file__).with_name("step_worker.py")


def relative_difference(ours, theirs):
    "Largest difference of two gradients, in units of 1e-5 · max(1, max |g|)."
    return max(((ours[k] - theirs[k]).abs().max() / (1e-5 * max(1, theirs[k].abs().max()))).item() for k in theirs)


def in_processes(number, micro_batch, folder):
    output = folder / "gradients.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number), WORKER, output, str(micro_batch)]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=300)
    return torch.load(output, weights_only=True)


def test_accumulated_micro_batches_give_the_gradients_of_the_whole_batch():
    whole = gradients(Process(), IMAGES)
    assert relative_difference(gradients(Process(), 2), whole) <= 1
    assert relative_difference(gradients(Process(), 1), whole) <= 1


def test_two_processes_give_the_gradients_of_one(tmp_path):
    whole = gradients(Process(), IMAGES)
    assert relative_difference(in_processes(2, 2, tmp_path), whole) <= 1
    assert relative_difference(in_processes(2, 1, tmp_path), whole) <= 1
