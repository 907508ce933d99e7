"""Compute the gradients of one step of four images in this process's share and save them (run with torchrun).

usage: step_worker.py OUTPUT MICRO_BATCH
"""
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from query_detr.coco import Transformed, train_transform
from query_detr.criterion import Criterion
from query_detr.data import collate
from query_detr.model import ModelConfig, QueryDETR
from query_detr.shapes import ShapesDataset
from query_detr.train import Process, compute_gradients, micro_batches

CONFIG = ModelConfig(classes=5, queries=12, width=32, heads=4, encoder_layers=1, decoder_layers=2, feedforward=64, dropout=0.0,
                     backbone="resnet10", stages=3, norm="group", freeze_stem=False)
IMAGES = 4


def gradients(process: Process, micro_batch: int, criterion=Criterion()) -> dict[str, torch.Tensor]:
    "Take the same step of four images, whichever share of it is this process's."
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = QueryDETR(CONFIG)
    torch.nn.init.normal_(model.box_head.layers[-1].weight, std=0.1)
    images = Transformed(ShapesDataset(IMAGES, seed=5), train_transform("none"))
    batches = [collate([images[i] for i in piece]) for piece in micro_batches(list(range(IMAGES)), process, micro_batch)]
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    compute_gradients(wrapped, batches, criterion, process)
    return {name: p.grad for name, p in model.named_parameters()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = gradients(Process(dist.get_rank(), dist.get_world_size()), int(sys.argv[2]))
    if dist.get_rank() == 0: torch.save(found, sys.argv[1])
    dist.destroy_process_group()
