"""A reference ONNX → one that ONNX Runtime computes with 8-bit integers: weights stored, activations as they come.

What is quantised are the matrix products with constant weights, a scale per output channel: nearly all arithmetic of a
Stable Audio 3 model. What stays float: products of activations, convolutions (ONNX Runtime's integer ones are slower),
token tables, and `Gemm`, which the exports use for single vectors only (time and duration after their Fourier features;
nothing to gain, and their error reaches every latent).

Weights take seven of the eight bits: on x86 without VNNI, ONNX Runtime adds two products of eight-bit values in 16
bits, and would saturate there.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import onnx
from google.protobuf.message import DecodeError
from onnxruntime.quantization import QuantType, quantize_dynamic

from sa3_convert.components import Component
from sa3_convert.errors import ConversionError
from sa3_convert.system.checked_files import named
from sa3_convert.system.files import partial_folder
from sa3_convert.system.log import taken_in

FLOORS_DB: Final[Mapping[Component, float]] = {
    Component.TEXT_ENCODER: 22,
    # Nothing of it is quantised.
    Component.NUMBER_CONDITIONER: 100,
    Component.DIT: 20,
    Component.DECODER: 26,
    Component.ENCODER: 26,
}
"""Least signal-to-noise ratio in dB against the reference: what one scale for a whole activation costs, with room for
weights that are less even than seeded ones (small-music at true size, with weights of eight bits: text encoder 24.3,
DiT 23.5, decoder 29.3, encoder 38.8 dB)."""

_INTEGER_PRODUCT = "MatMulInteger"


def quantise_for_ort(reference: Path, target: Path) -> int:
    """Write the integer form of a reference ONNX, its weights beside it in `target` + ".data".

    Args:
        reference: the fp32 ONNX, as exported.
        target: where to write; its folder is not shared with another conversion.

    Returns:
        The number of products that are computed with integers; 0 where a component has none to quantise.

    Raises:
        ConversionError: the file that was written does not hold what it should.

    """
    _, singles = _products(reference)
    with partial_folder(target) as scratch, taken_in("root"):
        # ONNX Runtime writes beside its input, and ONNX refuses weights behind a link: it works on a copy.
        source = scratch / reference.name
        for file in (reference, reference.with_name(reference.name + ".data")):
            if file.exists():
                shutil.copyfile(file, source.with_name(file.name))
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            # It splits a Gemm into a product of this name and an addition before it looks at names.
            nodes_to_exclude=[f"{name}_MatMul" for name in singles],
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=True,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
    return check_integer_form(reference, target)


def _products(reference: Path) -> tuple[int, list[str]]:
    """Return how many MatMuls have constant weights, and the names of the Gemms."""
    model = _read(reference)
    constants = {tensor.name for tensor in model.graph.initializer}
    wanted = sum(node.op_type == "MatMul" and node.input[1] in constants for node in model.graph.node)
    return wanted, [node.name for node in model.graph.node if node.op_type == "Gemm"]


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise ConversionError(f"{named(path)} cannot be read as ONNX: {error}.") from None


def check_integer_form(reference: Path, target: Path) -> int:
    """Hold an integer form to its reference; returns and raises what `quantise_for_ort` does."""
    wanted, singles = _products(reference)
    model = _read(target)
    found = sum(node.op_type == _INTEGER_PRODUCT for node in model.graph.node)
    constants = {tensor.name for tensor in model.graph.initializer}
    left = sum(node.op_type in ("MatMul", "Gemm") and node.input[1] in constants for node in model.graph.node)
    if found != wanted or left != len(singles):
        raise ConversionError(
            f"{named(target)} has {found} integer products and {left} float ones with constant weights, its reference "
            f"has {wanted} and {len(singles)} to make them of. If it was just made, report it with onnxruntime's "
            "version."
        )
    return wanted
