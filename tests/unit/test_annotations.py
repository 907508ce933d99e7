"""Annotation files: kept arrays are whole, shared and never stale, and whatever a file contains,
it is read or refused in plain words."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch.nn.functional import pad
from torchvision import tv_tensors
from torchvision.transforms import v2

from query_detr.batch import InputError, Sample, collate
from query_detr.data import annotations
from query_detr.data.coco import CocoDetection
from query_detr.data.files import map_arrays, whole_file, write_arrays
from query_detr.data.shapes import ShapesDataset
from query_detr.data.transforms import (
    Transformed,
    eval_transform,
    resized,
    to_tensor,
    train_transform,
)

SCENES = ShapesDataset(12, seed=0)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder of drawn scenes that no test changes."""
    folder = tmp_path_factory.mktemp("scenes")
    SCENES.write_coco(folder, "val2017")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """The same pictures, and annotations that a test may change."""
    (tmp_path / "val2017").mkdir()
    for picture in (original / "val2017").iterdir():
        os.link(picture, tmp_path / "val2017" / picture.name)
    (tmp_path / "a.json").write_bytes(
        (original / "annotations" / "instances_val2017.json").read_bytes()
    )
    return tmp_path


def open_set(folder, name="a.json", **options):
    return CocoDetection(
        folder / "val2017", folder / name, **{"cache": folder / "cache", **options}
    )


def kept(folder):
    return sorted((folder / "cache").iterdir())


def same(a, b):
    return (
        a.ground_truth() == b.ground_truth()
        and a.class_names == b.class_names
        and all(
            np.array_equal(getattr(a, n), getattr(b, n))
            for n in ("starts", "labels", "boxes", "crowd")
        )
    )


@pytest.fixture
def readings(monkeypatch):
    """Count how often a json is read."""
    read, paths = annotations.read_annotations, []
    monkeypatch.setattr(
        annotations, "read_annotations", lambda path: paths.append(path) or read(path)
    )
    return paths


def test_second_opening_maps_what_the_first_kept(folder, readings):
    first, second, plain = open_set(folder), open_set(folder), open_set(folder, cache=None)
    assert len(readings) == 2
    assert plain.kept is None
    assert first.kept == second.kept == kept(folder)[0]
    assert len(kept(folder)) == 1
    assert same(first, second)
    assert same(first, plain)
    assert len(first) == 12
    assert first.crowd.any()
    for dataset in (first, second):
        assert isinstance(dataset.boxes.base, np.memmap) or isinstance(
            dataset.boxes.base.base, np.memmap
        )
        assert not dataset.boxes.flags.writeable
    for i in range(12):
        assert torch.equal(second[i][1], SCENES[i][1])
        assert torch.equal(second[i][2], SCENES[i][2])
        assert second.file_name(i) == f"{i:06d}.png"


def test_a_limit_is_a_view_of_the_same_arrays(folder, readings):
    whole, few, plain = (
        open_set(folder),
        open_set(folder, limit=5),
        open_set(folder, limit=5, cache=None),
    )
    assert len(few) == 5
    assert same(few, plain)
    assert len(readings) == 2
    assert len(kept(folder)) == 1
    assert few.ground_truth()["images"] == whole.ground_truth()["images"][:5]
    assert len(few.boxes) == whole.starts[5]
    assert len(open_set(folder, limit=99)) == 12
    with pytest.raises(InputError, match="limit=0"):
        open_set(folder, limit=0)


def test_a_copy_shares_and_a_changed_file_does_not(folder, readings):
    before = open_set(folder)
    content = (folder / "a.json").read_bytes()
    (folder / "copy.json").write_bytes(content)
    assert open_set(folder, "copy.json").kept == before.kept
    assert len(readings) == 1
    at = os.stat(folder / "a.json")
    changed = content.replace(b'"circle"', b'"curcle"')
    (folder / "a.json").write_bytes(changed)
    os.utime(folder / "a.json", ns=(at.st_atime_ns, at.st_mtime_ns))  # same path, size and time
    assert len(changed) == len(content)
    assert "curcle" in open_set(folder).class_names
    assert "circle" in before.class_names
    assert len(kept(folder)) == 2


