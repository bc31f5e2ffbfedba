import tracemalloc
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from sa3_convert.passes.quantise_embedding import _nearest, pack, quantise_embedding, quantise_rows
from tests.passes.graphs import checked, graph, run_mnn, run_ort, signal_to_noise_db

TABLE = (0.05 * np.random.default_rng(0).standard_normal((300, 32))).astype(np.float32)
IDS = np.array([[0, 299, 17, 17, 250]], np.int32)
WIDTH_OF_T5GEMMA = 768


def lookup(table: NDArray[np.float32] = TABLE) -> ir.Model:
    width = table.shape[1]
    return graph(
        f"(int32[1, 5] ids) => (float[1, 5, {width}] y) {{ e = Gather(t, ids)  y = Mul(e, k) }}",
        t=table,
        k=np.float32(np.sqrt(width)),
    )


@pytest.mark.parametrize(("kind", "least_db"), [("int8", 43), ("int4", 19)])
def test_the_lookup_stays_close(kind: Literal["int8", "int4"], least_db: float) -> None:
    model = lookup()
    (before,) = run_ort(model, {"ids": IDS})
    assert quantise_embedding(model, kind) == 1
    assert signal_to_noise_db(before, run_ort(model, {"ids": IDS})[0]) > least_db


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_mnn_gives_the_same_bits_as_onnx_runtime(kind: Literal["int8", "int4"], tmp_path: Path) -> None:
    model = lookup()
    quantise_embedding(model, kind)
    feeds = {"ids": IDS}
    np.testing.assert_array_equal(run_mnn(model, feeds, tmp_path)[0], run_ort(model, feeds)[0])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_scales_for_half_survive_the_converters_halving(kind: Literal["int8", "int4"], tmp_path: Path) -> None:
    model = lookup()
    model.graph.initializers["k"].const_value = ir.tensor(np.float32(5.5))
    quantise_embedding(model, kind, half_scales=True)
    feeds = {"ids": IDS}
    np.testing.assert_array_equal(run_mnn(model, feeds, tmp_path, "--fp16")[0], run_ort(model, feeds)[0])


@pytest.mark.parametrize(("kind", "bytes_per_number"), [("int8", 1), ("int4", 0.5)])
def test_the_table_shrinks_to_what_its_name_says(kind: Literal["int8", "int4"], bytes_per_number: float) -> None:
    model = lookup()
    quantise_embedding(model, kind)
    sizes = {name: value.const_value.nbytes for name, value in model.graph.initializers.items() if value.const_value}
    assert sizes[f"t.{kind}"] == TABLE.size * bytes_per_number
    assert "t" not in sizes


def test_a_lookup_that_is_the_output_keeps_its_name() -> None:
    model = graph("(int32[1, 5] ids) => (float[1, 5, 32] y) { y = Gather(t, ids) }", t=TABLE)
    assert quantise_embedding(model, "int8") == 1
    checked(model)
    assert run_ort(model, {"ids": IDS})[0].shape == (1, 5, 32)


@pytest.mark.parametrize(
    ("bits", "tails", "least_db"), [(8, "gaussian", 43.9), (8, "heavy", 40), (4, "gaussian", 20), (4, "heavy", 16.5)]
)
def test_sampled_rows_of_a_true_size_table_reach(bits: Literal[4, 8], tails: str, least_db: float) -> None:
    rng = np.random.default_rng(1)
    shape = (1024, WIDTH_OF_T5GEMMA)
    table = (0.05 * (rng.standard_normal(shape) if tails == "gaussian" else rng.standard_t(4, shape))).astype(
        np.float32
    )
    assert signal_to_noise_db(table, quantise_rows(table, bits).dequantised()) > least_db


@pytest.mark.parametrize(("bits", "gain_db"), [(8, 1.6), (4, 2.5)])
def test_curve_and_search_beat_even_levels_up_to_the_largest_magnitude(bits: Literal[4, 8], gain_db: float) -> None:
    table = np.random.default_rng(2).standard_normal((256, WIDTH_OF_T5GEMMA)).astype(np.float32)
    plain = np.abs(table).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    searched = signal_to_noise_db(table, quantise_rows(table, bits).dequantised())
    assert searched > signal_to_noise_db(table, np.rint(table / plain) * plain) + gain_db


