"""Drawn scenes as COCO folders, damaged in every way that the survey should find, one by one and
all at once."""

import json
import random

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from query_detr.batch import InputError
from query_detr.data.check import File, choose_images, contact_sheet, draw_image, open_file, survey
from query_detr.data.coco import CocoDetection
from query_detr.data.shapes import ShapesDataset
from query_detr.use.plots import new_axes

SCENES = ShapesDataset(24, seed=0)


@pytest.fixture
def folder(tmp_path):
    """A clean COCO folder."""
    SCENES.write_coco(tmp_path, "val2017")
    return tmp_path


def content(folder):
    return json.loads((folder / "annotations" / "instances_val2017.json").read_text())


def look(folder, changed=None, queries=25):
    """Survey the folder, with another json if one is given."""
    path = folder / "annotations" / "instances_val2017.json"
    if changed:
        path.write_text(json.dumps(changed))
    return survey(folder / "val2017", path, queries)


def whats(seen, *levels):
    return {f.what for f in seen.findings if not levels or f.level in levels}


def annotations_on(data, crowd=0):
    return [a for a in data["annotations"] if a["iscrowd"] == crowd]


def test_clean_data_gives_notes_only_and_right_counts(folder):
    seen = look(folder)
    assert not whats(seen, "stop", "harm")
    assert not seen.stops
    assert "Nothing was found that stops or harms training." in str(seen)
    (note,) = [f for f in seen.findings if f.what == "image without boxes"]
    empty = [i for i in range(len(SCENES)) if len(SCENES[i][1]) == 0]
    assert note.count == len(empty) > 0
    assert note.images == empty
    assert f"(image {empty[0]})" in note.example


def test_table_counts_boxes_per_class_and_size(folder):
    data = content(folder)
    first(data, bbox=[0, 0, 120, 100], area=32**2 - 1)  # the file's area counts
    (
        annotations_on(data)[1].update(bbox=[0, 0, 32, 32], area=32**2),
        annotations_on(data)[2].update(bbox=[0, 0, 120, 100], area=12000),
    )
    rows = {name: numbers for name, *numbers in look(folder, data).class_table()}
    boxes = annotations_on(data)
    for k, name in enumerate(SCENES.class_names):
        mine = [a for a in boxes if a["category_id"] == SCENES.category_ids[k]]
        small, large = sum(a["area"] < 32**2 for a in mine), sum(a["area"] >= 96**2 for a in mine)
        assert rows[name] == [
            len(mine),
            small,
            len(mine) - small - large,
            large,
            len({a["image_id"] for a in mine}),
        ]
    assert rows["all"][0] == len(boxes) == sum(rows["all"][1:4])
    assert all(rows["all"])
    assert (
        f"24 images, {len(content(folder)['annotations'])} annotations "
        f"({len(annotations_on(content(folder), crowd=1))} of them crowds), 5 classes"
        in str(look(folder))
    )


def corners(a):
    a["bbox"] = [
        a["bbox"][0],
        a["bbox"][1],
        a["bbox"][0] + a["bbox"][2],
        a["bbox"][1] + a["bbox"][3],
    ]


def first(data, n=1, **change):
    for a in annotations_on(data)[:n]:
        a.update(change)


def all_boxes(data, change):
    for a in data["annotations"]:
        change(a)


def resize(path):
    Image.open(path).resize((64, 128)).save(path)


def turn(path):
    image = Image.open(path)
    exif = image.getexif()
    exif[0x112] = 6
    image.save(path, exif=exif)


def damage_file(path, how):
    if how == "missing":
        path.unlink()
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-9000])
    if how == "words":
        path.write_text("<html>not found</html>")