def damages():
    def cut(n):
        return lambda content: content[:n]

    def flip(part):
        return lambda content: (
            content[: int(part * len(content))]
            + bytes([content[int(part * len(content))] ^ 1])
            + content[int(part * len(content)) + 1 :]
        )

    rng = random.Random(0)
    return [
        cut(0),
        cut(1),
        cut(31),
        cut(32),
        cut(200),
        cut(-1),
        cut(-1000),
        lambda content: content + b"x",
        lambda content: b"\0" * len(content),
        *(flip(rng.random()) for _ in range(40)),
    ]


def test_damaged_arrays_are_made_anew(folder, readings):
    good = open_set(folder)
    content = good.kept.read_bytes()
    for n, damage in enumerate(damages()):
        good.kept.unlink()
        good.kept.write_bytes(damage(content))
        assert map_arrays(good.kept) is None
        again = open_set(folder)
        assert same(again, good)
        assert len(readings) == n + 2
        assert good.kept.read_bytes() == content
    assert len(kept(folder)) == 1


def test_arrays_of_another_version_are_not_read(folder, readings, monkeypatch):
    open_set(folder)
    monkeypatch.setattr(annotations, "VERSION", annotations.VERSION + 1)
    open_set(folder)
    assert len(readings) == 2
    assert len(kept(folder)) == 2


def test_where_nothing_can_be_kept_the_file_is_read_all_the_same(folder, readings, monkeypatch):
    (folder / "cache").write_text("a file, where a folder should be")
    with pytest.warns(UserWarning, match="QUERY_DETR_CACHE"):
        dataset = open_set(folder)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert same(open_set(folder, cache=folder / "full"), dataset)
    assert dataset.kept is None
    assert len(dataset[3][1]) == len(SCENES[3][1])
    assert list((folder / "full").iterdir()) == []


def test_default_folder(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "xdg"))
    monkeypatch.delenv("QUERY_DETR_CACHE", raising=False)
    assert open_set(folder, cache=None).kept is None  # a small file
    monkeypatch.setattr(annotations, "WORTH_KEEPING", 1)
    assert open_set(folder, cache=None).kept.parent == folder / "xdg" / "query_detr"
    monkeypatch.setenv("QUERY_DETR_CACHE", str(folder / "mine"))
    assert open_set(folder, cache=None).kept.parent == folder / "mine"
    monkeypatch.setenv("QUERY_DETR_CACHE", "")
    assert open_set(folder, cache=None).kept is None
    monkeypatch.delenv("QUERY_DETR_CACHE"), monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert open_set(folder, cache=None).kept is None


def test_a_file_that_is_not_there(folder):
    with pytest.raises(InputError, match="none.json does not exist"):
        open_set(folder, "none.json")
    (folder / "none.json").mkdir()
    with pytest.raises(InputError, match="none.json cannot be read .Is a directory"):
        open_set(folder, "none.json")
    with pytest.raises(InputError, match="elsewhere is not a folder"):
        CocoDetection(folder / "elsewhere", folder / "a.json")


def open_and_report(folder, start, reports):
    start.wait()
    dataset = open_set(folder)
    reports.put((str(dataset.kept), len(dataset), dataset.boxes.sum()))


