"""What the measurements claim, and that fast paths compute what plain ones do."""

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from query_detr import attention as layers
from query_detr.batch import InputError
from query_detr.lab import bench
from query_detr.lab.bench import (
    Workload,
    count,
    measure,
    measure_against,
    measure_growth,
    measure_matching,
)

TINY = Workload("shapes_group", features=(4, 5), boxes=3, threads=1)


def test_parts_of_a_step_add_up_to_it():
    found = measure(TINY, repeat=2, memory=False)
    parts = [part["least"] for name, part in found["step"].items() if name != "step"]
    assert {"encoder", "decoder", "matching", "loss", "backward", "optimiser", "step"} == set(
        found["step"]
    )
    assert 0 < sum(parts) <= found["step"]["step"]["most"]
    assert (
        found["rate"]["fp32"] > 1e9
        and found["operations"]["step"] > 2 * found["operations"]["inference"] > 0
    )
    assert "TFLOP/s" in bench.table(found)


def test_operations_are_those_of_the_formula():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    assert count(lambda: a @ b).operations == 2 * 3 * 5 * 7
    assert count(lambda: (a @ b).sum().backward()).operations == 2 * 2 * 3 * 5 * 7


def test_inference_of_groups_runs_what_a_single_group_runs():
    group, single = (
        count(bench.Subject(Workload(recipe, features=(4, 5), threads=1)).infer)
        for recipe in ("shapes_group", "shapes_demo")
    )
    training = [
        count(bench.Subject(Workload(recipe, features=(4, 5), threads=1)).step).operations
        for recipe in ("shapes_group", "shapes_demo")
    ]
    assert group.operators == single.operators and group.operations == single.operations
    assert training[0] > training[1]


def test_matching_finds_the_pairs_of_the_plain_way():
    found = measure_matching(
        Workload("shapes_group", threads=1), boxes=(1, 8, 40), repeat=1
    )  # 40: more objects than queries
    assert all(row["same"] for row in found["rows"]) and [
        row["boxes"] for row in found["rows"]
    ] == [1, 8, 40]


def test_wrong_pairs_are_noticed(monkeypatch):
    right = bench.match

    def other(*arguments):
        found = right(*arguments)
        found.query[0, 0] = (found.query[0, 0] + 1) % 25
        return found

    monkeypatch.setattr(bench, "match", other)
    assert not measure_matching(Workload("shapes_group", threads=1), boxes=(8,), repeat=1)["rows"][
        0
    ]["same"]


@pytest.mark.parametrize("recipe", ["shapes_demo", "shapes_dab"])
def test_twin_of_transformers_computes_the_same(recipe):
    pytest.importorskip("transformers")
    found = measure_against(Workload(recipe, features=(4, 5), boxes=3, threads=1), repeat=1)
    assert found["outputs_differ"] < 1e-4 and found["step"]["ratio"] > 0


def test_groups_have_no_twin():
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="--groups 1"):
        measure_against(TINY, repeat=1)


def test_growth_is_fitted():
    found = measure_growth(
        Workload("shapes_group", features=(4, 5), boxes=3, threads=1),
        "groups",
        repeat=1,
        memory=False,
    )
    assert found["sizes"] == [25 * k for k in (1, 3, 5, 11, 13)] and len(found["seconds"]) == 5
    assert "fit" in bench.table_growth(found)


def test_numbers_go_into_a_file(tmp_path, capsys):
    arguments = "--recipe shapes_group --features 4x5 --boxes 3 --threads 1 --matching --repeat 1 --device cpu --output".split()
    assert bench.command_line([*arguments, str(tmp_path / "found.json")]) == 0
    assert [row["boxes"] for row in json.loads((tmp_path / "found.json").read_text())["rows"]] == [
        20,
        60,
        100,
    ]
    assert "same pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", ["--matching --growth groups", "--boxes 0", "--recipe nothing", "--repeat 0"]
)
def test_mistakes_are_told_in_a_line(arguments, capsys):
    assert bench.command_line(arguments.split()) == 2
    assert capsys.readouterr().err.startswith("error: ")


