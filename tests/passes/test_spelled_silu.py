from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sa3_convert.mnn.compatibility import oldest_reader
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.passes.hazards import find_hazards
from sa3_convert.passes.spellings import spell_silu
from tests.passes.graphs import graph, mnn_of, run_mnn, run_ort, signal_to_noise_db

SILU = "(float[4, 6] x) => (float[4, 6] y) { s = Sigmoid(x)  y = Mul(x, s) }"
GATED = "(float[4, 6] x) => (float[4, 6] y) { s = Sigmoid(x)  n = Neg(x)  y = Mul(n, s) }"
X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32) * 5


@given(arrays.arrays(np.float32, (4, 6), elements=st.floats(-1e5, 1e5, width=32)))
def test_the_result_is_the_same_to_rounding(x: np.ndarray) -> None:
    model = graph(SILU)
    (before,) = run_ort(model, {"x": x})
    assert spell_silu(model) == 1
    np.testing.assert_allclose(run_ort(model, {"x": x})[0], before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", [SILU, SILU.replace("Mul(x, s)", "Mul(s, x)")])
def test_the_hazard_is_gone(text: str) -> None:
    model = graph(text)
    assert [hazard.id for hazard in find_hazards(model, target_mnn="3.0")] == ["silu-unknown"]
    assert spell_silu(model) == 1
    assert find_hazards(model, target_mnn="3.0") == []
    assert "Sigmoid" not in [node.op_type for node in model.graph]


def test_a_sigmoid_that_is_used_elsewhere_stays_there() -> None:
    model = graph(SILU.replace("(float[4, 6] y)", "(float[4, 6] y, float[4, 6] s)"))
    before = run_ort(model, {"x": X})
    assert spell_silu(model) == 1
    for value, expected in zip(run_ort(model, {"x": X}), before, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_other_gates_stay() -> None:
    model = graph(GATED)
    assert spell_silu(model) == 0
    assert find_hazards(model, target_mnn="3.0") == []


def test_mnn_gets_the_same_numbers(tmp_path: Path) -> None:
    model = graph(SILU)
    spell_silu(model)
    (result,) = run_mnn(model, {"x": X}, tmp_path)
    assert signal_to_noise_db(run_ort(model, {"x": X})[0], result) > 110


def test_the_converter_makes_one_operator_of_it_unless_it_is_spelled_out(tmp_path: Path) -> None:
    readers = []
    for rewrite in (False, True):
        model = graph(SILU)
        if rewrite:
            spell_silu(model)
        readers.append(oldest_reader(read_storage(mnn_of(model, tmp_path))).version)
    assert readers == ["3.1", "3.0"]
