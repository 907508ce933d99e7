"""Compute the gradients of one step of eight images in this process's share and save them (run
with torchrun).

usage: step_worker.py OUTPUT MICRO_BATCH CASE
"""

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from query_detr.batch import collate
from query_detr.criterion import Criterion
from query_detr.data.shapes import ShapesDataset
from query_detr.data.transforms import Transformed, train_transform
from query_detr.denoising import Denoising
from query_detr.model import ModelConfig, QueryDETR
from query_detr.run.distributed import DistContext
from query_detr.run.step import compute_gradients, micro_batches

POINTS = ModelConfig(
    classes=5,
    queries=12,
    width=32,
    heads=4,
    encoder_layers=1,
    decoder_layers=2,
    feedforward=64,
    dropout=0.0,
    backbone="resnet10",
    stages=3,
    norm="group",
    freeze_stem=False,
)
GROUPS = replace(POINTS, groups=3)
BOTH = replace(
    POINTS,
    reference="anchor",
    activation="prelu",
    groups=3,
    denoising=Denoising(sets=2, hide_padding=True),
)
VISIBLE = replace(BOTH, denoising=Denoising(sets=2))
SCENES = ShapesDataset(60, seed=5)
EMPTY = [i for i in range(len(SCENES)) if not len(SCENES[i][1])][:4]
IMAGES = 8
FIRST = list(range(IMAGES))
CASES = {  # model, and eight scenes; of two processes, the second takes the last four
    "points": (POINTS, FIRST),
    "groups": (GROUPS, FIRST),
    "groups and noise": (BOTH, FIRST),
    "second process without objects": (BOTH, FIRST[:4] + EMPTY),
    "no objects": (BOTH, EMPTY + EMPTY),
    "visible padding": (VISIBLE, FIRST),
}


def gradients(
    process: DistContext, micro_batch: int, case: str = "points"
) -> dict[str, torch.Tensor]:
    """Take the same step of eight images, whichever share of it is this process's."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config, scenes = CASES[case]
    model = QueryDETR(config)
    torch.nn.init.normal_(model.box_head.layers[-1].weight, std=0.1)
    images = Transformed(SCENES, train_transform("none"))
    batches = [
        collate([images[i] for i in piece]) for piece in micro_batches(scenes, process, micro_batch)
    ]
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    compute_gradients(wrapped, batches, Criterion(groups=config.groups), process)
    return {name: p.grad for name, p in model.named_parameters()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = gradients(
        DistContext(dist.get_rank(), dist.get_world_size()), int(sys.argv[2]), sys.argv[3]
    )
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.destroy_process_group()
