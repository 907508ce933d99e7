"""Break the code on purpose and see that the condition of a named test notices.

Each mutation first checks that the condition holds on the code as it is.
"""

import pytest
import torch
from conditions import (
    COMBINATIONS,
    PATHS,
    Step,
    assignment_equals_the_reference,
    flips_never_draw_no_object,
    giou_loss_equals_the_reference,
    gradients_equal_the_reference,
    is_isolated,
    noise_loss_ignores_groups,
    outputs_equal_the_reference,
    padding_is_invisible,
    relative_difference,
    total_equals_the_reference,
    train_outputs_equal_the_reference,
)
from golden import Golden
from step_worker import IMAGES, gradients

from query_detr import attention, criterion, denoising, features, layout, losses, matcher, queries
from query_detr.boxes import iou
from query_detr.criterion import Criterion
from query_detr.run.distributed import DistContext


@pytest.fixture(scope="module")
def golden():
    return Golden("conditional_detr")


def test_dropped_padding_mask_of_cross_attention_is_noticed(golden, monkeypatch, small):
    assert outputs_equal_the_reference(golden)
    assert padding_is_invisible(small)
    attend = attention.attend

    def attend_to_padding(query, key, value, heads, visible=None, dropout=0.0):
        return attend(query, key, value, heads, None, dropout)

    monkeypatch.setattr(attention, "attend", attend_to_padding)
    assert not outputs_equal_the_reference(golden)
    assert not padding_is_invisible(small)


def test_swapped_x_and_y_in_the_sine_embedding_are_noticed(golden, monkeypatch):
    assert outputs_equal_the_reference(golden)

    def x_first(coordinates, width, temperature=10000.0):
        return attention.sine_embedding(
            torch.cat([coordinates[..., 1:2], coordinates[..., :1], coordinates[..., 2:]], -1),
            width,
            temperature,
        )

    monkeypatch.setattr(queries, "sine_embedding", x_first)
    assert not outputs_equal_the_reference(golden)
    monkeypatch.undo()
    monkeypatch.setattr(features, "sine_embedding", x_first)
    assert not outputs_equal_the_reference(golden)


def test_scaled_spatial_query_of_the_first_layer_is_noticed(golden, monkeypatch):
    assert outputs_equal_the_reference(golden)
    position = queries.PointQueries.position
    monkeypatch.setattr(
        queries.PointQueries,
        "position",
        lambda self, state, layer: position(self, state, max(layer, 1)),
    )
    assert not outputs_equal_the_reference(golden)


def test_giou_without_the_enclosing_box_is_noticed(golden, monkeypatch):
    assert giou_loss_equals_the_reference(golden)
    monkeypatch.setattr(losses, "giou", iou)
    assert not giou_loss_equals_the_reference(golden)


def test_costs_of_another_image_are_noticed(golden, monkeypatch):
    model, right = golden.model(), matcher.matching_cost
    with torch.no_grad():
        predictions = model.decode_predictions(
            model.encode(golden["inputs/features"], golden["inputs/mask"])
        )
    assert assignment_equals_the_reference(golden, predictions)
    monkeypatch.setattr(
        matcher,
        "matching_cost",
        lambda logits, boxes, *rest: right(logits.flip(1), boxes.flip(1), *rest),
    )
    assert not assignment_equals_the_reference(golden, predictions)


def test_count_that_is_not_summed_over_micro_batches_is_noticed(monkeypatch):
    whole = gradients(DistContext(), IMAGES)
    assert relative_difference(gradients(DistContext(), 2), whole) <= 1
    own_count = Criterion.__call__
    monkeypatch.setattr(
        Criterion,
        "__call__",
        lambda self, predictions, targets, count, noise: own_count(
            self, predictions, targets, max(1, len(targets)), noise
        ),
    )
    assert relative_difference(gradients(DistContext(), 2), whole) > 1


def test_count_that_is_not_summed_over_processes_is_noticed():
    whole = gradients(DistContext(), IMAGES)
    average = average_of_two_processes()
    assert relative_difference(average, whole) <= 1
    assert relative_difference(average_of_two_processes(keep_own_count=True), whole) > 1


class Counting(DistContext):
    """One of two processes: notes what it adds to the box count, and knows what the other adds."""

    others = 0.0
    own = 0.0

    def total(self, numbers):
        self.own = float(numbers)
        return numbers + self.others


def average_of_two_processes(keep_own_count=False):
    """Do what distributed training does, in one process: average two shares of one step."""
    processes = [Counting(rank, 2) for rank in range(2)]
    for process in processes:
        gradients(process, IMAGES)
    first, second = processes
    if not keep_own_count:
        first.others, second.others = second.own, first.own
    shares = [gradients(process, IMAGES) for process in processes]
    return {name: (shares[0][name] + shares[1][name]) / 2 for name in shares[0]}


# --- anchors, noise and groups -------------------------------------------------------------------


@pytest.fixture(scope="module")
def dn():
    return Golden("dn_detr")


@pytest.fixture(scope="module")
def group():
    return Golden("group_detr")


def leak(monkeypatch, rule):
    """Replace the rule of visibility by `rule(mine, yours)`."""

    def visible(self, device="cpu"):
        identity = self.identity(device)
        return rule(identity[:, None], identity)

    monkeypatch.setattr(layout.QueryLayout, "visible", visible)


