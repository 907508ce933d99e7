"""AP is COCO's, to all published numbers of its own example and whatever engine computes it;
what else is told about detections agrees with counting one by one. (Perfect detections and
merged shards: chapter 33.)"""

import copy
import json
import sys
from dataclasses import astuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from query_detr.batch import Batch, InputError, Predictions, Targets
from query_detr.run import evaluate
from query_detr.run.evaluate import (
    METRICS,
    coco_evaluation,
    coco_metrics,
    duplicates,
    load_engine,
    metric_text,
    per_class,
    run_inference,
    text_table,
)
from query_detr.use.plots import read_metrics, show_run

PUBLISHED = (0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564)


@pytest.fixture
def example(pictures):
    """Ground truth and detections of the COCO API's demonstration."""
    folder = pictures / "cocoeval_fakebbox100"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    found = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    return truth, torch.tensor(
        [[d["image_id"], *d["bbox"], d["score"], d["category_id"]] for d in found],
        dtype=torch.float64,
    )


@pytest.fixture
def fast():
    """Skip where the fast engine is not installed."""
    pytest.importorskip("hotcoco")
    assert load_engine() != load_engine("pycocotools")


@pytest.mark.parametrize("engine", ["pycocotools", "hotcoco"])
def test_all_twelve_published_numbers_of_the_coco_example(example, engine):
    if engine == "hotcoco":
        pytest.importorskip("hotcoco")
    metrics = coco_metrics(*example, engine)
    assert np.round(list(metrics.values()), 3).tolist() == list(PUBLISHED)
    assert tuple(metrics) == METRICS
    assert metrics["AP"] == pytest.approx(0.5045806987, abs=1e-10)


def made_up(
    seed, images=12, categories=6, detections=40, score_digits=None, largest=180.0, crowds=0.1
):
    """A ground truth and detections: near objects, doubled, and anywhere; some images without
    objects, the last category without any."""
    rng = np.random.default_rng(seed)
    category_ids, image_ids = (
        np.sort(rng.choice(90, categories, replace=False) + 1),
        np.sort(rng.choice(10**6, images, replace=False) + 1),
    )
    annotations, rows = [], []
    for image in image_ids[:-2]:
        for _ in range(rng.integers(0, 8)):
            box = np.concatenate([rng.uniform(0, 400, 2), rng.uniform(4, largest, 2)])
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=int(image),
                    category_id=int(rng.choice(category_ids[:-1])),
                    bbox=box.tolist(),
                    area=float(box[2] * box[3] * rng.uniform(0.5, 1)),
                    iscrowd=int(rng.random() < crowds),
                )
            )
    for image in image_ids[1:]:  # the first image has no detections
        here = [a for a in annotations if a["image_id"] == image]
        for _ in range(detections):
            if here and rng.random() < 0.6:
                a = here[rng.integers(len(here))]
                box, category = (
                    np.array(a["bbox"])
                    + rng.normal(0, 0.06, 4) * np.array(a["bbox"])[[2, 3, 2, 3]],
                    a["category_id"],
                )
                box[2:] = np.abs(box[2:])
                if rng.random() < 0.2:
                    box = np.array(a["bbox"])  # IoU exactly 1
                if rng.random() < 0.1:
                    box[2] = a["bbox"][2] / 2  # near half of the object
            else:
                box, category = (
                    np.concatenate([rng.uniform(0, 400, 2), rng.uniform(1, largest, 2)]),
                    rng.choice(category_ids),
                )
            score = rng.random() if score_digits is None else round(rng.random(), score_digits)
            rows.append([image, *box, score, category])
    truth = dict(
        images=[dict(id=int(i), height=600, width=600) for i in image_ids],
        annotations=annotations,
        categories=[dict(id=int(c), name=f"class {c}") for c in category_ids],
    )
    return truth, torch.tensor(rows, dtype=torch.float64).reshape(-1, 7)


CASES = {
    "plain": dict(),
    "ties in scores": dict(score_digits=1),
    "all scores equal": dict(score_digits=0),
    "many crowds": dict(crowds=0.6),
    "only crowds": dict(crowds=1.0),
    "small objects only": dict(largest=12.0),
    "more than 100 detections of one class": dict(
        images=5, categories=2, detections=350, score_digits=2
    ),
    "one image with objects": dict(images=3),
    "no objects at all": dict(images=2),
}


