"""Kill a run of two processes again and again, resume it each time, and compare where it ends
with an uninterrupted run.

usage: python tests/kill.py [KILLS [FOLDER]]     (default: 20 kills; about 6 minutes on two
cores)

Every other kill waits for the moment at which a checkpoint is being written.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

LAUNCH = str(Path(__file__).parents[1] / "query_detr" / "launch.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
OPTIONS = [
    "--recipe",
    "shapes_demo",
    "--limit-train",
    "1600",
    "--limit-val",
    "20",
    "--epochs",
    "3",
    "--save-every",
    "5",
    "--set",
    "evaluate_every=1",
]


def start(
    folder: Path, *options: str, how=("--standalone", "--nproc_per_node", "2")
) -> subprocess.Popen:
    """Start a run that continues whatever lies in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            [*TORCHRUN, *how, LAUNCH, *options, "--resume", "auto", "--output", str(folder)],
            stdout=output,
            stderr=output,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            },
        )


def workers(run: subprocess.Popen) -> list[int]:
    """List the processes that torchrun started."""
    return [
        int(pid)
        for pid in subprocess.run(
            ["pgrep", "-P", str(run.pid)], capture_output=True, text=True
        ).stdout.split()
    ]


def kill(run: subprocess.Popen) -> None:
    """Kill torchrun and its processes at once."""
    run.send_signal(signal.SIGSTOP)  # so that it cannot react
    for pid in (*workers(run), run.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait()


def wait_for_moment(
    run: subprocess.Popen, folder: Path, seconds: float, while_saving: bool
) -> bool:
    """Wait for some seconds, then perhaps for a checkpoint that is being written. False: the run
    has ended before."""
    until = time.time() + seconds
    while run.poll() is None and time.time() < until:
        time.sleep(0.05)
    until = time.time() + 20
    while (
        while_saving
        and run.poll() is None
        and time.time() < until
        and not (folder / "checkpoint_new.pt.tmp").exists()
    ):
        time.sleep(0.0005)
    return run.poll() is None


def killed_run(
    folder: Path, kills: int, *options: str, shortest: float = 4.0, longest: float = 14.0
) -> int:
    """Run to the end with so many kills; gives how many struck while a checkpoint was being
    written."""
    chance, struck = random.Random(0), 0
    for n in range(kills):
        (folder / "checkpoint_new.pt.tmp").unlink(missing_ok=True)  # of the kill before
        run = start(folder, *options)
        if not wait_for_moment(run, folder, chance.uniform(shortest, longest), n % 2 == 1):
            raise RuntimeError(
                f"the run ended after {n} kills: {(folder / 'output.txt').read_text()[-2000:]}"
            )
        kill(run)
        struck += (folder / "checkpoint_new.pt.tmp").exists() or not (
            folder / "checkpoint.pt"
        ).exists()
    assert start(folder, *options).wait() == 0, (folder / "output.txt").read_text()[-2000:]
    return struck


def differing(a: Path, b: Path) -> list[str]:
    """List the weights of two finished runs that are not equal bit for bit."""
    one, two = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b))
    assert one["step"] == two["step"]
    return [k for k in one["model"] if not torch.equal(one["model"][k], two["model"][k])]


if __name__ == "__main__":
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    assert start(folder / "straight", *OPTIONS).wait() == 0, (
        folder / "straight" / "output.txt"
    ).read_text()[-2000:]
    struck = killed_run(folder / "killed", kills, *OPTIONS)
    wrong = differing(folder / "straight", folder / "killed")
    print(
        f"{kills} kills, {struck} of them while a checkpoint was being written; weights "
        f"that differ from the uninterrupted run: {len(wrong)}"
    )
    sys.exit(bool(wrong))
