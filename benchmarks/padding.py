"""Measure the share of padded pixels in training with images shared out as they come, and with
images of like width together.

usage: python benchmarks/padding.py COCO_FOLDER [SPLIT]
"""

import sys

import numpy as np

from query_detr.data.coco import coco_split
from query_detr.data.transforms import Transformed, train_transform
from query_detr.run.distributed import DistContext
from query_detr.run.step import epoch_steps, micro_batches


def padded_share(sizes: dict[int, tuple[int, int]], pieces: list[list[int]]) -> float:
    """Share of the pixels of all batches that lie outside of their images."""
    used = sum(h * w for piece in pieces for h, w in (sizes[i] for i in piece))
    return 1 - used / sum(
        len(piece) * max(sizes[i][0] for i in piece) * max(sizes[i][1] for i in piece)
        for piece in pieces
    )


if __name__ == "__main__":
    dataset = coco_split(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "train2017")
    shares = {False: [], True: []}
    for epoch in range(4):
        images = Transformed(dataset, train_transform(), 0, epoch)
        steps = epoch_steps(len(images), 16, 0, epoch)
        sizes = {i: tuple(images[i].image.shape[1:]) for step in steps for i in step}
        for together in (False, True):
            pieces = [
                piece
                for step in steps
                for rank in range(8)
                for piece in micro_batches(
                    step, DistContext(rank, 8), None, images.width if together else None
                )
            ]
            shares[together].append(padded_share(sizes, pieces))
    print(
        f"{len(dataset)} images, steps of 16 on 8 processes, 4 epochs: "
        f"{np.mean(shares[False]):.1%} of the pixels are padding as the images come, "
        f"{np.mean(shares[True]):.1%} with like widths together"
    )
