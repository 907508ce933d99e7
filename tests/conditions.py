"""Conditions that hold on the code as it is.

A test asserts each of them; tests of mutations see them fail.
"""

from dataclasses import replace

import torch
from golden import Golden

from query_detr.batch import Targets
from query_detr.criterion import Criterion
from query_detr.denoising import Denoising, apply_noise, sample_noise
from query_detr.features import Memory
from query_detr.layout import folded_attention, masked_attention
from query_detr.matcher import match
from query_detr.model import QueryDETR

# --- group 0 is isolated ---

ANCHORS = dict(reference="anchor", activation="prelu")
NOISE = Denoising(sets=2)
HIDDEN = replace(NOISE, hide_padding=True)
COMBINATIONS = {
    "points + groups": dict(groups=3),
    "anchors + groups": dict(groups=3, **ANCHORS),
    "anchors + noise": dict(denoising=NOISE, **ANCHORS),
    "anchors + groups + noise": dict(groups=3, denoising=NOISE, **ANCHORS),
    "anchors + groups + hidden padding": dict(groups=3, denoising=HIDDEN, **ANCHORS),
}
PATHS = {"masked": masked_attention, "folded": folded_attention}


class Step:
    """The decoder's part of a training step, with dropout, with the gradient of every input."""

    def __init__(self, small, axes):
        torch.manual_seed(0)
        self.model = QueryDETR(replace(small, dropout=0.1, **axes)).train()
        for head in (self.model.box_head.layers[-1], self.model.class_head):
            torch.nn.init.normal_(head.weight)
        config = self.model.config
        state, self.layout = self.model.make_queries(2, config.groups, self.noise())
        self.state = replace(state, **{name: x.detach() for name, x in tensors(state).items()})
        self.state.content += 0.1 * torch.randn_like(state.content)
        self.tokens = torch.randn(2, 30, config.width)
        self.positions = torch.randn(2, 30, config.width)
        self.group_0 = slice(self.layout.noise, self.layout.noise + config.queries)

    def noise(self):
        """Draw noise for three objects in one image and one in the other, if the model has any."""
        targets = Targets(torch.rand(4, 4) * 0.3 + 0.3, torch.randint(5, (4,)), (3, 1))
        how = self.model.config.denoising
        if not how.sets:
            return None
        draws = sample_noise(how, self.model.config.classes, targets, (1, 2), 0, 0)
        return apply_noise(targets, draws, how)

    def run(self, attention, dtype, read: slice, disturbed: slice | None = None):
        """Read a scalar from some queries' outputs.

        Gives its value and its gradients for the queries' inputs and the memory.
        """
        inputs = {name: x.clone() for name, x in tensors(self.state).items()}
        if disturbed is not None:
            for x in inputs.values():
                generator = torch.Generator().manual_seed(3)
                x[:, disturbed] = torch.rand(x[:, disturbed].shape, generator=generator)
        for x in inputs.values():
            x.requires_grad_()
        tokens = self.tokens.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits, boxes = self.predict(replace(self.state, **inputs), tokens, attention)
        value = logits[:, :, read].float().square().sum() + boxes[:, :, read].float().square().sum()
        *grads, memory_grad = torch.autograd.grad(value, [*inputs.values(), tokens])
        return value.detach(), dict(zip(inputs, grads, strict=True)), memory_grad

    def predict(self, state, tokens, attention):
        """Decode, with the same dropout every time."""
        torch.manual_seed(1)
        memory = Memory(tokens, self.positions, torch.zeros(2, 30, dtype=torch.bool), (5, 6))
        model = self.model
        hidden, references = model.decoder(state, model.queries, memory, model.box_head, attention)
        return model.class_head(hidden), model.decode_boxes(model.box_head(hidden), references)


def tensors(state) -> dict[str, torch.Tensor]:
    """The tensors that a query state holds, by name."""
    return {name: x for name, x in vars(state).items() if x is not None}