@given(arrays(np.int8, (3, 8), elements=st.integers(-8, 7)))
def test_packed_nibbles_unpack_to_the_same_numbers(codes: NDArray[np.int8]) -> None:
    packed = pack(codes).astype(np.float32)
    high = np.floor(packed / 16)
    np.testing.assert_array_equal(np.concatenate((high, packed - 16 * high - 8), axis=1), codes)


@given(
    arrays(np.float32, (4, 6), elements=st.floats(-100, 100, width=32, allow_subnormal=False)), st.sampled_from([4, 8])
)
def test_no_row_comes_out_worse_than_half_a_step_of_the_plain_scale(
    table: NDArray[np.float32], bits: Literal[4, 8]
) -> None:
    rows = quantise_rows(table, bits)
    assert np.isfinite(rows.scales).all()
    step = np.abs(table).max(axis=1) / (2 ** (bits - 1) - 1)
    error = np.sqrt(np.mean((table.astype(np.float64) - rows.dequantised()) ** 2, axis=1))
    # Where the curve is steepest its steps are (1 + 3c)/(1 + c) times as wide as even ones.
    widest = (1 + 3 * rows.curve) / (1 + rows.curve)
    assert (error <= 0.55 * widest * step + 1e-30).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("curve", [0.0, 0.25, 1.0, 5.0])
def test_codes_are_the_nearest_on_the_curve(bits: Literal[4, 8], curve: float) -> None:
    top = 2 ** (bits - 1)
    u = np.arange(-top, top) / top
    places = u * (1 + curve * u * u)
    numbers = np.linspace(places[0] * 1.1, places[-1] * 1.1, 4001)
    exact = np.abs(numbers[:, None] - places).min(axis=1)
    found = np.abs(numbers - places[_nearest(numbers.astype(np.float32), bits, curve).astype(int) + top])
    assert (found <= exact + 0.02 * np.diff(places).max()).all()


def test_evenly_spread_numbers_get_even_levels() -> None:
    table = np.random.default_rng(3).uniform(-1, 1, (64, WIDTH_OF_T5GEMMA)).astype(np.float32)
    assert quantise_rows(table, 8).curve == 0


def test_the_graph_computes_what_was_judged() -> None:
    model = graph("(int32[1, 5] ids) => (float[1, 5, 32] y) { y = Gather(t, ids) }", t=TABLE)
    quantise_embedding(model, "int4")
    np.testing.assert_array_equal(run_ort(model, {"ids": IDS})[0], quantise_rows(TABLE, 4).dequantised()[IDS])


def test_a_row_of_zeros_stays_zero() -> None:
    rows = quantise_rows(np.zeros((2, 4), np.float32), 8)
    np.testing.assert_array_equal(rows.dequantised(), np.zeros((2, 4), np.float32))


def test_memory_is_bounded_by_the_integers() -> None:
    table = np.zeros((40_000, 64), np.float32)
    tracemalloc.start()
    quantise_rows(table, 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < table.nbytes


UNTOUCHED = {
    "a table used elsewhere": (
        "(int32[1, 5] ids) => (float[1, 5, 32] y, float[300, 32] z) { y = Gather(t, ids)  z = Neg(t) }"
    ),
    "columns looked up": "(int32[1, 5] ids) => (float[300, 1, 5] y) { y = Gather<axis = 1>(t, ids) }",
    "constant ids": "(float[2, 32] x) => (float[2, 32] y) { r = Gather(t, two)  y = Add(r, x) }",
    "a table at run time": "(int32[1, 5] ids, float[300, 32] t) => (float[1, 5, 32] y) { y = Gather(t, ids) }",
}


@pytest.mark.parametrize("text", UNTOUCHED.values(), ids=UNTOUCHED.keys())
def test_other_lookups_stay(text: str) -> None:
    constants = {"two": np.array([3, 4])} if "two" in text else {}
    model = graph(text, **constants, **({} if "32] t" in text else {"t": TABLE}))
    assert quantise_embedding(model, "int8") == 0
    assert next(node.op_type for node in model.graph) == "Gather"


def test_an_odd_width_cannot_be_packed() -> None:
    assert quantise_embedding(lookup(TABLE[:, :31].copy()), "int4") == 0
