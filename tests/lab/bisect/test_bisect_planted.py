"""Whatever layer of a real component is broken, and however: the bisection names it."""

from pathlib import Path

import numpy as np
import pytest

from sa3_convert.check.inputs import sample_inputs
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.components import Component, components_of
from sa3_convert.convert.conversion import convert
from sa3_convert.convert.plan import ConvertRequest
from sa3_convert.lab.bisect.bisect import DEFAULT_LATENTS
from sa3_convert.recipe import Recipe
from tests.lab.bisect.planting import FAULTS, blames, layers, plant
from tests.lab.bisect.sessions import LAYOUT

DRAWS = range(20)


@pytest.mark.parametrize("draw", DRAWS)
def test_a_fault_in_any_layer_of_the_toy_dit_is_found(two_models: Path, tmp_path: Path, draw: int) -> None:
    random = np.random.default_rng(draw)
    model = two_models / "dit.mnn"
    layer = random.choice(np.array(layers(model), object))
    fault = FAULTS[draw % len(FAULTS)]
    plant(model, tmp_path / "dit.mnn", layer, fault)
    # With something to keep, so that the layers of the local conditioning have an input other than zero.
    feeds = sample_inputs(Component.DIT, LAYOUT, seed=2, latents=12).feeds
    found, verdict = blames(two_models / "reference" / "dit.onnx", tmp_path / "dit.mnn", layer, feeds)
    assert found, f"{fault} in {verdict}"


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    folder = tmp_path_factory.mktemp("full")
    synthesize(folder / "checkpoint", "small-music", size="full", seed=0)
    checkpoint = Checkpoint.open(folder / "checkpoint")
    parts = {c: {"weights": {"bits": 8}, "floor_db": 5} for c in Component}
    recipe = Recipe.model_validate({"schema": 1, "name": "int8", "description": "", "components": parts})
    request = ConvertRequest(checkpoint, recipe, folder / "int8", folder / "cache", with_reference=True, threads=2)
    convert(request, lambda event: None)
    return checkpoint, folder / "int8"


@pytest.mark.slow
def test_faults_in_true_size_models_are_found(full_size: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    checkpoint, bundle = full_size
    missed = []
    for draw, component in enumerate((*components_of(checkpoint.layout), *components_of(checkpoint.layout))):
        random = np.random.default_rng(draw)
        model, target = bundle / f"{component.value}.mnn", tmp_path / f"{component.value}.mnn"
        layer = random.choice(np.array(layers(model), object))
        plant(model, target, layer, FAULTS[draw % len(FAULTS)])
        feeds = sample_inputs(component, checkpoint.layout, seed=2, latents=DEFAULT_LATENTS[component]).feeds
        found, verdict = blames(bundle / "reference" / f"{component.value}.onnx", target, layer, feeds)
        if not found:
            missed.append(verdict)
    assert missed == []