def test_eight_processes_that_open_at_once_get_whole_arrays(folder):
    context = multiprocessing.get_context("fork")
    start, reports = context.Event(), context.Queue()
    processes = [
        context.Process(target=open_and_report, args=(folder, start, reports)) for _ in range(8)
    ]
    for process in processes:
        process.start()
    start.set()
    found = {reports.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert found == {(str(kept(folder)[0]), 12, open_set(folder).boxes.sum())}
    assert len(kept(folder)) == 1
    assert map_arrays(kept(folder)[0])


def test_a_pickled_data_set_carries_no_arrays(folder, readings):
    dataset = open_set(folder, limit=7)
    sent = pickle.dumps(dataset)
    assert len(sent) < 2000
    assert same(pickle.loads(sent), dataset)
    assert len(readings) == 1
    assert b"boxes" not in sent
    plain = open_set(folder, limit=7, cache=None)
    assert same(pickle.loads(pickle.dumps(plain)), dataset)
    assert len(readings) == 2
    seen = Transformed(dataset, train_transform("detr"), 3, 4)
    assert torch.equal(pickle.loads(pickle.dumps(seen))[2].image, seen[2].image)
    dataset.kept.unlink()
    assert same(pickle.loads(sent), dataset)
    assert len(kept(folder)) == 1


def test_what_is_left_out_is_said_at_every_opening(folder):
    content = json.loads((folder / "a.json").read_text())
    content["annotations"][0]["bbox"][2] = 0
    content["annotations"][1]["image_id"] = 4711
    (folder / "a.json").write_text(json.dumps(content))
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset = open_set(folder)
        n = len(content["annotations"])
        assert len(dataset.boxes) == n - 2
        assert [str(w.message).split(": ")[1] for w in caught] == [
            f"1 of {n - 1} boxes have no width or no height and are left out",
            f"1 of {n} annotations belong to images that it does not list and are left out",
        ]


def test_arrays_of_any_kind_come_back(tmp_path):
    arrays = dict(
        a=np.arange(5),
        empty=np.zeros((0, 4)),
        one=np.array(3.5),
        flags=np.array([True, False]),
        bytes=np.frombuffer(b"abc", np.uint8),
        table=np.random.rand(7, 3).astype(np.float32),
    )
    write_arrays(tmp_path / "x", arrays)
    found = map_arrays(tmp_path / "x")
    assert found.keys() == arrays.keys()
    assert all(
        found[k].dtype == a.dtype and found[k].shape == a.shape and np.array_equal(found[k], a)
        for k, a in arrays.items()
    )
    assert map_arrays(tmp_path / "none") is None


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path):
    for shared in (False, True):
        with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "x", shared) as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with (
        whole_file(tmp_path / "x", shared=True) as one,
        whole_file(tmp_path / "x", shared=True) as other,
    ):
        one.write(b"1"), other.write(b"22")
    assert (tmp_path / "x").read_bytes() in (b"1", b"22")
    assert len(list(tmp_path.iterdir())) == 1


# images that cannot be read


def spoil(folder, *which):
    for i in which:
        (folder / "val2017" / f"{i:06d}.png").unlink()
        (folder / "val2017" / f"{i:06d}.png").write_bytes([b"", b"not a picture"][i % 2])


def test_a_bad_image_stops_or_is_replaced_by_the_next_good_one(folder):
    spoil(folder, 3, 4, 11)
    dataset = open_set(folder)

    def seen(on_bad, seed=0, epoch=0):
        return Transformed(dataset, train_transform("flip"), seed, epoch, on_bad)

    with pytest.raises(InputError, match="000003.png cannot be read") as told:
        seen("stop")[3]
    assert "000004" not in str(told.value)
    samples = [seen("skip")[i] for i in range(12)]
    assert [s.image_id for s in samples] == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10, 0]
    assert [s.replaced_file for s in samples] == [
        "",
        "",
        "",
        "000003.png",
        "000004.png",
        *[""] * 6,
        "000011.png",
    ]
    assert collate(samples).replaced == ("000003.png", "000004.png", "000011.png")
    assert collate(samples).to("cpu").replaced == collate(samples).replaced
    assert collate(samples[:3]).replaced == ()
    for s in samples:
        assert torch.equal(s.labels, SCENES[s.image_id][2])
    with pytest.raises(InputError, match="stop or skip"):
        seen("ignore")


