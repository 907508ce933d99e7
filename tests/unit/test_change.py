"""What CONTRIBUTING promises to somebody who adds something: it is one definition in one place.

A kind of noise, of query, of backbone or of data, a field of targets, a loss.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet

from query_detr import criterion, denoising, features, model
from query_detr.batch import Assignment, Predictions, Targets, collate
from query_detr.criterion import Criterion
from query_detr.data.coco import DetectionDataset
from query_detr.data.shapes import ShapesDataset
from query_detr.data.transforms import Transformed, eval_transform
from query_detr.denoising import Denoising, Noise, apply_noise, sample_noise
from query_detr.groups import repeat_targets
from query_detr.matcher import TermWeights
from query_detr.model import QueryDETR
from query_detr.queries import AnchorQueries
from query_detr.run.evaluate import evaluate
from query_detr.run.loop import RunOptions, fit
from query_detr.run.recipes import Recipe, recipe_named
from query_detr.run.step import start_run, train_step


def learn(recipe: Recipe, steps: int = 2, scenes: DetectionDataset | None = None) -> QueryDETR:
    """Take steps as a run does, and evaluate."""
    scenes = scenes or ShapesDataset(4, seed=0)
    pictures = Transformed(scenes, eval_transform(short=None))
    batch = collate([pictures[i] for i in range(4)])
    learner = QueryDETR(recipe.model).train()
    state = start_run(learner, recipe, seed=0, images=len(batch))
    before = learner.queries.embedding.weight.clone()
    for _ in range(steps):
        outcome = train_step(state, [batch], Criterion(groups=recipe.model.groups))
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


def contrastive_noise(targets, draws, how: Denoising) -> Noise:
    """DINO's contrastive noise: every object once near itself, once too far away to be found."""
    outwards = draws.shift.sign() * (1 + draws.shift.abs()) / 2
    near = apply_noise(targets, draws, how)
    far = apply_noise(targets, replace(draws, shift=outwards), replace(how, box_noise=1.0))

    def together(name):
        sides = (getattr(side, name).unflatten(1, (near.sets, near.slots)) for side in (near, far))
        return torch.cat([*sides], 2).flatten(1, 2)

    pairs = near.assignment  # of the near ones alone
    query = pairs.query + pairs.query // near.slots * near.slots
    parts = {name: together(name) for name in ("labels", "boxes", "empty")}
    return replace(near, **parts, assignment=replace(pairs, query=query), slots=2 * near.slots)


def slots_with_negatives(predictions, noise):
    """Line up all slots that are not empty; those without a pair are background."""
    image, slot = (~noise.empty).nonzero(as_tuple=True)
    rows = torch.zeros(noise.empty.shape, dtype=torch.int64)
    rows[image, slot] = torch.arange(len(image))
    pairs, layers = noise.assignment, len(predictions.logits)
    query = rows[pairs.batch, pairs.query[0]]
    return predictions.map(lambda tensor: tensor[:, None, image, slot]), Assignment(
        torch.zeros_like(query), query.expand(layers, -1), pairs.target.expand(layers, -1)
    )


def test_contrastive_noise_is_two_functions(recipe, monkeypatch):
    monkeypatch.setattr(criterion, "filled_slots", slots_with_negatives)
    targets = Targets(torch.rand(3, 4) * 0.3 + 0.3, torch.tensor([0, 1, 2]), (1, 2))
    how = Denoising(sets=2)
    noise = contrastive_noise(targets, sample_noise(how, 5, targets, (0, 1), 0, 0), how)
    learner = QueryDETR(recipe.model).train()
    torch.nn.init.normal_(learner.box_head.layers[-1].weight, std=0.1)
    predictions = learner(
        torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool), noise
    )
    total = Criterion(groups=2)(predictions, targets, len(targets), noise).total
    of_logits, of_boxes = torch.autograd.grad(total, (predictions.logits, predictions.boxes))
    paired = torch.zeros_like(noise.empty)
    paired[noise.assignment.batch, noise.assignment.query[0]] = True
    negative = ~paired & ~noise.empty
    heard = of_logits[:, :, : noise.total].abs().sum((0, 3)) > 0
    assert torch.equal(heard, paired | negative)
    assert torch.equal(of_boxes[:, :, : noise.total].abs().sum((0, 3)) > 0, paired)
    assert negative.sum() == paired.sum() == 6


@dataclass(eq=False)
class TargetsWithMasks(Targets):
    """Objects with a mask each, as a mask head would need them."""

    masks: torch.Tensor


def test_a_further_field_of_targets_is_one_definition():
    targets = TargetsWithMasks(torch.rand(3, 4), torch.arange(3), (1, 2), torch.rand(3, 8, 8))
    repeated = repeat_targets(targets.to("cpu"), 2)
    assert repeated.counts == (1, 1, 2, 2)
    assert torch.equal(repeated.masks, targets.masks[[0, 0, 1, 2, 1, 2]])


class WeightsWithMasks(TermWeights):
    def of(self, loss):
        return 10.0 if "mask" in loss else super().of(loss)


