"""Error-compensated rounding from what calibration collected: kept only where it helps on other samples."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.components import Component
from sa3_convert.errors import ConversionError
from sa3_convert.export.component import export_component
from sa3_convert.ort import OrtSession
from sa3_convert.passes.pipeline import onnx_for_mnn
from sa3_convert.quantise.calibrate import CALIBRATION_SEED, CHECK_SEED, calibrate, calibration_samples
from sa3_convert.quantise.grid import Floats, Grid, round_least_squares
from sa3_convert.quantise.layers import quantisable_layers
from sa3_convert.quantise.moments import Calibration, local_energy
from sa3_convert.quantise.rounding import round_calibrated
from sa3_convert.recipe import ComponentRecipe, Rounding, WeightScheme
from sa3_convert.verify.inputs import sample_inputs

TEXT_ENCODER = Component.TEXT_ENCODER
GRID = Grid(bits=4, symmetric=False, block_size=None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint") / "toy"
    synthesize(folder, "small-music", "toy", 0, "gaussian")
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "text_encoder.onnx"
    export_component(checkpoint, TEXT_ENCODER, path)
    return path


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("moments") / "moments.safetensors"
    return calibrate(reference, TEXT_ENCODER, checkpoint, path, threads=1)


def four_bits(rounding: Rounding) -> ComponentRecipe:
    return ComponentRecipe(floor_db=1, weights=WeightScheme(bits=4, block_size=32, rounding=rounding))


def test_every_linear_has_moments_of_both_sets_that_differ(reference: Path, calibration: Calibration) -> None:
    layers = [layer for layer in quantisable_layers(ir.load(reference)) if layer.is_linear]
    assert layers
    for layer in layers:
        moments = calibration.of(layer.name)
        assert moments is not None
        fit, check = moments
        assert fit.shape == check.shape == (layer.shape[1], layer.shape[1])
        assert np.linalg.eigvalsh(fit).min() > -1e-3 * np.trace(fit)
        assert np.abs(fit - check).max() > 0


def test_samples_to_fit_on_and_to_check_with_have_no_seed_in_common(checkpoint: Checkpoint) -> None:
    fit, check = (
        {sample.name for sample in calibration_samples(TEXT_ENCODER, checkpoint, first_seed=seed)}
        for seed in (CALIBRATION_SEED, CHECK_SEED)
    )
    assert fit.isdisjoint(check)


def test_no_layer_is_worse_than_by_least_squares_on_samples_it_was_not_fitted_on(
    reference: Path, calibration: Calibration
) -> None:
    better = 0
    for layer in quantisable_layers(ir.load(reference)):
        moments = calibration.of(layer.name)
        assert moments is not None
        weight = layer.read()
        plain = local_energy(round_least_squares(weight, GRID) - weight, moments[1])
        chosen = local_energy(round_calibrated(weight, layer.name, GRID, calibration) - weight, moments[1])
        assert chosen <= plain
        better += chosen < plain
    assert better


def test_the_text_encoder_comes_closer_than_by_least_squares_on_unseen_prompts(
    checkpoint: Checkpoint, reference: Path, calibration: Calibration, tmp_path: Path
) -> None:
    samples = [sample_inputs(TEXT_ENCODER, checkpoint.layout, seed=seed, latents=0) for seed in range(16)]

    def outputs(path: Path) -> list[Floats]:
        session = OrtSession(path, threads=1)
        return [sample.regions[0].of(next(iter(session.run(sample.feeds).values()))) for sample in samples]

    expected = outputs(reference)
    shares = []
    for rounding in ("least_squares", "error_compensated"):
        target = tmp_path / rounding / "text_encoder.onnx"
        onnx_for_mnn(reference, target, TEXT_ENCODER, four_bits(rounding), calibration=calibration)
        difference = zip(expected, outputs(target), strict=True)
        shares.append(sum(float(np.square(one - other).sum() / np.square(one).sum()) for one, other in difference))
    least_squares, compensated = shares
    assert compensated < least_squares


def test_compensation_that_does_not_help_elsewhere_is_dropped(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((32, 64)).astype(np.float32)
    # Fitted on one direction only, checked on all of them alike.
    direction = random.standard_normal((64, 1)).astype(np.float32)
    fit = {"layer": 1000 * direction @ direction.T}
    misled = Calibration.write(tmp_path / "moments.safetensors", fit, {"layer": np.eye(64, dtype=np.float32)})
    chosen = round_calibrated(weight, "layer", GRID, misled)
    np.testing.assert_array_equal(chosen, round_least_squares(weight, GRID), strict=True)


def test_a_layer_without_moments_is_rounded_by_least_squares(calibration: Calibration) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    chosen = round_calibrated(weight, "no_such_layer", GRID, calibration)
    np.testing.assert_array_equal(chosen, round_least_squares(weight, GRID), strict=True)


def test_moments_that_layers_share_are_kept_once(tmp_path: Path) -> None:
    shared = np.eye(256, dtype=np.float32)
    layers = dict.fromkeys(("q", "k", "v"), shared)
    calibration = Calibration.write(tmp_path / "moments.safetensors", layers, layers)
    assert calibration.path.stat().st_size < 3 * shared.nbytes
    for layer in layers:
        moments = calibration.of(layer)
        assert moments is not None
        np.testing.assert_array_equal(moments[1], shared, strict=True)


def test_a_recipe_that_needs_calibration_fails_without(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="needs calibration"):
        onnx_for_mnn(reference, tmp_path / "out.onnx", TEXT_ENCODER, four_bits("error_compensated"))
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("content", [None, b"", b"no safetensors at all"])
def test_a_calibration_that_cannot_be_read_is_an_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConversionError, match="cannot be read"):
        Calibration(path).of("layer")
