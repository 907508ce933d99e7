"Conditional DETR equals detrex (in the variants that equal the authors' code) and transformers."
import pytest
import torch
from golden import IMAGES, Golden

from query_detr.checkpoints import from_detrex, from_transformers
from query_detr.criterion import Criterion
from query_detr.model import ModelConfig, QueryDETR


@pytest.fixture(scope="module")
def golden(): return Golden("conditional_detr")


def difference(ours, theirs): return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("variant", ["eval_official", "train_official"])
def test_outputs_of_every_layer_equal_the_reference(golden, variant):
    model = golden.model().train(variant.startswith("train"))
    memory = model.encode(golden["inputs/features"], golden["inputs/mask"])
    hidden, references = model.decode(memory)
    predictions = model.detect(memory)
    assert difference(memory.positions.transpose(1, 2).unflatten(2, memory.size), golden["inputs/pos_embed"]) < 2e-5
    assert difference(memory.tokens, golden[f"{variant}/memory"]) < 2e-5
    assert all(difference(r, golden[f"{variant}/references"]) < 2e-5 for r in references)
    assert difference(hidden, golden[f"{variant}/hidden_states"]) < 2e-5
    assert difference(predictions.logits, golden[f"{variant}/logits"]) < 2e-5
    assert difference(predictions.boxes, golden[f"{variant}/boxes"]) < 2e-5


@pytest.fixture(scope="module")
def trained(golden):
    "Forward and backward pass with the reference's weights and targets."
    model, features = golden.model(), golden["inputs/features"].requires_grad_()
    predictions = model.detect(model.encode(features, golden["inputs/mask"]))
    total, losses, assignment = Criterion(giou_eps=1e-6)(predictions, golden.targets(), len(golden.targets()))
    total.backward()
    return model, features, total.detach(), losses, assignment


def test_assignment_equals_the_reference_in_every_layer(golden, trained):
    assignment, starts = trained[-1], [s.start for s in golden.targets().slices]
    for layer in range(golden.config.decoder_layers):
        for image in range(IMAGES):
            here = assignment.batch == image
            assert assignment.query[layer, here].tolist() == golden[f"train_official/match/layer{layer}/image{image}/query"].tolist()
            assert (assignment.target[layer, here] - starts[image]).tolist() == golden[f"train_official/match/layer{layer}/image{image}/target"].tolist()


def test_every_loss_equals_the_reference(golden, trained):
    _, _, total, losses, _ = trained
    assert total.item() == pytest.approx(golden["train_official/total_loss"].item(), rel=1e-5)
    layers = golden.config.decoder_layers
    for ours, theirs in ((losses.label, "loss_class"), (losses.l1, "loss_bbox"), (losses.giou, "loss_giou")):
        for layer in range(layers):
            suffix = "" if layer == layers - 1 else f"_{layer}"
            assert ours[layer].item() == pytest.approx(golden[f"train_official/loss/{theirs}{suffix}"].item(), rel=1e-5)


def test_gradient_of_every_parameter_equals_the_reference(golden, trained):
    model, features, *_ = trained
    assert difference(features.grad, golden["train_official/grad/features"]) < 1e-6
    for theirs, value in golden.weights.items():
        (ours,) = from_detrex({theirs: value})
        norm, expected = model.get_parameter(ours).grad.norm().item(), golden[f"train_official/grad_norm/{theirs}"].item()
        is_key_bias = ours.endswith(("key_content.bias", "key_position.bias", "key_spatial.bias"))
        assert abs(norm - expected) <= (0 if is_key_bias else 3e-4 * expected) + 3e-5, ours


@pytest.mark.parametrize("seed", range(3))
def test_outputs_equal_transformers(seed):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.ConditionalDetrConfig(
        d_model=64, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=96, decoder_ffn_dim=96, num_queries=10, num_labels=5,
        encoder_attention_heads=4, decoder_attention_heads=4, use_pretrained_backbone=False, auxiliary_loss=False)
    theirs = transformers.ConditionalDetrForObjectDetection(config).eval()
    for name, parameter in theirs.named_parameters():  # away from the first values, which leave much of the model silent
        if "query_position_embeddings" in name: parameter.data.normal_()
        elif "backbone" not in name: parameter.data.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5))
        if "input_projection.weight" in name: parameter.data.mul_(20)           # the features of an untrained backbone are faint
        if ".q_" in name or ".k_" in name: parameter.data.mul_(4)               # sharper attention, so that queries differ
    ours = QueryDETR(ModelConfig(classes=5, queries=10, width=64, heads=4, encoder_layers=2, decoder_layers=3, feedforward=96)).eval()
    loaded = ours.load_state_dict(from_transformers(theirs.state_dict()), strict=False)
    assert not loaded.unexpected_keys and all(k.startswith("backbone.") for k in loaded.missing_keys)

    images, pad_mask = torch.randn(2, 3, 128, 160), torch.zeros(2, 128, 160, dtype=torch.bool)
    pad_mask[1, :, 100:] = pad_mask[1, 90:] = True
    with torch.no_grad():
        expected = theirs(pixel_values=images, pixel_mask=(~pad_mask).long())
        features = theirs.model.backbone(images, (~pad_mask).long())[-1][0]
        predictions = ours.detect(ours.encode(features, pad_mask))
    assert expected.logits.std(1).mean() > 5e-3 and expected.pred_boxes.std(1).max() > 0.05  # queries differ: the comparison is about something
    assert difference(predictions.logits[-1], expected.logits) < 2e-5
    assert difference(predictions.boxes[-1], expected.pred_boxes) < 2e-5
