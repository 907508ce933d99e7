"""Noise is drawn per image and set, and made without touching the targets.

It costs nothing where it is empty, and stays finite.
"""

from dataclasses import replace

import pytest
import torch
from conditions import difference, flips_never_draw_no_object, some_targets

from query_detr.criterion import Criterion
from query_detr.denoising import Denoising, apply_noise, sample_noise
from query_detr.model import QueryDETR

NOISE = Denoising(sets=3, label_flip=1.0, box_noise=1.0)


def noise_losses(outcome):
    return [loss for name, loss in outcome.losses.items() if name.startswith("noise_")]


def take_step(small, targets, denoising=NOISE, noise=None):
    model = QueryDETR(replace(small, reference="anchor", denoising=denoising, groups=2)).train()
    noise = noise or apply_noise(
        targets,
        sample_noise(denoising, 5, targets, tuple(range(len(targets.counts))), 0, 0),
        denoising,
    )
    size = len(targets.counts)
    predictions = model(
        torch.randn(size, 3, 64, 64), torch.zeros(size, 64, 64, dtype=torch.bool), noise
    )
    outcome = Criterion(groups=2)(predictions, targets, max(1, len(targets)), noise)
    outcome.total.backward()
    return model, outcome


def test_flipped_labels_are_classes():
    assert flips_never_draw_no_object()


def test_draws_depend_on_seed_epoch_image_and_set_alone():
    counts, ids = (3, 0, 2), (7, 8, 9)
    together = sample_noise(NOISE, 5, some_targets(counts), ids, 1, 2)
    alone = sample_noise(NOISE, 5, some_targets((2,)), (9,), 1, 2)
    assert torch.equal(together.shift[:, 3:], alone.shift)
    assert torch.equal(together.label[:, 3:], alone.label)
    assert not torch.equal(alone.shift[0], alone.shift[1])
    for other in ((9,), 2, 2), ((9,), 1, 3), ((8,), 1, 2):
        assert not torch.equal(
            sample_noise(NOISE, 5, some_targets((2,)), *other).shift, alone.shift
        )


def test_share_of_flipped_labels_and_reach_of_boxes():
    targets, how = some_targets([4000]), Denoising(sets=1, label_flip=0.2, box_noise=0.4)
    targets.boxes.copy_(torch.tensor([0.5, 0.5, 0.2, 0.1]))
    draws = sample_noise(how, 5, targets, (0,), 0, 0)
    assert draws.flip.float().mean().item() == pytest.approx(0.2, abs=0.03)
    noise = apply_noise(targets, draws, how)
    moved = (noise.boxes[0] - targets.boxes).abs().amax(0)
    assert moved.tolist() == pytest.approx([0.04, 0.02, 0.08, 0.04], rel=0.01)


def test_targets_stay_as_they_are():
    targets = some_targets((3, 1))
    before = targets.boxes.clone(), targets.labels.clone()
    apply_noise(targets, sample_noise(NOISE, 5, targets, (0, 1), 0, 0), Denoising(box_noise=1.0))
    assert torch.equal(targets.boxes, before[0])
    assert torch.equal(targets.labels, before[1])


def test_boxes_of_size_zero_give_finite_losses_and_gradients(small):
    targets = some_targets((3, 1))
    noise = apply_noise(
        targets,
        replace_shift(sample_noise(NOISE, 5, targets, (0, 1), 0, 0), -1.0),
        Denoising(box_noise=1.0),
    )
    assert (noise.boxes[~noise.empty][:, 2:] == 0).all()
    model, outcome = take_step(small, targets, noise=noise)
    assert outcome.total.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def replace_shift(draws, value):
    draws.shift = torch.full_like(draws.shift, value)
    return draws


@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (0, 3)])
def test_images_without_objects_are_no_trouble(small, counts):
    model, outcome = take_step(small, some_targets(counts))
    assert outcome.total.isfinite()
    assert all(p.grad is not None for p in model.parameters())
    if not sum(counts):
        assert outcome.losses["noise_class_loss"].sum() == 0


def test_empty_slots_cost_nothing(small):
    torch.manual_seed(1)
    targets = some_targets((3, 1))
    draws = sample_noise(NOISE, 5, targets, (0, 1), 0, 0)
    noise = apply_noise(targets, draws, NOISE)
    model = QueryDETR(replace(small, reference="anchor", denoising=NOISE)).train()
    memory = model.encode(
        torch.randn(2, model.backbone.channels, 6, 8), torch.zeros(2, 6, 8, dtype=torch.bool)
    )
    predictions = model.decode_predictions(memory, 1, noise)
    before = noise_losses(Criterion()(predictions, targets, 4, noise))
    predictions.logits[:, :, : noise.total][:, noise.empty] += 5.0
    after = noise_losses(Criterion()(predictions, targets, 4, noise))
    assert noise.empty.any()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_padding_slots_reach_real_noise_only_where_they_are_visible(small):
    """The authors leave them visible; `hide_padding` hides them.

    Matching queries never see either.
    """
    targets = some_targets((3, 1))
    noise = apply_noise(targets, sample_noise(NOISE, 5, targets, (0, 1), 0, 0), NOISE)
    wider = apply_noise(targets, sample_noise(NOISE, 5, targets, (0, 1), 0, 0), NOISE, slots=6)
    for hide in (False, True):
        torch.manual_seed(0)
        model = QueryDETR(
            replace(small, reference="anchor", denoising=replace(NOISE, hide_padding=hide))
        ).train()
        torch.nn.init.normal_(model.class_head.weight)
        memory = model.encode(
            torch.randn(2, model.backbone.channels, 6, 8), torch.zeros(2, 6, 8, dtype=torch.bool)
        )
        with torch.no_grad():
            some, more = (model.decode_predictions(memory, 1, n).logits for n in (noise, wider))
        changed = difference(real_slots(some, noise), real_slots(more, wider))
        if hide:
            assert changed < 1e-5
        else:
            assert changed > 1e-3
        assert (some[:, :, noise.total :] - more[:, :, wider.total :]).abs().max() < 1e-5


def real_slots(logits, noise):
    """Logits of the slots that hold an object."""
    return logits[:, noise.assignment.batch, noise.assignment.query[0]]


def test_loss_of_noise_is_divided_by_boxes_and_sets_whatever_the_number_of_groups(small):
    targets = some_targets((3, 1))
    noise = apply_noise(targets, sample_noise(NOISE, 5, targets, (0, 1), 0, 0), NOISE)
    model = QueryDETR(replace(small, reference="anchor", denoising=NOISE, groups=2)).train()
    memory = model.encode(
        torch.randn(2, model.backbone.channels, 6, 8), torch.zeros(2, 6, 8, dtype=torch.bool)
    )
    losses = []
    for groups in (1, 2):
        predictions = model.decode_predictions(memory, groups, noise)
        losses.append(noise_losses(Criterion(groups=groups)(predictions, targets, 4, noise)))
    assert torch.allclose(*map(torch.stack, losses), rtol=1e-4)
    twice = apply_noise(targets, doubled(sample_noise(NOISE, 5, targets, (0, 1), 0, 0)), NOISE)
    outcome = Criterion()(model.decode_predictions(memory, 1, twice), targets, 4, twice)
    assert torch.allclose(*map(torch.stack, (noise_losses(outcome), losses[0])), rtol=1e-4)


def doubled(draws):
    """Every noise set a second time."""
    return draws.map(lambda tensor: torch.cat([tensor, tensor]))
