"""Predictions for pictures as users have them: of any form and size, from Python and from the
command line."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from query_detr.batch import InputError, Predictions
from query_detr.boxes import to_cxcywh
from query_detr.data.shapes import CLASSES, draw_scene
from query_detr.model import InferenceConfig, QueryDETR
from query_detr.run.checkpoints import save_model
from query_detr.use.predict import annotated_names, command_line, image_files, open_picture, predict

BOX = [10, 20, 40, 50]  # xyxy in pixels of `picture`


class Finder(nn.Module):
    """Stands for a trained model: finds the bright rectangle in each image by looking at its
    pixels, with scores 0.9 (class 1) and 0.3 (class 0)."""

    def __init__(self, **usage):
        super().__init__()
        self.usage, self.weight, self.seen = (
            InferenceConfig(**usage),
            nn.Parameter(torch.zeros(1)),
            [],
        )

    def forward(self, images, pad_mask):
        assert not self.training
        self.seen.append(tuple(images.shape))
        boxes = []
        for image, mask in zip(images, pad_mask):
            height, width = (~mask).any(1).sum(), (~mask).any(0).sum()
            y, x = torch.where((image[0] > 1.2) & ~mask)
            boxes.append(
                to_cxcywh(
                    torch.stack(
                        [
                            x.min() / width,
                            y.min() / height,
                            (x.max() + 1) / width,
                            (y.max() + 1) / height,
                        ]
                    )
                )
            )
        logits = torch.tensor([[0.3, 0.9]]).logit().expand(1, len(images), 1, 2)
        return Predictions(logits, torch.stack(boxes)[None, :, None])


def picture(width=100, height=60, box=BOX):
    """A dark picture with a bright rectangle."""
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 250
    return Image.fromarray(pixels)


def close(found, box=BOX, within=0.7):
    """One pixel of the model's image is a third of a pixel here, and resizing blurs."""
    return len(found) == 1 and torch.allclose(
        found.boxes_xyxy[0], torch.tensor(box).float(), atol=within
    )


def test_boxes_come_back_in_pixels_of_the_original():
    for short, longest, seen in (
        (180, 1333, (180, 300)),
        (180, 150, (90, 150)),
        (0, 1333, (60, 100)),
    ):
        model = Finder(short_side=short, longest_side=longest)
        found = predict(model, picture())
        assert close(found)
        assert found.size == (60, 100)
        assert model.seen == [(1, 3, *seen)]
        assert torch.allclose(found.boxes[0], torch.tensor([0.25, 35 / 60, 0.3, 0.5]), atol=0.015)


def test_all_forms_of_a_picture_give_the_same(tmp_path):
    model, rgb = Finder(short_side=180), picture()
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.info["transparency"] = bytes([255] * len(palette.getcolors()))
    forms = [
        rgb,
        pixels,
        pixels / 255,
        pixels[:1],
        rgb.convert("L"),
        rgb.convert("RGBA"),
        palette,
        rgb.convert("1", dither=Image.Dither.NONE),
        rgb.convert("CMYK"),
    ]
    for i, form in enumerate(form for form in list(forms) if isinstance(form, Image.Image)):
        path = tmp_path / f"{i}.{'tif' if form.mode == 'CMYK' else 'png'}"
        form.save(path)
        forms += [path, str(path)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in forms:
            assert close(predict(model, form)), form
        assert all(close(found) for found in predict(model, forms))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, orientation):
    turned = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }  # how a camera holding it so sees the scene
    stored = (
        picture() if orientation == 1 else picture().transpose(Image.Transpose[turned[orientation]])
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    model = Finder(short_side=180)
    for image in (tmp_path / "photo.jpg", Image.open(tmp_path / "photo.jpg")):
        found = predict(model, image)
        assert close(found)
        assert found.size == (60, 100)


def test_pictures_of_several_sizes_share_a_batch():
    model, boxes = (
        Finder(short_side=60),
        ([10, 20, 40, 50], [5, 5, 20, 55], [0, 0, 30, 10], [30, 60, 60, 90]),
    )
    pictures = [
        picture(*size, box) for size, box in zip(((100, 60), (60, 60), (60, 120), (60, 90)), boxes)
    ]
    results = predict(model, pictures, batch_size=3)
    assert [shape[0] for shape in model.seen] == [3, 1]
    assert model.seen[0] == (3, 3, 120, 100)
    assert all(close(found, box, 1e-3) for found, box in zip(results, boxes, strict=True))
    assert predict(model, []) == []
    assert isinstance(predict(model, pictures[:1]), list)


def test_threshold_and_names():
    named, nameless = (
        Finder(class_names=("cat", "dog"), short_side=0),
        Finder(class_names=("cat",), short_side=0),
    )
    assert predict(named, picture()).names == ["dog"]
    both = predict(named, picture(), threshold=0.25)
    assert both.names == ["dog", "cat"]
    assert both.labels.tolist() == [1, 0]
    assert torch.allclose(both.scores, torch.tensor([0.9, 0.3]))
    assert len(predict(named, picture(), threshold=0.95)) == 0
    assert len(predict(named, picture(), threshold=0)) == 2
    assert predict(nameless, picture()).names == ["class 1"]
    assert len(predict(Finder(keep=1, short_side=0), picture(), threshold=0)) == 1


def detector(small, **usage):
    """A model that has not learned anything, but says something everywhere."""
    model = QueryDETR(
        small,
        InferenceConfig(
            **{**dict(class_names=CLASSES, short_side=160, longest_side=256, keep=6), **usage}
        ),
    )
    nn.init.normal_(model.box_head.layers[-1].weight, std=0.3)
    nn.init.zeros_(model.class_head.bias)
    return model


def test_results_do_not_depend_on_the_batch(small):
    model = detector(small).eval()
    scenes = [Image.fromarray(draw_scene(0, i).image) for i in range(5)]
    alone = [predict(model, scene, threshold=0) for scene in scenes]
    assert len({tuple(found.scores.tolist()) for found in alone}) == 5
    for batch_size in (1, 2, 5):
        for found, expected in zip(predict(model, scenes, 0, batch_size), alone, strict=True):
            assert torch.allclose(found.scores, expected.scores, atol=1e-4)
            assert found.names == expected.names
            assert torch.allclose(found.boxes_xyxy, expected.boxes_xyxy, atol=0.02)


def test_boxes_end_at_the_border(small):
    model = detector(small)
    nn.init.constant_(
        model.box_head.layers[-1].bias, 1.5
    )  # large boxes: many reach over the border
    found = predict(model, Image.fromarray(draw_scene(0, 1).image[:, :90]), threshold=0)
    assert (found.boxes_xyxy >= 0).all()
    assert found.boxes_xyxy[:, 0::2].max() == 90
    assert found.boxes_xyxy[:, 1::2].max() == 128
    assert (found.boxes_xyxy[:, 2:] > found.boxes_xyxy[:, :2]).all()


def test_the_model_keeps_its_mode(small):
    model = detector(small)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for training in (True, False):
        assert not predict(
            model.train(training), Image.fromarray(draw_scene(0, 0).image), 0
        ).scores.requires_grad
        assert model.training is training
    assert all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )  # batch norm saw nothing