# what is found: level, how many, what the example says, what is done to the json and to the picture
# of image 3
DAMAGES = {
    "missing file": ("stop", 1, "000003.png (image 3)", None, lambda p: damage_file(p, "missing")),
    "file that cannot be read": (
        "stop",
        1,
        "000003.png (image 3): image file is truncated",
        None,
        lambda p: damage_file(p, "cut"),
    ),
    "file that cannot be read ": (
        "stop",
        1,
        "000003.png (image 3): cannot identify",
        None,
        lambda p: damage_file(p, "words"),
    ),
    "file of another size than the json says": (
        "harm",
        1,
        "000003.png (image 3): 64 × 128 instead of 128 × 128",
        None,
        resize,
    ),
    "file with a camera's note that it should be shown turned, which is not followed here": (
        "note",
        1,
        "000003.png",
        None,
        turn,
    ),
    "image without width and height above 0 in the json": (
        "stop",
        2,
        "(image 4)",
        lambda d: [d["images"][4].update(width=None), d["images"][5].update(height=0)],
        None,
    ),
    "image with an id that occurred before": (
        "stop",
        1,
        "000007.png (image 3)",
        lambda d: d["images"][7].update(id=3),
        None,
    ),
    "image with an id that is not a whole number from 0 on": (
        "stop",
        2,
        "(image cat)",
        lambda d: [d["images"][7].update(id="cat"), d["images"][8].update(id=-1)],
        None,
    ),
    "image with a file that occurred before": (
        "harm",
        1,
        "000003.png (image 7)",
        lambda d: d["images"][7].update(file_name="000003.png"),
        None,
    ),
    "category with an id that occurred before": (
        "stop",
        1,
        "'ring' (id 2)",
        lambda d: d["categories"][4].update(id=2),
        None,
    ),
    "category with a name that occurred before": (
        "note",
        1,
        "'circle' (id 5)",
        lambda d: d["categories"][4].update(name="circle"),
        None,
    ),
    "category with an id that is not a whole number": (
        "stop",
        1,
        "'ring' (id 5)",
        lambda d: d["categories"][4].update(id="5"),
        None,
    ),
    "category without boxes": (
        "note",
        1,
        "'cat' (id 17)",
        lambda d: d["categories"].append(dict(id=17, name="cat")),
        None,
    ),
    "annotation with a category_id that 'categories' does not list": (
        "stop",
        2,
        "annotation 1 ",
        lambda d: first(d, 2, category_id=99),
        None,
    ),
    "annotation with an image_id that 'images' does not list, which is lost": (
        "harm",
        3,
        "annotation 1 ",
        lambda d: first(d, 3, image_id="0"),
        None,
    ),
    "annotation with an id that occurred before": (
        "note",
        2,
        "annotation 1 ",
        lambda d: first(d, 3, id=1),
        None,
    ),
    "box that is not four numbers, and is left out": (
        "harm",
        1,
        "annotation 1 [?]",
        lambda d: first(d, bbox=[1, 2, 3]),
        None,
    ),
    "box that is not four numbers, and is left out ": (
        "harm",
        1,
        "annotation 1 [?]",
        lambda d: first(d, bbox=[1, 2, float("nan"), 3]),
        None,
    ),
    "box that is not four numbers, and is left out  ": (
        "harm",
        1,
        "annotation 1 [?]",
        lambda d: first(d, bbox=None),
        None,
    ),
    "box without width or height, which is left out": (
        "harm",
        1,
        "annotation 1 [10, 20, 0, 5]",
        lambda d: first(d, bbox=[10, 20, 0, 5]),
        None,
    ),
    "box without width or height, which is left out ": (
        "stop",
        None,
        "annotation 1 [10, 20, 5, -3]",
        lambda d: all_boxes(d, lambda a: a.update(bbox=[10, 20, 5, -3])),
        None,
    ),
    "box that looks like 0..1 instead of pixels": (
        "harm",
        None,
        "annotation 1 [0.",
        lambda d: all_boxes(d, lambda a: a.update(bbox=[v / 128 for v in a["bbox"]])),
        None,
    ),
    "box that looks like [left, top, right, bottom]": (
        "harm",
        None,
        "annotation 1 ",
        lambda d: all_boxes(d, corners),
        None,
    ),
    "box that looks like [left, top, right, bottom] ": (
        "harm",
        1,
        "annotation 1 [70, 60, 120, 125]",
        lambda d: first(d, bbox=[70, 60, 120, 125]),
        None,
    ),
    "box that reaches out of its image by more than a pixel, and is cut": (
        "harm",
        2,
        "annotation 1 [100, 10, 40, 20] on 000000.png of 128 × 128",
        lambda d: [
            first(d, bbox=[100, 10, 40, 20]),
            annotations_on(d)[1].update(bbox=[-9, 1, 20, 20]),
        ],
        None,
    ),
    "annotation that repeats another one's image, class and box": (
        "harm",
        1,
        "annotation 999 ",
        lambda d: d["annotations"].append(dict(d["annotations"][0], id=999)),
        None,
    ),
}


