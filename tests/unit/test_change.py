"""What CONTRIBUTING promises to somebody who changes the model: a new kind of noise, of query or of backbone is one definition in one place."""

from dataclasses import replace

import pytest
import torch
from torchvision.models import resnet

from query_detr import denoising, features, model
from query_detr.batch import collate
from query_detr.criterion import Criterion
from query_detr.data.coco import Transformed, eval_transform
from query_detr.data.shapes import ShapesDataset
from query_detr.denoising import Denoising
from query_detr.model import QueryDETR
from query_detr.queries import AnchorQueries
from query_detr.run.recipes import Recipe, recipe_named
from query_detr.run.step import evaluate, make_optimizer, make_schedule, train_step


def learn(recipe: Recipe, steps: int = 2) -> QueryDETR:
    """Take steps as a run does, and evaluate."""
    scenes = ShapesDataset(4, seed=0)
    pictures = Transformed(scenes, eval_transform(short=None))
    batch = collate([pictures[i] for i in range(4)])
    learner = QueryDETR(recipe.model).train()
    optimizer = make_optimizer(learner, recipe)
    schedule = make_schedule(optimizer, recipe, steps)
    before = learner.queries.embedding.weight.clone()
    for step in range(steps):
        outcome = train_step(
            learner,
            [batch],
            Criterion(groups=recipe.model.groups),
            optimizer,
            schedule,
            0.1,
            noise_key=(0, step),
        )
        assert all(loss.isfinite().all() for loss in outcome.losses.values())
    assert not torch.equal(before, learner.queries.embedding.weight)
    assert 0 <= evaluate(learner, scenes, recipe)["AP"] <= 1
    return learner


@pytest.fixture
def recipe(small):
    return replace(
        recipe_named("shapes_dn"),
        model=replace(small, reference="anchor", denoising=Denoising(sets=2), groups=2),
    )


def test_another_kind_of_noise_is_one_function(recipe, monkeypatch):
    seen = []

    def normal_noise(targets, draws, denoising):
        seen.append(denoising.box_noise)
        moved = targets.boxes + denoising.box_noise / 2 * torch.erfinv(
            0.99 * draws.shift
        ) * targets.boxes[:, 2:].repeat(1, 2)
        return torch.where(draws.flip, draws.label, targets.labels), moved.clamp(0, 1)

    monkeypatch.setattr(denoising, "noised_objects", normal_noise)
    learn(recipe)
    assert seen == [0.4, 0.4]


def test_another_kind_of_query_is_one_class_and_its_name(recipe, monkeypatch):
    class StillAnchors(AnchorQueries):
        """Anchors that are read from and never move."""

        def refine(self, reference, hidden, box_head):
            return reference, reference

    monkeypatch.setitem(
        model.QUERY_TYPES,
        "still",
        lambda c: StillAnchors(c.queries, c.width, c.groups, c.sigmoid_eps),
    )
    learner = learn(replace(recipe, model=replace(recipe.model, reference="still")))
    memory = learner.eval().encode(
        torch.randn(1, learner.backbone.channels, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    )
    references = learner.decode(memory)[1]
    assert torch.equal(references[0], references[-1])


def test_another_backbone_is_one_line(recipe, monkeypatch):
    monkeypatch.setitem(features.RESNETS, "resnet14", (resnet.BasicBlock, [1, 2, 2, 1]))
    learner = learn(replace(recipe, model=replace(recipe.model, backbone="resnet14")))
    assert [len(stage) for stage in learner.backbone.stages] == [1, 2, 2]
