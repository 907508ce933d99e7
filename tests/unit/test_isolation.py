"""Group 0 learns as if it were alone.

No other group and no noise query reaches its outputs, on either path of attention.
"""

from dataclasses import replace

import pytest
import torch

from query_detr.attention import Attention
from query_detr.batch import Targets
from query_detr.denoising import Denoising, apply_noise, sample_noise
from query_detr.features import Memory
from query_detr.layout import QueryLayout, folded_attention, masked_attention
from query_detr.model import QueryDETR

pytestmark = pytest.mark.usefixtures("kernels")

ANCHORS = dict(reference="anchor", activation="prelu")
NOISE = Denoising(sets=2)
COMBINATIONS = {
    "points + groups": dict(groups=3),
    "anchors + groups": dict(groups=3, **ANCHORS),
    "anchors + noise": dict(denoising=NOISE, **ANCHORS),
    "anchors + groups + noise": dict(groups=3, denoising=NOISE, **ANCHORS),
    "anchors + groups + hidden padding": dict(
        groups=3, denoising=replace(NOISE, hide_padding=True), **ANCHORS
    ),
}
PATHS = {"masked": masked_attention, "folded": folded_attention}


class Step:
    """The decoder's part of a training step, with dropout, with the gradient of every input."""

    def __init__(self, small, axes):
        torch.manual_seed(0)
        self.model = QueryDETR(replace(small, dropout=0.1, **axes)).train()
        for head in (self.model.box_head.layers[-1], self.model.class_head):
            torch.nn.init.normal_(head.weight)
        targets = Targets(torch.rand(4, 4) * 0.3 + 0.3, torch.randint(5, (4,)), (3, 1))
        config, noise = self.model.config, None
        if config.denoising.sets:
            noise = apply_noise(
                targets,
                sample_noise(config.denoising, config.classes, targets, (1, 2), 0, 0),
                config.denoising,
            )
        state, self.layout = self.model.make_queries(2, config.groups, noise)
        self.state = replace(
            state, **{k: v.detach() for k, v in vars(state).items() if v is not None}
        )
        self.state.content += 0.1 * torch.randn_like(state.content)
        self.tokens, self.positions = (
            torch.randn(2, 30, config.width),
            torch.randn(2, 30, config.width),
        )
        self.group_0 = slice(self.layout.noise, self.layout.noise + config.queries)

    def run(self, attention, dtype, read: slice, disturbed: slice | None = None):
        """Read a scalar from some queries' outputs.

        Gives its value and its gradients for the queries' inputs and the memory.
        """
        inputs = {k: v.clone() for k, v in vars(self.state).items() if v is not None}
        if disturbed is not None:
            for _k, v in inputs.items():
                v[:, disturbed] = torch.rand(
                    v[:, disturbed].shape, generator=torch.Generator().manual_seed(3)
                )
        for v in inputs.values():
            v.requires_grad_()
        tokens = self.tokens.clone().requires_grad_()
        memory = Memory(tokens, self.positions, torch.zeros(2, 30, dtype=torch.bool), (5, 6))
        torch.manual_seed(1)  # the same dropout every time
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden, references = self.model.decoder(
                replace(self.state, **inputs),
                self.model.queries,
                memory,
                self.model.box_head,
                attention,
            )
            logits, boxes = (
                self.model.class_head(hidden),
                self.model.decode_boxes(self.model.box_head(hidden), references),
            )
        value = logits[:, :, read].float().square().sum() + boxes[:, :, read].float().square().sum()
        *grads, of_memory = torch.autograd.grad(value, [*inputs.values(), tokens])
        return value.detach(), dict(zip(inputs, grads)), of_memory


def others(step) -> list[slice]:
    """What group 0 must not hear of: noise before it, other groups behind it."""
    total = step.layout.total
    return [
        s
        for s in (slice(0, step.group_0.start), slice(step.group_0.stop, total))
        if s.start < s.stop
    ]


def is_isolated(step, attention, dtype) -> bool:
    """Condition of test_group_0_is_isolated."""
    value, grads, of_memory = step.run(attention, dtype, step.group_0)
    silent = all(g[:, s].abs().max() == 0 for g in grads.values() for s in others(step))
    heard = all(g[:, step.group_0].abs().max() > 0 for g in grads.values())
    same = True
    for s in others(step):
        again, grads_again, of_memory_again = step.run(attention, dtype, step.group_0, disturbed=s)
        pairs = [
            (value, again),
            (of_memory, of_memory_again),
            *((grads[k][:, step.group_0], grads_again[k][:, step.group_0]) for k in grads),
        ]
        same = same and all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
    return silent and heard and same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("axes", COMBINATIONS.values(), ids=COMBINATIONS)
def test_group_0_is_isolated(small, axes, path, dtype):
    step = Step(small, axes)
    assert is_isolated(step, PATHS[path](step.layout), dtype)


@pytest.mark.parametrize("axes", COMBINATIONS.values(), ids=COMBINATIONS)
def test_one_visible_stranger_is_noticed(small, axes):
    step = Step(small, axes)
    visible = step.layout.visible().clone()
    stranger = others(step)[0].start
    visible[..., step.group_0.start, stranger] = True
    assert is_isolated(step, masked_attention(step.layout), torch.float32)

    def attend_with_stranger(attention, query, key, value):
        return attention(query, key, value, visible)

    assert not is_isolated(step, attend_with_stranger, torch.float32)


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
    found = []
    for path in PATHS.values():
        out = path(layout)(Attention(4, dropout=0.0), *inputs)
        found.append(
            (out, *torch.autograd.grad((out * torch.linspace(-1, 1, 16)).square().sum(), inputs))
        )
    assert max((a - b).abs().max().item() for a, b in zip(*found)) < 1e-5
