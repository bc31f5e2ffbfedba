"""fp32 bundles of the golden checkpoints generate, on each engine, what the reference implementation generates."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.components import Component, contract
from sa3_convert.mnn.converter import mnn_from_onnx
from sa3_convert.recipe import ComponentRecipe
from sa3_convert.runtime.engines import EngineName, MnnEngine, OrtEngine, bundle_engine
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.system.checked_files import CheckedFile
from tests.bundles import Convert
from tests.conftest import Golden, assert_close_to_peak, load_golden
from tests.runtime.conftest import golden_request, open_parts, weights_of

ENGINES: list[EngineName] = ["mnn", "onnxruntime"]
FAMILIES = ["small", "base", "medium"]
BundleOf = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def bundle_of(converted: Convert, tmp_path_factory: pytest.TempPathFactory) -> BundleOf:
    made: dict[str, Bundle] = {}

    def bundle(weights: str) -> Bundle:
        if weights not in made:
            folder = tmp_path_factory.mktemp(weights)
            made[weights] = converted(load_golden(weights).checkpoint, "fp32", folder)[0].bundle
        return made[weights]

    return bundle


@pytest.fixture(scope="module")
def value_zeroing(tmp_path_factory: pytest.TempPathFactory) -> dict[EngineName, Path]:
    """DiTs of `small` with the other treatment of padding."""
    from sa3_convert.export.component import onnx_from_module
    from sa3_convert.networks.build import build_network

    checkpoint = Checkpoint.open(load_golden("small").checkpoint)
    folder = tmp_path_factory.mktemp("value_zeroing")
    state = checkpoint.state(Component.DIT)
    network = build_network(Component.DIT, checkpoint.layout, state, padding="value_zeroing")
    onnx_from_module(network, contract(Component.DIT, checkpoint.layout), folder / "dit.onnx")
    mnn_from_onnx(folder / "dit.onnx", folder / "dit.mnn", ComponentRecipe(floor_db=100))
    return {"mnn": folder / "dit.mnn", "onnxruntime": folder / "dit.onnx"}


def pipeline_of(family: str, bundle: Bundle, engine: EngineName, dit: Path | None = None) -> Pipeline:
    """Return a pipeline over a bundle, sampled as its family is, by default with the bundle's own DiT."""
    parts = open_parts(family)
    runner = bundle_engine(bundle, engine, {"threads": 2})
    assert isinstance(runner, MnnEngine | OrtEngine)
    if dit is not None:
        runner = dataclasses.replace(runner, files={**runner.files, Component.DIT: CheckedFile.read(dit)})
    return Pipeline(parts.layout, runner, parts.prompts, parts.bottleneck, keep_loaded=True)


def assert_golden(pipeline: Pipeline, golden: Golden, case: dict[str, Any]) -> None:
    result = pipeline.generate(golden_request(golden, case), allow=("clipping",))
    valid = result.report.lengths.valid
    assert_close_to_peak(result.report.latents[..., :valid], golden.tensors[case["latents"]][..., :valid], 1e-3)
    assert_close_to_peak(result.audio[None], golden.tensors[case["audio"]], 1e-3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_golden_generation_comes_out(family: str, engine: EngineName, bundle_of: BundleOf) -> None:
    golden = load_golden(family)
    cases = [case for case in golden.of("generate") if case["padding"] == "key_mask"]
    assert len(cases) == 5
    with pipeline_of(family, bundle_of(weights_of(family)), engine) as pipeline:
        for case in cases:
            assert_golden(pipeline, golden, case)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_dit_with_value_zeroing_gives_its_own_golden_generations(
    engine: EngineName, bundle_of: BundleOf, value_zeroing: dict[EngineName, Path]
) -> None:
    golden = load_golden("small")
    cases = [case for case in golden.of("generate") if case["padding"] == "value_zeroing"]
    assert len(cases) == 5
    with pipeline_of("small", bundle_of("small"), engine, value_zeroing[engine]) as pipeline:
        for case in cases:
            assert_golden(pipeline, golden, case)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pipeline_opens_a_bundle_by_its_folder(engine: EngineName, bundle_of: BundleOf) -> None:
    golden = load_golden("small")
    case = next(case for case in golden.of("generate") if case["padding"] == "key_mask")
    with Pipeline.from_bundle(bundle_of("small").path, engine, threads=2) as pipeline:
        assert_golden(pipeline, golden, case)
