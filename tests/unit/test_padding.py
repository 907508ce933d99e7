"""Padding is invisible: given the same features, it changes no valid memory, logit or box."""

import pytest
import torch
from conditions import shift_caused_by_padding

from query_detr.model import QueryDETR

pytestmark = pytest.mark.usefixtures("kernels")


def test_padding_changes_no_valid_memory_logit_or_box(small):
    model = QueryDETR(small).eval()
    torch.nn.init.normal_(model.box_head.layers[-1].weight)  # else all offsets are zero
    with torch.no_grad():
        shift = shift_caused_by_padding(model)
    assert shift == pytest.approx(dict.fromkeys(shift, 0), abs=1e-5)
