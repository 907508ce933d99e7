"""Break the code on purpose and see that the condition of a named test notices.

Each mutation first checks that the condition holds on the code as it is.
"""

import pytest
import torch
from golden import Golden
from step_worker import IMAGES, gradients
from test_denoising import flips_never_draw_no_object
from test_isolation import COMBINATIONS, PATHS, Step, is_isolated
from test_padding import shift_caused_by_padding
from test_same_step import relative_difference

from query_detr import attention as layers
from query_detr import criterion, denoising, features, layout, losses, matcher, queries
from query_detr.boxes import iou
from query_detr.criterion import Criterion
from query_detr.matcher import match
from query_detr.model import QueryDETR
from query_detr.run.distributed import DistContext


@pytest.fixture(scope="module")
def golden():
    return Golden("conditional_detr")


def outputs_equal_the_reference(golden) -> bool:
    """Condition of test_outputs_of_every_layer_equal_the_reference."""
    model = golden.model()
    with torch.no_grad():
        predictions = model.decode_predictions(
            model.encode(golden["inputs/features"], golden["inputs/mask"])
        )
    return (predictions.logits - golden["eval_official/logits"]).abs().max() < 2e-5 and (
        predictions.boxes - golden["eval_official/boxes"]
    ).abs().max() < 2e-5


def losses_equal_the_reference(golden) -> bool:
    """Condition of test_every_loss_equals_the_reference."""
    model = golden.model()
    with torch.no_grad():
        predictions = model.decode_predictions(
            model.encode(golden["inputs/features"], golden["inputs/mask"])
        )
        found = Criterion(giou_eps=1e-6)(
            predictions, golden.targets(), len(golden.targets())
        ).losses
    expected = golden["train_official/loss/loss_giou"].item()
    return abs(found["giou_loss"][-1].item() - expected) <= 1e-5 * expected


def assignment_equals_the_reference(golden, predictions) -> bool:
    """Condition of test_assignment_equals_the_reference_in_every_layer, last layer."""
    found = match(predictions.logits, predictions.boxes, golden.targets(), giou_eps=1e-6)
    expected = torch.cat([golden[f"train_official/match/layer2/image{i}/query"] for i in range(2)])
    return torch.equal(found.query[-1], expected)


def test_dropped_padding_mask_of_cross_attention_is_noticed(golden, monkeypatch, small):
    def padding_is_invisible():
        torch.manual_seed(0)
        model = QueryDETR(small).eval()
        torch.nn.init.normal_(model.box_head.layers[-1].weight)
        with torch.no_grad():
            return max(shift_caused_by_padding(model)) < 1e-5

    assert outputs_equal_the_reference(golden) and padding_is_invisible()
    attend = layers.attend

    def attend_to_padding(query, key, value, heads, visible=None, dropout=0.0):
        return attend(query, key, value, heads, None, dropout)

    monkeypatch.setattr(layers, "attend", attend_to_padding)
    assert not outputs_equal_the_reference(golden) and not padding_is_invisible()


