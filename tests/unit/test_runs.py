"""A run that is stopped, killed or damaged goes on where it was, and says what went wrong."""

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.utils.data import get_worker_info

from query_detr import criterion
from query_detr.batch import Batch, InputError, Targets, collate
from query_detr.data.shapes import ShapesDataset
from query_detr.data.transforms import Transformed, eval_transform
from query_detr.denoising import Denoising
from query_detr.model import QueryDETR
from query_detr.run import loggers, loop
from query_detr.run.checkpoints import NEWEST, PREVIOUS, load, load_newest, save_newest
from query_detr.run.faults import (
    FailedStep,
    Preempted,
    TrainingError,
    explain,
    load_replay,
    replay,
)
from query_detr.run.loop import RunOptions, fit, restore
from query_detr.run.recipes import recipe_named
from query_detr.run.step import NonFiniteGuard, start_run

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


def train(state, folder, train_set=None, **options):
    folder.mkdir(exist_ok=True)
    train_set = train_set or ShapesDataset(SCENES, seed=1)
    options = RunOptions(**{"log_every": 1, **options})
    fit(state, train_set, ShapesDataset(4), folder, options=options)
    return state


def going_on(recipe, folder, seed=3):
    state = new_run(recipe, seed)
    restore(state, *load_newest(folder))
    return state


def same_weights(a, b):
    ours = [*a.model.state_dict().values(), *a.average.state_dict().values()]
    theirs = [*b.model.state_dict().values(), *b.average.state_dict().values()]
    return all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


SPEED = {"images_per_second", "data_waiting", "matching_ms", "peak_memory_mb"}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lines(folder):
    """The log without what a clock decided."""
    clock = {"seconds", "time", *SPEED}
    return [{k: v for k, v in line.items() if k not in clock} for line in records(folder)]


@pytest.fixture
def stop_at(monkeypatch):
    """Stop a run like SIGTERM does, after a step."""

    def stop(step):
        take = loop.train_step

        def counted(state, *arguments):
            if state.step + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return take(state, *arguments)

        monkeypatch.setattr(loop, "train_step", counted)

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
    again = going_on(recipe, tmp_path / "parts")
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
    again = going_on(recipe, tmp_path / "parts")
    train(again, tmp_path / "parts", log_instability=True)
    assert same_weights(straight, again)
    assert lines(tmp_path / "parts") == lines(tmp_path / "straight")


def test_run_of_other_settings_is_not_resumed(recipe, tmp_path):
    train(new_run(recipe), tmp_path, stop_after=1)
    with pytest.raises(InputError, match="lr was 0.0004, is 0.1"):
        going_on(replace(recipe, lr=0.1), tmp_path)
    with pytest.raises(InputError, match="seed was 3, is 4"):
        going_on(recipe, tmp_path, seed=4)


@pytest.mark.system
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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path, content = load_newest(saved)
    assert path.name == PREVIOUS
    assert content["step"] == 1
    told = [re.search(f"{NEWEST}.*trying the one before", str(w.message)) for w in caught]
    assert [bool(match) for match in told] == ([] if damage == "missing" else [True])


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
    assert sorted(p.name for p in saved.iterdir()) == [NEWEST, PREVIOUS]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of one megabyte."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.system
def test_full_disk_leaves_the_old_checkpoints(small_disk):
    for step in (1, 2):
        save_newest(dict(step=step, weights=torch.full((1000,), float(step))), small_disk)
    with pytest.raises((OSError, RuntimeError)) as error:
        save_newest(dict(step=3, weights=torch.zeros(500_000)), small_disk)
    assert "disk is full" in explain(error.value)
    assert load_newest(small_disk)[1]["step"] == 2
    assert load(small_disk / PREVIOUS)["step"] == 1


class DyingScenes(ShapesDataset):
    """Scenes whose loading kills the process that loads them."""

    def __getitem__(self, i):
        if get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


@pytest.mark.system
def test_death_of_a_loading_process_is_explained(recipe, tmp_path):
    with pytest.raises(RuntimeError) as error:
        train(new_run(recipe), tmp_path, DyingScenes(SCENES), workers=1)
    assert "process that loads images died" in explain(error.value)
    assert "--resume auto" in explain(error.value)


def breaks_at_call(number):
    """From this call on, the GIoU loss of the second layer is NaN."""
    calls = iter(range(1, 10**6))

    def broken(*arguments, real=criterion.detection_loss):
        losses = real(*arguments)
        if next(calls) < number:
            return losses
        return losses | {"giou": losses["giou"] * torch.tensor([1.0, float("nan")])}

    return broken


def test_loss_that_is_not_finite_stops_names_and_can_be_replayed(recipe, tmp_path, monkeypatch):
    # matching and noise, twice a step: the seventh is the matching loss of step 4
    monkeypatch.setattr(criterion, "detection_loss", breaks_at_call(7))
    state = new_run(recipe)
    message = r"step 4: giou_loss of decoder layer 2.*Image ids: \d+"
    with pytest.raises(TrainingError, match=message):
        train(state, tmp_path)
    before = load_newest(tmp_path)[1]
    assert before["step"] == 3
    for name, parameter in state.model.named_parameters():
        assert torch.equal(before["model"][name], parameter)  # the step was not taken
    assert "now: giou_loss of decoder layer 2" in replay(tmp_path / "replay_0.pt")
    monkeypatch.undo()
    mended = replay(tmp_path / "replay_0.pt")
    assert "now: all losses are finite; gradients that are not finite: none" in mended


