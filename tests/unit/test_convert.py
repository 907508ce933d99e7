"""Weights of other libraries come in completely, go out again, and files that are not what they
should be are refused."""

import http.server
import os
import threading
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import CONFIGS, Golden
from safetensors.torch import save_file

from query_detr.batch import InputError
from query_detr.denoising import Denoising
from query_detr.features import ResNetBackbone
from query_detr.model import InferenceConfig, ModelConfig, QueryDETR
from query_detr.run.recipes import recipes
from query_detr.use import interop as convert
from query_detr.use.interop import (
    COCO_IDS,
    COCO_NAMES,
    convert_weights,
    import_model,
    read_weights,
    to_onnx,
    to_transformers,
)

KEYS = Path(__file__).parents[1] / "golden" / "keys"


# ---- key lists: every name of every library

# file → recipe whose model it is, origin, detections kept, end of inverse_sigmoid, names left out
FITTING = {
    "detrex_conditional_detr_r50": ("conditional_detr_50ep", "detrex", 300, 1e-3, 0),
    "detrex_group_detr_r50": ("group_detr_12ep", "detrex", 300, 1e-3, 0),
    "detrex_dab_detr_r50": ("dab_detr_50ep", "detrex", 300, 1e-3, 18),
    "detrex_dn_detr_r50": ("dn_detr_50ep", "detrex", 300, 1e-3, 18),
    "official_conditional_detr_r50": ("conditional_detr_50ep", "the authors' code", 100, 1e-5, 0),
    "official_group_detr_r50": ("group_detr_12ep", "the authors' code", 100, 1e-5, 0),
    "official_dn_detr_r50": ("dn_detr_50ep", "the authors' code", 300, 1e-3, 6),
    "hf_conditional_detr_r50": ("conditional_detr_50ep", "transformers", 100, 1e-5, 0),
    "hf_conditional_detr_r50_timm": ("conditional_detr_50ep", "transformers", 100, 1e-5, 0),
    "hf_v4_conditional_detr_r50_timm": ("conditional_detr_50ep", "transformers", 100, 1e-5, 0),
    "hf_dab_detr_r50": ("dab_detr_50ep", "transformers", 300, 1e-5, 6),
}


def shapes_of(name):
    lines = (KEYS / f"{name}.txt").read_text().splitlines()
    return {
        key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
        for key, shape in (line.split("\t") for line in lines)
    }


def first_of(key):
    """What a name that is stored twice is a copy of."""
    return (
        key.replace("transformer.decoder.bbox_embed", "bbox_embed")
        .replace("model.decoder.bbox_embed", "bbox_predictor")
        .replace("ffns.0.layers.0.1.", "ffns.0.activation.")
    )


@pytest.fixture(params=sorted(FITTING))
def listed(request):
    """A key list with weights of its shapes; every tensor is filled with a number of its own,
    rows of classes with the row's number behind the point."""
    shapes = shapes_of(request.param)
    number = {key: float(i) for i, key in enumerate(shapes)}
    weights = {key: torch.full(shape, number[first_of(key)]) for key, shape in shapes.items()}
    for key in weights:
        if shapes[key][0] in (80, 81, 91, 92):
            weights[key] += (torch.arange(shapes[key][0]) / 100).view(
                -1, *[1] * (len(shapes[key]) - 1)
            )
    return request.param, weights


def test_all_key_lists_are_here():
    assert {p.stem for p in KEYS.glob("*.txt")} == set(FITTING)