def others(step) -> list[slice]:
    """What group 0 must not hear of: noise before it, other groups behind it."""
    before = slice(0, step.group_0.start)
    behind = slice(step.group_0.stop, step.layout.total)
    return [part for part in (before, behind) if part.start < part.stop]


def is_silent_to_others(step, attention, dtype) -> bool:
    """No gradient of group 0's outputs reaches another set; all of its own inputs get one."""
    _, grads, _ = step.run(attention, dtype, step.group_0)
    leaks = [grad[:, part].abs().max() for grad in grads.values() for part in others(step)]
    own = [grad[:, step.group_0].abs().max() for grad in grads.values()]
    return max(leaks) == 0 and min(own) > 0


def ignores_others(step, attention, dtype) -> bool:
    """Group 0's outputs and gradients stay when the inputs of another set are replaced."""
    value, grads, memory_grad = step.run(attention, dtype, step.group_0)
    for part in others(step):
        again, grads_again, memory_grad_again = step.run(
            attention, dtype, step.group_0, disturbed=part
        )
        pairs = [(value, again), (memory_grad, memory_grad_again)]
        for name, grad in grads.items():
            pairs.append((grad[:, step.group_0], grads_again[name][:, step.group_0]))
        if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs):
            return False
    return True


def is_isolated(step, attention, dtype=torch.float32) -> bool:
    """Group 0 sends nothing to other sets and hears nothing from them."""
    silent = is_silent_to_others(step, attention, dtype)
    return silent and ignores_others(step, attention, dtype)


# --- padding is invisible ---


def padded(features, right, bottom):
    """Features with noise where an image has been padded, and the mask that says so."""
    b, c, h, w = features.shape
    larger = 10 * torch.randn(b, c, h + bottom, w + right)
    larger[:, :, :h, :w] = features
    mask = torch.ones(b, h + bottom, w + right, dtype=torch.bool)
    mask[:, :h, :w] = False
    return larger, mask


def shift_caused_by_padding(model) -> dict[str, float]:
    """Largest change of valid memory, logits and boxes when the same features are padded."""
    features = torch.randn(2, model.backbone.channels, 6, 8)
    alone = model.encode(features, torch.zeros(2, 6, 8, dtype=torch.bool))
    more = model.encode(*padded(features, right=5, bottom=3))
    valid = more.tokens.unflatten(1, more.size)[:, :6, :8].flatten(1, 2)
    a, b = model.decode_predictions(alone), model.decode_predictions(more)
    return {
        "memory": difference(alone.tokens, valid),
        "logits": difference(a.logits, b.logits),
        "boxes": difference(a.boxes, b.boxes),
    }


def padding_is_invisible(small) -> bool:
    """A model that moves its boxes gives the same for images that are padded."""
    torch.manual_seed(0)
    model = QueryDETR(small).eval()
    torch.nn.init.normal_(model.box_head.layers[-1].weight)  # else all offsets are zero
    with torch.no_grad():
        return max(shift_caused_by_padding(model).values()) < 1e-5


# --- noise ---


def some_targets(counts) -> Targets:
    """Draw objects of five classes; `counts` says how many each image has."""
    total = sum(counts)
    return Targets(torch.rand(total, 4) * 0.5 + 0.25, torch.randint(5, (total,)), tuple(counts))


def flips_never_draw_no_object() -> bool:
    """Flipped labels are classes, and all classes are drawn."""
    targets = some_targets([2000])
    how = Denoising(sets=3, label_flip=1.0, box_noise=1.0)
    labels = sample_noise(how, 5, targets, (0,), 0, 0).label
    return labels.unique().tolist() == [0, 1, 2, 3, 4]


# --- a step is the same however it is shared ---


def relative_difference(ours, theirs) -> float:
    """Largest difference of two gradients, in units of 1e-5 · max(1, max |g|)."""
    largest = max(grad.abs().max().item() for grad in theirs.values())
    differences = [(ours[name] - grad).abs().max().item() for name, grad in theirs.items()]
    return max(differences) / (1e-5 * max(1, largest))


# --- equal to the reference ---


def difference(ours, theirs) -> float:
    """Largest absolute difference."""
    return (ours - theirs).abs().max().item()


