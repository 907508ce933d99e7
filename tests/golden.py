"""The numbers that the reference implementations computed, and models with their weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from query_detr.batch import Targets
from query_detr.criterion import Criterion
from query_detr.denoising import Denoising, Noise, NoiseDraws, apply_noise
from query_detr.matcher import TermWeights
from query_detr.model import ModelConfig, QueryDETR
from query_detr.use.interop import from_detrex

FOLDER = Path(__file__).with_name("golden")
IMAGES = 2
POINTS = ModelConfig(
    classes=7,
    queries=20,
    width=64,
    heads=4,
    encoder_layers=2,
    decoder_layers=3,
    feedforward=128,
    dropout=0.0,
    sigmoid_eps=1e-3,
    backbone="resnet10",
)
ANCHORS = replace(
    POINTS, reference="anchor", activation="prelu", temperature=20.0, scale_positions=True
)
CONFIGS = {
    "conditional_detr": POINTS,
    "group_detr": replace(POINTS, groups=4),
    "dab_detr": ANCHORS,
    "dn_detr": replace(ANCHORS, denoising=Denoising(sets=3, label_flip=0.5, box_noise=0.4)),
}


class Golden:
    """One reference model: `golden[name]` is an array of its file."""

    def __init__(self, name: str):
        self.name, self.config, self.arrays = name, CONFIGS[name], np.load(FOLDER / f"{name}.npz")
        self.weights = load_file(FOLDER / f"{name}.weights.safetensors")

    def __getitem__(self, key):
        return torch.from_numpy(self.arrays[key])

    def model(self) -> QueryDETR:
        """Build our model with the reference's weights.

        The backbone, which the stored reference has not, stays as drawn.
        """
        model = QueryDETR(self.config)
        model.project = torch.nn.Conv2d(self["inputs/features"].shape[1], self.config.width, 1)
        given = from_detrex(self.weights)
        assert set(given) == {k for k in model.state_dict() if not k.startswith("backbone.")}
        model.load_state_dict(given, strict=False)
        return model

    def names(self) -> dict[str, str]:
        """Say what each of our parameters is called there."""
        return from_detrex({k: k for k in self.weights})

    def targets(self) -> Targets:
        boxes = [self[f"inputs/target_boxes_{i}"] for i in range(IMAGES)]
        labels = [self[f"inputs/target_labels_{i}"] for i in range(IMAGES)]
        return Targets(torch.cat(boxes), torch.cat(labels), tuple(map(len, labels)))

    def draws(self) -> NoiseDraws:
        """What the reference drew; it numbers objects set by set, as we do."""
        how = self.config.denoising
        flip = self["dn/draw_label_p"] < how.label_flip
        zeros = torch.zeros_like(flip, dtype=torch.int64)
        label = zeros.masked_scatter(flip, self["dn/draw_new_labels"])
        shift = 2 * self["dn/draw_box_u"] - 1
        return NoiseDraws(
            flip.view(how.sets, -1), label.view(how.sets, -1), shift.view(how.sets, -1, 4)
        )

    def noise(self) -> Noise | None:
        if not self.config.denoising.sets:
            return None
        return apply_noise(self.targets(), self.draws(), self.config.denoising)

    def criterion(self) -> Criterion:
        weights = TermWeights(label=1.0) if self.config.reference == "anchor" else TermWeights()
        return Criterion(weights=weights, giou_eps=1e-6, groups=self.config.groups)

    def memory(self, model: QueryDETR, features=None):
        return model.encode(
            self["inputs/features"] if features is None else features, self["inputs/mask"]
        )

    def train_predictions(self, model: QueryDETR, features=None):
        return model.decode_predictions(
            self.memory(model, features), self.config.groups, self.noise()
        )