def test_replay_holds_the_batch_as_it_was(recipe, tmp_path):
    images = Transformed(ShapesDataset(4, seed=1), eval_transform(None))
    batch = collate([images[i] for i in range(4)])
    failed = FailedStep(step=2, message="a cost", batches=[batch], rank=1)
    failed.save(tmp_path / "replay_1.pt", new_run(recipe))
    content = load_replay(tmp_path / "replay_1.pt")
    (again,) = content["batches"]
    for field in fields(Batch):
        if field.name != "targets":
            assert same(getattr(again, field.name), getattr(batch, field.name)), field.name
    for field in fields(Targets):
        assert same(getattr(again.targets, field.name), getattr(batch.targets, field.name))
    assert (content["step"], content["epoch"], content["rank"]) == (2, 0, 1)


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_fused_optimizer_reads_what_the_guard_hands_it():
    """As torch's GradScaler does, through attributes that are torch's own affair."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = NonFiniteGuard()

    def step(loss):
        weight.grad = torch.ones(3)
        guard.check({"class_loss": torch.tensor([loss])}, torch.tensor(1.0), step=1)
        guard.hold_back(optimizer)
        optimizer.step()
        memory = optimizer.state[weight]
        return [weight.detach().clone(), *(x.clone() for x in memory.values())]

    first, second = step(1.0), step(1.0)
    assert not torch.equal(first[0], second[0])
    third, fourth = step(float("nan")), step(1.0)
    for before, held, still_held in zip(second, third, fourth, strict=True):
        assert torch.equal(before, held)
        assert torch.equal(before, still_held)


def test_weights_that_are_not_finite_are_noticed_before_they_spread(recipe, tmp_path):
    state = new_run(recipe)
    with torch.no_grad():
        state.model.class_head.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="step 1: .*matching cost of image"):
        train(state, tmp_path)
    assert "now: the matching cost" in replay(tmp_path / "replay_0.pt")


def test_running_average_is_the_average_and_is_what_is_kept(recipe, tmp_path, monkeypatch):
    state, seen = new_run(recipe), []
    update = state.average.update_parameters

    def observed(model):
        update(model)
        seen.append(model.class_head.bias.detach().clone())

    monkeypatch.setattr(state.average, "update_parameters", observed)
    train(state, tmp_path)
    average = seen[0]
    for weights in seen[1:]:
        average = 0.9 * average + 0.1 * weights
    assert torch.allclose(state.eval_model.class_head.bias, average, atol=1e-6)
    assert not torch.allclose(average, seen[-1], atol=1e-6)


def test_bf16_keeps_boxes_and_losses_in_fp32_and_learns_alike(recipe, tmp_path):
    losses = {}
    for amp in ("none", "bf16"):
        state = train(new_run(replace(recipe, amp=amp, epochs=1)), tmp_path / amp)
        losses[amp] = [r["loss"] for r in lines(tmp_path / amp) if "loss" in r]
    assert losses["none"] != losses["bf16"]
    assert losses["none"] == pytest.approx(losses["bf16"], rel=0.02)
    images, no_padding = torch.rand(1, 3, 128, 128), torch.zeros(1, 128, 128, dtype=torch.bool)
    hidden = torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        predictions = state.model.eval()(images, no_padding)
        offsets = state.model.box_offsets(hidden)
    assert predictions.logits.dtype == predictions.boxes.dtype == torch.float32
    assert torch.equal(offsets, state.model.box_head(hidden))


def test_tensorboard_files_hold_what_the_log_holds(recipe, tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(new_run(recipe), tmp_path, tensorboard=True)
    board = reading.EventAccumulator(str(tmp_path))
    board.Reload()
    logged = [(r["step"], pytest.approx(r["loss"])) for r in lines(tmp_path) if "loss" in r]
    assert [(event.step, event.value) for event in board.Scalars("loss")] == logged
    assert [event.step for event in board.Scalars("AP")] == [STEPS, 2 * STEPS]


class ListLogger:
    """Another place for a run's numbers, such as Weights & Biases: one class."""

    made: ClassVar[list["ListLogger"]] = []

    def __init__(self, folder, state):
        self.recipe, self.done, self.entries, self.closed = state.recipe, [], [], False
        self.made.append(self)

    def log(self, step, **numbers):
        if numbers:
            self.entries.append(dict(step=step, **numbers))
        else:
            self.done.append(step)

    def close(self):
        self.closed = True


def test_another_logger_is_one_class(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(ListLogger, "made", [])
    train(new_run(recipe), tmp_path, loggers=(ListLogger,))
    (logger,) = ListLogger.made
    assert logger.recipe == recipe
    assert logger.done == list(range(1, 2 * STEPS + 1))
    assert logger.entries == records(tmp_path)
    assert logger.closed


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_megabytes_on_every_system(monkeypatch, platform, unit):
    """The system tells kibibytes on Linux and bytes on macOS (`man getrusage`)."""
    usage = SimpleNamespace(ru_maxrss=512_000_000 // unit)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    assert loggers.peak_memory("cpu") == 512


def test_log_line_says_what_the_issue_of_a_slow_or_bad_run_could_be(recipe, tmp_path):
    train(new_run(recipe), tmp_path)
    line = next(line for line in records(tmp_path) if "loss" in line)
    terms = {"class_loss": 2, "l1_loss": 5, "giou_loss": 2}
    weights = terms | {f"noise_{name}": weight for name, weight in terms.items()}
    others = {"epoch", "step", "loss", "layer_loss", "grad_norm", "lr", "time"}
    assert set(line) == {*weights, *others, *SPEED}
    assert sum(line["layer_loss"]) == pytest.approx(line["loss"])
    assert sum(weight * line[name] for name, weight in weights.items()) == pytest.approx(
        line["loss"]
    )
    assert 0 <= line["data_waiting"] <= 1
    assert line["matching_ms"] > 0
    assert 50 < line["peak_memory_mb"] < 100_000