def test_a_replaced_image_depends_on_seed_epoch_and_place_alone(folder):
    spoil(folder, 3, 4)
    dataset = open_set(folder)

    def image(i, seed, epoch):
        return Transformed(dataset, train_transform("flip"), seed, epoch, "skip")[i].image

    flipped = {
        (i, seed, epoch): torch.equal(image(i, seed, epoch), image(5, 0, 0))
        for i in (3, 4, 5)
        for seed in range(4)
        for epoch in range(4)
    }
    torch.manual_seed(5)
    assert all(
        torch.equal(image(i, seed, epoch), image(5, 0, 0)) == value
        for (i, seed, epoch), value in flipped.items()
    )
    by_place = [
        [flipped[i, seed, epoch] for seed in range(4) for epoch in range(4)] for i in (3, 4, 5)
    ]
    assert by_place[0] != by_place[1] != by_place[2] != by_place[0]


def test_where_no_image_can_be_read_skipping_ends(folder):
    spoil(folder, *range(12))
    dataset = open_set(folder)
    with pytest.raises(InputError, match="000007.png .*nor can any of the 11 images after it"):
        Transformed(dataset, eval_transform(None), on_bad="skip")[7]
    with pytest.raises(IndexError):
        open_set(folder, cache=None)[12]
    with pytest.raises(IndexError):
        Transformed(dataset, eval_transform(None), on_bad="skip")[12]


@pytest.mark.parametrize(
    "name", ["", "..", "a\0b.png", "x" * 5000, "\ud800", "no/such/folder.png", "\udcff.png"]
)
def test_file_names_that_lead_nowhere(folder, name):
    content = json.loads((folder / "a.json").read_text())
    content["images"][0]["file_name"] = name
    (folder / "a.json").write_text(json.dumps(content))
    for _ in range(2):
        dataset = open_set(folder)
        assert dataset.file_name(0) == name
        assert dataset.file_name(1) == "000001.png"
        with pytest.raises(InputError):
            dataset[0]
        assert Transformed(dataset, eval_transform(None), on_bad="skip")[0].image_id == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
        b"\xff\xd8\xff\xe0" + b"\0" * 40,
        b"BM" + b"\xff" * 60,
        b"II*\0" + b"\xff" * 60,
        b"RIFF\0\0\0\0WEBP",
        b"8BPS" + b"\1" * 60,
    ],
    ids=range(8),
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_files_that_are_no_pictures(folder, content):
    (folder / "val2017" / "000000.png").unlink()
    (folder / "val2017" / "000000.png").write_bytes(content)
    with pytest.raises(InputError, match="000000.png cannot be read"):
        open_set(folder).open(0)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1), (3, 5000), (1, 2000)])
def test_strips_keep_at_least_a_row_of_pixels(size):
    height, width = resized(*size, 800, 1333)
    assert min(height, width) >= 1
    assert max(height, width) < 2 * 1333  # rounding half a row up to one doubles the length
    assert min(eval_transform()(Image.new("RGB", size[::-1])).shape) >= 1
    image, boxes = (
        Image.new("RGB", size[::-1]),
        tv_tensors.BoundingBoxes([[0, 0, 1, 1]], format="XYXY", canvas_size=size),
    )
    for seed in range(8):
        torch.manual_seed(seed)
        picture, box = train_transform()(image, boxes)
        assert min(picture.shape) >= 1
        assert max(picture.shape) < 2 * 1333
        assert torch.isfinite(box).all()


# fuzzing

ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    1.0,
    1.5,
    2,
    -0.0,
    float("nan"),
    float("inf"),
    float("-inf"),
    1e308,
    5e-324,
    10**400,
    -(10**30),
    2**53,
    2**53 + 1,
    2**63,
    2**64,
    -(2**63),
    "",
    "0",
    "1",
    "a\0b",
    "\ud800",
    "ünï😀",
    "x" * 3000,
    "\n\r\u2028",
    [],
    {},
    [[]],
    [None] * 4,
    [0, 0, 1, 1],
    ["1"] * 4,
    [1, 2, 3],
    [float("nan")] * 4,
    [0, 0, -5, 5],
    [0, 0, 1e9, 1],
    [1e300] * 4,
    {"id": 1},
    [{}],
    [0, 0, True, True],
]
TEXTS = [
    b"",
    b" ",
    b"null",
    b"0",
    b'"images"',
    b"[",
    b"{}",
    b"[" * 100_000,
    b'{"images":' * 100_000,
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"\0" * 100,
    b"1" * 10_000,
    b'{"a":' + b"9" * 5000 + b"}",
    b"NaN",
    b"-",
    b"\xc3\x28",
    b'"\\ud800"',
]


