"""Conditional, Group, DAB- and DN-DETR equal detrex (in the variants that equal the authors'
code); Conditional DETR equals transformers too."""

import pytest
import torch
from conditions import difference
from golden import CONFIGS, IMAGES, Golden

from query_detr.batch import Assignment
from query_detr.criterion import weighted_total
from query_detr.groups import unfold_assignment
from query_detr.losses import detection_loss
from query_detr.model import ModelConfig, QueryDETR
from query_detr.use.interop import from_transformers

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(scope="module", params=list(CONFIGS))
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module")
def dn():
    return Golden("dn_detr")


@pytest.mark.parametrize("variant", ["eval_official", "train_official"])
def test_outputs_of_every_layer_equal_the_reference(golden, variant):
    model, noise, groups = golden.model(), None, 1
    if variant == "train_official":
        noise, groups = golden.noise(), golden.config.groups
    memory = golden.memory(model)
    hidden, references = model.decode(memory, groups, noise)
    predictions = model.decode_predictions(memory, groups, noise)
    first = noise.total if noise else 0
    positions = memory.positions.transpose(1, 2).unflatten(2, memory.size)
    assert difference(positions, golden["inputs/pos_embed"]) < 2e-5
    assert difference(memory.tokens, golden[f"{variant}/memory"]) < 2e-5
    assert difference(references, golden[f"{variant}/references"].expand_as(references)) < 2e-5
    assert hidden.shape == golden[f"{variant}/hidden_states"].shape
    assert difference(hidden, golden[f"{variant}/hidden_states"]) < 2e-5
    assert difference(predictions.logits[:, :, first:], golden[f"{variant}/logits"]) < 2e-5
    assert difference(predictions.boxes[:, :, first:], golden[f"{variant}/boxes"]) < 2e-5
    if noise:
        assert difference(predictions.logits[:, :, :first], golden[f"{variant}/dn_logits"]) < 2e-5
        assert difference(predictions.boxes[:, :, :first], golden[f"{variant}/dn_boxes"]) < 2e-5


@pytest.fixture
def outcome(golden, kernels):
    """What our criterion computes in a training step."""
    with torch.no_grad():
        predictions, targets = golden.train_predictions(golden.model()), golden.targets()
        return golden.criterion()(predictions, targets, len(targets), golden.noise())


def test_assignment_equals_the_reference_in_every_layer(golden, outcome):
    targets = golden.targets()
    assignment = unfold_assignment(
        outcome.assignment, targets, golden.config.groups, golden.config.queries
    )
    for layer in range(golden.config.decoder_layers):
        for image, objects in enumerate(targets.slices):
            in_image = assignment.batch == image
            query = assignment.query[layer, in_image]
            target = assignment.target[layer, in_image] - objects.start
            expected = f"train_official/match/layer{layer}/image{image}"
            assert query.tolist() == golden[f"{expected}/query"].tolist()
            assert target.tolist() == golden[f"{expected}/target"].tolist()


def assert_losses_equal(golden, losses, suffix="", folder="loss"):
    layers = golden.config.decoder_layers
    names = {"class": "loss_class", "l1": "loss_bbox", "giou": "loss_giou"}
    for term, theirs in names.items():
        if folder == "loss_official" and theirs != "loss_class":
            continue
        for layer in range(layers):
            number = "" if layer == layers - 1 else f"_{layer}"
            expected = golden[f"train_official/{folder}/{theirs}{suffix}{number}"].item()
            assert losses[term][layer].item() == pytest.approx(expected, rel=1e-5)


def test_every_loss_equals_the_reference(golden, outcome):
    matching = {term: outcome.losses[f"{term}_loss"] for term in ("class", "l1", "giou")}
    assert_losses_equal(golden, matching)
    with_noise = "noise_class_loss" in outcome.losses
    total = "total_loss_official_dn_class" if with_noise else "total_loss"
    assert outcome.total.item() == pytest.approx(golden[f"train_official/{total}"].item(), rel=1e-5)


def noise_losses_with_padding(golden, predictions, count):
    """What detrex computes: empty slots are trained as background."""
    noise, layers = golden.noise(), golden.config.decoder_layers
    known = Assignment(
        noise.assignment.batch,
        noise.assignment.query.expand(layers, -1),
        noise.assignment.target.expand(layers, -1),
    )
    return detection_loss(
        predictions.select(slice(noise.total)),
        golden.targets(),
        known,
        count * noise.sets,
        golden.criterion().giou_eps,
    )


def test_noise_losses_equal_the_authors_and_with_padding_counted_detrex(dn):
    predictions, count = dn.train_predictions(dn.model()), len(dn.targets())
    ours = dn.criterion().denoising(
        predictions.select(slice(dn.noise().total)), dn.targets(), count, dn.noise()
    )
    assert_losses_equal(dn, ours, "_dn", "loss_official")
    assert_losses_equal(dn, noise_losses_with_padding(dn, predictions, count), "_dn")
    padded = noise_losses_with_padding(dn, predictions, count)["class"]
    assert (ours["class"] < 0.99 * padded).all()  # there, padding is not free


