"""All components of the golden checkpoints, exported, rewritten, converted and run."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.components import Component, Contract, contract
from sa3_convert.export.component import export_component
from sa3_convert.ort import OrtSession
from sa3_convert.passes.hazards import find_hazards
from sa3_convert.passes.pipeline import PassReport, load_onnx, onnx_for_mnn
from sa3_convert.recipe import ComponentRecipe
from tests.conftest import GOLDEN
from tests.passes.graphs import convert, run_file, signal_to_noise_db

Exported = Callable[[str, Component], Path]
FAMILIES = ("small", "medium")
EVERY = [(family, component) for family in FAMILIES for component in Component]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("reference")

    @cache
    def export(family: str, component: Component) -> Path:
        path = folder / family / f"{component.value}.onnx"
        path.parent.mkdir(exist_ok=True)
        export_component(Checkpoint.open(GOLDEN / family / "checkpoint"), component, path)
        return path

    return export


def ports(family: str, component: Component) -> Contract:
    return contract(component, Checkpoint.open(GOLDEN / family / "checkpoint").layout)


def feeds_for(family: str, component: Component, latents: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    feeds: dict[str, NDArray[Any]] = {}
    for port in ports(family, component).inputs:
        shape = port.concrete(latents)
        fixed = {"t": 0.77, "seconds": 173.3, "padding_mask": 1.0}
        if port.name == "input_ids":
            feeds[port.name] = rng.integers(1, 300, shape).astype(np.int32)
        elif port.name == "attention_mask":
            feeds[port.name] = (np.arange(shape[1]) < 9).astype(np.int32)[None]
        else:
            feeds[port.name] = np.full(shape, fixed.get(port.name, 0), np.float32)
            if port.name not in fixed:
                feeds[port.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def fidelity_db(
    family: str, component: Component, reference: Path, folder: Path, keys: dict[str, Any], *flags: str
) -> tuple[PassReport, float]:
    prepared = folder / "prepared.onnx"
    report = onnx_for_mnn(reference, prepared, component, ComponentRecipe.model_validate({"floor_db": 1, **keys}))
    onnx.checker.check_model(str(prepared), full_check=True)
    convert(prepared, folder / "target.mnn", *flags)
    name = ports(family, component).outputs[0].name
    feeds = feeds_for(family, component, 22)
    (target,) = run_file(folder / "target.mnn", feeds, [name])
    expected = OrtSession(reference).run(feeds)[name]
    return report, signal_to_noise_db(expected, target.reshape(expected.shape))


@pytest.mark.parametrize(("family", "component"), EVERY)
def test_exported_graphs_have_no_hazards_after_the_passes(
    family: str, component: Component, exported: Exported, tmp_path: Path
) -> None:
    target = tmp_path / "prepared.onnx"
    chosen = ComponentRecipe(floor_db=1, floats="fp16")
    onnx_for_mnn(exported(family, component), target, component, chosen, target_mnn="3.0")
    assert find_hazards(load_onnx(target), target_mnn="3.0") == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("component", [Component.DECODER, Component.ENCODER])
def test_the_weight_norm_of_the_autoencoder_is_fused(
    family: str, component: Component, exported: Exported, tmp_path: Path
) -> None:
    report, fidelity = fidelity_db(family, component, exported(family, component), tmp_path, {})
    assert report.counts()["fuse_weight_norm"] == 1
    names = set(load_onnx(tmp_path / "prepared.onnx").graph.initializers)
    assert not any(name.endswith(("weight_v", "weight_g")) for name in names)
    assert fidelity > 110


@pytest.mark.parametrize(("family", "component"), EVERY)
def test_float16_models_stay_close(family: str, component: Component, exported: Exported, tmp_path: Path) -> None:
    # Rounding every weight to 11 bits is 73.8 dB a layer; a dozen layers in a row are 11 dB more.
    _, fidelity = fidelity_db(family, component, exported(family, component), tmp_path, {"floats": "fp16"}, "--fp16")
    assert fidelity > 60


def test_the_flag_alone_ruins_a_dit(exported: Exported, tmp_path: Path) -> None:
    reference = exported("small", Component.DIT)
    _, fidelity = fidelity_db("small", Component.DIT, reference, tmp_path, {}, "--fp16")
    assert fidelity < 20


@pytest.mark.parametrize("family", FAMILIES)
def test_phases_of_the_dit_are_kept(family: str, exported: Exported, tmp_path: Path) -> None:
    reference, target = exported(family, Component.DIT), tmp_path / "dit.onnx"
    report = onnx_for_mnn(reference, target, Component.DIT, ComponentRecipe(floor_db=1, floats="fp16"))
    # The timestep's frequencies and 2π, and the rotary positions' frequencies.
    assert report.counts()["make_fp16_safe"] == 3


@pytest.mark.parametrize(("kind", "least_db"), [("int8", 36), ("int4", 14)])
def test_the_text_encoder_works_on_a_quantised_table(
    kind: str, least_db: float, exported: Exported, tmp_path: Path
) -> None:
    reference = exported("small", Component.TEXT_ENCODER)
    report, fidelity = fidelity_db("small", Component.TEXT_ENCODER, reference, tmp_path, {"embedding": kind})
    assert report.counts()["quantise_embedding"] == 1
    assert fidelity > least_db
