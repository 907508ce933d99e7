"""Measure how long COCO's evaluation takes and how much memory it needs, with each engine in a
process of its own.

usage: python benchmarks/evaluation.py [--images 5000] [--objects 36000] [--classes 80]
[--detections 300] [--engines hotcoco pycocotools] [--duplicates]

Ground truth and detections are made up (seeded) in the sizes of COCO's val2017: detections near
objects, several for some of them, and random ones.
pycocotools takes minutes and gigabytes at the default size.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from query_detr.run.evaluate import coco_evaluation, duplicates, metrics_of, per_class


def made_up(
    images: int, objects: int, classes: int, detections: int, seed: int = 0
) -> tuple[dict, torch.Tensor]:
    """Draw a ground truth and `detections` rows per image; few classes are frequent, few objects
    are large."""
    rng = np.random.default_rng(seed)
    image_ids = np.sort(rng.choice(600_000, images, replace=False) + 1)
    often = rng.zipf(1.5, classes).clip(max=200).astype(float) + 1
    where, label = (
        np.sort(rng.integers(images, size=objects)),
        rng.choice(classes, objects, p=often / often.sum()),
    )
    size = np.exp(rng.uniform(np.log(8), np.log(400), (objects, 2)))
    boxes = np.concatenate([rng.uniform(0, 1, (objects, 2)) * (640 - size).clip(min=1), size], 1)
    annotations = [
        dict(
            id=n + 1,
            image_id=int(image_ids[w]),
            category_id=int(c) + 1,
            bbox=box.tolist(),
            area=float(box[2] * box[3] * 0.7),
            iscrowd=int(crowd),
        )
        for n, (w, c, box, crowd) in enumerate(zip(where, label, boxes, rng.random(objects) < 0.01))
    ]
    truth = dict(
        images=[dict(id=int(i), height=640, width=640) for i in image_ids],
        annotations=annotations,
        categories=[dict(id=c + 1, name=f"class {c + 1}") for c in range(classes)],
    )
    return truth, torch.from_numpy(
        np.concatenate(
            [
                rows_of_image(
                    rng, image_ids[i], boxes[where == i], label[where == i], classes, detections
                )
                for i in range(images)
            ]
        )
    )


def rows_of_image(
    rng, image_id, boxes, label, classes: int, detections: int
) -> np.ndarray:  # [detections, 7]
    """Find each object one to three times, less surely the more the box is off, and fill up with
    random boxes of low scores."""
    near = np.repeat(np.arange(len(boxes)), rng.integers(1, 4, len(boxes)))[:detections]
    noise = rng.exponential(0.08, (len(near), 1))
    found = boxes[near] + noise * rng.standard_normal((len(near), 4)) * boxes[near][:, [2, 3, 2, 3]]
    rest = np.concatenate(
        [
            rng.uniform(0, 500, (detections - len(near), 2)),
            rng.uniform(8, 300, (detections - len(near), 2)),
        ],
        1,
    )
    rows = np.concatenate([found, rest])
    rows[:, 2:] = np.abs(rows[:, 2:])
    score = np.concatenate(
        [
            0.9 * np.exp(-5 * noise[:, 0]) * rng.uniform(0.5, 1, len(near)),
            rng.beta(1, 12, len(rest)),
        ]
    )
    category = np.concatenate([label[near], rng.integers(classes, size=len(rest))]) + 1
    return np.concatenate(
        [np.full((detections, 1), image_id), rows, score[:, None], category[:, None]], 1
    )


def peak() -> float:
    """The most memory that this process has held so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(options) -> None:
    """Make data, evaluate once with one engine, and print what it took."""
    truth, rows = made_up(options.images, options.objects, options.classes, options.detections)
    before, start = peak(), time.perf_counter()
    judge = coco_evaluation(truth, rows, options.engine)
    metrics = metrics_of(judge)
    seconds, held = time.perf_counter() - start, peak()
    print(
        json.dumps(
            dict(
                engine=options.engine,
                rows=len(rows),
                seconds=round(seconds, 2),
                peak_gb=round(held, 2),
                before_gb=round(before, 2),
                metrics=metrics,
            )
        )
    )
    if options.duplicates:
        for what, compute in (
            ("per class", lambda: per_class(judge)),
            ("duplicates", lambda: duplicates(truth, rows)),
        ):
            start = time.perf_counter()
            compute()
            print(f"{what}: {time.perf_counter() - start:.2f} s", file=sys.stderr)


def main() -> None:
    """Measure each engine in a new process and say whether they agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("images", 5000),
        ("objects", 36000),
        ("classes", 80),
        ("detections", 300),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--engines", nargs="+", default=["hotcoco", "pycocotools"])
    parser.add_argument(
        "--duplicates", action="store_true", help="time what else is told about detections"
    )
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        return measure(options)
    found = []
    for engine in options.engines:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--engine", engine],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found.append(json.loads(done.stdout))
        print(
            "{engine}: {rows} detections, {seconds} s, at most {peak_gb} GB of memory "
            "({before_gb} GB before it began)".format(**found[-1]),
            flush=True,
        )
    apart = max(
        abs(found[0]["metrics"][name] - other["metrics"][name])
        for other in found
        for name in other["metrics"]
    )
    print(
        {name: round(value, 4) for name, value in found[0]["metrics"].items()},
        f"largest difference between engines: {apart:g}",
        sep="\n",
    )


if __name__ == "__main__":
    main()
