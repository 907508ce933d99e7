"The numbers that the reference implementations computed, and a model with their weights."
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from query_detr.checkpoints import from_detrex
from query_detr.data import Targets
from query_detr.model import ModelConfig, QueryDETR

FOLDER = Path(__file__).with_name("golden")
IMAGES = 2
CONFIGS = {"conditional_detr": ModelConfig(classes=7, queries=20, width=64, heads=4, encoder_layers=2, decoder_layers=3, feedforward=128, dropout=0.0, sigmoid_eps=1e-3)}


class Golden:
    "One reference model: `golden[name]` is an array of its file."
    def __init__(self, name: str):
        self.config, self.arrays = CONFIGS[name], np.load(FOLDER / f"{name}.npz")
        self.weights = load_file(FOLDER / f"{name}.weights.safetensors")

    def __getitem__(self, key): return torch.from_numpy(self.arrays[key])

    def model(self) -> QueryDETR:
        "Build our model with the reference's weights; the backbone, which the reference has not, stays as drawn."
        model = QueryDETR(self.config)
        model.project = torch.nn.Conv2d(self["inputs/features"].shape[1], self.config.width, 1)
        own, given = {k for k in model.state_dict() if not k.startswith("backbone.")}, from_detrex(self.weights)
        assert own == set(given)
        model.load_state_dict(given, strict=False)
        return model

    def targets(self) -> Targets:
        boxes, labels = ([self[f"inputs/target_{what}_{i}"] for i in range(IMAGES)] for what in ("boxes", "labels"))
        return Targets(torch.cat(boxes), torch.cat(labels), tuple(map(len, labels)))