LOST_IMAGE, LOST_CATEGORY = (
    "annotation with an image_id that 'images' does not list, which is lost",
    "annotation with a category_id that 'categories' does not list",
)
FOLLOWS = {  # what else such a damage brings about
    "image with an id that occurred before": {LOST_IMAGE},
    "image with an id that is not a whole number from 0 on": {LOST_IMAGE},
    "category with an id that occurred before": {LOST_CATEGORY, "category without boxes"},
    "category with an id that is not a whole number": {LOST_CATEGORY, "category without boxes"},
    "box without width or height, which is left out": {"category without boxes"},
}


@pytest.mark.parametrize("what", DAMAGES)
def test_every_damage_is_found_and_nothing_else(folder, what):
    level, count, example, change, change_file = DAMAGES[what]
    clean, data = look(folder), content(folder)
    if change:
        change(data)
    if change_file:
        change_file(folder / "val2017" / "000003.png")
    seen = look(folder, data)
    (found,) = [f for f in seen.findings if f.what == what.strip()]
    assert (found.level, found.count) == (level, count or len(data["annotations"]))
    assert example in found.example
    assert found.remedy
    assert str(found) in str(seen)
    assert seen.stops == (level == "stop")
    assert whats(seen) - whats(clean) - FOLLOWS.get(found.what, set()) == {found.what}
    sheet = contact_sheet(seen, folder / "sheet.png", count=2, columns=2)
    assert Image.open(sheet).width > 400
    assert not (folder / "sheet.png.tmp").exists()


def test_more_boxes_than_queries(folder):
    counts = [len(SCENES[i][1]) for i in range(len(SCENES))]
    most = max(counts)
    assert not [w for w in whats(look(folder, queries=most)) if "queries" in w]
    (found,) = [f for f in look(folder, queries=most - 1).findings if "queries" in f.what]
    assert found.level == "harm"
    assert found.count == counts.count(most)
    assert found.images[0] == counts.index(most)
    assert f"at least {most} queries" in found.remedy


def test_the_data_set_refuses_what_the_survey_calls_a_stop(folder):
    for _what, (level, _, _, change, _change_file) in DAMAGES.items():
        if level != "stop" or not change:
            continue
        data = content(folder)
        change(data)
        (folder / "bad.json").write_text(json.dumps(data))
        with pytest.raises(InputError):
            CocoDetection(folder / "val2017", folder / "bad.json")