def test_a_key_list_is_converted_completely(listed):
    name, weights = listed
    recipe, origin, keep, eps, left_out = FITTING[name]
    got = convert_weights(weights)
    assert (got.origin, got.usage.keep, len(got.ignored)) == (origin, keep, left_out)
    assert got.config == replace(
        recipes[recipe].model, sigmoid_eps=eps, denoising=got.config.denoising
    )
    assert got.config.denoising.sets == (5 if "dn" in name else 0)
    with torch.device("meta"):
        own = QueryDETR(got.config).state_dict()
    assert {k: v.shape for k, v in own.items()} == {
        k: v.shape for k, v in got.weights.items()
    }  # every parameter filled
    used = set(
        torch.cat(
            [v.flatten()[:: max(1, v.numel() // 3 - 1)].floor() for v in got.weights.values()]
        )
        .int()
        .tolist()
    )
    consumed = set(weights) - set(got.ignored)
    assert used == {
        int(weights[key].flatten()[0]) for key in consumed
    }  # every name consumed or named as ignored
    assert all(first_of(key) != key and first_of(key) in consumed for key in got.ignored)


def test_91_ids_become_80_classes(listed):
    name, weights = listed
    got = convert_weights(weights)
    assert got.usage.class_names == COCO_NAMES
    assert len(COCO_NAMES) == 80
    ids = list(COCO_IDS) if not name.startswith("detrex") else list(range(80))
    assert ((got.weights["class_head.bias"] % 1) * 100).round().int().tolist() == ids
    if "dn" in name:
        assert ((got.weights["labels.table.weight"][:, 0] % 1) * 100).round().int().tolist() == [
            *ids,
            91 if ids[0] else 80,
        ]


def test_coco_ids_are_those_of_coco():
    assert (COCO_IDS[0], COCO_IDS[-1], len(COCO_IDS)) == (1, 90, 80)
    assert set(range(1, 91)) - set(COCO_IDS) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert (COCO_NAMES[0], COCO_NAMES[11], COCO_NAMES[-1]) == ("person", "stop sign", "toothbrush")


@pytest.mark.parametrize("stage, blocks, name", [(4, 6, "resnet50"), (4, 23, "resnet101")])
def test_arguments_and_depths_decide_what_names_do_not_say(stage, blocks, name):
    shapes = shapes_of("detrex_group_detr_r50")
    for i in range(6, blocks):
        shapes |= {k.replace("res4.5", f"res4.{i}"): v for k, v in shapes.items() if "res4.5" in k}
    weights = {k: torch.zeros(1).expand(v) for k, v in shapes.items()}
    config = convert_weights(weights, groups=1, dilation=True).config
    assert (config.backbone, config.groups, config.queries, config.dilation) == (
        name,
        1,
        3300,
        True,
    )
    with pytest.raises(InputError, match="groups = 7"):
        convert_weights(weights, groups=7)


# ---- golden numbers through the importer

TO_AUTHORS = {  # detrex → the authors, by hand, for this test alone
    ".attentions.0.attn.": ".self_attn.",
    ".ffns.0.layers.0.0.": ".linear1.",
    ".ffns.0.layers.1.": ".linear2.",
    ".ffns.0.activation.": ".activation.",
    ".norms.0.": ".norm1.",
    ".norms.1.": ".norm2.",
    ".norms.2.": ".norm3.",
    "post_norm_layer": "norm",
    "denoising_generator.label_encoder": "label_enc",
    "anchor_box_embed": "refpoint_embed",
    ".attentions.0.out_proj.": ".self_attn.out_proj.",
    ".attentions.1.out_proj.": ".cross_attn.out_proj.",
    **{
        f".attentions.{i}.{theirs}.": f".{short}_{name}."
        for i, short in ((0, "sa"), (1, "ca"))
        for theirs, name in (
            ("query_content_proj", "qcontent_proj"),
            ("query_pos_proj", "qpos_proj"),
            ("query_pos_sine_proj", "qpos_sine_proj"),
            ("key_content_proj", "kcontent_proj"),
            ("key_pos_proj", "kpos_proj"),
            ("value_proj", "v_proj"),
        )
    },
}


def as_authors(weights):
    def name(key):
        for theirs, new in TO_AUTHORS.items():
            key = key.replace(theirs, new)
        return key

    return {name(k): v for k, v in weights.items() if not k.endswith("ffns.0.layers.0.1.weight")}


def backbone_named(library):
    """A small ResNet under the names of detectron2 or of torchvision inside the authors' model."""
    weights = {f"backbone.{k}": v for k, v in ResNetBackbone("resnet10").state_dict().items()}
    detrex = {
        "stem.0.": "stem.conv1.",
        "stem.1.": "stem.conv1.norm.",
        "downsample.0": "shortcut",
        "downsample.1": "shortcut.norm",
        "bn1": "conv1.norm",
        "bn2": "conv2.norm",
        **{f"stages.{i}": f"res{i + 2}" for i in range(4)},
    }
    authors = {
        "backbone.": "backbone.0.body.",
        "stem.0": "conv1",
        "stem.1": "bn1",
        **{f"stages.{i}": f"layer{i + 1}" for i in range(4)},
    }
    for ours, theirs in (detrex if library == "detrex" else authors).items():
        weights = {k.replace(ours, theirs): v for k, v in weights.items()}
    return weights


@pytest.mark.parametrize("library", ["detrex", "the authors' code"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_golden_outputs_through_the_importer(name, library):
    golden = Golden(name)
    wide = torch.nn.functional.pad(
        golden.weights["input_proj.weight"], (0, 0, 0, 0, 0, 512 - 96)
    )  # a real backbone has more channels than the stored features
    weights = {**golden.weights, "input_proj.weight": wide}
    got = convert_weights(
        {**(weights if library == "detrex" else as_authors(weights)), **backbone_named(library)},
        groups=golden.config.groups,
        heads=4,
    )
    assert got.origin == library
    assert got.config.classes == 7
    assert got.config.backbone == "resnet10"
    assert got.usage.class_names == ()
    model = QueryDETR(
        replace(got.config, sigmoid_eps=1e-3)
    ).eval()  # with which the numbers were made
    model.load_state_dict(got.weights)
    features = torch.nn.functional.pad(golden["inputs/features"], (0, 0, 0, 0, 0, 512 - 96))
    with torch.no_grad():
        found = model.decode_predictions(golden.memory(model, features))
    assert (found.logits - golden["eval_official/logits"]).abs().max() < 2e-5
    assert (found.boxes - golden["eval_official/boxes"]).abs().max() < 2e-5


# ---- live against transformers


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers")
    library.utils.logging.disable_progress_bar()
    return library


def stir(model):
    """Move weights away from their first values, which leave much of a model silent, and
    statistics to where the activations are."""
    for name, parameter in model.named_parameters():
        if "backbone" in name:
            continue
        if "query_position" in name or "queries.embedding" in name:
            parameter.data.normal_()
        else:
            parameter.data.add_(
                torch.randn_like(parameter)
                * (0.2 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
            )
        if "input_projection.weight" in name or name == "project.weight":
            parameter.data.mul_(20)  # the features of an untrained backbone are faint
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def padded_pair():
    images, pad_mask = torch.randn(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
    pad_mask[1, :, 80:] = pad_mask[1, 70:] = True
    return images, pad_mask


@torch.no_grad()
def assert_equal(ours, theirs):
    images, pad_mask = padded_pair()
    found, expected = (
        ours(images, pad_mask),
        theirs(pixel_values=images, pixel_mask=(~pad_mask).long()),
    )
    assert expected.logits.std(1).mean() > 1e-3  # queries differ: the comparison is about something
    assert expected.pred_boxes.std(1).max() > 0.05
    assert (found.logits[-1] - expected.logits).abs().max() < 1e-4
    assert (found.boxes[-1] - expected.pred_boxes).abs().max() < 1e-4


SIZES = dict(
    encoder_layers=2,
    decoder_layers=3,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    num_queries=10,
    auxiliary_loss=False,
)


@pytest.mark.parametrize("backbone", ["transformers", "timm"])
@pytest.mark.parametrize("kind", ["ConditionalDetr", "DabDetr"])
def test_transformers_to_ours(transformers, kind, backbone):
    if backbone == "timm":
        pytest.importorskip("timm")
        described = transformers.TimmBackboneConfig(
            backbone="resnet18",
            features_only=True,
            use_pretrained_backbone=False,
            out_indices=[1, 2, 3, 4],
        )
    else:
        described = transformers.ResNetConfig(
            layer_type="bottleneck", depths=[3, 4, 6, 3], out_features=["stage4"]
        )
    sizes = dict(SIZES, d_model=32) if kind == "ConditionalDetr" else dict(SIZES, hidden_size=32)
    theirs = stir(
        getattr(transformers, f"{kind}ForObjectDetection")(
            getattr(transformers, f"{kind}Config")(
                **sizes, num_labels=91, backbone_config=described
            )
        )
    )
    got = convert_weights(theirs.state_dict(), heads=4)
    assert got.config.backbone == ("resnet18" if backbone == "timm" else "resnet50")
    assert got.config.classes == 80
    ours = QueryDETR(got.config).eval()
    ours.load_state_dict(got.weights)
    head = theirs.class_embed if kind == "DabDetr" else theirs.class_labels_classifier
    head.weight.data, head.bias.data = (
        head.weight.data[list(COCO_IDS)],
        head.bias.data[list(COCO_IDS)],
    )
    assert_equal(ours, theirs)


SMALL = ModelConfig(
    classes=5,
    queries=12,
    groups=3,
    width=32,
    heads=4,
    encoder_layers=2,
    decoder_layers=3,
    feedforward=64,
    dropout=0.0,
    backbone="resnet10",
    norm="batch",
    freeze_stem=False,
)
BOXES = replace(
    SMALL, reference="anchor", activation="prelu", temperature=20.0, scale_positions=True
)
EXPORTED = {
    "points, 3 groups": SMALL,
    "3 stages of ResNet-50": replace(SMALL, backbone="resnet50", stages=3, norm="frozen"),
    "DC5": replace(SMALL, backbone="resnet50", dilation=True),
    "anchors": BOXES,
    "anchors, positions not scaled, ReLU": replace(BOXES, scale_positions=False, activation="relu"),
    "DN-DETR": replace(BOXES, denoising=Denoising(sets=2)),
}


@pytest.mark.parametrize("name", list(EXPORTED))
def test_ours_to_transformers_and_back(transformers, name, tmp_path):
    if name == "DC5":
        pytest.importorskip("timm")
    config = EXPORTED[name]
    ours = stir(QueryDETR(config, InferenceConfig(tuple("abcde"))))
    if ours.labels:
        ours.labels.table.weight.data[-1].normal_()
    to_transformers(ours, tmp_path / "model")
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "model").eval()
    assert type(theirs).__name__ == (
        "DabDetrForObjectDetection"
        if config.reference == "anchor"
        else "ConditionalDetrForObjectDetection"
    )
    assert theirs.config.id2label == dict(enumerate("abcde"))
    assert not theirs.config.auxiliary_loss
    assert_equal(ours, theirs)
    back = import_model(
        tmp_path / "model"
    )  # as saved, which is under the names of version 4; config.json says the rest
    assert (back.config.heads, back.config.dilation, back.usage.class_names) == (
        4,
        config.dilation,
        tuple("abcde"),
    )
    assert back.config.denoising.sets == (5 if ours.labels else 0)
    assert_equal(back, theirs)


def test_pipeline_runs_on_an_export(transformers, tmp_path):
    from PIL import Image

    to_transformers(
        stir(QueryDETR(SMALL, InferenceConfig(tuple("abcde"), short_side=96, longest_side=128))),
        tmp_path,
    )
    detections = transformers.pipeline("object-detection", model=str(tmp_path))(
        Image.new("RGB", (200, 100), "red"), threshold=0.0
    )
    assert detections
    assert {d["label"] for d in detections} <= set("abcde")
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path)(
        Image.new("RGB", (200, 100)), return_tensors="pt"
    )["pixel_values"].shape == (1, 3, 64, 128)
    untouched = (
        transformers.ConditionalDetrImageProcessor
    )  # a model of short_side 0 is used at the size of the image
    to_transformers(QueryDETR(SMALL, InferenceConfig(short_side=0)), tmp_path)
    assert untouched.from_pretrained(tmp_path)(Image.new("RGB", (200, 100)), return_tensors="pt")[
        "pixel_values"
    ].shape == (1, 3, 100, 200)


@pytest.mark.parametrize(
    "change", [dict(norm="group"), dict(temperature=20.0), dict(scale_positions=True)]
)
def test_what_transformers_cannot_express_is_refused(transformers, change, tmp_path):
    with pytest.raises(InputError, match="transformers has no model with"):
        to_transformers(QueryDETR(replace(SMALL, **change)), tmp_path)


@pytest.mark.compiled
def test_onnx_takes_any_batch_and_size(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = stir(
        QueryDETR(
            replace(
                BOXES,
                denoising=Denoising(sets=2),
                encoder_layers=1,
                decoder_layers=2,
                stages=1,
                backbone_bf16=True,
            )
        )
    )
    to_onnx(model, tmp_path / "model.onnx")
    model.backbone.bf16 = False
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, height, width in ((1, 96, 128), (3, 130, 97), (2, 64, 200)):
        images, pad_mask = (
            torch.randn(batch, 3, height, width),
            torch.zeros(batch, height, width, dtype=torch.bool),
        )
        pad_mask[-1, :, width // 2 :] = True
        logits, boxes = session.run(
            ["logits", "boxes"], dict(images=images.numpy(), pad_mask=pad_mask.numpy())
        )
        with torch.no_grad():
            expected = model(images, pad_mask)
        assert abs(logits - expected.logits[-1].numpy()).max() < 1e-4
        assert abs(boxes - expected.boxes[-1].numpy()).max() < 1e-4


@pytest.mark.parametrize(
    "package, export", [("transformers", to_transformers), ("onnxscript", to_onnx)]
)
def test_a_missing_package_is_named(package, export, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(InputError, match=f"pip install .*{package}"):
        export(QueryDETR(SMALL), tmp_path / "there")


# ---- files


@pytest.fixture(scope="module")
def detector():
    """Weights of a small detrex model."""
    torch.manual_seed(0)
    golden = Golden("conditional_detr").weights
    return {**golden, "input_proj.weight": torch.randn(64, 512, 1, 1), **backbone_named("detrex")}


@pytest.mark.parametrize(
    "container",
    [
        lambda w: w,
        lambda w: dict(model=w, args=Namespace(lr=1e-4, device="cuda"), epoch=3),
        lambda w: dict(state_dict={f"module.{k}": v for k, v in w.items()}),
        lambda w: dict(ema_state=w),
    ],
)
@pytest.mark.parametrize("new_format", [True, False])
def test_weights_are_found_in_a_file(detector, container, new_format, tmp_path):
    torch.save(container(detector), tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    found = read_weights(tmp_path / "a.pth")
    assert found.keys() == detector.keys()
    assert all(torch.equal(found[k], detector[k]) for k in found)


def test_safetensors_and_folders_are_read(detector, tmp_path):
    save_file({k: v.contiguous() for k, v in detector.items()}, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert all(torch.equal(v, detector[k]) for k, v in read_weights(source).items())
    model = import_model(tmp_path, heads=4)
    assert not model.training
    assert torch.equal(model.class_head.weight, detector["class_embed.weight"])
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(InputError, match="cut off or damaged"):
        read_weights(tmp_path)


class Trap:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    "place",
    [
        lambda trap, w: dict(model=w, args=trap),
        lambda trap, w: dict(model=w, args=Namespace(inside=trap)),
        lambda trap, w: dict(model={**w, "x": trap}),
    ],
)
def test_code_in_a_file_never_runs(place, new_format, detector, tmp_path):
    made, file = tmp_path / "made", tmp_path / "trap.pth"
    torch.save(
        place(Trap(made), {"a": torch.zeros(1)}), file, _use_new_zipfile_serialization=new_format
    )
    with pytest.raises(
        InputError, match=r"trap.pth holds code \(posix.mkdir\), which is never run"
    ):
        read_weights(file)
    assert not made.exists()
    torch.load(file, weights_only=False)  # the trap works
    assert made.exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_a_truncated_file_is_refused(new_format, tmp_path):
    torch.save(
        dict(model={"a": torch.zeros(2000)}, args=Namespace(a=1)),
        tmp_path / "a.pth",
        _use_new_zipfile_serialization=new_format,
    )
    whole = (tmp_path / "a.pth").read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(InputError, match="cut.pth (cannot be read: it is cut off|is empty)"):
            read_weights(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"<!DOCTYPE html><html>Sign in", "is a web page"),
        (b"\n <html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "large file storage"),
        (b"hello", "not a file of weights"),
    ],
)
def test_what_is_no_file_of_weights_is_named(content, said, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(InputError, match=f"a.pth.* {said}"):
        read_weights(tmp_path / "a.pth")


def test_files_that_hold_something_else_are_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="list.pth holds no weights"):
        read_weights(tmp_path / "list.pth")
    with pytest.raises(InputError, match="none.pth does not exist"):
        read_weights(tmp_path / "none.pth")


def test_faults_in_names_and_shapes_are_counted_and_listed(detector):
    without = {
        k: v for k, v in detector.items() if ".decoder.layers.2." not in k or "proj" not in k
    }
    with pytest.raises(InputError) as missing:
        convert_weights(without, "a.pth", heads=4)
    line, remedy = str(missing.value).split("\n")
    gone = len(detector) - len(without)
    assert line.startswith(
        f"a.pth belongs to another model ({gone} missing: decoder.layers.2.self_attention."
    )
    assert line.count("decoder.layers.2.") == 10
    assert "detrex" in remedy
    with pytest.raises(InputError, match="1 unexpected: teacher.weight"):
        convert_weights({**detector, "teacher.weight": torch.zeros(1)}, heads=4)
    with pytest.raises(
        InputError, match=r"1 of another shape: box_head.layers.2.bias \(5,\) instead of \(4,\)"
    ):
        convert_weights({**detector, "bbox_embed.layers.2.bias": torch.zeros(5)}, heads=4)
    with pytest.raises(InputError, match="has none of the names") as foreign:
        convert_weights({f"key{i}": torch.zeros(1) for i in range(20)}, "a.pth")
    assert "20 names begin with\nkey0, key1, " in str(foreign.value)
    assert "key9" in str(foreign.value)
    assert "key10" not in str(foreign.value)
    for key in (
        "query_embed.weight",
        "backbone.res3.0.conv1.weight",
        "transformer.encoder.layers.0.ffns.0.layers.0.0.weight",
    ):
        with pytest.raises(InputError):
            convert_weights({k: v for k, v in detector.items() if k != key}, heads=4)


def test_a_copy_that_is_none_is_refused(detector):
    golden = {
        **Golden("dab_detr").weights,
        **backbone_named("detrex"),
        "input_proj.weight": torch.randn(64, 512, 1, 1),
    }
    convert_weights(golden, heads=4)
    golden["transformer.decoder.bbox_embed.layers.0.bias"] = golden["bbox_embed.layers.0.bias"] + 1
    with pytest.raises(InputError, match="heads of their own"):
        convert_weights(golden, heads=4)


def test_patterns_are_refused(transformers):
    theirs = transformers.DabDetrForObjectDetection(
        transformers.DabDetrConfig(
            **SIZES,
            hidden_size=32,
            num_patterns=3,
            backbone_config=transformers.ResNetConfig(
                layer_type="basic",
                depths=[1, 1, 1, 1],
                hidden_sizes=[64, 128, 256, 512],
                out_features=["stage4"],
            ),
        )
    )
    with pytest.raises(InputError, match="patterns"):
        convert_weights(theirs.state_dict(), heads=4)


class Interrupted(http.server.SimpleHTTPRequestHandler):
    """Serves one file with ranges; the first answer breaks off in the middle."""

    content, asked = b"", []

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-"))
        self.asked.append(start)
        self.send_response(206 if start else 200)
        (
            self.send_header("Content-Length", str(len(self.content) - start)),
            self.send_header("ETag", '"1"'),
        )
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
            )
        self.end_headers()
        self.wfile.write(
            self.content[start:] if len(self.asked) > 1 else self.content[: len(self.content) // 2]
        )

    def log_message(self, *args):
        pass


def test_an_address_is_downloaded_continued_and_kept(detector, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save(dict(model=detector), tmp_path / "a.pth")
    Interrupted.content, Interrupted.asked = (tmp_path / "a.pth").read_bytes(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Interrupted)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/some/a.pth?download=true"
        with pytest.raises(InputError, match="broke off"):
            read_weights(address)
        assert not list((tmp_path / "cache").rglob("*.pth"))  # nothing that looks whole
        assert read_weights(address).keys() == detector.keys()
        assert Interrupted.asked == [0, len(Interrupted.content) // 2]
        read_weights(address)
        assert len(Interrupted.asked) == 2  # it is here now
        assert import_model(address, heads=4).config.classes == 7
    finally:
        server.shutdown(), server.server_close()


def test_two_addresses_with_one_file_name_do_not_meet(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(convert, "fetch", lambda address, path: path)
    a, b = (
        convert.local_copy(f"https://example.org/{model}/model.safetensors?x=1") for model in "ab"
    )
    assert a != b
    assert a.name.endswith("-model.safetensors")