def drawn(query, key, dropout):
    """Draw what `PiecewiseAttention` draws."""
    keep = torch.empty(*query.shape[:3], key.shape[1])
    for image, rows in layers.PiecewiseAttention.pieces(query, key):
        keep[image, rows] = layers.random_keep(keep[image, rows].shape, dropout)
    return keep.transpose(1, 2)


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("rows", [3, 10])  # weights computed again, and kept
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_in_pieces_equals_the_formula(monkeypatch, hides, rows, dropout):
    monkeypatch.setattr(layers, "PIECE", rows * 4 * 7)
    query, key, value = (
        torch.randn(2, n, 4, d).requires_grad_() for n, d in ((10, 6), (7, 6), (7, 3))
    )
    assert len(layers.PiecewiseAttention.pieces(query, key)) == 2 * (4 if rows == 3 else 1)
    bias = (
        torch.zeros(2, 1, 1, 7).masked_fill(torch.arange(7) > 4, -torch.inf).expand(2, 10, 4, 7)
        if hides
        else None
    )
    computed, weights = [], layers.PiecewiseAttention.weights
    monkeypatch.setattr(
        layers.PiecewiseAttention,
        "weights",
        lambda *piece: computed.append(piece) or weights(*piece),
    )
    torch.manual_seed(1)
    ours = layers.PiecewiseAttention.apply(query, key, value, bias, dropout).transpose(1, 2)
    torch.manual_seed(1)
    keep = drawn(query, key, dropout) if dropout else torch.ones(())
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    plain = (
        (q @ k.mT / 6**0.5 + (0 if bias is None else bias.transpose(1, 2))).softmax(-1)
        * keep
        * layers.keep_scale(dropout)
    ) @ v
    weight = torch.randn_like(plain)
    assert torch.allclose(ours, plain, atol=1e-6)
    for a, b in zip(
        *(torch.autograd.grad(out, (query, key, value), weight) for out in (ours, plain))
    ):
        assert torch.allclose(a, b, atol=1e-5)
    assert len(computed) == (16 if rows == 3 else 2)
    assert not dropout or 0 < keep.mean() < 1


@pytest.mark.parametrize(
    "kind", ["fp32", "fp64", "bf16", "nothing", "autocast", "slices", "compiled", "without oneDNN"]
)
def test_a_linear_layer_is_torchs(monkeypatch, kind):
    dtype = dict(fp64=torch.float64, bf16=torch.bfloat16).get(kind, torch.float32)
    monkeypatch.setattr(layers, "LARGE", 1)
    layer = layers.Linear(48, 20).to(dtype)
    x = (
        torch.randn(2, 0 if kind == "nothing" else 30, 64, dtype=dtype)[..., 8:56].requires_grad_()
        if kind != "slices"
        else torch.randn(48, 30, 2).permute(2, 1, 0).requires_grad_()
    )
    if kind == "without oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
        ours = (torch.compile(layer, backend="eager") if kind == "compiled" else layer)(x)
    assert (
        ours.dtype == plain.dtype and torch.allclose(ours, plain, atol=1e-5) and not ours._is_view()
    )
    for a, b in zip(
        *(
            torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))
            for out in (ours, plain)
        )
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("large", [1, 2**22])
def test_large_products_are_convolved_where_onednn_is(monkeypatch, large):
    called = []
    monkeypatch.setattr(
        layers,
        "conv2d",
        lambda *arguments, **options: called.append(1) or torch.conv2d(*arguments, **options),
    )
    monkeypatch.setattr(layers, "LARGE", large)
    query = torch.randn(1, 5, 8)
    layers.Linear(8, 8)(query), layers.attend(query, query, query, 2)
    assert len(called) == (3 if torch.backends.mkldnn.is_available() and large == 1 else 0)


def test_attention_in_pieces_is_torchs(monkeypatch):
    inputs = [torch.randn(2, n, d, requires_grad=True) for n, d in ((30, 24), (40, 24), (40, 16))]
    visible, found = (torch.arange(40) < torch.tensor([[40], [25]]))[:, None, None], []
    for large in (2**22, 1):
        monkeypatch.setattr(layers, "LARGE", large)
        out = layers.attend(*inputs, 4, visible)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_counted_rows_of_pictures_fit():
    for rows in (1, 7, 16, 31, 100, 127, 600, 1700, 6600):
        shape = layers._pictures(torch.zeros(rows, 3)).shape
        assert (
            shape[0] * shape[2] == rows
            and shape[1] == 3
            and (shape[0] == 1 or 16 <= shape[0] <= 64)
        )


def test_dropout_keeps_means_and_draws_as_often_as_asked():
    torch.manual_seed(0)
    keep = layers.random_keep((1000, 4001), 0.1).float()
    error = (0.1 * 0.9 / keep.numel()) ** 0.5  # standard deviation of the share
    assert abs(keep.mean().item() - 0.9) < 5 * error
    lanes = keep.flatten()[:4000000].view(-1, 4).mean(0)  # four are cut from 64 random bits
    assert (lanes - 0.9).abs().max() < 10 * error
    drop, x = layers.Dropout(0.1), torch.ones(1000, 1000, requires_grad=True)
    out = drop(x)
    out.sum().backward()
    assert (
        torch.equal(x.grad, out)
        and abs(out.mean().item() - 1) < 0.002
        and out.unique().tolist() == pytest.approx([0, 1 / 0.9], rel=1e-4)
    )
    assert torch.equal(drop.eval()(x), x)


def test_dropped_attention_has_the_mean_of_attention_without_dropout():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, 2, 4) for n in (5, 9, 9))
    many = torch.stack(
        [layers.PiecewiseAttention.apply(query, key, value, None, 0.2) for _ in range(4000)]
    )
    assert (
        many.mean(0).transpose(1, 2)
        - scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    ).abs().max() < 0.03


def test_the_same_seed_drops_the_same():
    x = torch.ones(100, 100)
    first, second, third = (torch.manual_seed(s) and layers.Dropout(0.5)(x) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)
