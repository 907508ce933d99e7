"""A model begins like the references: mean and standard deviation of every parameter, over
several seeds."""

import math

import pytest
import torch

from query_detr.model import ModelConfig, QueryDETR

SEEDS = 6
CONFIG = ModelConfig(
    classes=20,
    queries=50,
    width=64,
    heads=4,
    encoder_layers=1,
    decoder_layers=2,
    feedforward=128,
    backbone="resnet10",
    stages=1,
)


def uniform(bound):
    return 0.0, bound / math.sqrt(3)


def expected(name: str, shape) -> tuple[float, float]:
    """Mean and standard deviation that REFERENCES give: Xavier in the transformer, torch's
    defaults in the heads and projections."""
    if name == "class_head.bias":
        return -math.log(99), 0.0
    if name.startswith("box_head.layers.2"):
        return 0.0, 0.0
    if name == "queries.embedding.weight":
        return 0.0, 1.0
    if "norm" in name:
        return (1.0, 0.0) if name.endswith("weight") else (0.0, 0.0)
    if name.endswith(("in_proj_bias", "out_proj.bias", "_attention.out.bias")):
        return 0.0, 0.0
    fan_in = fan_in_of(name, shape)
    if name.endswith("bias") or name.startswith(("project", "class_head", "box_head")):
        return uniform(1 / math.sqrt(fan_in))
    return uniform(math.sqrt(6 / (shape[0] + shape[1])))


def fan_in_of(name, shape):
    if name.startswith("project"):
        return 64
    if name.endswith("linear2.bias"):
        return CONFIG.feedforward
    return shape[1] if len(shape) > 1 else CONFIG.width


def draws():
    """Values of every parameter over several seeds."""
    values = {}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        for name, p in QueryDETR(CONFIG).named_parameters():
            if not name.startswith("backbone."):
                values.setdefault(name, []).append(p.detach().flatten())
    shapes = {name: p.shape for name, p in QueryDETR(CONFIG).named_parameters()}
    return {name: (torch.cat(parts), shapes[name]) for name, parts in values.items()}


def test_every_parameter_begins_with_the_mean_and_deviation_of_the_references():
    for name, (values, shape) in draws().items():
        mean, std = expected(name, shape)
        error = 5 * std / math.sqrt(len(values)) + 1e-5  # five standard errors
        assert values.mean().item() == pytest.approx(mean, abs=error), name
        assert values.std(correction=0).item() == pytest.approx(std, abs=error), name
