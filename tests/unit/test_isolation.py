"""Group 0 learns as if it were alone.

No other group and no noise query reaches its outputs, on either path of attention.
"""

import pytest
import torch
from conditions import (
    COMBINATIONS,
    PATHS,
    Step,
    difference,
    ignores_others,
    is_isolated,
    is_silent_to_others,
    others,
)

from query_detr.attention import Attention
from query_detr.layout import QueryLayout, masked_attention

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("axes", COMBINATIONS.values(), ids=COMBINATIONS)
def test_group_0_is_isolated(small, axes, path, dtype):
    step = Step(small, axes)
    attention = PATHS[path](step.layout)
    assert is_silent_to_others(step, attention, dtype)
    assert ignores_others(step, attention, dtype)


@pytest.mark.parametrize("axes", COMBINATIONS.values(), ids=COMBINATIONS)
def test_one_visible_stranger_is_noticed(small, axes):
    step = Step(small, axes)
    visible = step.layout.visible().clone()
    stranger = others(step)[0].start
    visible[..., step.group_0.start, stranger] = True
    assert is_isolated(step, masked_attention(step.layout))

    def attend_with_stranger(attention, query, key, value):
        return attention(query, key, value, visible)

    assert not is_isolated(step, attend_with_stranger)


@pytest.mark.parametrize("path", PATHS)
def test_noise_teaches_group_0_through_its_keys_and_values(small, path):
    """Intended: noise may look at group 0, so its loss reaches group 0's inputs, nobody else's."""
    step = Step(small, COMBINATIONS["anchors + groups + noise"])
    _, grads, _ = step.run(PATHS[path](step.layout), torch.float32, slice(0, step.layout.noise))
    assert grads["content"][:, step.group_0].abs().max() > 1e-6
    assert grads["content"][:, step.group_0.stop :].abs().max() == 0


@pytest.mark.parametrize(
    "layout",
    [
        QueryLayout(6),
        QueryLayout(6, 3),
        QueryLayout(6, 1, 2, 3),
        QueryLayout(6, 3, 2, 3),
        QueryLayout(6, 3, 2, 0),
        QueryLayout(6, 3, 2, 3, torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.4),
    ],
    ids=["alone", "groups", "noise", "both", "no object", "hidden padding"],
)
def test_folded_attention_equals_masked_attention(layout):
    inputs = [torch.randn(2, layout.total, 16, requires_grad=True) for _ in range(3)]
    results = []
    for path in PATHS.values():
        out = path(layout)(Attention(4, dropout=0.0), *inputs)
        value = (out * torch.linspace(-1, 1, 16)).square().sum()
        results.append((out, *torch.autograd.grad(value, inputs)))
    assert max(difference(a, b) for a, b in zip(*results, strict=True)) < 1e-5