@pytest.fixture
def photos(tmp_path):
    """Folder with scenes as files, of two sizes, and files that are not pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(draw_scene(0, i).image[:, : 128 - 24 * (i % 2)]).save(folder / f"{i}.png")
    (
        (folder / "notes.txt").write_text("not a picture"),
        (folder / "._0.png").write_text("what a Mac leaves"),
    )
    return folder


def test_command(small, photos, tmp_path):
    model = detector(small).eval()
    save_model(model, tmp_path / "model")
    Image.fromarray(draw_scene(0, 7).image).save(tmp_path / "0.jpg")
    command = [
        sys.executable,
        "-m",
        "query_detr.use.predict",
        "model",
        "photos",
        "0.jpg",
        "photos/0.png",
        "--output",
        "out/new",
        "--threshold",
        "0.3",
        "--device",
        "cpu",
    ]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.stderr == ""
    assert run.returncode == 0
    assert {p.name for p in (tmp_path / "out" / "new").iterdir()} == {
        "0.png",
        "1.png",
        "2.png",
        "0-2.png",
        "detections.json",
    }
    written = json.loads((tmp_path / "out" / "new" / "detections.json").read_text())
    assert [(i["file"], i["annotated"], i["height"], i["width"]) for i in written["images"]] == [
        ("photos/0.png", "0.png", 128, 128),
        ("photos/1.png", "1.png", 128, 104),
        ("photos/2.png", "2.png", 128, 128),
        ("0.jpg", "0-2.png", 128, 128),
    ]
    for image in written["images"]:
        found = predict(model, tmp_path / image["file"], 0.3)
        assert len(found) > 0
        assert [d["name"] for d in image["detections"]] == found.names
        assert torch.allclose(
            torch.tensor([d["score"] for d in image["detections"]]), found.scores, atol=0.05
        )  # padding moves them a little
        with Image.open(tmp_path / "out" / "new" / image["annotated"]) as drawn:
            assert drawn.size == (round(800 * image["width"] / 128), 800)
            blue = (
                np.abs(np.array(drawn.convert("RGB")).astype(int) - [31, 119, 180]).sum(-1) < 6
            ).mean()
        assert 0.005 < blue < 0.5  # boxes and the ground of their names
    assert (
        f"{sum(len(i['detections']) for i in written['images'])} detections in 4 images"
        in run.stdout
    )


def test_command_can_be_repeated_and_never_writes_over_other_files(small, photos, tmp_path, capsys):
    save_model(detector(small), tmp_path / "model")
    command = [
        str(tmp_path / "model"),
        str(photos),
        "--device",
        "cpu",
        "--threshold",
        "0.9",
        "--output",
    ]
    before = {
        p: p.read_bytes() for folder in (photos, tmp_path / "model") for p in folder.iterdir()
    }
    assert (
        command_line([*command, str(tmp_path / "out")])
        == 0
        == command_line([*command, str(tmp_path / "out")])
    )
    for folder in (photos, tmp_path / "model"):
        assert command_line([*command, str(folder)]) == 2
    assert command_line([*command, str(photos / "0.png")]) == 2
    again = [
        str(tmp_path / "model"),
        str(tmp_path / "out"),
        "--output",
        str(tmp_path / "out"),
    ]  # annotating annotated pictures
    assert command_line(again) == 2
    assert capsys.readouterr().err.count("error: ") == 4
    assert before == {
        p: p.read_bytes() for folder in (photos, tmp_path / "model") for p in folder.iterdir()
    }


def broken(folder):
    """Files that look like pictures."""
    whole = folder / "whole.jpg"
    Image.fromarray(draw_scene(0, 0).image).save(whole)
    (folder / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    (folder / "text.png").write_text("<html>404</html>"), (folder / "empty.png").touch()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(folder / "deep.png")
    return [
        folder / name for name in ("cut.jpg", "text.png", "empty.png", "deep.png", "missing.png")
    ]


def test_unreadable_pictures_are_named(tmp_path):
    for file in broken(tmp_path):
        with pytest.raises(InputError, match=file.name):
            predict(Finder(), [tmp_path / "whole.jpg", file])
    with pytest.raises(InputError, match="cut.jpg"):
        open_picture(Image.open(tmp_path / "cut.jpg"))


@pytest.mark.parametrize(
    "image, said",
    [
        (torch.zeros(2, 3, 8, 8), "as a list"),
        (torch.zeros(8, 8, 3), "shape"),
        (torch.full((3, 8, 8), -1.0), "before normalisation"),
        (torch.full((3, 8, 8), torch.nan), "0..1"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "uint8"),
        (np.zeros((8, 8, 3)), "ndarray"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(image, said):
    with pytest.raises(InputError, match=said):
        predict(Finder(), image)


@pytest.mark.parametrize(
    "options",
    [dict(threshold=1.5), dict(threshold=-0.1), dict(threshold=float("nan")), dict(batch_size=0)],
)
def test_senseless_numbers_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        predict(Finder(), picture(), **options)
    with pytest.raises(InputError, match=next(iter(options))):
        predict(Finder(), [picture()], **options)


def test_command_refuses_in_one_line(small, photos, tmp_path, capsys):
    save_model(detector(small), tmp_path / "model")
    wrong = broken(tmp_path)
    (tmp_path / "nothing").mkdir()
    good = [str(tmp_path / "model"), str(photos)]
    cases = {
        "model.json": [str(photos), str(photos)],
        "nothing": [good[0], str(tmp_path / "nothing")],
        "threshold": [*good, "--threshold", "2"],
        "batch_size": [*good, "--batch-size", "0"],
        **{file.name: [*good, str(file)] for file in wrong},
    }
    if not torch.cuda.is_available():
        cases["--device cuda"] = [*good, "--device", "cuda"]
    for named, arguments in cases.items():
        assert command_line([*arguments, "--output", str(tmp_path / "out")]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("error: ")
        assert named in output.err
        assert output.err.count("\n") == 1
    assert not list(
        (tmp_path / "out").glob("*")
    )  # nothing is written before everything is known to be right


def test_a_broken_picture_is_told_before_the_work(small, photos, tmp_path, monkeypatch, capsys):
    save_model(detector(small), tmp_path / "model")
    (photos / "z.png").write_text("broken")
    monkeypatch.setattr(
        "query_detr.use.predict.detect_batch",
        lambda *_: pytest.fail("the others should have waited"),
    )
    assert (
        command_line(
            [
                str(tmp_path / "model"),
                str(photos),
                "--batch-size",
                "1",
                "--output",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "z.png" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(
        word in said
        for word in (
            "python -m query_detr.use.predict",
            "MODEL",
            "IMAGE",
            "--output",
            "--threshold",
            "--device",
            "--batch-size",
        )
    )
    with pytest.raises(SystemExit) as stop:
        command_line(["model"])
    assert stop.value.code == 2


def test_names_of_annotated_pictures_are_unique():
    names = annotated_names(
        [Path(p) for p in ("a/1.jpg", "b/1.png", "c/1-2.jpg", "c/X.png", "d/x.png", "a/1.gif")]
    )
    assert len({n.lower() for n in names}) == 6
    assert names[:2] == ["1.png", "1-2.png"]


def test_folders_are_listed_in_order_and_once(photos):
    inside = [photos / f"{i}.png" for i in range(3)]
    assert image_files([str(photos)]) == inside
    assert image_files([str(inside[2]), str(photos)]) == [inside[2], inside[0], inside[1]]
