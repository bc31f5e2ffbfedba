"""What a file stores stands for exactly the numbers that MNN multiplies with."""

from pathlib import Path

import numpy as np
import pytest

from sa3_convert.errors import ModelFileError, UsageError
from sa3_convert.mnn.file.dequantise import dequantised_weight
from sa3_convert.mnn.file.flatbuffer import weight_path
from sa3_convert.mnn.file.storage import read_storage
from tests.mnn.constants import constant_values
from tests.mnn.converted import Converter, convolution_graph, gaussian, linear_graph, what_mnn_multiplies_with

IN, OUT = 128, 96
LAYER = "y__matmul_converted"

SYMMETRIC = "--weightQuantAsymmetric=0"


def quantised(bits: int, *more: str) -> tuple[str, ...]:
    return ("--weightQuantBits", str(bits), *more)


GRIDS = [
    *[quantised(bits) for bits in range(2, 9)],
    *[quantised(bits, SYMMETRIC) for bits in range(2, 9)],
    *[quantised(4, "--weightQuantBlock", str(block)) for block in (16, 32, 64)],
    *[quantised(6, SYMMETRIC, "--weightQuantBlock", str(block)) for block in (16, 32, 64)],
    quantised(4, "--weightQuantBlock", "32", "--weightQuantScaleBit", "16"),
    quantised(8, SYMMETRIC, "--weightQuantScaleBit", "16"),
    quantised(5, "--saveExternalData=1"),
]
OTHERS = [
    (),
    ("--fp16",),
    ("--saveExternalData=1",),
    quantised(4, "--weightQuantBlock", "32", "--hqq"),
]


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return gaussian(IN, OUT)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory, weight: np.ndarray) -> Path:
    return linear_graph(tmp_path_factory.mktemp("graph") / "linear.onnx", weight)


@pytest.fixture(scope="module")
def sparse_weight(weight: np.ndarray) -> np.ndarray:
    mostly_zero = weight.copy()
    mostly_zero[np.random.default_rng(0).random(weight.shape) < 0.95] = 0
    return mostly_zero


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory, sparse_weight: np.ndarray) -> Path:
    return linear_graph(tmp_path_factory.mktemp("graph") / "sparse.onnx", sparse_weight)


@pytest.mark.parametrize("flags", [*GRIDS, *OTHERS], ids=" ".join)
def test_decoded_weights_are_bit_for_bit_what_mnn_multiplies_with(
    converter: Converter, linear: Path, flags: tuple[str, ...]
) -> None:
    model = converter(linear, *flags)
    decoded = dequantised_weight(model, LAYER)
    assert decoded.shape == (OUT, IN, 1, 1)
    np.testing.assert_array_equal(decoded[:, :, 0, 0].T, what_mnn_multiplies_with(model, IN), strict=True)


@pytest.mark.parametrize("flags", GRIDS, ids=" ".join)
def test_no_decoded_weight_is_further_than_half_a_step_from_the_original(
    converter: Converter, linear: Path, weight: np.ndarray, flags: tuple[str, ...]
) -> None:
    model = converter(linear, *flags)
    (stored,) = [found for _, found in read_storage(model).weighted()]
    rows = weight.T.reshape(stored.rows, -1)
    reach = np.abs(rows).max(axis=1) if stored.symmetric else rows.max(axis=1) - rows.min(axis=1)
    step = reach / (2 ** (stored.bits - 1) - 1 if stored.symmetric else 2**stored.bits - 1)
    # Scales of 16 bits are rounded by up to 2⁻¹¹, the largest weight is that much of itself away.
    slack = np.abs(rows).max() * (2**-10 if stored.scale_type == "fp16" else 2**-22)
    error = np.abs(dequantised_weight(model, LAYER).reshape(rows.shape) - rows)
    assert (error <= step[:, None] / 2 + slack).all()


def test_float_weights_come_back_unchanged(converter: Converter, linear: Path, weight: np.ndarray) -> None:
    decoded = dequantised_weight(converter(linear), LAYER)
    np.testing.assert_array_equal(decoded[:, :, 0, 0].T, weight, strict=True)


