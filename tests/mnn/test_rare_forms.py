"""Forms that our own conversions never have and other people's files may: written by MNN from its JSON form."""

from typing import Any

import numpy as np
import pytest

from sa3_convert.errors import ModelFileError
from sa3_convert.mnn.file.contents import ModelStorage, OperatorStorage
from sa3_convert.mnn.file.dequantise import dequantised_weight
from sa3_convert.mnn.file.storage import read_storage
from tests.mnn.converted import Converter

EIGHT = [1, 2, 3, 4, -5, 6, 7, 8]


def model(*operators: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the JSON form of a model with one input and these operators side by side."""
    source = {"main_type": "Input", "main": {"dims": [1, 4]}, "name": "x", "outputIndexes": [0], "type": "Input"}
    others = [
        {"inputIndexes": [0], "outputIndexes": [index], **operator} for index, operator in enumerate(operators, start=1)
    ]
    names = ["x", *(operator["name"] for operator in operators)]
    return {"oplists": [source, *others], "tensorName": names, "sourceType": "TFLITE", **more}


def convolution(name: str = "layer", kind: str = "Convolution", **main: Any) -> dict[str, Any]:
    common = {"outputCount": 2, "inputCount": 4}
    return {"main_type": "Convolution2D", "main": {"common": common, **main}, "name": name, "type": kind}


def read(converter: Converter, *operators: dict[str, Any], **more: Any) -> tuple[ModelStorage, OperatorStorage]:
    storage = read_storage(converter.from_json(model(*operators, **more)))
    return storage, storage.operators[1]


def test_an_inner_product_is_a_layer(converter: Converter) -> None:
    main = {"outputCount": 2, "weight": EIGHT, "bias": [1, 2]}
    operator = {"main_type": "InnerProduct", "main": main, "name": "layer", "type": "InnerProduct"}
    storage, found = read(converter, operator)
    assert found.weight is not None
    assert (found.weight.type, found.weight.shape) == ("fp32", (2, 4))
    assert [(parameter.role, parameter.elements) for parameter in found.parameters] == [("bias", 2)]
    np.testing.assert_array_equal(dequantised_weight(storage.path, "layer"), np.reshape(EIGHT, (2, 4)))


def test_a_three_dimensional_convolution_is_a_layer(converter: Converter) -> None:
    main = {"common": {"kernels": [1, 1, 2], "outputCount": 2}, "weight": EIGHT}
    _, found = read(converter, {"main_type": "Convolution3D", "main": main, "name": "layer", "type": "Convolution3D"})
    assert found.weight is not None
    assert found.weight.shape == (2, 2, 1, 1, 2)


def test_plain_int8_is_decoded_with_its_multiplier(converter: Converter) -> None:
    quantised = {"type": 4, "buffer": EIGHT, "alpha": [0.5, 0.25], "quantScale": 2.0}
    storage, found = read(converter, convolution(quanParameter=quantised))
    assert found.weight is not None
    assert (found.weight.type, found.weight.stored, found.weight.symmetric) == ("int8", "int8", True)
    expected = np.reshape(EIGHT, (2, 4, 1, 1)) * np.reshape([1, 0.5], (2, 1, 1, 1))
    np.testing.assert_array_equal(dequantised_weight(storage.path, "layer"), expected)


def test_the_oldest_int8_is_asymmetric_from_minus_128(converter: Converter) -> None:
    quantised = {"type": 4, "buffer": EIGHT, "alpha": [-1.0, 0.5, -2.0, 0.25], "quantScale": 0.0}
    storage, found = read(converter, convolution(quanParameter=quantised))
    assert found.weight is not None
    assert found.weight.symmetric is False
    expected = (np.reshape(EIGHT, (2, 4)) + 128) * np.array([[0.5], [0.25]]) + np.array([[-1.0], [-2.0]])
    np.testing.assert_array_equal(dequantised_weight(storage.path, "layer").reshape(2, 4), expected)


def test_a_layer_that_calculates_with_integers_is_seen_and_not_decoded(converter: Converter) -> None:
    integers = {"weight": EIGHT, "bias": [1, 2], "scale": [0.5, 0.25]}
    storage, found = read(converter, convolution(kind="ConvInt8", symmetricQuan=integers))
    assert found.weight is not None
    assert (found.weight.type, found.weight.activations_too) == ("int8", True)
    with pytest.raises(ModelFileError, match="calculates with integers"):
        dequantised_weight(storage.path, "layer")


def test_float_vectors_of_other_operators_are_parameters(converter: Converter) -> None:
    _, found = read(converter, {"main_type": "PRelu", "main": {"slope": [1, 2, 3]}, "name": "p", "type": "PReLU"})
    assert [(p.role, p.type, p.elements) for p in found.parameters] == [("slope", "fp32", 3)]


def test_tensors_of_a_recurrent_layer_are_parameters(converter: Converter) -> None:
    main = {"weightI": {"dims": [2, 1], "float32s": [1, 2]}, "bias": {"dims": [1], "float32s": [1]}}
    _, found = read(converter, {"main_type": "LSTM", "main": main, "name": "lstm", "type": "LSTM"})
    assert [parameter.elements for parameter in found.parameters] == [2, 1]


def test_subgraphs_are_read_with_tensor_names_of_their_own(converter: Converter) -> None:
    main = {"dims": [2], "dataType": "DT_INT64", "int64s": [1, 2]}
    node = {"main_type": "Blob", "main": main, "name": "k", "outputIndexes": [1], "type": "Const"}
    body = {"name": "body", "tensors": ["p", "q"], "nodes": [node]}
    storage, _ = read(converter, convolution(weight=EIGHT), subgraphs=[body])
    assert [(c.name, c.graph, c.type, c.shape) for c in storage.constants] == [("q", "body", "int64", (2,))]


def test_outputs_that_are_not_named_are_what_nothing_takes(converter: Converter) -> None:
    storage, _ = read(converter, convolution("one", weight=EIGHT), convolution("two", weight=EIGHT))
    assert [port.name for port in storage.outputs] == ["one", "two"]


@pytest.mark.parametrize(
    ("main", "fault"),
    [
        ({"weight": [1, 2, 3]}, "3 weights do not divide into 2 outputs"),
        ({"quanParameter": {"type": 3, "buffer": [1, 2, 3]}}, "no whole number of 2-byte weights"),
        ({"quanParameter": {"type": 4, "buffer": EIGHT}}, "int8 weights without scales"),
        ({"quanParameter": {"type": 4, "buffer": EIGHT, "alpha": [1, 2, 3], "quantScale": 1.0}}, "3 scales do not"),
        ({"quanParameter": {"type": 9, "buffer": EIGHT, "alpha": [1, 2]}}, r"stored in an unknown way \(9\)"),
        ({"quanParameter": {"type": 1, "buffer": [9, 0], "alpha": [1, 2]}}, "a weight has 9 dimensions"),
        ({"quanParameter": {"type": 1, "buffer": [2, 2, 0, 0, 0], "alpha": [1, 2]}}, "an empty dimension"),
        ({"quanParameter": {"type": 1, "buffer": [2, 2, 0, 4, 0], "alpha": [1, 2]}}, "ends before its own description"),
        (
            {"quanParameter": {"type": 1, "buffer": [2, 2, 0, 4, 0, 2, -1, 0, 5, 5], "alpha": [1, 2]}},
            "a weight of 8 elements should take 9 bytes and takes 10",
        ),
        ({"quanParameter": {"index": [1, 2], "alpha": [1], "weightSize": 8}}, "not one value per position"),
        ({"weight": EIGHT, "common": {"outputCount": 2, "kernelX": -1}}, r"with kernel \[1, -1\]"),
    ],
    ids=str,
)
def test_descriptions_that_contradict_the_data_are_told(converter: Converter, main: dict[str, Any], fault: str) -> None:
    path = converter.from_json(model(convolution(**main)))
    with pytest.raises(ModelFileError, match=fault):
        read_storage(path)


@pytest.mark.parametrize(
    ("blob", "fault"),
    [
        ({"dims": [3], "float32s": [1, 2]}, r"constant 'k', fp32 of shape \[3\], has 8 bytes"),
        ({"dims": [-1], "float32s": [1, 2]}, r"constant 'k' has the shape \[-1\]"),
        ({"dims": [1] * 17, "float32s": [1]}, "has the shape"),
    ],
)
def test_constants_that_contradict_their_shape_are_told(converter: Converter, blob: dict[str, Any], fault: str) -> None:
    path = converter.from_json(model({"main_type": "Blob", "main": blob, "name": "k", "type": "Const"}))
    with pytest.raises(ModelFileError, match=fault):
        read_storage(path)


def test_weights_in_a_file_of_another_name_are_told(converter: Converter) -> None:
    path = converter.from_json(model({**convolution(weight=EIGHT), "externalPath": "../elsewhere/other.weight"}))
    with pytest.raises(ModelFileError, match=r"other\.weight' instead of in model\.mnn\.weight"):
        read_storage(path)


def test_a_tensor_that_is_not_there_is_told(converter: Converter) -> None:
    path = converter.from_json(model({**convolution(weight=EIGHT), "inputIndexes": [7]}))
    with pytest.raises(ModelFileError, match="a tensor that is not among the 2"):
        read_storage(path)


def sparse(rows: int, columns: int, step: int) -> dict[str, Any]:
    """Return a sparse weight of one entry of value 1, `step` after the start; its shape is stored in 32 bits."""
    shape = [2, *rows.to_bytes(4, "little"), *columns.to_bytes(4, "little")]
    head = [*shape, 1, 0, 0, 0, 8, step, 2, 0, 1, 0x80]
    buffer = [byte - 256 if byte > 127 else byte for byte in head]
    alpha = [1.0, 2.0]
    return {"type": 2, "shapeInt32": True, "quantScale": 1.0, "buffer": buffer, "alpha": alpha}


def test_a_sparse_weight_is_zero_but_for_its_entries(converter: Converter) -> None:
    path = converter.from_json(model(convolution(quanParameter=sparse(2, 4, 6))))
    assert dequantised_weight(path, "layer").reshape(-1).tolist() == [0, 0, 0, 0, 0, 0, 2, 0]


def test_a_sparse_weight_with_an_entry_beyond_its_shape_is_told(converter: Converter) -> None:
    path = converter.from_json(model(convolution(quanParameter=sparse(2, 4, 200))))
    with pytest.raises(ModelFileError, match="entries beyond its shape"):
        dequantised_weight(path, "layer")


def test_a_sparse_weight_too_large_for_its_entries_is_told(converter: Converter) -> None:
    path = converter.from_json(model(convolution(quanParameter=sparse(2, 1 << 30, 6))))
    with pytest.raises(ModelFileError, match="a sparse weight of 2147483648 elements has 1 entries"):
        read_storage(path)


def test_positions_beyond_a_sparse_float_weight_are_told(converter: Converter) -> None:
    quantised = {"index": [0, 9], "alpha": [1.0, 2.0], "weightSize": 8}
    path = converter.from_json(model(convolution(quanParameter=quantised)))
    with pytest.raises(ModelFileError, match="entries beyond its shape"):
        dequantised_weight(path, "layer")


def test_an_indexed_value_that_the_codebook_lacks_is_told(converter: Converter) -> None:
    codebook = {"type": 1, "buffer": [2, 2, 0, 4, 0, 3, -1, 0, 1, -1, -1], "alpha": [1, 2], "quantScale": 1.0}
    path = converter.from_json(model(convolution(quanParameter=codebook)))
    with pytest.raises(ModelFileError, match="uses value 3 of 3"):
        dequantised_weight(path, "layer")
