"""`read_storage` says what is in a file; MNN's own dump of the same file is the witness."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_convert.errors import ModelFileError
from sa3_convert.mnn.file.flatbuffer import weight_path
from sa3_convert.mnn.file.schema import Convolution, Net, Op
from sa3_convert.mnn.file.storage import content_digest, read_storage
from tests.mnn.converted import CHANNELS, HIDDEN, OUT, ROWS, WIDTH, Converter, gaussian, linear_graph
from tests.mnn.flat import field_position, file_of, follow, vector_item

INT4 = ("--weightQuantBits", "4")
VARIANTS = [
    (),
    ("--fp16",),
    ("--weightQuantBits", "8"),
    (*INT4, "--weightQuantAsymmetric=0"),
    (*INT4, "--weightQuantBlock", "16"),
    (*INT4, "--weightQuantBlock", "32", "--hqq"),
    (*INT4, "--weightQuantScaleBit", "16"),
    ("--saveExternalData=1",),
    ("--saveExternalData=1", "--weightQuantBits", "3"),
]
VECTOR_OF = {"DT_FLOAT": ("fp32", "float32s", 4), "DT_INT32": ("int32", "int32s", 4), "DT_HALF": ("fp16", "uint8s", 1)}


@pytest.fixture(params=VARIANTS, ids=" ".join)
def variant(request: pytest.FixtureRequest, converter: Converter, mixed: Path) -> Path:
    return converter(mixed, *request.param)


def copy_of(model: Path, folder: Path) -> Path:
    for file in (model, weight_path(model)):
        if file.exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder / model.name


def test_operators_are_those_that_mnn_dumps(variant: Path, converter: Converter) -> None:
    dump = converter.dump(variant)
    names = dump["tensorName"]

    def named(operator: dict[str, Any], key: str) -> tuple[str, ...]:
        return tuple(names[index] for index in operator.get(key, ()))

    expected = [(o["name"], o["type"], named(o, "inputIndexes"), named(o, "outputIndexes")) for o in dump["oplists"]]
    assert [(o.name, o.type, o.inputs, o.outputs) for o in read_storage(variant).operators] == expected


def test_functions_are_those_that_mnn_dumps(variant: Path, converter: Converter) -> None:
    dumped = [o["main"].get("opType", "").lower() or None for o in converter.dump(variant)["oplists"] if "main" in o]
    assert [o.function for o in read_storage(variant).operators if o.function] == [name for name in dumped if name]


def test_weights_take_the_bytes_that_mnn_dumps(variant: Path, converter: Converter) -> None:
    storage = read_storage(variant)
    layers = [o for o in converter.dump(variant)["oplists"] if o["main_type"] == "Convolution2D"]
    assert [operator.name for operator, _ in storage.weighted()] == [layer["name"] for layer in layers]
    for (operator, weight), layer in zip(storage.weighted(), layers, strict=True):
        main, stored = layer["main"], layer["main"].get("quanParameter", {})
        scales = 4 * len(stored.get("alpha", ())) + 2 * len(stored.get("alphaFp16", ()))
        inside = (
            4 * len(main.get("weight", ())) + len(stored.get("buffer", ())),
            scales,
            4 * len(main.get("bias", ())),
        )
        outside = main.get("external", [0, 0, 0, 0])
        payload, scales, bias = (
            inside if "external" not in main else (outside[1], *(outside[2:4] if stored else (0, outside[2])))
        )
        assert (weight.payload.bytes, weight.scale_bytes) == (payload, scales)
        assert [parameter.values.bytes for parameter in operator.parameters] == [bias]
        assert weight.payload.external == ("external" in main)


def test_constants_are_those_that_mnn_dumps(variant: Path, converter: Converter) -> None:
    dump = converter.dump(variant)
    expected = []
    for operator in dump["oplists"]:
        if operator["type"] == "Const":
            blob = operator["main"]
            kind, vector, size = VECTOR_OF[blob["dataType"]]
            stored = blob["external"][1] if "external" in blob else size * len(blob.get(vector, ()))
            name = dump["tensorName"][operator["outputIndexes"][0]]
            expected.append((name, kind, tuple(blob.get("dims", ())), stored))
    assert [(c.name, c.type, c.shape, c.bytes) for c in read_storage(variant).constants] == expected


def test_inputs_have_type_and_shape_and_outputs_a_name(variant: Path) -> None:
    storage = read_storage(variant)
    assert [(port.name, port.type, port.shape) for port in storage.inputs] == [("ids", "int32", (1, 8))]
    assert [(port.name, port.type, port.shape) for port in storage.outputs] == [("out", None, None)]


def test_version_source_and_size_are_told(variant: Path) -> None:
    storage = read_storage(variant)
    assert (storage.source, storage.label) == ("ONNX", "test")
    assert re.fullmatch(r"3\.\d+\.\d+", storage.mnn_version or "")
    assert storage.bytes == variant.stat().st_size
    assert storage.weight_file_bytes == (weight_path(variant).stat().st_size if weight_path(variant).exists() else 0)


def test_every_byte_of_the_weight_file_is_accounted_for(converter: Converter, mixed: Path) -> None:
    storage = read_storage(converter(mixed, "--saveExternalData=1", "--weightQuantBits", "8"))
    weights = sum(weight.payload.bytes + weight.scale_bytes for _, weight in storage.weighted())
    others = [parameter.values for operator in storage.operators for parameter in operator.parameters]
    others += [constant.values for constant in storage.constants if constant.values is not None]
    assert weights + sum(extent.bytes for extent in others if extent.external) == storage.weight_file_bytes


def test_structure_takes_a_few_kilobytes_and_the_rest_is_data(variant: Path) -> None:
    storage = read_storage(variant)
    assert 4096 < storage.overhead_bytes < 8192
    assert storage.overhead_bytes + storage.payload_bytes == storage.bytes


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_bits_and_symmetry_are_read_from_what_is_stored(
    converter: Converter, mixed: Path, bits: int, symmetric: bool
) -> None:
    flags = ("--weightQuantBits", str(bits), f"--weightQuantAsymmetric={int(not symmetric)}")
    for _, weight in read_storage(converter(mixed, *flags)).weighted():
        assert (weight.type, weight.bits, weight.symmetric) == (f"int{bits}", bits, symmetric)
        assert (weight.block_size, weight.rows, weight.scale_type) == (None, weight.shape[0], "fp32")


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("hqq", [(), ("--hqq",)])
def test_block_sizes_are_counted_in_input_channels(
    converter: Converter, mixed: Path, block: int, hqq: tuple[str, ...]
) -> None:
    storage = read_storage(converter(mixed, *INT4, "--weightQuantBlock", str(block), *hqq))
    assert {weight.block_size for _, weight in storage.weighted()} == {block}


def test_a_block_that_does_not_divide_is_seen_to_have_become_a_channel(converter: Converter, mixed: Path) -> None:
    storage = read_storage(converter(mixed, *INT4, "--weightQuantBlock", "24"))
    assert {weight.block_size for _, weight in storage.weighted()} == {None}


def test_shapes_are_those_of_the_weights(variant: Path) -> None:
    shapes = [weight.shape for _, weight in read_storage(variant).weighted()]
    assert shapes == [(HIDDEN, WIDTH, 1, 1), (OUT, HIDDEN, 1, 1), (CHANNELS, OUT, 3, 1)]


def test_half_scales_are_seen(converter: Converter, mixed: Path) -> None:
    storage = read_storage(converter(mixed, *INT4, "--weightQuantScaleBit", "16"))
    assert {weight.scale_type for _, weight in storage.weighted()} == {"fp16"}


def test_two_passes_leave_integers_and_halve_the_constants(converter: Converter, mixed: Path) -> None:
    storage = read_storage(converter(converter(mixed, *INT4), "--fp16"))
    assert {weight.type for _, weight in storage.weighted()} == {"int4"}
    assert {constant.type for constant in storage.constants if constant.is_float} == {"fp16"}


def test_both_in_one_call_are_seen_to_be_fp16(converter: Converter, mixed: Path) -> None:
    storage = read_storage(converter(mixed, *INT4, "--fp16"))
    assert {weight.type for _, weight in storage.weighted()} == {"fp16"}


def test_totals_add_up_to_what_was_put_in(converter: Converter, mixed: Path) -> None:
    totals = read_storage(converter(mixed, "--weightQuantBits", "8")).totals()
    assert totals["int8"].elements == WIDTH * HIDDEN + HIDDEN * OUT + CHANNELS * OUT * 3
    assert totals["int8"].scale_bytes == 8 * (HIDDEN + OUT + CHANNELS)
    assert totals["fp32"].elements == ROWS * WIDTH + 8 * 8 + HIDDEN + OUT + CHANNELS + 2 * CHANNELS
    assert (totals["fp32"].constants, totals["fp32"].parameters) == (2, 5)


def test_the_summary_is_json_and_names_the_scheme(converter: Converter, mixed: Path) -> None:
    summary = json.loads(json.dumps(read_storage(converter(mixed, *INT4, "--weightQuantBlock", "16")).summary()))
    (scheme,) = summary["weights"]
    assert (scheme["type"], scheme["symmetric"], scheme["block_size"], scheme["layers"]) == ("int4", False, 16, 3)
    assert summary["largest_constants"][0]["name"] == "table"


def test_json_lists_every_operator(variant: Path) -> None:
    whole = json.loads(read_storage(variant).to_json())
    assert len(whole["layers"]) == sum(whole["operators"].values())
    assert len(whole["constants"]) == whole["operators"]["Const"]


def test_two_conversions_differ_in_bytes_but_not_in_digest(mixed: Path, tmp_path: Path) -> None:
    first, second = (Converter(folder) for folder in (tmp_path / "1", tmp_path / "2") if not folder.mkdir())
    for flags in [(), ("--weightQuantBits", "4"), ("--saveExternalData=1",)]:
        one, two = first(mixed, *flags), second(mixed, *flags)
        assert one.read_bytes() != two.read_bytes()
        assert content_digest(one) == content_digest(two)


@pytest.mark.parametrize("where", ["model", "weights"])
def test_one_changed_weight_changes_the_digest(converter: Converter, mixed: Path, tmp_path: Path, where: str) -> None:
    made = converter(mixed, *(("--saveExternalData=1",) if where == "weights" else ()))
    model = copy_of(made, tmp_path)
    weight = next(weight for _, weight in read_storage(model).weighted())
    file = weight_path(model) if where == "weights" else model
    data = bytearray(file.read_bytes())
    data[weight.payload.offset] ^= 1
    file.write_bytes(data)
    assert content_digest(model) != content_digest(made)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"absent\.mnn does not exist"):
        read_storage(tmp_path / "absent.mnn")


def test_a_missing_weight_file_is_told(converter: Converter, mixed: Path, tmp_path: Path) -> None:
    model = copy_of(converter(mixed, "--saveExternalData=1"), tmp_path)
    weight_path(model).unlink()
    with pytest.raises(ModelFileError, match=r"mixed\.mnn\.weight does not exist"):
        read_storage(model)


def test_a_weight_file_that_is_too_short_is_told(converter: Converter, mixed: Path, tmp_path: Path) -> None:
    model = copy_of(converter(mixed, "--saveExternalData=1"), tmp_path)
    os.truncate(weight_path(model), 100_000)
    with pytest.raises(ModelFileError, match=r"keeps weights in bytes .* which has 100000"):
        read_storage(model)


def test_a_folder_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="is not a file"):
        read_storage(tmp_path)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mnn")
    with pytest.raises(ModelFileError, match="is not a file"):
        read_storage(tmp_path / "pipe.mnn")


@pytest.mark.parametrize(
    "content", [b"", b"MNN", b"\0" * 64, b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_what_is_no_model_at_all_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "none.mnn").write_bytes(content)
    with pytest.raises(ModelFileError, match="cannot be used as an MNN model"):
        read_storage(tmp_path / "none.mnn")


def test_an_onnx_file_is_not_a_model(mixed: Path) -> None:
    with pytest.raises(ModelFileError):
        read_storage(mixed)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_model_is_told(converter: Converter, mixed: Path, tmp_path: Path, share: float) -> None:
    model = copy_of(converter(mixed), tmp_path)
    os.truncate(model, int(model.stat().st_size * share))
    with pytest.raises(ModelFileError):
        read_storage(model)


@pytest.mark.parametrize("size", [-1, 1, 3])
def test_a_model_of_a_few_bytes_more_or_less_is_told(
    converter: Converter, mixed: Path, tmp_path: Path, size: int
) -> None:
    model = copy_of(converter(mixed), tmp_path)
    os.truncate(model, model.stat().st_size + size)
    with pytest.raises(ModelFileError, match="cut off or added to"):
        read_storage(model)


def test_two_gigabytes_take_little_memory(converter: Converter, tmp_path: Path) -> None:
    """A file of 1.9 GiB, most of it a hole: its one weight is moved to the end and grown to fill it."""
    small = converter(linear_graph(tmp_path / "linear.onnx", gaussian(64, 16)))
    model = copy_of(small, tmp_path)
    data = bytearray(model.read_bytes())
    (operator,) = [i for i, o in enumerate(read_storage(model).operators) if o.weight]
    root = follow(data, 0)
    table = follow(data, vector_item(data, root, Net.OPERATORS, operator))
    field = field_position(data, follow(data, field_position(data, table, Op.PARAMETER)), Convolution.WEIGHT)
    start, count = -len(data) % 4 + len(data), 16 * 31_000_000
    data[field : field + 4] = (start - field).to_bytes(4, "little")
    with model.open("wb") as stream:
        stream.write(data)
        stream.seek(start)
        stream.write(count.to_bytes(4, "little"))
        stream.truncate(start + 4 + 4 * count)
    code = """
