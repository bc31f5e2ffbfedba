from pathlib import Path

import numpy as np
import pytest

from sa3_convert.mnn.compatibility import oldest_reader
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.passes.hazards import find_hazards
from sa3_convert.passes.spellings import use_whole_shapes
from tests.passes.graphs import graph, mnn_of, run_mnn, run_ort

X = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
TEXT = "(float[2, N, M] x) => (int64[K] y) { y = Shape<RANGE>(x) }"
EXPANDED = "(float[2, N, M] x) => (float[P, Q] y) { s = Shape<start = 1>(x)  y = Expand(k, s) }"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ("start = 0", [2, 5, 3]),
        ("start = 1", [5, 3]),
        ("start = -1", [3]),
        ("end = 2", [2, 5]),
        ("end = -1", [2, 5]),
        ("start = 1, end = 2", [5]),
        ("start = -2, end = 9", [5, 3]),
        ("start = 2, end = 1", []),
    ],
)
def test_the_part_is_the_same(limits: str, expected: list[int]) -> None:
    model = graph(TEXT.replace("RANGE", limits))
    np.testing.assert_array_equal(run_ort(model, {"x": X})[0], expected)
    assert use_whole_shapes(model) == 1
    np.testing.assert_array_equal(run_ort(model, {"x": X})[0], expected)
    assert find_hazards(model, target_mnn="3.0") == []


def test_a_whole_shape_stays() -> None:
    model = graph("(float[2, N, M] x) => (int64[K] y) { y = Shape(x) }")
    assert use_whole_shapes(model) == 0
    assert [node.op_type for node in model.graph] == ["Shape"]


def test_mnn_gets_the_same_numbers(tmp_path: Path) -> None:
    model = graph(EXPANDED, k=np.float32([[3]]))
    use_whole_shapes(model)
    (result,) = run_mnn(model, {"x": X}, tmp_path)
    np.testing.assert_array_equal(result, run_ort(model, {"x": X})[0])


def test_the_converter_writes_a_range_and_old_versions_refuse_it(tmp_path: Path) -> None:
    readers = []
    for rewrite in (False, True):
        model = graph(EXPANDED, k=np.float32([[3]]))
        if rewrite:
            use_whole_shapes(model)
        readers.append(oldest_reader(read_storage(mnn_of(model, tmp_path))).version)
    assert readers == ["3.5", "3.0"]
