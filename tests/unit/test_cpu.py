"""The CPU's kernels compute what torch's own modules do, and only those that win are swapped in."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from query_detr.attention import Attention
from query_detr.batch import InputError
from query_detr.lab import cpu
from query_detr.model import QueryDETR


@pytest.fixture
def always(monkeypatch):
    """Let the kernels begin at any size."""
    monkeypatch.setattr(cpu, "MIN_MULTIPLICATIONS", 1)


def gradients(out, inputs):
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weight).sum(), inputs)


def draws_of(query, key, dropout):
    """Draw what `PiecewiseAttention` draws."""
    keep = torch.empty(*query.shape[:3], key.shape[1])
    for piece in cpu._pieces(query, key):
        keep[piece] = cpu.dropout_mask(keep[piece].shape, dropout)
    return keep.transpose(1, 2)


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("rows", [3, 10])  # weights computed again, and kept
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_in_pieces_equals_the_formula(monkeypatch, hides, rows, dropout):
    monkeypatch.setattr(cpu, "PIECE_WEIGHTS", rows * 4 * 7)
    sizes = (10, 6), (7, 6), (7, 3)
    query, key, value = (torch.randn(2, n, 4, d).requires_grad_() for n, d in sizes)
    assert len(cpu._pieces(query, key)) == 2 * (4 if rows == 3 else 1)
    bias = torch.zeros(2, 10, 4, 7)
    if hides:
        bias[..., 5:] = -torch.inf
    torch.manual_seed(1)
    out = cpu.PiecewiseAttention.apply(query, key, value, bias, dropout).transpose(1, 2)
    torch.manual_seed(1)
    keep = draws_of(query, key, dropout) if dropout else torch.ones(())
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    weights = (q @ k.mT / 6**0.5 + bias.transpose(1, 2)).softmax(-1)
    expected = (weights * keep * cpu.dropout_scale(dropout)) @ v
    assert torch.allclose(out, expected, atol=1e-6)
    inputs = query, key, value
    for of_pieces, of_formula in zip(
        gradients(out, inputs), gradients(expected, inputs), strict=True
    ):
        assert torch.allclose(of_pieces, of_formula, atol=1e-5)
    assert not dropout or 0 < keep.mean() < 1


KINDS = ["fp32", "fp64", "bf16", "nothing", "autocast", "slices", "compiled"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_layer_is_torchs(always, kind):
    dtype = dict(fp64=torch.float64, bf16=torch.bfloat16).get(kind, torch.float32)
    layer = cpu.ConvLinear(48, 20).to(dtype)
    rows = 0 if kind == "nothing" else 30
    x = torch.randn(2, rows, 64, dtype=dtype)[..., 8:56].requires_grad_()
    if kind == "slices":
        x = torch.randn(48, 30, 2).permute(2, 1, 0).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        run = torch.compile(layer, backend="eager") if kind == "compiled" else layer
        out = run(x)
    assert out.dtype == plain.dtype
    coarse = kind in ("bf16", "autocast")
    assert torch.allclose(out, plain, atol=2e-2 if coarse else 1e-5)
    inputs = (x, *layer.parameters())
    pairs = zip(gradients(out, inputs), gradients(plain, inputs), strict=True)
    for of_kernel, of_torch in pairs:
        assert torch.allclose(of_kernel, of_torch, rtol=1e-2 if coarse else 1e-4, atol=1e-3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images", [1, 2])
def test_a_convolution_may_write_over_and_read_any_memory_order(always, images, memory_format):
    layer = cpu.ConvLinear(8, 16)
    features = torch.randn(images, 8, 15, 17).to(memory_format=memory_format)
    tokens = features.flatten(2).transpose(1, 2)
    out = layer(tokens)
    expected = nn.functional.linear(tokens, layer.weight, layer.bias)
    assert torch.allclose(torch.relu_(out), expected.relu(), atol=1e-5)


def attention_modules(kind):
    """torch's module, ours with the same weights, and arguments for both."""
    inputs = [torch.randn(2, n, d, requires_grad=True) for n, d in ((30, 24), (40, 24), (40, 16))]
    padding = torch.arange(40) >= torch.tensor([[40], [25]])
    if kind == "Attention":
        return Attention(4), inputs, dict(visible=~padding[:, None, None])
    module = nn.MultiheadAttention(24, 4, batch_first=True)
    nn.init.normal_(module.in_proj_bias)
    inputs[2] = torch.randn(2, 40, 24, requires_grad=True)
    return module, inputs, dict(key_padding_mask=padding, need_weights=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Attention", "MultiheadAttention"])
def test_attention_is_torchs(always, kind, dtype):
    module, inputs, options = attention_modules(kind)
    coarse, outs = dtype == torch.bfloat16, []
    if dtype == torch.float64:
        module, inputs = module.double(), [x.detach().double().requires_grad_() for x in inputs]
    for swapped in (False, True):
        if swapped:
            cpu.swap([module])
        with torch.autocast("cpu", dtype, enabled=coarse):
            out = module(*inputs, **options)
        outs.append(out[0] if isinstance(out, tuple) else out)
    assert outs[0].dtype == outs[1].dtype
    assert torch.allclose(outs[0], outs[1], atol=5e-2 if coarse else 1e-5)
    parts = [*inputs, *module.parameters()]
    pairs = zip(gradients(outs[0], parts), gradients(outs[1], parts), strict=True)
    for of_torch, of_kernel in pairs:
        size = of_torch.abs().max()
        assert (of_torch - of_kernel).abs().max() < (5e-2 if coarse else 1e-4) * (1 + size)


def test_attention_that_hands_out_its_weights_stays_torchs(always):
    module, inputs, options = attention_modules("MultiheadAttention")
    cpu.swap([module])
    _, weights = module(*inputs, key_padding_mask=options["key_padding_mask"])
    assert weights.shape == (2, 30, 40)


def test_rows_are_laid_out_as_pictures_of_one_column():
    for rows in (1, 7, 16, 31, 100, 127, 600, 1700, 6600):
        pictures, channels, height, width = cpu._as_pictures(torch.zeros(rows, 3)).shape
        assert (pictures * height, channels, width) == (rows, 3, 1)
        assert pictures == 1 or 16 <= pictures <= 64


def test_dropout_draws_as_often_as_asked():
    keep = cpu.dropout_mask((1000, 4001), 0.1).float()
    error = (0.1 * 0.9 / keep.numel()) ** 0.5  # standard deviation of the share
    assert abs(keep.mean().item() - 0.9) < 5 * error
    lanes = keep.flatten()[:4000000].view(-1, 4).mean(0)  # four are cut from 64 random bits
    assert (lanes - 0.9).abs().max() < 10 * error


def test_dropout_keeps_means_and_drops_the_same_in_backward():
    drop, x = cpu.FastDropout(0.1), torch.ones(1000, 1000, requires_grad=True)
    out = drop(x)
    out.sum().backward()
    assert torch.equal(x.grad, out)
    assert abs(out.mean().item() - 1) < 0.002
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.9], rel=1e-4)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything_is_torchs(p):
    x = torch.ones(10, 10)
    assert torch.equal(cpu.FastDropout(p)(x), nn.Dropout(p)(x))


