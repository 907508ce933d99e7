"""A run that is stopped, killed or damaged goes on where it was, and says what went wrong."""

import contextlib
import json
import os
import random
import signal
import subprocess
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import get_worker_info

from query_detr.batch import InputError
from query_detr.data.shapes import ShapesDataset
from query_detr.denoising import Denoising
from query_detr.model import QueryDETR
from query_detr.run import loop
from query_detr.run.checkpoints import NEWEST, PREVIOUS, load, load_newest, save_newest
from query_detr.run.loop import Fault, Preempted, RunOptions, explain, fit, replay, start_run
from query_detr.run.recipes import recipe_named

SCENES, STEPS = 12, 3  # per epoch


@pytest.fixture
def recipe(small):
    """Two epochs of three steps with all that is random: dropout, flips, noise."""
    model = replace(small, reference="anchor", groups=2, denoising=Denoising(sets=1), dropout=0.1)
    return replace(
        recipe_named("shapes_demo"),
        model=model,
        epochs=2,
        batch_size=4,
        warmup=2,
        evaluate_every=1,
        eval_batch_size=2,
        ema=0.9,
    )


def new_run(recipe, seed=3):
    torch.manual_seed(seed)
    return start_run(QueryDETR(recipe.model), recipe, seed, SCENES)


def train(progress, folder, **options):
    folder.mkdir(exist_ok=True)
    fit(
        progress,
        ShapesDataset(SCENES, seed=1),
        ShapesDataset(4),
        folder,
        options=RunOptions(log_every=1, **options),
    )
    return progress


def same_weights(a, b):
    pairs = ((a.model, b.model), (a.average, b.average))
    return all(
        torch.equal(x, y)
        for one, two in pairs
        for x, y in zip(one.state_dict().values(), two.state_dict().values())
    )