def test_a_further_loss_is_one_entry(monkeypatch):
    usual = criterion.detection_loss

    def with_masks(predictions, *arguments):
        return usual(predictions, *arguments) | {"mask": torch.ones(len(predictions.logits))}

    targets = Targets(torch.rand(3, 4) * 0.3 + 0.3, torch.tensor([0, 1, 2]), (1, 2))
    predictions = Predictions(torch.randn(2, 2, 6, 5), torch.rand(2, 2, 6, 4))
    before = Criterion()(predictions, targets, 3)
    monkeypatch.setattr(criterion, "detection_loss", with_masks)
    after = Criterion(weights=WeightsWithMasks())(predictions, targets, 3)
    assert list(after.losses) == [*before.losses, "mask_loss"]
    assert after.total.item() == pytest.approx(before.total.item() + 20)


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


def test_a_backbone_of_timm_is_one_class_and_its_name(recipe, monkeypatch):
    timm = pytest.importorskip("timm")

    class TimmBackbone(nn.Module):
        """The last feature map of any of timm's image models."""

        def __init__(self, name: str):
            super().__init__()
            self.body = timm.create_model(name, features_only=True, out_indices=(-1,))
            self.channels = self.body.feature_info.channels()[-1]

        def forward(self, images):
            return self.body(images)[-1]

        def compiled_parts(self):
            return [self.body]

    monkeypatch.setitem(
        model.BACKBONES, "mobilenet", lambda c: TimmBackbone("mobilenetv3_small_050")
    )
    learner = learn(replace(recipe, model=replace(recipe.model, backbone="mobilenet")))
    assert isinstance(learner.backbone, features.Backbone)
    assert learner.project.weight.grad.abs().max() > 0
    assert next(learner.backbone.parameters()).grad.abs().max() > 0


class YoloFolder:
    """Pictures, and beside each a text file with a line `label cx cy w h` for every object."""

    def __init__(self, folder: Path, class_names: list[str]):
        self.paths, self.class_names = sorted(folder.glob("*.png")), class_names
        self.image_ids = range(len(self.paths))
        self.category_ids = range(len(class_names))
        sizes = [self.picture(i).size[::-1] for i in self.image_ids]
        self.sizes = np.array(sizes)  # height, width

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i: int):
        lines = self.paths[i].with_suffix(".txt").read_text().splitlines()
        rows = torch.tensor([[float(word) for word in line.split()] for line in lines])
        label, center, size = rows.view(-1, 5).split([1, 2, 2], 1)
        corners = torch.cat([center - size / 2, center + size / 2], 1)
        height, width = self.sizes[i].tolist()
        boxes = corners * torch.tensor([width, height, width, height])
        return self.picture(i), boxes, label[:, 0].long()

    def picture(self, i: int):
        with Image.open(self.paths[i]) as file:
            return file.convert("RGB")

    def file_name(self, i: int):
        return self.paths[i].name

    def ground_truth(self):
        images, annotations = [], []
        for i, (height, width) in enumerate(self.sizes.tolist()):
            images.append(dict(id=i, file_name=self.file_name(i), height=height, width=width))
            _, boxes, labels = self[i]
            for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                box = [x0, y0, x1 - x0, y1 - y0]
                one = dict(image_id=i, category_id=label, bbox=box, area=box[2] * box[3], iscrowd=0)
                annotations.append(dict(id=len(annotations) + 1, **one))
        categories = [dict(id=i, name=name) for i, name in enumerate(self.class_names)]
        return dict(images=images, annotations=annotations, categories=categories)


def write_yolo(scenes: ShapesDataset, folder: Path):
    """Save scenes as pictures and text files."""
    for i in range(len(scenes)):
        picture, boxes, labels = scenes[i]
        picture.save(folder / f"{i}.png")
        corners = boxes / torch.tensor([*picture.size, *picture.size])
        center, size = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        rows = torch.cat([center, size], 1).tolist()
        lines = [" ".join(map(str, [label, *row])) for label, row in zip(labels.tolist(), rows)]
        (folder / f"{i}.txt").write_text("\n".join(lines))


def test_another_format_of_data_is_one_class(recipe, tmp_path):
    scenes = ShapesDataset(4, seed=0)
    write_yolo(scenes, tmp_path)
    folder = YoloFolder(tmp_path, list(scenes.class_names))
    for i in range(len(scenes)):
        assert torch.allclose(folder[i][1], scenes[i][1].float(), atol=1e-3)
        assert torch.equal(folder[i][2], scenes[i][2])
    learn(recipe, scenes=folder)


# --- a second logger ---


class ListLogger:
    """Keep what a run logs, as a logger for a web service would send it."""

    def __init__(self, folder, state):
        self.lines, self.closed = [], False
        made.append(self)

    def log(self, step, **numbers):
        self.lines.append(dict(step=step, **numbers))

    def close(self):
        self.closed = True


made: list[ListLogger] = []


def test_a_second_logger_is_one_class(recipe, tmp_path):
    short = replace(recipe, epochs=1, batch_size=2, eval_batch_size=2)
    state = start_run(QueryDETR(short.model), short, seed=0, images=4)
    scenes = ShapesDataset(4, seed=0)
    options = RunOptions(log_every=1, loggers=(ListLogger,))
    made.clear()
    fit(state, scenes, scenes, tmp_path, options=options)
    (logger,) = made
    assert [line["step"] for line in logger.lines if "loss" in line] == [1, 2]
    assert any("AP" in line for line in logger.lines)
    assert logger.closed