import resource, sys
from pathlib import Path
import numpy
from sa3_convert.mnn.file.storage import read_storage
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weight = read_storage(Path(sys.argv[1])).totals()["fp32"]
print(weight.elements, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True)
    elements, kibibytes = map(int, result.stdout.split())
    assert elements == count + 16
    assert kibibytes < 20_000


def test_reading_loads_neither_mnn_nor_numpy() -> None:
    code = "import sys, sa3_convert.mnn.file.storage; print({'MNN', 'numpy', 'onnx', 'torch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_one_vector_reached_from_everywhere_is_refused(converter: Converter, mixed: Path, tmp_path: Path) -> None:
    """Tensor names that all point to one long name would be copied a million times."""
    model = copy_of(converter(mixed), tmp_path)
    data = bytearray(model.read_bytes())
    field = field_position(data, follow(data, 0), Net.TENSOR_NAMES)
    start, count, length = len(data) + -len(data) % 4, 200_000, 60_000
    data[field : field + 4] = (start - field).to_bytes(4, "little")
    data += bytes(start - len(data))
    offsets = np.arange(count, 0, -1, dtype="<u4") * 4
    model.write_bytes(
        bytes(data)
        + count.to_bytes(4, "little")
        + offsets.tobytes()
        + length.to_bytes(4, "little")
        + b"n" * length
        + bytes(4)
    )
    with pytest.raises(ModelFileError, match="its structure is larger than 16 MiB"):
        read_storage(model)


def test_weights_that_share_bytes_are_counted_once(converter: Converter, mixed: Path, tmp_path: Path) -> None:
    model = copy_of(converter(mixed), tmp_path)
    whole = read_storage(model)
    with file_of(model) as data:
        first, second = [i for i, o in enumerate(whole.operators) if o.weight][:2]
        tables = [follow(data, vector_item(data, follow(data, 0), Net.OPERATORS, index)) for index in (first, second)]
        fields = [
            field_position(data, follow(data, field_position(data, table, Op.PARAMETER)), Convolution.BIAS)
            for table in tables
        ]
        assert fields[0] > fields[1] or follow(data, fields[0]) > fields[1]
        data[fields[1] : fields[1] + 4] = (follow(data, fields[0]) - fields[1]).to_bytes(4, "little")
    assert whole.payload_bytes - read_storage(model).payload_bytes == 4 * OUT
