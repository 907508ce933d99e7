"""Time training steps with torch's kernels, with those of `query_detr.lab.cpu`, and as measured.

usage: python benchmarks/kernels.py [--repeat 5] [--threads 2] [--only NAME …]

The three take turns, so that a machine that drifts drifts for all. Seconds: median (least–most).
"""

import argparse
import platform
from dataclasses import replace
from pathlib import Path
from statistics import median

from query_detr.lab.bench import Subject, Workload

KINDS = ("off", "on", "measured")
WORKLOADS = {
    "group_detr_12ep, dropout 0": Workload("group_detr_12ep", dropout=0.0),
    "group_detr_12ep, dropout 0.1": Workload("group_detr_12ep"),
    "conditional_detr_12ep, dropout 0": Workload("conditional_detr_12ep", dropout=0.0),
    "conditional_detr_12ep, dropout 0.1": Workload("conditional_detr_12ep"),
    "dab_detr_50ep, dropout 0": Workload("dab_detr_50ep"),
    "dn_detr_50ep, dropout 0": Workload("dn_detr_50ep"),
    "shapes_demo, 8 images of 8 × 8 cells": Workload(
        "shapes_demo", batch=8, features=(8, 8), boxes=5
    ),
}


def processor() -> str:
    """Name the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def time_in_turns(workload: Workload, repeat: int) -> tuple[dict[str, list[float]], str]:
    """Take steps of the three kinds in turns; the first turn warms up."""
    subjects = {kind: Subject(replace(workload, kernels=kind)) for kind in KINDS}
    seconds = {kind: [] for kind in KINDS}
    for turn in range(repeat + 1):
        for kind, subject in subjects.items():
            taken = sum(subject.step().values())
            if turn:
                seconds[kind].append(taken)
    return seconds, subjects["measured"].kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=5, help="steps of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    options = parser.parse_args()
    print(f"{processor()}, {options.threads} threads")
    for name, workload in WORKLOADS.items():
        if not any(part in name for part in options.only):
            continue
        timed = replace(workload, threads=options.threads)
        seconds, chosen = time_in_turns(timed, options.repeat)
        better = min(median(seconds["off"]), median(seconds["on"]))
        print(f"{name}\n    {chosen}")
        for kind, taken in seconds.items():
            spread = f"{median(taken):.3f} ({min(taken):.3f}–{max(taken):.3f})"
            print(
                f"    {kind:9} {spread:24} {median(taken) / better:.2f} of the better", flush=True
            )


if __name__ == "__main__":
    main()