def test_gradient_of_every_parameter_equals_the_reference(golden):
    model, targets = golden.model(), golden.targets()
    features = golden["inputs/features"].requires_grad_()
    predictions, noise = golden.train_predictions(model, features), golden.noise()
    criterion = golden.criterion()
    if noise:  # the stored gradients count empty slots as background
        free = predictions.select(slice(noise.total, None))
        losses, _ = criterion.matching(free, targets, len(targets))
        noise_losses = noise_losses_with_padding(golden, predictions, len(targets))
        total = weighted_total(losses, criterion.weights)
        total = total + weighted_total(noise_losses, criterion.weights)
    else:
        total = criterion(predictions, targets, len(targets)).total
    assert total.item() == pytest.approx(golden["train_official/total_loss"].item(), rel=1e-5)
    total.backward()
    assert difference(features.grad, golden["train_official/grad/features"]) < 1e-6
    for ours, theirs in golden.names().items():
        norm = model.get_parameter(ours).grad.norm().item()
        expected = golden[f"train_official/grad_norm/{theirs}"].item()
        is_key_bias = ours.endswith(("key_content.bias", "key_position.bias", "key_spatial.bias"))
        assert abs(norm - expected) <= (0 if is_key_bias else 3e-4 * expected) + 3e-5, ours


def test_stored_draws_give_the_references_noise(dn):
    noise, model, sets = dn.noise(), dn.model(), dn.config.denoising.sets
    state, layout = model.make_queries(IMAGES, 1, noise)
    filled = ~noise.empty
    slots = noise.assignment.batch, noise.assignment.query[0]
    labels, boxes = noise.labels[slots], noise.boxes[slots]
    assert filled.sum() == sets * len(dn.targets())
    assert len(labels) == sets * len(dn.targets())
    assert torch.equal(labels, dn["dn/noised_labels"])
    assert difference(boxes, dn["dn/noised_boxes"]) < 1e-6
    content, reference = state.content[:, : noise.total], state.reference[:, : noise.total]
    assert torch.equal(content, dn["dn/noised_label_queries"].to(content))
    assert difference(reference, dn["dn/noised_box_queries"].sigmoid()) < 1e-6
    assert torch.equal(~layout.visible(), dn["dn/attn_mask"])
    # "no object", which our `sample_noise` never draws:
    assert dn.draws().label.max() == dn.config.classes


def wake(model):
    """Move parameters away from their initial values, which leave much of the model silent."""
    for name, parameter in model.named_parameters():
        if "query_position_embeddings" in name:
            parameter.data.normal_()
        elif "backbone" not in name:
            scale = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.data.add_(scale * torch.randn_like(parameter))
        if "input_projection.weight" in name:
            parameter.data.mul_(20)  # the features of an untrained backbone are faint
        if ".q_" in name or ".k_" in name:
            parameter.data.mul_(4)  # sharper attention, so that queries differ


@pytest.mark.parametrize("seed", range(3))
def test_outputs_equal_transformers(seed):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.ConditionalDetrConfig(
        d_model=64,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_queries=10,
        num_labels=5,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        use_pretrained_backbone=False,
        auxiliary_loss=False,
    )
    theirs = transformers.ConditionalDetrForObjectDetection(config).eval()
    wake(theirs)
    ours = QueryDETR(
        ModelConfig(
            classes=5,
            queries=10,
            width=64,
            heads=4,
            encoder_layers=2,
            decoder_layers=3,
            feedforward=96,
        )
    ).eval()
    loaded = ours.load_state_dict(from_transformers(theirs.state_dict()), strict=False)
    assert not loaded.unexpected_keys
    assert all(k.startswith("backbone.") for k in loaded.missing_keys)

    images, pad_mask = torch.randn(2, 3, 128, 160), torch.zeros(2, 128, 160, dtype=torch.bool)
    pad_mask[1, :, 100:] = pad_mask[1, 90:] = True
    with torch.no_grad():
        expected = theirs(pixel_values=images, pixel_mask=(~pad_mask).long())
        features = theirs.model.backbone(images, (~pad_mask).long())[-1][0]
        predictions = ours.decode_predictions(ours.encode(features, pad_mask))
    assert expected.logits.std(1).mean() > 5e-3  # queries differ: the comparison is about something
    assert expected.pred_boxes.std(1).max() > 0.05
    assert difference(predictions.logits[-1], expected.logits) < 2e-5
    assert difference(predictions.boxes[-1], expected.pred_boxes) < 2e-5