def test_everything_at_once_is_survived(folder):
    data, rng = content(folder), random.Random(0)
    for _what, (_, _, _, change, _) in DAMAGES.items():
        if change:
            change(data)
    for a in data["annotations"][::3]:
        a.update(
            rng.choice(
                [
                    dict(bbox="x"),
                    dict(bbox=[1e300, 0, 10**400, 2]),
                    dict(image_id=[1]),
                    dict(category_id={}),
                    dict(id=None),
                    dict(area="big"),
                    dict(bbox=[None] * 4),
                    dict(iscrowd=1),
                ]
            )
        )
    data["images"] += [
        dict(id=None, file_name=None, height="a", width=[]),
        dict(id=[2], file_name="..", height=1, width=1),
        dict(id=1.5, file_name="a\0b$x_$", height=1, width=1),
    ]
    data["categories"].append(dict(id=None, name="$_$"))
    data["annotations"].append(dict(id=1000, image_id=0, category_id=None, bbox=[1, 2, 30, 40]))
    for k, how in enumerate(("missing", "cut", "words")):
        damage_file(folder / "val2017" / f"{k:06d}.png", how)
    seen = look(folder, data)
    assert seen.stops
    assert len(whats(seen, "stop")) >= 6
    assert len(str(seen).splitlines()) > 30
    contact_sheet(seen, folder / "sheet.png")


def test_empty_lists_are_survived(folder):
    for data in (
        dict(images=[], annotations=[], categories=[]),
        dict(content(folder), annotations=[]),
        dict(content(folder), images=[]),
        dict(content(folder), categories=[]),
    ):
        seen = look(folder, data)
        assert seen.stops
        assert str(seen)
        contact_sheet(seen, folder / "sheet.png")


def test_only_an_unreadable_json_or_folder_is_refused(folder):
    with pytest.raises(InputError, match="not a folder"):
        survey(folder / "none", folder / "annotations" / "instances_val2017.json", 25)
    with pytest.raises(InputError, match="does not exist"):
        survey(folder / "val2017", folder / "none.json", 25)
    (folder / "cut.json").write_text('{"images": [')
    with pytest.raises(InputError, match="not JSON"):
        survey(folder / "val2017", folder / "cut.json", 25)


def test_contact_sheet_shows_findings_and_others(folder):
    data = content(folder)
    data["images"][11].update(width=64)
    seen = look(folder, data)
    chosen = choose_images(seen, 8)
    assert len(chosen) == 8
    assert "size" in chosen[11]
    assert list(chosen.values()).count("") >= 4
    assert len(choose_images(seen, 100)) == 24


@pytest.mark.parametrize(
    "images, annotations, totals",
    [
        ("bccd/train", "bccd/annotations/instances_train.json", (205, 2804, 0)),
        ("bccd/val", "bccd/annotations/instances_val.json", (87, 1137, 0)),
        ("coco_free/train2017", "coco_free/annotations/instances_train2017.json", (92, 829, 1)),
        ("coco_free/val2017", "coco_free/annotations/instances_val2017.json", (66, 560, 2)),
    ],
)
def test_real_data_is_counted_and_not_suspected(pictures, images, annotations, totals):
    seen = survey(pictures / images, pictures / annotations, 100)
    without = sum(f.count for f in seen.findings if f.what == "image without boxes")
    assert (len(seen.records.files), len(seen.records.boxes), without) == totals
    assert not whats(seen, "stop", "harm")


def test_a_cut_jpeg_is_read_to_its_end(tmp_path):
    Image.effect_noise((300, 200), 60).convert("RGB").save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-1000])
    assert open_file(tmp_path / "whole.jpg") == File((300, 200))
    assert "truncated" in open_file(tmp_path / "cut.jpg").complaint


def test_boxes_that_training_reads_are_green_and_others_red(folder):
    data = content(folder)
    data["annotations"] = [
        dict(id=n, image_id=3, category_id=k, iscrowd=c, bbox=[20 * n, 5, 10, 60])
        for n, (k, c) in enumerate([(1, 0), (99, 0), (1, 1), (2, 0)])
    ]
    ax = new_axes()[0, 0]
    draw_image(look(folder, data).records, 3, "", ax)
    drawn = {round(p.get_x() * 128): to_hex(p.get_edgecolor()) for p in ax.patches}
    green, red = to_hex("tab:green"), to_hex("tab:red")
    assert drawn == {0: green, 20: red, 40: red, 60: green}
    assert all(
        (round(p.get_width() * 128), round(p.get_height() * 128)) == (10, 60) for p in ax.patches
    )
