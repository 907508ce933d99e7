"""Break the code on purpose and see that the condition of a named test notices.

Each mutation first checks that the condition holds on the code as it is.
"""
import pytest
import torch
from golden import Golden
from step_worker import IMAGES, gradients
from test_padding import shift_caused_by_padding
from test_same_step import relative_difference

from query_detr import decoder, features, layers, losses, matcher, queries, train
from query_detr.boxes import iou
from query_detr.criterion import Criterion
from query_detr.matcher import match
from query_detr.model import QueryDETR
from query_detr.train import Process


@pytest.fixture(scope="module")
def golden(): return Golden("conditional_detr")


def outputs_equal_the_reference(golden) -> bool:
    "Condition of test_outputs_of_every_layer_equal_the_reference."
    model = golden.model()
    with torch.no_grad(): predictions = model.detect(model.encode(golden["inputs/features"], golden["inputs/mask"]))
    return (predictions.logits - golden["eval_official/logits"]).abs().max() < 2e-5 and (predictions.boxes - golden["eval_official/boxes"]).abs().max() < 2e-5


def losses_equal_the_reference(golden) -> bool:
    "Condition of test_every_loss_equals_the_reference."
    model = golden.model()
    with torch.no_grad():
        predictions = model.detect(model.encode(golden["inputs/features"], golden["inputs/mask"]))
        _, found, _ = Criterion(giou_eps=1e-6)(predictions, golden.targets(), len(golden.targets()))
    expected = golden["train_official/loss/loss_giou"].item()
    return abs(found.giou[-1].item() - expected) <= 1e-5 * expected


def assignment_equals_the_reference(golden, predictions) -> bool:
    "Condition of test_assignment_equals_the_reference_in_every_layer, last layer."
    found = match(predictions.logits, predictions.boxes, golden.targets(), giou_eps=1e-6)
    expected = torch.cat([golden[f"train_official/match/layer2/image{i}/query"] for i in range(2)])
    return torch.equal(found.query[-1], expected)


def test_dropped_padding_mask_of_cross_attention_is_noticed(golden, monkeypatch, small):
    def padding_is_invisible():
        torch.manual_seed(0)
        model = QueryDETR(small).eval()
        torch.nn.init.normal_(model.box_head.layers[-1].weight)
        with torch.no_grad(): return max(shift_caused_by_padding(model)) < 1e-5

    assert outputs_equal_the_reference(golden) and padding_is_invisible()
    monkeypatch.setattr(decoder, "attend", lambda q, k, v, heads, visible=None, dropout=0.0: layers.attend(q, k, v, heads, None, dropout))
    assert not outputs_equal_the_reference(golden) and not padding_is_invisible()


def test_swapped_x_and_y_in_the_sine_embedding_are_noticed(golden, monkeypatch):
    assert outputs_equal_the_reference(golden)
    def x_first(coordinates, width, temperature=10000.0):
        return layers.sine_embedding(torch.cat([coordinates[..., 1:2], coordinates[..., :1], coordinates[..., 2:]], -1), width, temperature)
    monkeypatch.setattr(queries, "sine_embedding", x_first)
    assert not outputs_equal_the_reference(golden)
    monkeypatch.undo()
    monkeypatch.setattr(features, "sine_embedding", x_first)
    assert not outputs_equal_the_reference(golden)


def test_scaled_spatial_query_of_the_first_layer_is_noticed(golden, monkeypatch):
    assert outputs_equal_the_reference(golden)
    position = queries.PointQueries.position
    monkeypatch.setattr(queries.PointQueries, "position", lambda self, state, layer: position(self, state, max(layer, 1)))
    assert not outputs_equal_the_reference(golden)


def test_giou_without_the_enclosing_box_is_noticed(golden, monkeypatch):
    assert losses_equal_the_reference(golden)
    monkeypatch.setattr(losses, "giou", iou)
    assert not losses_equal_the_reference(golden)


def test_costs_of_another_image_are_noticed(golden, monkeypatch):
    model, right = golden.model(), matcher.matching_cost
    with torch.no_grad(): predictions = model.detect(model.encode(golden["inputs/features"], golden["inputs/mask"]))
    assert assignment_equals_the_reference(golden, predictions)
    other = iter([1, 0])
    def of_another_image(logits, boxes, *rest):
        image = next(other)
        return right(predictions.logits[:, image], predictions.boxes[:, image], *rest)
    monkeypatch.setattr(matcher, "matching_cost", of_another_image)
    assert not assignment_equals_the_reference(golden, predictions)


def test_count_that_is_not_summed_over_micro_batches_is_noticed(monkeypatch):
    whole = gradients(Process(), IMAGES)
    assert relative_difference(gradients(Process(), 2), whole) <= 1
    own_count = Criterion.__call__
    monkeypatch.setattr(Criterion, "__call__", lambda self, predictions, targets, count: own_count(self, predictions, targets, max(1, len(targets))))
    assert relative_difference(gradients(Process(), 2), whole) > 1


def test_count_that_is_not_summed_over_processes_is_noticed(monkeypatch, tmp_path):
    whole = gradients(Process(), IMAGES)
    average = average_of_two_processes()
    assert relative_difference(average, whole) <= 1
    monkeypatch.setattr(train.Process, "total", lambda self, numbers: numbers)
    assert relative_difference(average_of_two_processes(keep_own_count=True), whole) > 1


class TwoProcesses(Process):
    "Stands for one of two processes: knows what the other one would have added to the box count."
    others = 0

    def total(self, numbers): return numbers + self.others


def average_of_two_processes(keep_own_count=False):
    "Do what distributed training does, in one process: the mean of the gradients of two shares of one step."
    counts = []
    for rank in range(2):
        seen = []
        probe = type("Probe", (Process,), {"total": lambda self, numbers: seen.append(float(numbers)) or numbers})
        gradients(probe(rank, 2), IMAGES)
        counts.append(seen[0])
    shares = []
    for rank in range(2):
        process = Process(rank, 2) if keep_own_count else type("Summed", (TwoProcesses,), {"others": counts[1 - rank]})(rank, 2)
        shares.append(gradients(process, IMAGES))
    return {k: (shares[0][k] + shares[1][k]) / 2 for k in shares[0]}
