import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sa3_convert.components import Component
from sa3_convert.errors import ConversionError, ModelFileError
from sa3_convert.ort import OrtSession
from sa3_convert.passes.pipeline import apply_passes, load_onnx, onnx_for_mnn
from sa3_convert.recipe import ComponentRecipe
from tests.passes.graphs import graph, run_ort

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((300, 32)).astype(np.float32)
WEIGHT = RNG.standard_normal((32, 32)).astype(np.float32)
IDS = {"ids": np.array([[0, 299, 17, 17, 250]], np.int32)}


def recipe(**keys: Any) -> ComponentRecipe:
    return ComponentRecipe.model_validate({"floor_db": 1, **keys})


def encoder() -> ir.Model:
    return graph(
        """(int32[1, 5] ids) => (float[1, 5, 32] y) {
        e = Gather(t, ids)  h = MatMul(e, w)  p = Mul(h, k)  y = Sin(p) }""",
        t=TABLE,
        w=WEIGHT,
        k=np.float32(np.pi),
    )


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    path = tmp_path / "reference" / "text_encoder.onnx"
    path.parent.mkdir()
    ir.save(encoder(), path, external_data="text_encoder.onnx.data", size_threshold_bytes=0)
    return path


@pytest.mark.parametrize(
    ("keys", "counts"),
    [
        ({}, {"fuse_weight_norm": 0}),
        ({"weights": {"bits": 8}}, {"fuse_weight_norm": 0, "lift_small_weights": 0}),
        ({"embedding": "int8"}, {"fuse_weight_norm": 0, "quantise_embedding": 1}),
        ({"floats": "fp16"}, {"fuse_weight_norm": 0, "make_fp16_safe": 1}),
        (
            {"weights": {"bits": 8, "rounding": "least_squares"}},
            {"fuse_weight_norm": 0, "lift_small_weights": 0, "round_weights": 1},
        ),
        (
            {"embedding": "int4", "floats": "fp16"},
            {"fuse_weight_norm": 0, "quantise_embedding": 1, "make_fp16_safe": 1},
        ),
    ],
)
def test_the_recipe_chooses_the_passes(keys: dict[str, Any], counts: dict[str, int]) -> None:
    done = apply_passes(encoder(), Component.TEXT_ENCODER, recipe(**keys)).counts()
    always = (
        "keep_channels_packed",
        "round_to_half",
        "scale_gated_products",
        "use_whole_shapes",
        "subtract_row_maximum",
    )
    assert {name: count for name, count in done.items() if name not in always} == counts
    assert ("round_to_half" in done) == (keys.get("floats") == "fp16")


def test_an_embedding_that_is_asked_for_and_not_found_fails() -> None:
    model = graph("(float[1, 32] x) => (float[1, 32] y) { y = MatMul(x, w) }", w=WEIGHT)
    with pytest.raises(ConversionError, match=r"text_encoder: .*quantise_embedding.*no token table"):
        apply_passes(model, Component.TEXT_ENCODER, recipe(embedding="int8"))


def test_rounding_that_is_asked_for_and_finds_no_layer_fails() -> None:
    model = graph("(float[1, 32] x) => (float[1, 32] y) { y = Neg(x) }")
    with pytest.raises(ConversionError, match="no linear or convolution"):
        apply_passes(model, Component.DIT, recipe(weights={"bits": 8, "rounding": "least_squares"}))


def test_rounding_that_needs_planned_weights_is_refused() -> None:
    with pytest.raises(ConversionError, match="rounds ahead"):
        apply_passes(encoder(), Component.DIT, recipe(weights={"bits": 8, "rounding": "error_compensated"}))


def test_a_graph_with_hazards_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source, target = tmp_path / "source.onnx", tmp_path / "out" / "dit.onnx"
    ir.save(graph("(float[4] x) => (float[4] y) { y = Round(x) }"), source)
    with pytest.raises(ConversionError, match="round-half-to-even"):
        onnx_for_mnn(source, target, Component.DIT, recipe())
    assert not target.parent.exists()


