"A run that was stopped and resumed ends where an uninterrupted one ends, bit for bit."
from dataclasses import replace

import pytest
import torch

from query_detr.data import InputError
from query_detr.model import QueryDETR
from query_detr.recipes import recipe_named
from query_detr.shapes import ShapesDataset
from query_detr.train import Progress, epoch_steps, fit, make_optimizer, make_schedule

SCENES = 12


def new_progress(small, **changes):
    recipe = replace(recipe_named("shapes_demo"), model=replace(small, dropout=0.1), epochs=2, batch_size=4, warmup=2, **changes)
    torch.manual_seed(1)
    model = QueryDETR(recipe.model)
    optimizer = make_optimizer(model, recipe)
    return Progress(model, optimizer, make_schedule(optimizer, recipe, len(epoch_steps(SCENES, 4, 0, 0))), recipe, seed=3, images=SCENES)


def train(progress, folder, stop_after=None):
    folder.mkdir(exist_ok=True)
    fit(progress, ShapesDataset(SCENES, seed=1), ShapesDataset(4), folder, stop_after=stop_after)
    return progress.model.state_dict()


def test_resumed_run_ends_with_the_same_weights(small, tmp_path):
    straight = train(new_progress(small), tmp_path / "straight")
    train(new_progress(small), tmp_path / "halves", stop_after=1)
    resumed = new_progress(small)
    resumed.resume(tmp_path / "halves" / "checkpoint.pt")
    assert resumed.epoch == 1 and resumed.step == 3
    again = train(resumed, tmp_path / "halves")
    assert all(torch.equal(straight[k], again[k]) for k in straight)


def test_run_of_other_settings_is_not_resumed(small, tmp_path):
    train(new_progress(small), tmp_path, stop_after=1)
    with pytest.raises(InputError, match="lr was 0.0004, is 0.1"):
        new_progress(small, lr=0.1).resume(tmp_path / "checkpoint.pt")
