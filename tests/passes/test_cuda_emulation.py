"""The text encoder under what CUDA is suspected to do: integer masks break it, the exported graph stands it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sa3_convert.check.inputs import sample_inputs
from sa3_convert.check.metrics import compare
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.components import Component
from sa3_convert.export.component import export_component
from sa3_convert.passes.hazards import find_hazards
from sa3_convert.passes.pipeline import apply_passes, load_onnx
from sa3_convert.recipe import ComponentRecipe
from tests.passes.cuda import Feeds, as_written, checked, on_cuda, with_published_masks
from tests.passes.graphs import run_ort

Load = Callable[[], ir.Model]


@pytest.fixture(scope="module")
def load(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Load:
    path = tmp_path_factory.mktemp("text-encoder") / "text_encoder.onnx"
    export_component(Checkpoint.open(toy), Component.TEXT_ENCODER, path)
    return lambda: ir.external_data.load_to_model(load_onnx(path))


@pytest.fixture(scope="module")
def feeds(toy: Path) -> Feeds:
    layout = Checkpoint.open(toy).layout
    return dict(sample_inputs(Component.TEXT_ENCODER, layout, seed=1, latents=1).feeds)


@pytest.fixture(scope="module")
def reference(load: Load, feeds: Feeds) -> np.ndarray:  # type: ignore[type-arg]
    return run_ort(load(), feeds)[0]


def ours(load: Load, *, grow: float = 1) -> ir.Model:
    model = load()
    grown(model, grow)
    apply_passes(model, Component.TEXT_ENCODER, ComponentRecipe(floor_db=1), target_mnn="3.0")
    return model


def grown(model: ir.Model, factor: float) -> None:
    """Make the gated products larger, as trained weights may."""
    for name, value in model.graph.initializers.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")) and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=name)


def prompt(feeds: Feeds) -> slice:
    return slice(0, int(feeds["attention_mask"].sum()))


def test_the_published_masks_change_nothing_where_integers_are_right(
    load: Load,
    feeds: Feeds,
    reference: np.ndarray,  # type: ignore[type-arg]
) -> None:
    model = load()
    assert with_published_masks(model) > 0
    assert compare(reference, as_written(checked(model), feeds)).signal_to_noise_db > 110


def test_the_published_masks_break_where_unary_operators_run_on_the_integers_bits(
    load: Load,
    feeds: Feeds,
    reference: np.ndarray,  # type: ignore[type-arg]
) -> None:
    model = load()
    with_published_masks(model)
    tokens = prompt(feeds)
    found = compare(reference[:, tokens], on_cuda(model, feeds)[:, tokens])
    assert found.cosine < 0.9


def test_the_exported_graph_stands_it(load: Load, feeds: Feeds, reference: np.ndarray) -> None:  # type: ignore[type-arg]
    tokens = prompt(feeds)
    found = compare(reference[:, tokens], on_cuda(ours(load), feeds)[:, tokens])
    assert found.signal_to_noise_db >= 60


def test_without_scaling_large_products_overflow(load: Load, feeds: Feeds) -> None:
    model = load()
    grown(model, 300)
    assert not np.isfinite(on_cuda(model, feeds)).all()


def test_with_scaling_they_do_not(load: Load, feeds: Feeds) -> None:
    model = load()
    grown(model, 300)
    (expected,) = run_ort(model, feeds)
    tokens = prompt(feeds)
    found = compare(expected[:, tokens], on_cuda(ours(load, grow=300), feeds)[:, tokens])
    assert found.signal_to_noise_db >= 60


def test_the_lint_refuses_the_published_masks_and_passes_ours(load: Load) -> None:
    model = ours(load)
    assert {hazard.severity for hazard in find_hazards(model, target_mnn="3.0")} <= {"info"}