def test_what_is_written_computes_what_the_reference_does(reference: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "text_encoder.onnx"
    onnx_for_mnn(reference, target, Component.TEXT_ENCODER, recipe())
    onnx.checker.check_model(str(target), full_check=True)
    np.testing.assert_array_equal(OrtSession(target).run(IDS)["y"], run_ort(encoder(), IDS)[0])
    assert sorted(file.name for file in target.parent.iterdir()) == ["text_encoder.onnx", "text_encoder.onnx.data"]


def test_the_reference_stays_as_it_was(reference: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in reference.parent.iterdir()}
    onnx_for_mnn(reference, tmp_path / "out.onnx", Component.TEXT_ENCODER, recipe(embedding="int8", floats="fp16"))
    assert {file: file.read_bytes() for file in reference.parent.iterdir()} == before


def test_the_reference_may_be_replaced_by_the_result(reference: Path) -> None:
    onnx_for_mnn(reference, reference, Component.TEXT_ENCODER, recipe())
    np.testing.assert_array_equal(OrtSession(reference).run(IDS)["y"], run_ort(encoder(), IDS)[0])


def test_an_older_result_and_its_data_are_replaced(reference: Path, tmp_path: Path) -> None:
    target = tmp_path / "text_encoder.onnx"
    onnx_for_mnn(reference, target, Component.TEXT_ENCODER, recipe())
    small = tmp_path / "small.onnx"
    ir.save(graph("(float[4] x) => (float[4] y) { y = Neg(x) }"), small)
    onnx_for_mnn(small, target, Component.TEXT_ENCODER, recipe())
    assert [node.op_type for node in load_onnx(target).graph] == ["Neg"]
    assert not (tmp_path / "text_encoder.onnx.data").exists()


def test_the_same_input_gives_the_same_bytes(reference: Path, tmp_path: Path) -> None:
    chosen = recipe(embedding="int8", floats="fp16", weights={"bits": 4, "rounding": "least_squares"})
    targets = [tmp_path / name / "text_encoder.onnx" for name in ("first", "second")]
    for target in targets:
        onnx_for_mnn(reference, target, Component.TEXT_ENCODER, chosen)
    first, second = ([file.read_bytes() for file in sorted(t.parent.iterdir())] for t in targets)
    assert first == second


def test_a_target_that_cannot_be_written_is_an_error(reference: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConversionError, match="cannot be written"):
        onnx_for_mnn(reference, blocked / "out.onnx", Component.TEXT_ENCODER, recipe())


def damage_none(reference: Path) -> None:
    reference.unlink()


def damage_text(reference: Path) -> None:
    reference.write_text("no protobuf at all")


def damage_empty(reference: Path) -> None:
    reference.write_bytes(b"")


def damage_half(reference: Path) -> None:
    reference.write_bytes(reference.read_bytes()[: reference.stat().st_size // 2])


def damage_data_missing(reference: Path) -> None:
    reference.with_name("text_encoder.onnx.data").unlink()


def damage_data_short(reference: Path) -> None:
    data = reference.with_name("text_encoder.onnx.data")
    data.write_bytes(data.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_none, "does not exist"),
        (damage_text, "cannot be read as ONNX"),
        (damage_empty, "no ONNX graph"),
        (damage_half, "cannot be read as ONNX"),
        (damage_data_missing, "text_encoder.onnx.data beside it"),
        (damage_data_short, "is cut short"),
    ],
)
def test_damaged_references_are_refused(damage: Any, message: str, reference: Path, tmp_path: Path) -> None:
    damage(reference)
    with pytest.raises(ModelFileError, match=message):
        onnx_for_mnn(reference, tmp_path / "out.onnx", Component.TEXT_ENCODER, recipe())
    assert not (tmp_path / "out.onnx").exists()


LIMITED = """
import pathlib, resource, sys
from sa3_convert.components import Component
from sa3_convert.passes.pipeline import onnx_for_mnn
from sa3_convert.recipe import ComponentRecipe

source, target, more = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
status = pathlib.Path("/proc/self/status").read_text()
limit = 1024 * int(status.split("VmData:")[1].split()[0]) + more
# Counts what is allocated, not what is mapped from a file.
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
onnx_for_mnn(source, target, Component.DIT, ComponentRecipe(floats="fp16", floor_db=1))
"""


@pytest.mark.parametrize(("weights_of_memory", "enough"), [(5, True), (1, False)])
def test_twelve_weights_need_the_memory_of_a_few(weights_of_memory: int, enough: bool, tmp_path: Path) -> None:
    weights = {f"w{i}": np.full((2048, 2048), i + 0.1, np.float32) for i in range(12)}
    chain = "  ".join(f"h{i + 1} = MatMul(h{i}, w{i})" for i in range(12))
    source, target = tmp_path / "reference.onnx", tmp_path / "dit.onnx"
    model = graph(f"(float[1, 2048] h0) => (float[1, 2048] h12) {{ {chain} }}", **weights)
    ir.save(model, source, external_data="reference.onnx.data")
    memory = weights_of_memory * weights["w0"].nbytes
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, source, target, str(memory)], capture_output=True, check=False
    )
    assert (result.returncode == 0) is enough, result.stderr.decode()
    assert target.exists() is enough
