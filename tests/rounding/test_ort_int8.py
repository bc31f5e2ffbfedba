import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.compare import verify_sessions
from sa3_convert.check.inputs import samples_for
from sa3_convert.components import Component
from sa3_convert.errors import ConversionError
from sa3_convert.ort import OrtSession
from sa3_convert.rounding import ort_int8
from sa3_convert.rounding.ort_int8 import FLOORS_DB, quantise_for_ort


@pytest.fixture(scope="module")
def quantised(toy_int8: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[Component, tuple[Path, Path, int]]:
    folder = tmp_path_factory.mktemp("quantised")
    made = {}
    for component in Component:
        reference = toy_int8.file(component, "onnx")
        target = folder / component.value / reference.name
        made[component] = (reference, target, quantise_for_ort(reference, target))
    return made


def floats(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    model = onnx.load(path)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name: array for name, array in arrays.items() if array.dtype == np.float32}


@pytest.mark.parametrize("component", list(Component))
def test_every_linear_of_many_rows_is_an_integer_product(
    component: Component, quantised: dict[Component, tuple[Path, Path, int]]
) -> None:
    reference, target, count = quantised[component]
    before, after = (onnx.load(path, load_external_data=False).graph for path in (reference, target))
    constants = {tensor.name for tensor in before.initializer}
    expected = sum(node.op_type == "MatMul" and node.input[1] in constants for node in before.node)
    assert sum(node.op_type == "MatMulInteger" for node in after.node) == expected == count
    assert (count == 0) == (component is Component.NUMBER_CONDITIONER)
    kinds = {tensor.name: tensor.data_type for tensor in after.initializer}
    weights = [node.input[1] for node in after.node if node.op_type == "MatMulInteger"]
    assert {kinds[name] for name in weights} <= {onnx.TensorProto.INT8}


@pytest.mark.parametrize("component", list(Component))
def test_whatever_is_not_a_linear_keeps_its_values(
    component: Component, quantised: dict[Component, tuple[Path, Path, int]]
) -> None:
    reference, target, _ = quantised[component]
    graph = onnx.load(reference, load_external_data=False).graph
    linears = {node.input[1] for node in graph.node if node.op_type in ("MatMul", "Gemm")}
    after = floats(target)
    kept = {name: array for name, array in floats(reference).items() if name not in linears}
    assert kept or component is Component.NUMBER_CONDITIONER
    for name, array in kept.items():
        np.testing.assert_array_equal(after[name], array)


@pytest.mark.parametrize("component", list(Component))
def test_the_integer_form_is_above_its_floor_and_is_not_the_reference(
    component: Component, quantised: dict[Component, tuple[Path, Path, int]], toy_int8: Bundle
) -> None:
    reference, target, count = quantised[component]
    openers = partial(OrtSession, reference, threads=2), partial(OrtSession, target, threads=2, optimise=True)
    samples = samples_for(component, toy_int8.layout, quick=True)
    result = verify_sessions(*openers, component, toy_int8.layout, samples)
    result.check_floor(FLOORS_DB[component])
    assert (result.worst.signal_to_noise_db < 60) == (count > 0)


def test_ports_are_those_of_the_reference(quantised: dict[Component, tuple[Path, Path, int]]) -> None:
    for reference, target, _ in quantised.values():
        before, after = OrtSession(reference, threads=1), OrtSession(target, threads=1, optimise=True)
        assert (before.inputs, before.outputs) == (after.inputs, after.outputs)


def test_only_the_model_and_its_weights_are_left_and_the_reference_as_it_was(
    quantised: dict[Component, tuple[Path, Path, int]],
) -> None:
    for reference, target, _ in quantised.values():
        assert {path.name for path in target.parent.iterdir()} == {target.name, target.name + ".data"}
        assert not list(reference.parent.glob("*infer*"))


def test_advice_of_the_quantiser_is_not_passed_on_and_other_messages_are(
    toy_int8: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantise_for_ort(toy_int8.file(Component.NUMBER_CONDITIONER, "onnx"), tmp_path / "x.onnx")
    # Our own log takes everything in, and is no message.
    assert [record for record in caplog.records if record.name != "sa3_convert"] == []
    logging.warning("something else")
    assert [record.message for record in caplog.records if record.name != "sa3_convert"] == ["something else"]


def test_a_quantiser_that_leaves_products_as_they_are_is_not_believed(
    toy_int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend(source: Path, target: Path, **_: object) -> None:
        shutil.copyfile(source, target)

    monkeypatch.setattr(ort_int8, "quantize_dynamic", pretend)
    with pytest.raises(ConversionError, match="0 integer products"):
        quantise_for_ort(toy_int8.file(Component.DIT, "onnx"), tmp_path / "dit.onnx")