@pytest.mark.parametrize("case", CASES)
def test_both_engines_give_the_same_bits(case, fast):
    sizes_missing, above_limit, in_crowds = 0, 0, 0
    for seed in range(12):
        truth, rows = made_up(seed, **CASES[case])
        judges = [coco_evaluation(truth, rows, engine) for engine in ("pycocotools", "hotcoco")]
        numbers = [evaluate.metrics_of(judge) for judge in judges]
        assert numbers[0] == numbers[1], seed
        for name in ("precision", "recall"):
            assert np.array_equal(judges[0].eval[name], judges[1].eval[name]), (seed, name)
        assert per_class(judges[0]) == per_class(judges[1])
        sizes_missing += sum(value == -1 for value in numbers[0].values())
        above_limit += int(
            (torch.unique(rows[:, [0, 6]], dim=0, return_counts=True)[1] > 100).sum()
        )
        in_crowds += sum(a["iscrowd"] for a in truth["annotations"])
    # the cases are what their names say
    if case in ("only crowds", "small objects only", "no objects at all"):
        assert sizes_missing
    if case.startswith("more than 100"):
        assert above_limit
    if case in ("plain", "many crowds", "only crowds"):
        assert in_crowds


def test_both_engines_agree_on_the_coco_example_and_on_its_parts(example, fast):
    truth, rows = example
    for image_share in (1, 2, 5):
        ids = [i["id"] for i in truth["images"]][::image_share]
        part = dict(
            truth,
            images=[i for i in truth["images"] if i["id"] in ids],
            annotations=[a for a in truth["annotations"] if a["image_id"] in ids],
        )
        of_part = rows[torch.isin(rows[:, 0], torch.tensor(ids, dtype=torch.float64))]
        judges = [coco_evaluation(part, of_part, engine) for engine in ("pycocotools", "hotcoco")]
        assert judges[0].stats.tolist() == judges[1].stats.tolist()
        assert per_class(judges[0]) == per_class(judges[1])


