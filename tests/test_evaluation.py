"AP is COCO's, to all published numbers of its own example. (Perfect detections and merged shards: chapter 18.)"
import json

import numpy as np
import pytest
import torch

from query_detr.evaluate import METRICS, coco_metrics

PUBLISHED = (.505, .697, .573, .586, .519, .501, .387, .594, .595, .640, .566, .564)


@pytest.fixture
def example(pictures):
    "Ground truth and detections of the COCO API's demonstration."
    folder = pictures / "cocoeval_fakebbox100"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    found = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    return truth, torch.tensor([[d["image_id"], *d["bbox"], d["score"], d["category_id"]] for d in found], dtype=torch.float64)


def test_all_twelve_published_numbers_of_the_coco_example(example):
    metrics = coco_metrics(*example)
    assert np.round(list(metrics.values()), 3).tolist() == list(PUBLISHED) and tuple(metrics) == METRICS
    assert metrics["AP"] == pytest.approx(0.5045806987, abs=1e-10)