REFUSED = {
    "image ids that are not whole": [
        ("images", 1, "id", v) for v in (True, 1.0, "1", None, -1, 2**53 + 1, [1])
    ],
    "one image id twice": [("images", 1, "id", 0)],
    "category ids that are not whole": [
        ("categories", 0, "id", v) for v in (True, 1.0, "1", 2**60, {})
    ],
    "one category id twice": [("categories", 0, "id", SCENES.category_ids[1])],
    "no width and height above 0": [
        ("images", 2, k, v)
        for k in ("width", "height")
        for v in (0, -5, 0.5, True, "9", None, float("nan"), 10**400)
    ],
    "has the name": [("categories", 1, "name", v) for v in (None, 5, ["a"])],
    "has the file name": [("images", 1, "file_name", v) for v in (None, 5, ["a"])],
    "which 'categories' does not list": [
        ("annotations", 3, "category_id", v) for v in (77, None, "1", [1], float("nan"), "x" * 5000)
    ],
    "has iscrowd": [("annotations", 3, "iscrowd", v) for v in ("0", 2, [], float("nan"))],
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_understood_is_refused_with_the_reason(folder, words):
    for part, n, key, value in REFUSED[words]:
        content = json.loads((folder / "a.json").read_text())
        content[part][n][key] = value
        (folder / "b.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=words) as told:
            open_set(folder, "b.json")
        assert len(str(told.value)) < 300 + len(str(folder))
    assert not (folder / "cache").exists()


def test_what_can_be_mended_is_read(folder):
    content = json.loads((folder / "a.json").read_text())
    for a, area in zip(content["annotations"], (None, "9", float("nan"), -3, [], 10**400)):
        a.update(area=area, iscrowd=None)
    (folder / "b.json").write_bytes(json.dumps(content).encode("utf-8-sig"))
    dataset = open_set(folder, "b.json")
    assert np.array_equal(dataset.areas[:6], dataset.boxes[:6, 2] * dataset.boxes[:6, 3])
    assert not dataset.crowd[:6].any()
    for a in content["annotations"]:
        a["image_id"] = str(a["image_id"])
    (folder / "b.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match='1 and "1" are different'):
        open_set(folder, "b.json")


def places_in(value, path=()):
    """List the paths to everything in nested lists and dictionaries."""
    children = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    return [path] * bool(path) + [
        p for key, child in children for p in places_in(child, (*path, key))
    ]


def mutate(content, rng):
    """Change, delete, repeat or exchange something somewhere."""
    places = places_in(content)
    *path, key = rng.choice(
        [p for p in places if len(p) == rng.choice([1, 2, 3, 3, 3, 4])] or places
    )
    parent = content
    for step in path:
        parent = parent[step]
    action = rng.choice(
        ["odd", "odd", "odd", "odd", "delete", "repeat", "exchange", "nest", "everywhere"]
    )
    if action == "odd":
        parent[key] = rng.choice(ODD)
    elif action == "delete":
        del parent[key]
    elif action == "repeat" and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), parent[key])
    elif action == "exchange":
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]
    elif action == "nest":
        for _ in range(rng.choice([1, 3, 100])):
            parent[key] = [parent[key]]
    elif action == "everywhere" and isinstance(key, str):
        value = rng.choice(ODD)
        for part in content.values():
            for entry in part if isinstance(part, list) else []:
                if isinstance(entry, dict) and key in entry and rng.random() < 0.7:
                    entry[key] = value