@pytest.mark.parametrize("engine", ["pycocotools", "hotcoco"])
def test_odd_input_is_judged_alike(engine):
    if engine == "hotcoco":
        pytest.importorskip("hotcoco")
    truth, rows = made_up(3)
    metrics, before = coco_metrics(truth, rows, engine), copy.deepcopy(truth)
    for first in range(0, 30, 3):  # the number 0 is an object like others
        from_zero = dict(
            truth,
            annotations=[
                dict(a, id=(a["id"] + first) % len(truth["annotations"]))
                for a in truth["annotations"]
            ],
        )
        assert coco_metrics(from_zero, rows, engine) == metrics
    marked = dict(
        truth, annotations=[dict(a, ignore=1) for a in truth["annotations"]]
    )  # COCO's judge looks at crowds only
    assert coco_metrics(marked, rows, engine) == metrics
    assert truth == before  # what was given is left as it was
    assert set(coco_metrics(truth, rows[:0], engine).values()) == {0.0}
    small = dict(truth, annotations=[dict(a, area=5.0) for a in truth["annotations"]])
    nothing = coco_metrics(small, rows[:0], engine)
    assert {name for name, value in nothing.items() if value == -1} == {
        "AP_medium",
        "AP_large",
        "AR_medium",
        "AR_large",
    }
    assert nothing["AP"] == 0
    rows[5, 3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        coco_metrics(truth, rows, engine)


def test_the_fast_engine_is_taken_if_it_is_there_and_new_enough(monkeypatch):
    pycocotools = load_engine("pycocotools")
    with pytest.raises(InputError, match="choose auto, pycocotools or hotcoco"):
        load_engine("fastest")
    for version, taken in (
        ("1.3.0", True),
        ("1.10.2", True),
        ("2.0.0rc1", True),
        ("1.2.9", False),
        ("0.5.0", False),
    ):
        other = SimpleNamespace(__version__=version, COCO=int, COCOeval=str)
        monkeypatch.setitem(sys.modules, "hotcoco", other)
        assert load_engine() == ((int, str) if taken else pycocotools), version
        if not taken:
            with pytest.raises(InputError, match="pip install"):
                load_engine("hotcoco")
    monkeypatch.setitem(
        sys.modules, "hotcoco", None
    )  # what Python does with a module that cannot be imported
    assert load_engine() == pycocotools
    with pytest.raises(InputError, match="pip install"):
        load_engine("hotcoco")


def test_ap_of_a_class_is_that_of_a_file_with_no_other():
    truth, rows = made_up(7)
    results = per_class(coco_evaluation(truth, rows, "pycocotools"))
    assert [r.name for r in results] == [c["name"] for c in truth["categories"]]
    for category, result in zip(truth["categories"], results):
        own = [a for a in truth["annotations"] if a["category_id"] == category["id"]]
        alone = coco_metrics(
            dict(truth, categories=[category], annotations=own),
            rows[rows[:, 6] == category["id"]],
            "pycocotools",
        )
        assert pytest.approx((alone["AP"], alone["AP50"]), abs=1e-12) == (result.AP, result.AP50)
        assert result.objects == sum(not a["iscrowd"] for a in own)
    assert results[-1].objects == 0
    assert results[-1].AP == results[-1].AP50 == -1
    assert np.mean([r.AP for r in results if r.AP >= 0]) == pytest.approx(
        coco_metrics(truth, rows, "pycocotools")["AP"], abs=1e-12
    )
    assert [
        line.split()[-1]
        for line in text_table(
            ("class", "objects", "AP", "AP50"), map(astuple, results)
        ).splitlines()
    ][-1] == "–"


def naive_duplicates(truth, rows, score, overlap):
    """Count one by one."""

    def iou(a, b):
        width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        return shared / (a[2] * a[3] + b[2] * b[3] - shared)

    times = {a["id"]: 0 for a in truth["annotations"] if not a["iscrowd"]}
    for image, *box, s, category in rows.tolist():
        rivals = [
            (iou(a["bbox"], box), -a["id"])
            for a in truth["annotations"]
            if not a["iscrowd"] and (a["image_id"], a["category_id"]) == (image, category)
        ]
        if s >= score and rivals and max(rivals)[0] >= overlap:
            times[-max(rivals)[1]] += 1
    found = [n for n in times.values() if n]
    return dict(
        objects_found=len(found) / len(times),
        detections_per_object=sum(found) / len(found) if found else -1,
    )


def test_duplicates_are_those_counted_one_by_one():
    seen = []
    for seed in range(8):
        for score, overlap in (
            (0.3, 0.49),
            (0.8, 0.7),
            (0.0, 0.1),
            (1.1, 0.51),
        ):  # made_up has boxes with an IoU of exactly 0.5
            truth, rows = made_up(seed, largest=300.0)
            seen.append(duplicates(truth, rows, score, overlap))
            assert seen[-1] == pytest.approx(naive_duplicates(truth, rows, score, overlap))
    assert any(s["detections_per_object"] > 1.5 for s in seen)
    assert seen[3] == dict(objects_found=0, detections_per_object=-1)
    truth, rows = made_up(0)
    single = [a for a in truth["annotations"] if not a["iscrowd"]]
    perfect = torch.tensor(
        [[a["image_id"], *a["bbox"], 1.0, a["category_id"]] for a in single], dtype=torch.float64
    )
    assert duplicates(truth, perfect) == dict(objects_found=1, detections_per_object=1)
    assert duplicates(truth, torch.cat([perfect, perfect[:5]])) == dict(
        objects_found=1, detections_per_object=1 + 5 / len(single)
    )
    assert duplicates(truth, rows[:0]) == dict(objects_found=0, detections_per_object=-1)
    assert duplicates(dict(truth, annotations=[]), rows) == dict(
        objects_found=-1, detections_per_object=-1
    )


class Counted(nn.Module):
    """Three layers of made-up predictions, and how often they were asked for."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images, pad_mask):
        self.calls += 1
        generator = torch.Generator().manual_seed(int(images.sum()))
        return Predictions(
            torch.randn(3, len(images), 6, 4, generator=generator),
            torch.rand(3, len(images), 6, 4, generator=generator),
        )


def test_every_layer_is_read_from_one_run_of_the_model():
    batches = [
        Batch(
            torch.full((2, 3, 4, 4), float(i)),
            torch.zeros(2, 4, 4, dtype=torch.bool),
            Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), (0, 0)),
            (2 * i, 2 * i + 1),
            torch.tensor([[40, 60], [80, 80]]),
        )
        for i in range(3)
    ]
    model = Counted().train()
    tables = run_inference(model, batches, (3, 5, 7, 9), keep=8, layers=range(3))
    assert model.calls == 3
    assert model.training
    assert [t.shape for t in tables] == [(48, 7)] * 3
    assert not torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[1], tables[2])
    for layer, table in enumerate(tables):
        assert torch.equal(
            run_inference(model, batches, (3, 5, 7, 9), keep=8, layers=[layer])[0], table
        )
    assert torch.equal(run_inference(model, batches, (3, 5, 7, 9), keep=8)[0], tables[-1])
    assert [t.shape for t in run_inference(model, [], (3, 5, 7, 9), layers=range(3))] == [
        (0, 7)
    ] * 3  # a process without images


def test_tables_write_what_could_not_be_measured_as_a_dash():
    assert (
        metric_text(0.12349),
        metric_text(0.0),
        metric_text(-1.0),
        metric_text(float("nan")),
    ) == ("0.123", "0.000", "–", "–")
    assert (
        text_table(("class", "objects", "AP"), [("a", 12, 0.5), ("longer", 0, -1.0)])
        == "class   objects     AP\na            12  0.500\nlonger        0      –"
    )


def write_run(folder, lines, rest=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)
    return folder


TRAINING = [dict(epoch=0, step=s, loss=20.0 - s, time=30.0 * s) for s in (1, 2, 3, 4)]
EVALUATION = [dict(epoch=1, step=4, seconds=2.0, time=130.0, AP=0.2, AP50=0.4, AP75=0.1)]


@pytest.mark.parametrize(
    "half", ['{"epoch": 1, "ste', '{"epoch": 1, "step": 5, "loss": 3.1', "{", "\0\0\0\0"]
)
def test_a_half_written_last_line_is_left_out(tmp_path, half):
    assert read_metrics(write_run(tmp_path / "run", TRAINING, half)) == TRAINING
    assert read_metrics(write_run(tmp_path / "new", [], half)) == []


def test_other_damage_to_a_log_is_named(tmp_path):
    folder = write_run(
        tmp_path / "run", TRAINING, '{"epoch": 1, "ste\n' + json.dumps(TRAINING[0]) + "\n"
    )
    with pytest.raises(InputError, match="metrics.jsonl: line 5 is damaged"):
        read_metrics(folder)
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere", "run/metrics.jsonl"):
        with pytest.raises(InputError, match="does not exist: name the folder of a run"):
            show_run(tmp_path / missing)
    with pytest.raises(InputError, match="no folder"):
        show_run()


def drawn(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.lines}


def test_runs_are_compared_by_their_folders(tmp_path):
    done = write_run(tmp_path / "done", TRAINING + EVALUATION)
    going_on = write_run(tmp_path / "going_on", TRAINING[:2], '{"epoch": 0, "st')
    begun = write_run(tmp_path / "begun", [])
    old = write_run(
        tmp_path / "old", [{k: v for k, v in r.items() if k != "time"} for r in TRAINING]
    )
    axes = show_run(done, str(going_on), begun, old)
    steps, minutes = [drawn(ax) for ax in axes[:, 0]]
    assert steps == dict(
        done=[[1, 19], [2, 18], [3, 17], [4, 16]],
        going_on=[[1, 19], [2, 18]],
        begun=[],
        old=[[1, 19], [2, 18], [3, 17], [4, 16]],
    )
    assert minutes == dict(
        done=[[0.5, 19], [1, 18], [1.5, 17], [2, 16]],
        going_on=[[0.5, 19], [1, 18]],
        begun=[],
        old=[],
    )
    assert axes[1, 0].get_xlabel() == "minutes"
    assert axes[0, 0].get_xlabel() == "step"
    assert [line.get_xydata().tolist() for line in axes[0, 1].lines] == [[[4, 0.2]], [], [], []]
    assert np.allclose(axes[1, 1].lines[0].get_xydata(), [[130 / 60, 0.2]])
    assert [text.get_text() for text in axes[0, 0].get_legend().get_texts()] == [
        "done",
        "going_on",
        "begun",
        "old",
    ]
    assert len({line.get_color() for line in axes[0, 0].lines}) == 4

    assert show_run(old).shape == (1, 2)  # nothing to draw against time
    alone = show_run(done)
    assert drawn(alone[0, 1]) == dict(AP=[[4, 0.2]], AP50=[[4, 0.4]], AP75=[[4, 0.1]])
    again = write_run(tmp_path / "other" / "done", TRAINING)
    assert list(drawn(show_run(done, again)[0, 0])) == [
        str(done),
        str(again),
    ]  # two folders of one name