@pytest.mark.parametrize(
    ("flags", "stored"),
    [
        (("--detectSparseSpeedUp",), "sparse_float"),
        (("--detectSparseSpeedUp", "--saveExternalData=1"), "sparse_float"),
        (quantised(4, "--detectSparseSpeedUp"), "sparse_codebook"),
        (quantised(4, "--detectSparseSpeedUp", SYMMETRIC), "sparse_codebook"),
    ],
    ids=str,
)
def test_sparse_weights_decode_to_what_mnn_multiplies_with(
    converter: Converter, sparse: Path, flags: tuple[str, ...], stored: str
) -> None:
    model = converter(sparse, *flags)
    weights = [found.stored for _, found in read_storage(model).weighted()]
    assert weights == [stored]
    decoded = dequantised_weight(model, LAYER)[:, :, 0, 0].T
    np.testing.assert_array_equal(decoded, what_mnn_multiplies_with(model, IN), strict=True)


@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("flags", [(), ("--fp16",), quantised(8), quantised(3, SYMMETRIC)], ids=str)
def test_a_convolutions_weight_has_the_shape_and_order_of_its_onnx_weight(
    converter: Converter, tmp_path: Path, flags: tuple[str, ...], groups: int
) -> None:
    kernel = gaussian(32, 64 // groups if groups == 1 else 1, 3)
    model = converter(convolution_graph(tmp_path / "convolution.onnx", kernel, groups), *flags)
    decoded = dequantised_weight(model, "y")
    assert decoded.shape == (*kernel.shape[:2], 3, 1)
    # The converter's own FP16 truncates.
    step = np.abs(kernel).max() * {0: 2**-9, 8: 2 / 255, 3: 1 / 3}[int(flags[1]) if len(flags) > 1 else 0]
    assert np.abs(decoded[..., 0] - kernel).max() <= step / 2 * 1.001


def test_a_block_is_a_run_of_input_channels_with_their_whole_kernels(converter: Converter, tmp_path: Path) -> None:
    kernel = gaussian(32, 64, 3)
    kernel[:, :16] *= 100
    graph = convolution_graph(tmp_path / "convolution.onnx", kernel)
    decoded = dequantised_weight(converter(graph, *quantised(8, "--weightQuantBlock", "16")), "y")[..., 0]
    small = kernel[:, 16:]
    assert np.abs(decoded[:, 16:] - small).max() <= (small.max() - small.min()) / 255


def test_constants_come_back_as_stored(converter: Converter, mixed: Path) -> None:
    table = gaussian(300, 64, seed=1)
    np.testing.assert_array_equal(constant_values(converter(mixed), "table"), table, strict=True)
    halved = constant_values(converter(mixed, "--fp16"), "table")
    assert halved.dtype == np.float16
    np.testing.assert_allclose(halved.astype(np.float32), table, rtol=2**-10, atol=1e-6, strict=True)


def test_constants_in_the_weight_file_are_found(converter: Converter, mixed: Path) -> None:
    values = constant_values(converter(mixed, "--saveExternalData=1"), "table")
    np.testing.assert_array_equal(values, gaussian(300, 64, seed=1), strict=True)


def test_a_layer_that_does_not_exist_is_told_with_those_that_do(converter: Converter, linear: Path) -> None:
    with pytest.raises(UsageError, match=f"no layer 'z'.*{LAYER}"):
        dequantised_weight(converter(linear), "z")


def test_a_constant_that_does_not_exist_is_told(converter: Converter, mixed: Path) -> None:
    with pytest.raises(UsageError, match="no constant 'z'"):
        constant_values(converter(mixed), "z")


def test_a_weight_file_that_became_shorter_is_an_input_error(
    converter: Converter, linear: Path, tmp_path: Path
) -> None:
    made = converter(linear, "--saveExternalData=1")
    model = tmp_path / made.name
    model.write_bytes(made.read_bytes())
    weights = weight_path(made).read_bytes()
    weight_path(model).write_bytes(weights)
    storage = read_storage(model)
    weight_path(model).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelFileError, match="became shorter"):
        dequantised_weight(model, LAYER, storage=storage)