@pytest.mark.parametrize("path", PATHS)
def test_dropped_isolation_of_groups_is_noticed(group, small, monkeypatch, path):
    step = Step(small, COMBINATIONS["points + groups"])
    assert train_outputs_equal_the_reference(group)
    assert is_isolated(step, PATHS[path](step.layout))
    leak(monkeypatch, lambda mine, yours: (mine >= -99) & (yours >= -99))
    monkeypatch.setattr("query_detr.model.folded_attention", layout.masked_attention)
    assert not train_outputs_equal_the_reference(group)
    assert not is_isolated(step, layout.masked_attention(step.layout))


def test_fold_that_mixes_groups_is_noticed(group, small, monkeypatch):
    step = Step(small, COMBINATIONS["points + groups"])
    monkeypatch.setattr(
        layout,
        "fold",
        lambda x, groups: x.unflatten(-2, (-1, groups)).transpose(-2, -3).flatten(-4, -3),
    )
    assert not train_outputs_equal_the_reference(group)
    assert not is_isolated(step, layout.folded_attention(step.layout))


def test_matching_queries_that_see_noise_are_noticed(dn, small, monkeypatch):
    step = Step(small, COMBINATIONS["anchors + noise"])
    assert train_outputs_equal_the_reference(dn)
    assert is_isolated(step, layout.folded_attention(step.layout))
    leak(
        monkeypatch, lambda mine, yours: (mine == yours) | (mine == 0) | ((mine < 0) & (yours == 0))
    )
    assert not train_outputs_equal_the_reference(dn)
    assert not is_isolated(step, layout.folded_attention(step.layout))


def test_noise_sets_that_see_each_other_are_noticed(dn, monkeypatch):
    assert train_outputs_equal_the_reference(dn)
    leak(monkeypatch, lambda mine, yours: (mine == yours) | (mine < 0))
    assert not train_outputs_equal_the_reference(dn)


@pytest.mark.parametrize(
    "wrong",
    [
        "the prediction starts from a detached reference",
        "the next layer learns through its reference",
    ],
)
def test_wrong_reference_detached_is_noticed(monkeypatch, wrong):
    golden = Golden("dab_detr")
    assert gradients_equal_the_reference(golden)
    refine = queries.AnchorQueries.refine

    def mutated(self, reference, hidden, box_head):
        refined, _ = refine(self, reference, hidden, box_head)
        return (refined.detach(), refined.detach()) if "prediction" in wrong else (refined, refined)

    monkeypatch.setattr(queries.AnchorQueries, "refine", mutated)
    assert not gradients_equal_the_reference(golden)


def test_count_multiplied_by_the_groups_twice_is_noticed(group, monkeypatch):
    assert total_equals_the_reference(group)
    matching = Criterion.matching
    monkeypatch.setattr(
        Criterion,
        "matching",
        lambda self, predictions, targets, count: matching(
            self, predictions, targets, count * self.groups
        ),
    )
    assert not total_equals_the_reference(group)


def test_noise_normalised_with_the_groups_is_noticed(dn, monkeypatch):
    assert noise_loss_ignores_groups(dn)
    right = Criterion.denoising
    monkeypatch.setattr(
        Criterion,
        "denoising",
        lambda self, predictions, targets, count, noise: right(
            self, predictions, targets, count * self.groups, noise
        ),
    )
    assert not noise_loss_ignores_groups(dn)


def test_noise_not_divided_by_its_sets_is_noticed(dn, monkeypatch):
    assert total_equals_the_reference(dn)
    right = Criterion.denoising
    monkeypatch.setattr(
        Criterion,
        "denoising",
        lambda self, predictions, targets, count, noise: right(
            self, predictions, targets, count / noise.sets, noise
        ),
    )
    assert not total_equals_the_reference(dn)


def test_empty_slots_trained_as_background_are_noticed(dn, monkeypatch):
    assert total_equals_the_reference(dn)

    def everything(predictions, noise):
        pairs, layers = noise.assignment, len(predictions.logits)
        return predictions, type(pairs)(
            pairs.batch, pairs.query.expand(layers, -1), pairs.target.expand(layers, -1)
        )

    monkeypatch.setattr(criterion, "filled_slots", everything)
    assert not total_equals_the_reference(dn)


def test_flips_that_draw_no_object_are_noticed(monkeypatch):
    assert flips_never_draw_no_object()
    sample = denoising.torch.randint
    monkeypatch.setattr(
        denoising.torch, "randint", lambda high, *rest, **how: sample(high + 1, *rest, **how)
    )
    assert not flips_never_draw_no_object()


def test_modulation_with_width_and_height_swapped_is_noticed(dn, monkeypatch):
    assert train_outputs_equal_the_reference(dn)
    right = queries.AnchorQueries.modulation
    monkeypatch.setattr(
        queries.AnchorQueries,
        "modulation",
        lambda self, state: right(self, state).roll(self.width // 2, -1),
    )
    assert not train_outputs_equal_the_reference(dn)


def test_indicator_of_matching_queries_is_noticed(dn, monkeypatch):
    assert train_outputs_equal_the_reference(dn)
    right = denoising.LabelEmbedding.forward
    monkeypatch.setattr(
        denoising.LabelEmbedding,
        "forward",
        lambda self, labels, is_noise: right(self, labels, True),
    )
    assert not train_outputs_equal_the_reference(dn)
