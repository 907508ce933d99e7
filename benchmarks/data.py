"""Measure what data costs: the annotations of a set of COCO's size, and the pipeline from files
to batches.

    python benchmarks/data.py annotations             # as many images and boxes as train2017;
    --outlines makes the json as large, too
    python benchmarks/data.py pipeline IMAGES JSON    # a folder of images and their annotations

Linux only: memory is what /proc/PID/smaps_rollup says. "own" counts pages that no other process
uses and that cannot be read from a file again (private, dirty);
"share" counts all pages, those that n processes use as an n-th (PSS).
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from query_detr.batch import collate
from query_detr.data.coco import CocoDetection
from query_detr.data.transforms import Transformed, train_transform

IMAGES, BOXES, CLASSES = 118_287, 860_001, 80  # of train2017


def memory(pid: int | str = "self") -> np.ndarray:
    """Read a process's own and shared memory, in MB."""
    lines = dict(
        line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    return np.array([int(lines[name].split()[0]) / 1000 for name in ("Private_Dirty", "Pss")])


def resident() -> float:
    """Read how much memory this process had resident at most, in MB."""
    return (
        int(
            next(
                line
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM")
            ).split()[1]
        )
        / 1000
    )


def generate(path: Path, images: int, boxes: int, outlines: bool) -> None:
    """Write annotations that look like COCO's; an outline has about 50 numbers on average."""
    rng = np.random.default_rng(0)
    ids, owner = (
        np.sort(rng.choice(600_000, images, replace=False)),
        rng.integers(images, size=boxes),
    )
    corners, sides = (
        rng.uniform(0, 400, (boxes, 2)).round(2).tolist(),
        rng.lognormal(4, 1, (boxes, 2)).clip(2, 400).round(2).tolist(),
    )
    classes, crowd, points = (
        rng.integers(CLASSES, size=boxes).tolist(),
        rng.random(boxes) < 0.01,
        rng.lognormal(3, 0.6, boxes).astype(int).clip(4, 300).tolist(),
    )
    names = [f"{i:012d}.jpg" for i in ids.tolist()]
    with open(path, "w") as file:
        file.write(
            '{"info": {}, "licenses": [], "categories": '
            + json.dumps(
                [
                    dict(id=i + 1 + i // 10, name=f"class {i}", supercategory="thing")
                    for i in range(CLASSES)
                ]
            )
            + ', "images": ['
        )
        for n, (i, name) in enumerate(zip(ids.tolist(), names)):
            image = dict(
                license=3,
                file_name=name,
                coco_url=f"http://images.cocodataset.org/train2017/{name}",
                height=480,
                width=640,
                date_captured="2013-11-14 11:18:45",
                flickr_url="http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
                id=i,
            )
            file.write(", " * bool(n) + json.dumps(image))
        file.write('], "annotations": [')
        for n, (corner, side) in enumerate(zip(corners, sides)):
            outline = (
                [[round(x, 2) for x in rng.uniform(0, 640, 2 * points[n]).tolist()]]
                if outlines
                else []
            )
            entry = dict(
                segmentation=outline,
                area=round(side[0] * side[1] / 2, 4),
                iscrowd=int(crowd[n]),
                image_id=int(ids[owner[n]]),
                bbox=corner + side,
                category_id=classes[n] + 1 + classes[n] // 10,
                id=n + 1,
            )
            file.write(", " * bool(n) + json.dumps(entry))
        file.write("]}")


class Ours(CocoDetection):
    """The data set, with a tiny picture in place of every file."""

    def open(self, i):
        return Image.new("RGB", (4, 4))

    @property
    def everything(self):
        return [
            self.boxes,
            self.areas,
            self.labels,
            self.crowd,
            self.starts,
            self.image_ids,
            self.sizes,
            self.files,
            self.file_ends,
        ]

    def look(self, i):
        _, _boxes, labels = self[i]
        return len(labels), self.file_name(i)


class Theirs:
    """The same on pycocotools' index."""

    def __init__(self, path):
        from pycocotools.coco import COCO

        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(path)
        self.ids = sorted(self.coco.imgs)

    def __len__(self):
        return len(self.ids)

    def look(self, i):
        found = self.coco.loadAnns(self.coco.getAnnIds(self.ids[i]))
        single = [a for a in found if not a["iscrowd"]]
        torch.tensor([a["bbox"] for a in single])
        labels = torch.tensor([a["category_id"] for a in single])
        return len(labels), self.coco.imgs[self.ids[i]]["file_name"]


class Looked:
    """A data set of which a loading process asks everything but the pixels."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset.look(i)


def keep(batch):
    return sum(n for n, _ in batch)


def opened(kind: str, path: str, cache: str):
    """Open a data set and tell the seconds and the memory that it took."""
    before, started = memory(), time.perf_counter()
    dataset = (
        Theirs(path) if kind == "pycocotools" else Ours(tempfile.gettempdir(), path, cache=cache)
    )
    seconds = time.perf_counter() - started
    if kind != "pycocotools":
        for array in dataset.everything:
            array.sum()  # touch every page
    return dataset, dict(seconds=seconds, before=before, after=memory())


def say(name: str, seconds: float, more: np.ndarray, rest: str = "") -> None:
    print(
        f"{name:<44} {seconds:6.2f} s   own {more[0]:7.1f} MB   share {more[1]:7.1f} MB{rest}",
        flush=True,
    )


def one_process(kind: str, name: str, path: str, cache: str, workers: int) -> None:
    """Open, and go through an epoch with loading processes."""
    begun = resident()
    dataset, cost = opened(kind, path, cache)
    say(
        name,
        cost["seconds"],
        cost["after"] - cost["before"],
        f"   at most {resident() - begun:.0f} MB more resident meanwhile",
    )
    if workers:
        iterate(dataset, workers, cost["before"])


def iterate(dataset, workers: int, before: np.ndarray) -> None:
    """Compare the memory of loading processes when they have begun and after one and two epochs."""
    warnings.filterwarnings(
        "ignore", "This DataLoader will create"
    )  # more processes than this computer has cores
    loader = DataLoader(
        Looked(dataset),
        batch_size=16,
        shuffle=True,
        num_workers=workers,
        collate_fn=keep,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    table, boxes, started = [], 0, time.perf_counter()
    for epoch in range(2):
        for n, batch in enumerate(loader):
            boxes += batch
            if not table and n == 20:
                table.append([memory(w.pid) for w in loader._iterator._workers])
        if not epoch:
            seconds = time.perf_counter() - started
        table.append([memory(w.pid) for w in loader._iterator._workers])
    begun, one, two = (np.mean(t, 0) for t in table)
    print(
        f"    {workers} loading processes, mean of each: at the start own {begun[0]:.1f} "
        f"MB, share {begun[1]:.1f} MB; "
        f"growth of own memory in the first epoch {one[0] - begun[0]:+.1f} MB, in the "
        f"second {two[0] - one[0]:+.1f} MB; {len(dataset) / seconds:,.0f} images/s, "
        f"{boxes // 2:,} boxes seen",
        flush=True,
    )


def rank(path: str, cache: str, barrier, reports) -> None:
    """One of several processes that open at the same time."""
    before = memory()
    barrier.wait()
    _dataset, cost = opened("ours", path, cache)
    barrier.wait()
    reports.put((cost["seconds"], memory() - before))
    barrier.wait()


def several(name: str, path: str, cache: str, ranks: int) -> None:
    """Open in several processes at once, as the processes of a run do."""
    context = multiprocessing.get_context("spawn")
    barrier, reports = context.Barrier(ranks), context.Queue()
    processes = [
        context.Process(target=rank, args=(path, cache, barrier, reports)) for _ in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [reports.get() for _ in processes]
    for process in processes:
        process.join()
    say(
        name,
        max(seconds for seconds, _ in found),
        np.mean([more for _, more in found], 0),
        "   per process, the slowest and the mean",
    )


def annotations(
    images: int, boxes: int, outlines: bool, ranks: int, workers: int, pycocotools_workers: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, cache = f"{folder}/instances.json", f"{folder}/cache"
        generate(Path(path), images, boxes, outlines)
        print(
            f"{images:,} images, {boxes:,} boxes, json of {Path(path).stat().st_size / 1e6:.0f} MB",
            flush=True,
        )
        for kind, name, n in (
            ("ours", "first opening", 0),
            ("ours", "second opening", workers),
            ("pycocotools", "pycocotools", pycocotools_workers),
        ):
            subprocess.run(
                [sys.executable, __file__, "process", kind, name, path, cache, str(n)], check=True
            )
        several(f"{ranks} processes at once, second opening", path, cache, ranks)
        print(f"kept arrays: {sum(p.stat().st_size for p in Path(cache).iterdir()) / 1e6:.1f} MB")


# the pipeline


def timed(function, name: str, seconds: Counter):
    """Add up the time that a function keeps the core busy."""

    def run(*arguments, **named):
        started = time.process_time()
        try:
            return function(*arguments, **named)
        finally:
            seconds[name] += time.process_time() - started

    return run


STAGES = dict(
    ResizeShortSide="resize",
    RandomSizedCrop="crop",
    RandomHorizontalFlip="flip",
    ToImage="to tensor",
    Lambda="colours apart",
    ToDtype="to 0..1",
    Normalize="normalise",
)


def time_stages(transform: v2.Transform, seconds: Counter) -> v2.Transform:
    """Let every step of a transform add up its time."""
    for step in getattr(transform, "transforms", []):
        time_stages(step, seconds)
    stage = STAGES.get(type(transform).__name__)
    if stage and "forward" not in vars(transform):
        transform.forward = timed(transform.forward, stage, seconds)
    return transform


def pipeline(images: str, annotations: str, batch: int, epochs: int) -> None:
    """Tell how many images per second one core turns into batches, and where the time goes."""
    torch.set_num_threads(1)
    dataset, seconds, count, pixels = CocoDetection(images, annotations), Counter(), 0, 0
    dataset.open = timed(dataset.open, "read and decode", seconds)
    transform, join = time_stages(train_transform(), seconds), timed(collate, "collate", seconds)
    for i in range(len(dataset)):
        (dataset.folder / dataset.file_name(i)).read_bytes()  # so that no disk is measured
    started = time.process_time()
    for epoch in range(epochs):
        seen = Transformed(dataset, transform, epoch=epoch)
        for i in range(0, len(seen) - batch + 1, batch):
            joined = join([seen[j] for j in range(i, i + batch)])
            count, pixels = count + len(joined), pixels + (~joined.pad_mask).sum().item()
    total = time.process_time() - started
    print(
        f"{count} images, {pixels / count / 1e6:.2f} million pixels each, batches of "
        f"{batch}: {count / total:.1f} images/s on one core"
    )
    seconds["the rest"] = total - sum(seconds.values())
    for name, s in seconds.most_common():
        print(f"{name:<18} {1000 * s / count:7.2f} ms per image  {s / total:5.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    a = commands.add_parser("annotations")
    (
        a.add_argument("--images", type=int, default=IMAGES),
        a.add_argument("--boxes", type=int, default=BOXES),
        a.add_argument("--outlines", action="store_true"),
    )
    (
        a.add_argument("--ranks", type=int, default=8),
        a.add_argument("--workers", type=int, default=4),
        a.add_argument("--pycocotools-workers", type=int, default=4),
    )
    p = commands.add_parser("pipeline")
    (
        p.add_argument("images"),
        p.add_argument("annotations"),
        p.add_argument("--batch", type=int, default=2),
        p.add_argument("--epochs", type=int, default=2),
    )
    if sys.argv[1:2] == ["process"]:
        one_process(*sys.argv[2:6], int(sys.argv[6]))
        return
    options = vars(parser.parse_args())
    dict(annotations=annotations, pipeline=pipeline)[options.pop("command")](**options)


if __name__ == "__main__":
    main()