def test_the_same_seed_drops_the_same():
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(cpu.FastDropout(0.5)(torch.ones(100, 100)))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_dropped_attention_has_the_mean_of_attention_without_dropout():
    query, key, value = (torch.randn(1, n, 2, 4) for n in (5, 9, 9))
    draws = [cpu.PiecewiseAttention.apply(query, key, value, None, 0.2) for _ in range(4000)]
    by_head = (x.transpose(1, 2) for x in (query, key, value))
    plain = nn.functional.scaled_dot_product_attention(*by_head).transpose(1, 2)
    assert (torch.stack(draws).mean(0) - plain).abs().max() < 0.03


# --- swapping ---


@pytest.fixture
def model(small):
    return QueryDETR(replace(small, dropout=0.1))


def kinds(model):
    return {type(m) for m in model.modules()}


def test_all_kernels_go_in_and_out_again(model):
    before, names = [type(m) for m in model.modules()], list(model.state_dict())
    assert "as asked" in cpu.use_fast_kernels(model, images=2, cells=64, kernels="on")
    assert set(cpu.KERNELS.values()) <= kinds(model)
    assert not set(cpu.KERNELS) & kinds(model)
    assert list(model.state_dict()) == names
    cpu.use_torch_kernels(model)
    assert [type(m) for m in model.modules()] == before


def test_off_changes_nothing(model):
    before = [type(m) for m in model.modules()]
    assert cpu.use_fast_kernels(model, images=2, cells=64, kernels="off") == "CPU kernels: torch's"
    assert [type(m) for m in model.modules()] == before


def test_a_small_model_is_not_even_timed(model, monkeypatch):
    def fail(*_):
        raise AssertionError("timed")

    monkeypatch.setattr(cpu, "time_ratio", fail)
    before = [type(m) for m in model.modules()]
    said = cpu.use_fast_kernels(model, images=2, cells=64)
    assert said == "CPU kernels: torch is fastest here"
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("winner", ["cross-attention", "linear layers", "dropout"])
def test_only_what_wins_is_swapped(model, monkeypatch, winner):
    monkeypatch.setattr(cpu, "_reaches_kernels", lambda use: True)
    monkeypatch.setattr(cpu, "time_ratio", lambda use, dtype: 0.5 if use.name == winner else 1.5)
    said = cpu.use_fast_kernels(model, images=2, cells=64)
    assert said == f"CPU kernels: {winner} (0.50 of torch's time)"
    layer = model.decoder.layers[0]
    swapped = {
        "cross-attention": type(layer.cross_attention.attention) is cpu.AttentionInPieces,
        "linear layers": type(model.class_head) is cpu.ConvLinear,
        "dropout": type(layer.dropout) is cpu.FastDropout,
    }
    assert [name for name, is_swapped in swapped.items() if is_swapped] == [winner]
    assert type(layer.self_attention.attention) is Attention


def test_a_draw_is_no_win(model, monkeypatch):
    monkeypatch.setattr(cpu, "_reaches_kernels", lambda use: True)
    monkeypatch.setattr(cpu, "time_ratio", lambda use, dtype: 0.99)
    assert cpu.use_fast_kernels(model, 2, 64) == "CPU kernels: torch is fastest here"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_leaves_random_numbers_and_modules_alone(always, model, dtype):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    said = cpu.use_fast_kernels(model, images=1, cells=30, dtype=dtype)
    assert said.startswith("CPU kernels: ")
    assert torch.equal(torch.rand(1), expected)


def test_another_word_is_refused(model):
    with pytest.raises(InputError, match="kernels = fast: it must be measured, on or off"):
        cpu.use_fast_kernels(model, 1, 64, "fast")


def test_copies_keep_their_kernels_and_compute_the_same(always, model, images_and_padding):
    plain = model.eval()(*images_and_padding)
    cpu.use_fast_kernels(model, 1, 64, "on")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert set(cpu.KERNELS.values()) <= kinds(twin)
    out = twin(*images_and_padding)
    assert torch.allclose(out.logits, plain.logits, atol=1e-4)
    assert torch.allclose(out.boxes, plain.boxes, atol=1e-5)


@pytest.fixture
def images_and_padding():
    return torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