def lines(folder):
    """The log without what a clock decided."""
    timing = (
        "seconds",
        "time",
        "images_per_second",
        "data_waiting",
        "matching_ms",
        "peak_memory_mb",
    )
    return [
        {k: v for k, v in json.loads(line).items() if k not in timing}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture
def stop_at(monkeypatch):
    """Stop a run like SIGTERM does, after a step."""

    def stop(step):
        import query_detr.run.loop as runs

        take = runs.train_step

        def counted(*args):
            if args[-1] == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return take(*args)

        monkeypatch.setattr(runs, "train_step", counted)

    return stop


@pytest.mark.parametrize("step", range(1, 2 * STEPS + 1))
def test_run_that_is_stopped_after_any_step_ends_like_the_uninterrupted_one(
    recipe, tmp_path, stop_at, monkeypatch, step
):
    straight = train(new_run(recipe), tmp_path / "straight", log_instability=True)
    stop_at(step)
    with pytest.raises(Preempted, match=f"after step {step} "):
        train(new_run(recipe), tmp_path / "parts", log_instability=True)
    monkeypatch.undo()
    again = new_run(recipe, seed=3)
    again.resume(*load_newest(tmp_path / "parts"))
    assert again.step == step
    train(again, tmp_path / "parts", log_instability=True)
    assert same_weights(straight, again)
    assert again.best_ap == straight.best_ap
    assert lines(tmp_path / "parts") == lines(tmp_path / "straight")
    assert torch.equal(
        load(tmp_path / "parts" / "best.pt")["model"]["class_head.bias"],
        load(tmp_path / "straight" / "best.pt")["model"]["class_head.bias"],
    )


def test_run_that_ended_after_an_evaluation_evaluates_again_and_logs_it_once(recipe, tmp_path):
    straight = train(new_run(recipe), tmp_path / "straight", log_instability=True)
    train(new_run(recipe), tmp_path / "parts", log_instability=True, stop_after=1)
    again = new_run(recipe)
    again.resume(*load_newest(tmp_path / "parts"))
    train(again, tmp_path / "parts", log_instability=True)
    assert same_weights(straight, again)
    assert lines(tmp_path / "parts") == lines(tmp_path / "straight")


def test_run_of_other_settings_is_not_resumed(recipe, tmp_path):
    train(new_run(recipe), tmp_path, stop_after=1)
    with pytest.raises(InputError, match="lr was 0.0004, is 0.1"):
        new_run(replace(recipe, lr=0.1)).resume(*load_newest(tmp_path))
    with pytest.raises(InputError, match="seed was 3, is 4"):
        new_run(recipe, seed=4).resume(*load_newest(tmp_path))


def test_number_of_workers_changes_nothing(recipe, tmp_path):
    assert same_weights(
        train(new_run(recipe), tmp_path / "none"),
        train(new_run(recipe), tmp_path / "two", workers=2),
    )


@pytest.fixture
def saved(tmp_path):
    """A folder with two checkpoints, of steps 1 and 2."""
    for step in (1, 2):
        save_newest(dict(step=step, weights=torch.full((1000,), float(step))), tmp_path)
    return tmp_path


def flip(path, places=1):
    content, chance = bytearray(path.read_bytes()), random.Random(0)
    for _ in range(places):
        content[chance.randrange(200, len(content) // 2)] ^= 255
    path.write_bytes(content)


DAMAGE = dict(
    truncated=lambda p: p.write_bytes(p.read_bytes()[:-100]),
    emptied=lambda p: p.write_bytes(b""),
    flipped=flip,
    missing=lambda p: p.unlink(),
    half=lambda p: p.write_bytes(p.read_bytes()[: len(p.read_bytes()) // 2]),
)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(saved, damage):
    DAMAGE[damage](saved / NEWEST)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        path, content = load_newest(saved)
    assert path.name == PREVIOUS
    assert content["step"] == 1
    assert damage == "missing" or (
        NEWEST in str(said[0].message) and "trying the one before" in str(said[0].message)
    )


def test_no_flipped_byte_of_weights_is_taken_for_good(saved):
    whole, chance, path = (saved / NEWEST).read_bytes(), random.Random(1), saved / NEWEST
    for _ in range(300):
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        with contextlib.suppress(InputError):
            assert load(path)["weights"].eq(2).all()


def test_two_damaged_checkpoints_are_an_error_that_names_both(saved):
    for name in (NEWEST, PREVIOUS):
        (saved / name).write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(InputError, match=f"{NEWEST}.*{PREVIOUS}"):
        load_newest(saved)


def test_failed_save_leaves_the_old_checkpoints_and_no_rest(saved, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        save_newest(dict(step=3), saved)
    assert "disk is full" in explain(error.value)
    assert load_newest(saved)[1]["step"] == 2
    assert sorted(p.name for p in saved.iterdir()) == [
        NEWEST,
        PREVIOUS,
    ]


@pytest.mark.system
def test_full_disk_leaves_the_old_checkpoints(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        for step in (1, 2):
            save_newest(dict(step=step, weights=torch.full((1000,), float(step))), tmp_path)
        with pytest.raises((OSError, RuntimeError)) as error:
            save_newest(dict(step=3, weights=torch.zeros(500_000)), tmp_path)
        assert "disk is full" in explain(error.value)
        assert load_newest(tmp_path)[1]["step"] == 2
        assert load(tmp_path / PREVIOUS)["step"] == 1
    finally:
        subprocess.run(["umount", tmp_path], check=True)


class DyingScenes(ShapesDataset):
    """Scenes whose loading kills the process that loads them."""

    def __getitem__(self, i):
        if get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_death_of_a_loading_process_is_explained(recipe, tmp_path):
    with pytest.raises(RuntimeError) as error:
        fit(
            new_run(recipe),
            DyingScenes(SCENES),
            ShapesDataset(4),
            tmp_path,
            options=RunOptions(workers=1),
        )
    assert "process that loads images died" in explain(error.value)
    assert "--resume auto" in explain(error.value)


def test_loss_that_is_not_finite_stops_names_and_can_be_replayed(recipe, tmp_path, monkeypatch):
    import query_detr.criterion as criterion

    real, calls = criterion.detection_loss, []

    def broken(predictions, *args):
        losses = real(predictions, *args)
        calls.append(len(predictions.logits))
        if len(calls) < 7:
            return losses  # matching and noise: the seventh is the matching loss of step 4
        return losses | {"giou": losses["giou"] * torch.tensor([1.0, float("nan")])}

    monkeypatch.setattr(criterion, "detection_loss", broken)
    progress = new_run(recipe)
    with pytest.raises(
        Fault, match=r"step 4: giou_loss of decoder layer 2.*Image ids: \d+"
    ) as fault:
        train(progress, tmp_path)
    before = load_newest(tmp_path)[1]
    assert before["step"] == 3  # the step was not taken
    assert all(torch.equal(before["model"][k], p) for k, p in progress.model.named_parameters())
    said = replay(tmp_path / "replay_0.pt")
    assert "giou_loss of decoder layer 2" in str(fault.value)
    assert "now: giou_loss of decoder layer 2" in said
    monkeypatch.undo()
    assert "now: all losses are finite; gradients that are not finite: none" in replay(
        tmp_path / "replay_0.pt"
    )


def test_weights_that_are_not_finite_are_noticed_before_they_spread(recipe, tmp_path):
    progress = new_run(recipe)
    with torch.no_grad():
        progress.model.class_head.weight[0, 0] = float("nan")
    with pytest.raises(Fault, match="step 1: .*matching cost of image"):
        train(progress, tmp_path)
    assert "now: the matching cost" in replay(tmp_path / "replay_0.pt")


def test_running_average_is_the_average_and_is_what_is_kept(recipe, tmp_path):
    progress, seen = new_run(recipe), []
    update = progress.average.update_parameters
    progress.average.update_parameters = lambda model: (
        update(model),
        seen.append(model.class_head.bias.detach().clone()),
    )
    train(progress, tmp_path)
    average = seen[0]
    for weights in seen[1:]:
        average = 0.9 * average + 0.1 * weights
    assert torch.allclose(progress.judged.class_head.bias, average, atol=1e-6)
    assert not torch.allclose(average, seen[-1], atol=1e-6)


def test_bf16_keeps_boxes_and_losses_in_fp32_and_learns_alike(recipe, tmp_path):
    _plain, mixed = (
        train(new_run(replace(recipe, amp=amp, epochs=1)), tmp_path / amp)
        for amp in ("none", "bf16")
    )
    a, b = ([r["loss"] for r in lines(tmp_path / amp) if "loss" in r] for amp in ("none", "bf16"))
    assert a != b
    assert a == pytest.approx(b, rel=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixed.model.eval()(
            torch.rand(1, 3, 128, 128), torch.zeros(1, 128, 128, dtype=torch.bool)
        )
    assert found.logits.dtype == found.boxes.dtype == torch.float32
    hidden = torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        offsets = mixed.model.box_offsets(hidden)
    assert torch.equal(offsets, mixed.model.box_head(hidden))


def test_tensorboard_files_hold_what_the_log_holds(recipe, tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(new_run(recipe), tmp_path, tensorboard=True)
    board = reading.EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [
        (r["step"], pytest.approx(r["loss"])) for r in lines(tmp_path) if "loss" in r
    ]
    assert [e.step for e in board.Scalars("AP")] == [STEPS, 2 * STEPS]


def test_log_line_says_what_the_issue_of_a_slow_or_bad_run_could_be(recipe, tmp_path):
    train(new_run(recipe), tmp_path)
    line = next(
        json.loads(text)
        for text in (tmp_path / "metrics.jsonl").read_text().splitlines()
        if "loss" in text
    )
    assert {
        "epoch",
        "step",
        "loss",
        "class_loss",
        "l1_loss",
        "giou_loss",
        "noise_class_loss",
        "noise_l1_loss",
        "noise_giou_loss",
        "layer_loss",
        "grad_norm",
        "lr",
        "images_per_second",
        "data_waiting",
        "matching_ms",
        "peak_memory_mb",
        "time",
    } <= set(line)
    assert sum(line["layer_loss"]) == pytest.approx(line["loss"])
    assert 0 <= line["data_waiting"] <= 1
    parts = (
        2 * (line["class_loss"] + line["noise_class_loss"])
        + 5 * (line["l1_loss"] + line["noise_l1_loss"])
        + 2 * (line["giou_loss"] + line["noise_giou_loss"])
    )
    assert parts == pytest.approx(line["loss"])


@pytest.mark.parametrize(
    ("platform", "reported"), [("linux", 3_000_000), ("darwin", 3_000_000_000)]
)
def test_peak_memory_is_in_megabytes_on_every_system(monkeypatch, platform, reported):
    """The system reports kilobytes on Linux and bytes on macOS."""
    usage = SimpleNamespace(ru_maxrss=reported)
    monkeypatch.setattr(loop.resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(loop.sys, "platform", platform)
    assert loop.peak_memory("cpu") == pytest.approx(3000)
