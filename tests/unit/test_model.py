"""What a model refuses, and what may be put into it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from query_detr import model as models
from query_detr.batch import InputError, Targets
from query_detr.denoising import Denoising, apply_noise, sample_noise
from query_detr.model import ModelConfig, QueryDETR

NOISE = Denoising(sets=2)


def noise():
    targets = Targets(torch.full((1, 4), 0.5), torch.tensor([0]), (1,))
    return apply_noise(targets, sample_noise(NOISE, 5, targets, (0,), 0, 0), NOISE)


@pytest.mark.parametrize("reference", ["point", "anchor"])
def test_noise_for_a_model_without_denoising_says_what_to_set(small, reference):
    model = QueryDETR(replace(small, reference=reference)).train()
    images = torch.randn(1, 3, 64, 64)
    pad_mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    with pytest.raises(InputError, match=r"denoising.sets = 0: set denoising.sets=2"):
        model(images, pad_mask, noise())


def test_noise_is_not_looked_at_in_evaluation(small):
    model = QueryDETR(small).eval()
    images = torch.randn(1, 3, 64, 64)
    pad_mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    assert torch.equal(
        model(images, pad_mask, noise()).logits,
        model(images, pad_mask).logits,
    )


class Patches(nn.Module):
    """A backbone that is a single convolution."""

    channels = 8

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, self.channels, 16, 16)

    def forward(self, images):
        return self.convolution(images)

    def compiled_parts(self):
        return [self.convolution]


def test_another_backbone_is_one_class_and_its_name(small, monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "patches", lambda config: Patches())
    model = QueryDETR(replace(small, backbone="patches"))
    predictions = model(torch.randn(2, 3, 64, 48), torch.zeros(2, 64, 48, dtype=torch.bool))
    assert predictions.logits.shape == (2, 2, small.queries, small.classes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("classes", 0),
        ("decoder_layers", 1),
        ("width", 30),
        ("dropout", 1.0),
        ("temperature", 0.0),
        ("sigmoid_eps", 0.5),
        ("reference", "box"),
        ("activation", "gelu"),
    ],
)
def test_a_wrong_value_is_named(field, value):
    with pytest.raises(InputError, match=f"^{field} = {value}: it must"):
        ModelConfig(**{field: value})