def test_swapped_x_and_y_in_the_sine_embedding_are_noticed(golden, monkeypatch):
    assert outputs_equal_the_reference(golden)

    def x_first(coordinates, width, temperature=10000.0):
        return layers.sine_embedding(
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
    assert losses_equal_the_reference(golden)
    monkeypatch.setattr(losses, "giou", iou)
    assert not losses_equal_the_reference(golden)


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


def test_count_that_is_not_summed_over_processes_is_noticed(monkeypatch, tmp_path):
    whole = gradients(DistContext(), IMAGES)
    average = average_of_two_processes()
    assert relative_difference(average, whole) <= 1
    monkeypatch.setattr(DistContext, "total", lambda self, numbers: numbers)
    assert relative_difference(average_of_two_processes(keep_own_count=True), whole) > 1


class TwoProcesses(DistContext):
    """Stands for one of two processes: knows what the other one would have added to the box
    count."""

    others = 0

    def total(self, numbers):
        return numbers + self.others


def average_of_two_processes(keep_own_count=False):
    """Do what distributed training does, in one process: the mean of the gradients of two shares
    of one step."""
    counts = []
    for rank in range(2):
        seen = []
        probe = type(
            "Probe",
            (DistContext,),
            {"total": lambda self, numbers, seen=seen: seen.append(float(numbers)) or numbers},
        )
        gradients(probe(rank, 2), IMAGES)
        counts.append(seen[0])
    shares = []
    for rank in range(2):
        process = (
            DistContext(rank, 2)
            if keep_own_count
            else type("Summed", (TwoProcesses,), {"others": counts[1 - rank]})(rank, 2)
        )
        shares.append(gradients(process, IMAGES))
    return {k: (shares[0][k] + shares[1][k]) / 2 for k in shares[0]}


# --- anchors, noise and groups -------------------------------------------------------------------


@pytest.fixture(scope="module")
def dn():
    return Golden("dn_detr")


@pytest.fixture(scope="module")
def group():
    return Golden("group_detr")


def train_outputs_equal_the_reference(golden) -> bool:
    """Condition of test_outputs_of_every_layer_equal_the_reference, in training."""
    with torch.no_grad():
        predictions = golden.train_predictions(golden.model())
    first = golden.noise().total if golden.noise() else 0
    pairs = [
        (predictions.logits[:, :, first:], "logits"),
        (predictions.boxes[:, :, first:], "boxes"),
    ]
    if first:
        pairs += [
            (predictions.logits[:, :, :first], "dn_logits"),
            (predictions.boxes[:, :, :first], "dn_boxes"),
        ]
    return all((ours - golden[f"train_official/{name}"]).abs().max() < 2e-5 for ours, name in pairs)


def total_equals_the_reference(golden) -> bool:
    """Condition of test_every_loss_equals_the_reference."""
    with torch.no_grad():
        outcome = golden.criterion()(
            golden.train_predictions(golden.model()),
            golden.targets(),
            len(golden.targets()),
            golden.noise(),
        )
    expected = golden[
        "train_official/total_loss_official_dn_class"
        if "noise_class_loss" in outcome.losses
        else "train_official/total_loss"
    ].item()
    return abs(outcome.total.item() - expected) <= 1e-5 * expected


def gradients_equal_the_reference(golden) -> bool:
    """Condition of test_gradient_of_every_parameter_equals_the_reference, for the box head."""
    model = golden.model()
    golden.criterion()(
        golden.train_predictions(model), golden.targets(), len(golden.targets())
    ).total.backward()
    expected = golden["train_official/grad_norm/bbox_embed.layers.0.weight"].item()
    return abs(model.box_head.layers[0].weight.grad.norm().item() - expected) <= 3e-4 * expected


def leak(monkeypatch, rule):
    """Replace the rule of visibility by `rule(mine, yours)`."""

    def visible(self, device="cpu"):
        identity = self.identity(device)
        return rule(identity[:, None], identity)

    monkeypatch.setattr(layout.QueryLayout, "visible", visible)


@pytest.mark.parametrize("path", PATHS)
def test_dropped_isolation_of_groups_is_noticed(group, small, monkeypatch, path):
    step = Step(small, COMBINATIONS["points + groups"])
    assert train_outputs_equal_the_reference(group) and is_isolated(
        step, PATHS[path](step.layout), torch.float32
    )
    leak(monkeypatch, lambda mine, yours: (mine >= -99) & (yours >= -99))
    monkeypatch.setattr("query_detr.model.folded_attention", layout.masked_attention)
    assert not train_outputs_equal_the_reference(group) and not is_isolated(
        step, layout.masked_attention(step.layout), torch.float32
    )


def test_fold_that_mixes_groups_is_noticed(group, small, monkeypatch):
    step = Step(small, COMBINATIONS["points + groups"])
    monkeypatch.setattr(
        layout,
        "fold",
        lambda x, groups: x.unflatten(-2, (-1, groups)).transpose(-2, -3).flatten(-4, -3),
    )
    assert not train_outputs_equal_the_reference(group) and not is_isolated(
        step, layout.folded_attention(step.layout), torch.float32
    )


def test_matching_queries_that_see_noise_are_noticed(dn, small, monkeypatch):
    step = Step(small, COMBINATIONS["anchors + noise"])
    assert train_outputs_equal_the_reference(dn) and is_isolated(
        step, layout.folded_attention(step.layout), torch.float32
    )
    leak(
        monkeypatch, lambda mine, yours: (mine == yours) | (mine == 0) | ((mine < 0) & (yours == 0))
    )
    assert not train_outputs_equal_the_reference(dn) and not is_isolated(
        step, layout.folded_attention(step.layout), torch.float32
    )


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


def test_noise_normalised_with_the_groups_is_noticed(small, monkeypatch):
    def noise_loss_ignores_groups():
        golden = Golden("dn_detr")
        with torch.no_grad():
            predictions = golden.train_predictions(golden.model())
        noise, targets = golden.noise(), golden.targets()
        first = predictions.select(slice(noise.total)), predictions.select(slice(noise.total, None))
        twice = type(predictions)(
            torch.cat([first[0].logits, first[1].logits, first[1].logits], 2),
            torch.cat([first[0].boxes, first[1].boxes, first[1].boxes], 2),
        )
        one, two = (
            Criterion(groups=k)(p, targets, len(targets), noise)
            .losses["noise_class_loss"][-1]
            .item()
            for k, p in ((1, predictions), (2, twice))
        )
        return one == pytest.approx(two, rel=1e-5)

    assert noise_loss_ignores_groups()
    right = Criterion.denoising
    monkeypatch.setattr(
        Criterion,
        "denoising",
        lambda self, predictions, targets, count, noise: right(
            self, predictions, targets, count * self.groups, noise
        ),
    )
    assert not noise_loss_ignores_groups()


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
