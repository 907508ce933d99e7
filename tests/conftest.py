"""What several test modules share."""

import os
from pathlib import Path

import jaxtyping
import pytest
import torch

GROUND_FLOOR = (
    *("boxes", "batch", "matcher", "losses", "attention", "features", "queries", "decoder"),
    *("layout", "denoising", "groups", "criterion", "model"),
)
MODULES = [f"query_detr.{name}" for name in GROUND_FLOOR]
jaxtyping.install_import_hook(MODULES, "typecheck.check")  # before query_detr is imported

from query_detr.lab import cpu
from query_detr.model import ModelConfig, QueryDETR

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    """Mark what stands in tests/system, so that -m "not system" leaves it out."""
    for item in items:
        if "system" in item.path.parts:
            item.add_marker(pytest.mark.system)


@pytest.fixture
def pictures():
    """Folder of real pictures that are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("the real pictures are not here")
    return SHARED


@pytest.fixture
def small():
    """Configuration of a model that runs in milliseconds."""
    return ModelConfig(
        classes=5,
        queries=12,
        width=32,
        heads=4,
        encoder_layers=1,
        decoder_layers=2,
        feedforward=64,
        dropout=0.0,
        backbone="resnet10",
        stages=3,
        norm="batch",
        freeze_stem=False,
    )


@pytest.fixture(autouse=True)
def quiet_and_repeatable():
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(autouse=True)
def shapes(request):
    """Verify shapes in annotations, except where a test compiles: a check cannot be traced."""
    unchecked = request.node.get_closest_marker("compiled") is not None
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", before or unchecked)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(params=["off", "on", "measured"])
def kernels(request, monkeypatch):
    """Let every new model compute with torch's modules, with the CPU's kernels, or as measured."""
    if request.param == "on":
        monkeypatch.setattr(cpu, "MIN_MULTIPLICATIONS", 1)
    build = QueryDETR.__init__

    def build_and_swap(self, *arguments, **options):
        build(self, *arguments, **options)
        cpu.use_fast_kernels(self, images=2, cells=64, kernels=request.param)

    if request.param != "off":
        monkeypatch.setattr(QueryDETR, "__init__", build_and_swap)
    return request.param
