"""Group-wise one-to-many assignment is the optimum of every group, by trying all permutations."""

from itertools import permutations

import pytest
import torch

from query_detr.batch import Predictions, Targets
from query_detr.criterion import Criterion
from query_detr.groups import fold_predictions, repeat_targets, unfold_assignment
from query_detr.matcher import match, matching_cost

pytestmark = pytest.mark.usefixtures("kernels")

K, N = 3, 4


def random_case(seed: int, counts=(2, 0, 3)):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    boxes = torch.cat(
        [rand(2, len(counts), K * N, 2), 0.05 + 0.4 * rand(2, len(counts), K * N, 2)], -1
    )
    T = sum(counts)
    targets = Targets(
        torch.cat([rand(T, 2), 0.05 + 0.4 * rand(T, 2)], 1),
        torch.randint(5, (T,), generator=generator),
        counts,
    )
    return Predictions(4 * rand(2, len(counts), K * N, 5) - 2, boxes), targets


def assigned(predictions, targets):
    folded = fold_predictions(predictions, K)
    return unfold_assignment(
        match(folded.logits, folded.boxes, repeat_targets(targets, K)), targets, K, N
    )


def cheapest(cost) -> float:
    """Cost [N, T] of the best one-to-one assignment, found by trying all."""
    return min(
        sum(cost[q, t].item() for t, q in enumerate(chosen))
        for chosen in permutations(range(cost.shape[0]), cost.shape[1])
    )


@pytest.mark.parametrize("seed", range(12))
def test_every_group_has_its_own_optimum(seed):
    predictions, targets = random_case(seed)
    assignment = assigned(predictions, targets)
    for layer in range(2):
        for image, objects in enumerate(targets.slices):
            cost = matching_cost(
                predictions.logits[layer, image],
                predictions.boxes[layer, image],
                targets.labels[objects],
                targets.boxes[objects],
            )
            in_image = assignment.batch == image
            query = assignment.query[layer, in_image]
            target = assignment.target[layer, in_image] - objects.start
            for group in range(K):
                inside = query // N == group
                assert sorted(target[inside].tolist()) == list(range(targets.counts[image]))
                total = cost[query[inside], target[inside]].sum().item()
                optimum = cheapest(cost[group * N : (group + 1) * N])
                assert total == pytest.approx(optimum, abs=1e-4)


@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 0, 0)])
def test_identical_groups_cost_what_one_group_costs(counts):
    predictions, targets = random_case(0, counts)
    one = predictions.select(slice(N))
    copies = Predictions(one.logits.repeat(1, 1, K, 1), one.boxes.repeat(1, 1, K, 1))
    count = max(1, len(targets))
    total = Criterion(groups=K)(copies, targets, count).total.item()
    assert total == pytest.approx(Criterion()(one, targets, count).total.item(), rel=1e-5)
