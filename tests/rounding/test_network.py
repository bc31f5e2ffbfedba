"""A whole network, rounded front to back: every linear keeps what helps on samples that it was not fitted on."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from sa3_convert.arrays import Floats
from sa3_convert.check.inputs import sample_inputs
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.components import Component
from sa3_convert.errors import ConversionError
from sa3_convert.export.component import export_component
from sa3_convert.ort import OrtSession
from sa3_convert.passes.pipeline import onnx_for_mnn
from sa3_convert.recipe import ComponentRecipe, LayerRule, Rounding, WeightScheme
from sa3_convert.rounding.compensated import RoundedLinear, Streams, round_blocks
from sa3_convert.rounding.grid import Grid, grid_for, round_least_squares
from sa3_convert.rounding.network import PlannedWeights, quantisable_layers, round_network
from tests.rounding.converter import round_as_converter

TEXT_ENCODER, DIT = Component.TEXT_ENCODER, Component.DIT


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


def recipe(rounding: Rounding = "error_compensated", *, layers: tuple[LayerRule, ...] = ()) -> ComponentRecipe:
    return ComponentRecipe(floor_db=1, weights=WeightScheme(bits=4, block_size=32, rounding=rounding, layers=layers))


@pytest.fixture(scope="module")
def rounded(checkpoint: Checkpoint) -> list[RoundedLinear]:
    return round_network(checkpoint, TEXT_ENCODER, recipe())


def test_every_linear_of_the_text_encoder_is_rounded_onto_its_grid(
    reference: Path, rounded: list[RoundedLinear]
) -> None:
    scheme = recipe().weights
    assert scheme is not None
    shapes = {layer.name: layer.shape for layer in quantisable_layers(ir.load(reference))}
    assert {linear.name: linear.weight.shape for linear in rounded} == shapes
    for linear in rounded:
        grid = grid_for(scheme, linear.name)
        assert grid is not None
        np.testing.assert_allclose(round_as_converter(linear.weight, grid), linear.weight, atol=1e-5, strict=True)


def test_a_linear_that_compensation_does_not_help_is_rounded_by_least_squares(
    checkpoint: Checkpoint, rounded: list[RoundedLinear]
) -> None:
    state = checkpoint.state(TEXT_ENCODER)
    assert any(linear.compensated for linear in rounded)
    for linear in rounded:
        plain = round_least_squares(state[f"{linear.name}.weight"].numpy(), Grid(4, False, 32))
        assert np.array_equal(linear.weight, plain) != linear.compensated


def test_the_text_encoder_comes_closer_than_by_least_squares_on_unseen_prompts(
    checkpoint: Checkpoint, reference: Path, rounded: list[RoundedLinear], tmp_path: Path
) -> None:
    samples = [sample_inputs(TEXT_ENCODER, checkpoint.layout, seed=seed, latents=0) for seed in range(16)]
    planned = PlannedWeights.write(tmp_path / "weights.safetensors", rounded)

    def outputs(path: Path) -> list[Floats]:
        session = OrtSession(path, threads=1)
        return [sample.regions[0].of(next(iter(session.run(sample.feeds).values()))) for sample in samples]

    expected = outputs(reference)
    shares = {}
    for rounding, weights in (("least_squares", None), ("error_compensated", planned)):
        target = tmp_path / rounding / "text_encoder.onnx"
        onnx_for_mnn(reference, target, TEXT_ENCODER, recipe(rounding), planned=weights)
        difference = zip(expected, outputs(target), strict=True)
        shares[rounding] = sum(float(np.square(a - b).sum() / np.square(a).sum()) for a, b in difference)
    assert shares["error_compensated"] < 0.9 * shares["least_squares"]


def test_the_dit_gets_the_linears_of_its_blocks_alone(checkpoint: Checkpoint) -> None:
    linears = round_network(checkpoint, DIT, recipe())
    names = {linear.name for linear in linears}
    assert names
    assert all(name.startswith("transformer.layers.") for name in names)
    blocks = {name for name in checkpoint.stored(DIT) if name.startswith("transformer.layers.")}
    linear_weights = {name.removesuffix(".weight") for name in blocks if len(checkpoint.stored(DIT)[name].shape) == 2}
    assert names == linear_weights


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_checkpoint_gives_the_same_weights_on_any_number_of_threads(
    checkpoint: Checkpoint, rounded: list[RoundedLinear], threads: int
) -> None:
    again = round_network(checkpoint, TEXT_ENCODER, recipe(), threads=threads)
    for one, other in zip(rounded, again, strict=True):
        np.testing.assert_array_equal(one.weight, other.weight, strict=True)


def test_a_layer_that_a_rule_keeps_in_floating_point_stays(checkpoint: Checkpoint) -> None:
    rule = LayerRule(match=r"self_attn\.", bits=None)
    names = [linear.name for linear in round_network(checkpoint, TEXT_ENCODER, recipe(layers=(rule,)))]
    assert names
    assert not any("self_attn" in name for name in names)


def test_compensation_that_does_not_help_elsewhere_is_dropped() -> None:
    torch.manual_seed(0)
    block, state = nn.Sequential(nn.Linear(64, 32, bias=False)), torch.randn(1, 1, 64)
    original = block[0].weight.detach().numpy().copy()
    # Fitted on one direction only, checked on all of them alike.
    fit, check = (Streams((x, ()), (x, ())) for x in (state, torch.eye(64)[None]))
    grid = Grid(bits=4, symmetric=False, block_size=None)
    with torch.no_grad():
        (linear,) = round_blocks({"block": block}, [fit], [check], lambda _: grid)
    assert not linear.compensated
    np.testing.assert_array_equal(linear.weight, round_least_squares(original, grid), strict=True)


def test_each_linear_runs_once_per_sample_in_either_network_and_stays_where_it_was() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 32))
    linears = [block[0], block[2], block[4]]
    states = [torch.randn(1, 8, 32) for _ in range(4)]
    samples = [Streams((state, ()), (state.clone(), ())) for state in states]
    runs = [0, 0, 0]

    def counted(position: int) -> None:
        def count(*_: object) -> None:
            runs[position] += 1

        linears[position].register_forward_hook(count)

    for position in range(3):
        counted(position)
    with torch.no_grad():
        rounded = list(round_blocks({"block": block}, samples[:3], samples[3:], lambda _: Grid(4, False, 16)))
        # Once to see which linears share their inputs; then per sample, in the original and in the rounded network.
        assert runs == [1 + 2 * len(samples)] * 3
        assert [block[0], block[2], block[4]] == linears
        for state, sample in zip(states, samples, strict=True):
            torch.testing.assert_close(sample.rounded[0], block(state), rtol=0, atol=0)
    for linear, one in zip(linears, rounded, strict=True):
        np.testing.assert_array_equal(linear.weight.detach().numpy(), one.weight, strict=True)


def test_a_recipe_that_needs_planned_weights_fails_without(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="rounds ahead"):
        onnx_for_mnn(reference, tmp_path / "out.onnx", TEXT_ENCODER, recipe())
    assert not (tmp_path / "out.onnx").exists()


def test_weights_planned_for_another_graph_are_refused(reference: Path, tmp_path: Path) -> None:
    stray = PlannedWeights.write(
        tmp_path / "weights.safetensors", [RoundedLinear("no.such.layer", np.zeros((2, 2), np.float32), 0.0)]
    )
    with pytest.raises(ConversionError, match=r"no\.such\.layer.*not for this graph"):
        onnx_for_mnn(reference, tmp_path / "out.onnx", TEXT_ENCODER, recipe(), planned=stray)


@pytest.mark.parametrize("content", [None, b"", b"no safetensors at all"])
def test_planned_weights_that_cannot_be_read_are_an_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConversionError, match="cannot be read"):
        PlannedWeights(path).names()
    with pytest.raises(ConversionError, match="cannot be read"):
        PlannedWeights(path).read("layer")
