"""Bad input is met with one or two lines that name the thing and the remedy, exit status 2, and
nothing overwritten."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from query_detr import launch
from query_detr.batch import InputError, Targets
from query_detr.data.shapes import ShapesDataset
from query_detr.denoising import Denoising, apply_noise, sample_noise
from query_detr.model import QueryDETR, extract_group
from query_detr.run import checkpoints
from query_detr.run.recipes import recipe_named

TINY = [
    "queries=8",
    "width=16",
    "heads=2",
    "encoder_layers=1",
    "decoder_layers=2",
    "feedforward=16",
    "backbone=resnet10",
    "stages=2",
    "augmentation=flip",
    "short_side=0",
]
LAUNCH = Path(__file__).parents[2] / "query_detr" / "launch.py"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, without a COCO folder of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QUERY_DETR_COCO", raising=False)


@pytest.fixture
def coco(tmp_path):
    """A small COCO folder with drawn scenes."""
    for split, seed in (("train2017", 1), ("val2017", 0)):
        ShapesDataset(4, seed).write_coco(tmp_path / "coco", split)
    return tmp_path / "coco"


def edit(folder, change, split="train2017"):
    """Change an annotation file."""
    path = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def train(coco, *more, options=()):
    return launch.command_line(
        [
            *options,
            "--recipe",
            "conditional_detr_12ep",
            "--coco",
            str(coco),
            "--epochs",
            "1",
            "--batch-size",
            "2",
            "--backbone-weights",
            "none",
            "--set",
            *TINY,
            *more,
        ]
    )


def check_refusal(capsys, status, *words):
    """Check exit status, length and content of an error."""
    lines = capsys.readouterr().err.strip().splitlines()
    errors = lines[next(i for i, line in enumerate(lines) if line.startswith("error: ")) :]
    assert status == 2, errors
    assert [word for word in words if word not in "\n".join(errors)] == [], errors
    assert len(errors) <= 2 or "annotations/instances" in errors[-1], (
        errors
    )  # a layout is shown as a picture of folders


def test_a_good_run_succeeds_and_leaves_its_folder(coco, capsys):
    assert train(coco) == 0
    assert {path.name for path in Path("runs/conditional_detr_12ep").iterdir()} == {
        "recipe.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "best.pt",
        "model.safetensors",
        "model.json",
        "detections.png",
        "curves.png",
    }


def test_unknown_recipe(capsys):
    check_refusal(
        capsys,
        launch.command_line(["--recipe", "conditional_50ep"]),
        "'conditional_50ep'",
        "did you mean conditional_detr_50ep",
        "shapes_demo",
    )


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: p.mkdir(), lambda p: (p / "val2017").mkdir(parents=True)]
)
def test_missing_or_wrong_coco_folder(tmp_path, capsys, make):
    make(tmp_path / "mine")
    check_refusal(
        capsys, train(tmp_path / "mine"), "mine", "--coco", "annotations/instances_train2017.json"
    )


def test_image_that_cannot_be_read_is_replaced_if_asked(coco, capsys):
    (coco / "train2017" / "000002.png").write_bytes(b"no picture")
    assert train(coco, options=["--on-bad-image", "skip"]) == 0
    assert "1 images could not be read and were replaced: 000002.png" in capsys.readouterr().out
    assert any(
        '"replaced": 1' in line
        for line in Path("runs/conditional_detr_12ep/metrics.jsonl").read_text().splitlines()
    )


def test_more_than_the_twelve_numbers_on_request(coco, capsys):
    assert train(coco, options=["--per-class", "--per-layer", "--duplicates"]) == 0
    said = capsys.readouterr().out
    assert "decoder layer" in said
    assert "detections of each" in said
    assert all(name in said for name in ShapesDataset.class_names)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--on-bad-image", "ignore"], "must be stop or skip"),
        (["--amp", "fp16"], "amp = fp16: it must be one of none, bf16"),
        (["--save-every", "0"], "save_every = 0"),
        (["--replay", "nothing.pt"], "nothing.pt does not exist"),
    ],
)
def test_wrong_options_of_a_run(coco, capsys, wrong, words):
    check_refusal(capsys, train(coco, options=wrong), words)


def test_restarts_need_what_a_restart_needs(coco, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    check_refusal(capsys, train(coco), "--resume auto", "--output")
    (
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True"),
        monkeypatch.setenv("WORLD_SIZE", "2"),
    )
    check_refusal(
        capsys,
        train(coco, options=["--resume", "auto", "--output", "run"]),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    )


def test_image_that_is_not_on_disk(coco, capsys):
    (coco / "train2017" / "000002.png").unlink()
    check_refusal(capsys, train(coco), "000002.png", "not on disk")


def test_image_that_is_not_on_disk_is_told_as_briefly_by_a_loading_process(coco, capsys):
    (coco / "train2017" / "000002.png").unlink()
    check_refusal(capsys, train(coco, "--workers", "1"), "000002.png", "not on disk")


def test_truncated_image(coco, capsys):
    path = coco / "train2017" / "000001.png"
    ShapesDataset(4, 1)[1][0].save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:1500])
    check_refusal(capsys, train(coco), "000001.png", "truncated", "fetch it again")


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1, 2]", ["no list 'images'"]),
        ("{", ["not JSON"]),
        ('{"images": [], "annotations": []}', ["no list 'categories'"]),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": []}',
            ["images[0]", "'file_name'"],
        ),
    ],
)
def test_json_that_is_not_coco(coco, capsys, text, words):
    (coco / "annotations" / "instances_train2017.json").write_text(text)
    check_refusal(capsys, train(coco), "instances_train2017.json", *words)


def flatten_boxes(number):
    def change(content):
        for annotation in content["annotations"][:number]:
            annotation["bbox"][2] *= -1

    return change


def test_boxes_without_size_are_counted_and_dropped_with_one_warning(coco):
    edit(coco, flatten_boxes(2))
    with pytest.warns(UserWarning, match="2 of .* boxes have no width") as seen:
        assert train(coco) == 0
    assert sum("no width" in str(w.message) for w in seen) == 1


def test_data_of_which_all_boxes_have_no_size(coco, capsys):
    edit(coco, flatten_boxes(None))
    check_refusal(capsys, train(coco), "instances_train2017.json", "all", "no width")


def test_labels_outside_the_class_range(coco, capsys):
    check_refusal(capsys, train(coco, "classes=3"), "5 classes", "classes=3")


def test_category_that_the_file_does_not_list(coco, capsys):
    edit(coco, lambda content: content["annotations"][0].update(category_id=77))
    check_refusal(capsys, train(coco), "category_id 77", "categories")


def test_more_objects_than_queries_warns_once_and_trains_on(coco):
    command = [
        sys.executable,
        str(LAUNCH),
        "--recipe",
        "conditional_detr_12ep",
        "--coco",
        str(coco),
        "--epochs",
        "2",
        "--batch-size",
        "2",
        "--backbone-weights",
        "none",
    ]
    done = subprocess.run(
        [*command, "--set", *TINY, "queries=1"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0
    assert (
        done.stderr.count("warning: an image has more objects than the model has queries (1)") == 1
    )


def test_imagenet_weights_without_a_network(coco, capsys, monkeypatch):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    status = launch.command_line(["--recipe", "conditional_detr_12ep", "--coco", str(coco)])
    check_refusal(capsys, status, "resnet50-0676ba61.pth", "--backbone-weights")


def test_checkpoint_of_another_model(coco, capsys, small):
    checkpoints.save({"model": QueryDETR(small).state_dict()}, "other.pt")
    check_refusal(
        capsys,
        train(coco, "--checkpoint", "other.pt"),
        "other.pt",
        "another model",
        "backbone.stem.1.running_mean",
    )


def test_checkpoint_that_is_cut_off(coco, capsys, small):
    checkpoints.save({"model": QueryDETR(small).state_dict()}, "whole.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:5000])
    check_refusal(capsys, train(coco, "--checkpoint", "cut.pt"), "cut.pt", "cannot be read")


def test_output_folder_of_another_run(coco, capsys):
    assert train(coco, "--output", "mine") == 0
    before = {path.name: path.read_bytes() for path in Path("mine").iterdir()}
    capsys.readouterr()
    check_refusal(capsys, train(coco, "--output", "mine"), "mine", "--resume", "--output")
    check_refusal(
        capsys, train(coco, "--output", "mine", "--resume", "--seed", "7"), "seed was 0, is 7"
    )
    assert before == {path.name: path.read_bytes() for path in Path("mine").iterdir()}


@pytest.mark.parametrize(
    "text, words",
    [
        ("widht=128", ["widht", "width"]),
        ("width=many", ["width=many", "int"]),
        ("dilation=perhaps", ["true or false"]),
        ("width", ["FIELD=VALUE"]),
        ("width=30", ["width = 30", "heads"]),
        ("label=3", ["cost.label", "loss.label"]),
        ("schedule=sometimes", ["schedule", "cosine"]),
        ("groups=0", ["groups = 0", "at least 1"]),
        ("box_noise=1.5", ["box_noise = 1.5", "0..1"]),
        ("label_flip=-0.1", ["label_flip = -0.1", "0..1"]),
        ("sets=-1", ["sets = -1"]),
        ("denoising.sets=5", ["denoising.sets = 5", "reference=anchor"]),
        ("reference=box", ["reference = box", "point, anchor"]),
        ("activation=gelu", ["activation = gelu", "relu, prelu"]),
    ],
)
def test_settings_that_no_recipe_has(capsys, text, words):
    check_refusal(capsys, launch.command_line(["--recipe", "shapes_demo", "--set", text]), *words)


def test_as_a_script_the_exit_status_is_2(coco):
    done = subprocess.run(
        [sys.executable, str(LAUNCH), "--recipe", "nothing"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no recipe is called 'nothing'")
    assert "Traceback" not in done.stderr


def test_nothing_runs_without_a_recipe(capsys):
    check_refusal(capsys, launch.command_line([]), "--recipe")


def test_recipe_lists_itself(capsys):
    assert launch.command_line(["--list-recipes"]) == 0
    assert "shapes_demo" in capsys.readouterr().out
    assert (
        launch.command_line(["--recipe", "shapes_demo", "--print-recipe", "--set", "lr=0.5"]) == 0
    )
    assert "lr = 0.5" in capsys.readouterr().out
    assert recipe_named("shapes_demo").lr != 0.5
    assert launch.command_line(["--print-recipe", "shapes_group", "--against", "shapes_demo"]) == 0
    assert capsys.readouterr().out == "model.groups = 3  (shapes_demo: 1)\n"


def test_against_needs_a_recipe_to_compare(capsys):
    check_refusal(
        capsys,
        launch.command_line(["--recipe", "shapes_demo", "--against", "shapes_dab"]),
        "--against",
        "--print-recipe",
    )


def test_group_is_for_evaluation_and_must_exist(capsys, tmp_path):
    check_refusal(
        capsys,
        launch.command_line(["--recipe", "shapes_group", "--group", "1"]),
        "--group",
        "--eval-only",
    )
    with pytest.raises(InputError, match="groups 0 to 2"):
        extract_group(QueryDETR(recipe_named("shapes_group").model), 3)


def test_batch_with_more_objects_than_the_noise_sets_hold():
    targets = Targets(torch.rand(3, 4), torch.zeros(3, dtype=torch.int64), (1, 2))
    with pytest.raises(InputError, match="2 objects, a noise set 1 slots"):
        apply_noise(
            targets, sample_noise(Denoising(sets=2), 5, targets, (0, 1), 0, 0), Denoising(), slots=1
        )
