"""From the user's own images and annotations to a model folder: check the data, train, fine-tune
on other classes, evaluate, predict."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from query_detr import launch
from query_detr.data.shapes import ShapesDataset
from query_detr.run.checkpoints import load_model
from query_detr.use import predict

TINY = [
    "--epochs",
    "1",
    "--batch-size",
    "2",
    "--set",
    "queries=8",
    "width=16",
    "heads=2",
    "encoder_layers=1",
    "decoder_layers=2",
    "feedforward=16",
    "stages=2",
    "norm=group",
    "backbone_bf16=false",
    "eval_batch_size=2",
]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Own data with category ids of its own, far from 0, as options of the command line."""
    monkeypatch.chdir(tmp_path)
    return write(tmp_path, "all", lambda label: True)


@pytest.fixture
def two_classes(tmp_path, own):
    return write(tmp_path, "two", lambda label: label < 2)


def write(folder, name, wanted):
    options = []
    for part, split, seed in (("train", "train2017", 1), ("val", "val2017", 0)):
        ShapesDataset(6, seed).write_coco(folder / name, split)
        path = folder / name / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        ids = {
            c["id"]: 70 + 7 * i
            for i, c in enumerate(c for i, c in enumerate(content["categories"]) if wanted(i))
        }
        content["categories"] = [
            {**c, "id": ids[c["id"]]} for c in content["categories"] if c["id"] in ids
        ]
        content["annotations"] = [
            {**a, "category_id": ids[a["category_id"]]}
            for a in content["annotations"]
            if a["category_id"] in ids
        ]
        path.write_text(json.dumps(content))
        options += [f"--{part}-images", str(folder / name / split), f"--{part}-json", str(path)]
    return options


def run(*options):
    return launch.command_line(["--recipe", "shapes_dn", *options, *TINY])


def test_training_on_own_data_ends_in_a_model_that_predicts(own, tmp_path, capsys):
    assert run(*own) == 0
    folder = tmp_path / "runs" / "shapes_dn"
    model = load_model(folder)
    assert model.config.classes == 5
    assert len(model.usage.class_names) == 5
    assert model.usage.keep == 100
    image = next((tmp_path / "all" / "val2017").iterdir())
    assert (
        predict.command_line([str(folder), str(image), "--output", "found", "--threshold", "0"])
        == 0
    )
    rows = json.loads(Path("found/detections.json").read_text())
    assert rows
    assert "the 100 best detections" in capsys.readouterr().out
    evaluated = ["--eval-only", "--checkpoint", str(folder / "checkpoint.pt")]
    assert run(*own, *evaluated) == 0
    assert (
        run(*own, "--eval-only", "--checkpoint", str(folder)) == 0
    )  # a model folder is a checkpoint too


def test_fine_tuning_on_other_classes_begins_anew_only_what_depends_on_them(
    own, two_classes, tmp_path, capsys
):
    assert run(*own) == 0
    first = str(tmp_path / "runs" / "shapes_dn" / "checkpoint.pt")
    before = load_file(tmp_path / "runs" / "shapes_dn" / "model.safetensors")
    capsys.readouterr()
    assert (
        run(
            *two_classes,
            "--checkpoint",
            first,
            "--output",
            "tuned",
            "--set",
            "lr=1e-12",
            "backbone_lr=1e-12",
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "begun anew for other classes: class_head.weight, class_head.bias, labels.table.weight"
        in said
    )
    assert "kept" in said
    after = load_file("tuned/model.safetensors")
    assert after["class_head.bias"].shape == (2,)
    assert after["labels.table.weight"].shape == (3, 15)
    assert torch.allclose(
        after["box_head.layers.0.weight"], before["box_head.layers.0.weight"], atol=1e-6
    )


def test_evaluation_on_other_classes_is_refused(own, two_classes, tmp_path, capsys):
    assert run(*own) == 0
    assert (
        run(
            *two_classes,
            "--eval-only",
            "--checkpoint",
            str(tmp_path / "runs" / "shapes_dn" / "checkpoint.pt"),
        )
        == 2
    )
    assert "knows 5 classes, the data has 2" in capsys.readouterr().err


def test_options_of_own_data_belong_together(own, capsys):
    assert run(*own[:6]) == 2
    assert "--val-json is missing" in capsys.readouterr().err


def test_data_is_checked_before_training(own, tmp_path, capsys):
    assert run(*own, "--check-data") == 0
    damaged = Path(own[1]) / sorted(p.name for p in Path(own[1]).iterdir())[0]
    damaged.write_bytes(b"not a picture")
    assert run(*own, "--check-data") == 2
    output, error = capsys.readouterr()
    assert damaged.name in output
    assert own[3] in error
    assert own[7] not in error
    assert Path("data_check/train.png").stat().st_size > 10_000
    assert not Path("runs").exists()
    assert launch.command_line(["--recipe", "shapes_demo", "--check-data"]) == 2