@torch.no_grad()
def outputs_equal_the_reference(golden: Golden) -> bool:
    """Logits and boxes of all layers, at inference."""
    model = golden.model()
    memory = model.encode(golden["inputs/features"], golden["inputs/mask"])
    predictions = model.decode_predictions(memory)
    logits = difference(predictions.logits, golden["eval_official/logits"])
    boxes = difference(predictions.boxes, golden["eval_official/boxes"])
    return max(logits, boxes) < 2e-5


@torch.no_grad()
def train_outputs_equal_the_reference(golden: Golden) -> bool:
    """Logits and boxes of all layers, in training: of matching and of noise queries."""
    predictions = golden.train_predictions(golden.model())
    noise = golden.noise()
    first = noise.total if noise else 0
    parts = {"": slice(first, None)}
    if noise:
        parts["dn_"] = slice(first)
    for prefix, part in parts.items():
        found = predictions.select(part)
        logits = difference(found.logits, golden[f"train_official/{prefix}logits"])
        boxes = difference(found.boxes, golden[f"train_official/{prefix}boxes"])
        if max(logits, boxes) >= 2e-5:
            return False
    return True


@torch.no_grad()
def giou_loss_equals_the_reference(golden: Golden) -> bool:
    """The GIoU loss of the last layer."""
    model, targets = golden.model(), golden.targets()
    memory = model.encode(golden["inputs/features"], golden["inputs/mask"])
    predictions = model.decode_predictions(memory)
    found = Criterion(giou_eps=1e-6)(predictions, targets, len(targets)).losses["giou_loss"][-1]
    expected = golden["train_official/loss/loss_giou"].item()
    return abs(found.item() - expected) <= 1e-5 * expected


@torch.no_grad()
def total_equals_the_reference(golden: Golden) -> bool:
    """The weighted sum of all losses; empty noise slots cost nothing, as in the authors' code."""
    targets, noise = golden.targets(), golden.noise()
    predictions = golden.train_predictions(golden.model())
    outcome = golden.criterion()(predictions, targets, len(targets), noise)
    name = "total_loss_official_dn_class" if noise else "total_loss"
    expected = golden[f"train_official/{name}"].item()
    return abs(outcome.total.item() - expected) <= 1e-5 * expected


@torch.no_grad()
def noise_loss_ignores_groups(golden: Golden) -> bool:
    """The loss of noise queries is the same when the matching queries stand there twice."""
    predictions = golden.train_predictions(golden.model())
    noise, targets = golden.noise(), golden.targets()
    known, free = (
        predictions.select(slice(noise.total)),
        predictions.select(slice(noise.total, None)),
    )
    twice = type(predictions)(
        torch.cat([known.logits, free.logits, free.logits], 2),
        torch.cat([known.boxes, free.boxes, free.boxes], 2),
    )
    one = Criterion(groups=1)(predictions, targets, len(targets), noise)
    two = Criterion(groups=2)(twice, targets, len(targets), noise)
    a, b = (outcome.losses["noise_class_loss"][-1].item() for outcome in (one, two))
    return abs(a - b) <= 1e-5 * b


def assignment_equals_the_reference(golden: Golden, predictions) -> bool:
    """Which query is matched with which object, in the last layer."""
    found = match(predictions.logits, predictions.boxes, golden.targets(), giou_eps=1e-6)
    expected = torch.cat([golden[f"train_official/match/layer2/image{i}/query"] for i in range(2)])
    return torch.equal(found.query[-1], expected)


def gradients_equal_the_reference(golden: Golden) -> bool:
    """The norm of the gradient of the box head's first weight."""
    model, targets = golden.model(), golden.targets()
    predictions = golden.train_predictions(model)
    golden.criterion()(predictions, targets, len(targets)).total.backward()
    expected = golden["train_official/grad_norm/bbox_embed.layers.0.weight"].item()
    found = model.box_head.layers[0].weight.grad.norm().item()
    return abs(found - expected) <= 3e-4 * expected