def mutated_file(content: bytes, seed: int) -> bytes:
    """Make the file of a seed: something else entirely, or with changed fields, or with changed
    bytes."""
    rng = random.Random(seed)
    if seed < len(TEXTS):
        return TEXTS[seed]
    if rng.random() < 0.75:
        data = json.loads(content)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            if data and isinstance(data, dict):
                mutate(data, rng)
        return json.dumps(data).encode()
    changed = bytearray(content)
    for _ in range(rng.choice([1, 2, 20])):
        at = rng.randrange(len(changed))
        action = rng.choice(["cut", "flip", "flip", "drop", "insert"])
        if action == "cut":
            changed = changed[: at + 1]
        elif action == "flip":
            changed[at] ^= 1 << rng.randrange(8)
        elif action == "drop":
            del changed[at : at + rng.randrange(1, 20)]
        else:
            changed[at:at] = rng.randbytes(rng.randrange(1, 5))
        if not changed:
            return b""
    return bytes(changed)


def use(dataset):
    """Ask a data set for everything that training and evaluation ask for."""
    truth, read = dataset.ground_truth(), 0
    json.dumps(truth, allow_nan=False)
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCO()
        judge.dataset = truth
        judge.createIndex()
    assert np.isfinite(dataset.boxes).all()
    assert (dataset.boxes[:, 2:] > 0).all()
    assert np.isfinite(dataset.areas).all()
    assert (np.diff(dataset.starts) >= 0).all()
    assert len(dataset) > 0
    assert len(dataset.starts) == len(dataset) + 1
    assert dataset.starts[-1] == len(dataset.labels) == len(dataset.crowd)
    assert (dataset.sizes >= 1).all()
    assert not len(dataset.labels) or 0 <= dataset.labels.min() <= dataset.labels.max() < len(
        dataset.class_names
    ) == len(dataset.category_ids)
    for i in range(len(dataset)):
        try:
            sample = Transformed(dataset, eval_transform(None), 1, 2)[i]
        except InputError as error:
            assert "a.json" in str(error) or "cannot be read as an image" in str(error)
        else:
            read += 1
            assert torch.isfinite(sample.boxes).all()
            assert len(sample.boxes) == len(sample.labels)
            assert type(sample.image_id) is int
            assert (
                sample.boxes.min() >= 0 and sample.boxes.max() <= 1 if len(sample.boxes) else True
            )
    return read


def test_whatever_an_annotation_file_contains_it_is_read_or_refused(folder):
    content = json.loads((folder / "a.json").read_text())
    content["images"] = content["images"][:4]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] < 4][:12]
    good, refused, read = json.dumps(content).encode(), {}, 0
    (folder / "a.json").write_bytes(good)
    assert use(open_set(folder)) == 4
    for seed in range(1000):
        (folder / "a.json").write_bytes(mutated_file(good, seed))
        begun = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                dataset = open_set(folder, cache=folder / "cache" if seed % 4 == 0 else None)
                use(dataset)
                read += 1
            except InputError as error:
                message = str(error)
                assert str(folder / "a.json") in message, seed
                assert len(message) < 500 + len(str(folder)), seed
                assert len(message.splitlines()) <= 2, seed
                refused[message.replace(str(folder), "")[:25]] = seed
            except Exception as error:
                raise AssertionError(f"mutation {seed}: {type(error).__name__}: {error}") from error
        assert time.perf_counter() - begun < 5, seed
    assert read > 150
    assert read < 700
    assert len(refused) >= 12, refused


# pixels and padding are those of the plain way


def test_numbers_of_pixels_and_batches_equal_the_plain_way():
    plain = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    images = [to_tensor()(SCENES[i][0].resize((90 + 7 * i, 120 - 5 * i))) for i in range(4)]
    for i, image in enumerate(images):
        assert torch.equal(image, plain(SCENES[i][0].resize((90 + 7 * i, 120 - 5 * i))))
        assert image.is_contiguous()
    samples = [
        Sample(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), i, (1, 1))
        for i, image in enumerate(images)
    ]
    batch = collate(samples)
    for n, image in enumerate(images):
        room = (
            0,
            batch.images.shape[3] - image.shape[2],
            0,
            batch.images.shape[2] - image.shape[1],
        )
        assert torch.equal(batch.images[n], pad(image, room))
        assert torch.equal(
            batch.pad_mask[n], pad(torch.zeros(image.shape[1:], dtype=torch.bool), room, value=True)
        )
    assert batch.images.shape == (4, 3, 120, 111)
