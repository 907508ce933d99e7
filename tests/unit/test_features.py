"""Features of any backbone become memory, in whatever order they lie in memory."""

import pytest
import torch

from query_detr.model import QueryDETR

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.usefixtures("kernels")
def test_features_of_a_backbone_of_ones_own_are_encoded(small, images, memory_format):
    model = QueryDETR(small)
    features = torch.randn(images, model.backbone.channels, 15, 17)
    padding = torch.zeros(images, 15, 17, dtype=torch.bool)
    expected = model.encode(features.to(memory_format=torch.channels_last), padding)
    memory = model.encode(features.to(memory_format=memory_format), padding)
    assert memory.tokens.shape == (images, 255, small.width)
    assert torch.allclose(memory.tokens, expected.tokens, atol=1e-4)
