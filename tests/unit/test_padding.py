"""Padding is invisible: given the same features, it changes no valid memory, logit or box."""

import pytest
import torch

from query_detr.model import QueryDETR

pytestmark = pytest.mark.usefixtures("kernels")


def padded(features, right, bottom):
    """Features with noise where an image has been padded, and the mask that says so."""
    b, c, h, w = features.shape
    larger = 10 * torch.randn(b, c, h + bottom, w + right)
    larger[:, :, :h, :w] = features
    mask = torch.ones(b, h + bottom, w + right, dtype=torch.bool)
    mask[:, :h, :w] = False
    return larger, mask


def shift_caused_by_padding(model):
    """Largest change of valid memory, logits and boxes when the same features are padded."""
    features = torch.randn(2, model.backbone.channels, 6, 8)
    alone = model.encode(features, torch.zeros(2, 6, 8, dtype=torch.bool))
    more = model.encode(*padded(features, right=5, bottom=3))
    valid = more.tokens.unflatten(1, more.size)[:, :6, :8].flatten(1, 2)
    a, b = model.decode_predictions(alone), model.decode_predictions(more)
    pairs = ((alone.tokens, valid), (a.logits, b.logits), (a.boxes, b.boxes))
    return [(x - y).abs().max().item() for x, y in pairs]


def test_padding_changes_no_valid_memory_logit_or_box(small):
    model = QueryDETR(small).eval()
    with torch.no_grad():
        torch.nn.init.normal_(model.box_head.layers[-1].weight)  # else all offsets are zero
        assert max(shift_caused_by_padding(model)) < 1e-5
