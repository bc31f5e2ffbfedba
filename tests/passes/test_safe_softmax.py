from pathlib import Path

import numpy as np
import pytest

from sa3_convert.components import Component
from sa3_convert.mnn.compatibility import MnnVersion
from sa3_convert.passes.hazards import find_hazards
from sa3_convert.passes.pipeline import apply_passes
from sa3_convert.passes.softmax import subtract_row_maximum
from sa3_convert.recipe import ComponentRecipe
from tests.passes.graphs import graph, run_mnn, run_ort, signal_to_noise_db

X = (30 * np.random.default_rng(0).standard_normal((2, 5, 48)) - 90).astype(np.float32)
PLAIN = "(float[2, 5, 48] x) => (float[2, 5, 48] y) { y = Softmax<axis = AXIS>(x) }"


@pytest.mark.parametrize("axis", ["-1", "1", "0"])
def test_the_result_is_bitwise_the_same(axis: str) -> None:
    model = graph(PLAIN.replace("AXIS", axis))
    (before,) = run_ort(model, {"x": X})
    assert subtract_row_maximum(model) == 1
    np.testing.assert_array_equal(run_ort(model, {"x": X})[0], before)


def test_mnn_agrees(tmp_path: Path) -> None:
    model = graph(PLAIN.replace("AXIS", "-1"))
    subtract_row_maximum(model)
    (target,) = run_mnn(model, {"x": X}, tmp_path)
    assert signal_to_noise_db(run_ort(model, {"x": X})[0], target) > 120


def test_the_maximum_is_not_subtracted_twice() -> None:
    model = graph(PLAIN.replace("AXIS", "-1"))
    assert [subtract_row_maximum(model), subtract_row_maximum(model)] == [1, 0]


def test_the_hazard_is_gone() -> None:
    model = graph(PLAIN.replace("AXIS", "-1"))
    assert [hazard.id for hazard in find_hazards(model, target_mnn="3.5")] == ["softmax-low-rows"]
    subtract_row_maximum(model)
    assert find_hazards(model, target_mnn="3.5") == []


@pytest.mark.parametrize(("target", "runs"), [("3.0", True), ("3.5", True), ("3.6", False)])
def test_it_runs_for_old_targets_only(target: MnnVersion, runs: bool) -> None:
    model = graph(PLAIN.replace("AXIS", "-1"))
    report = apply_passes(model, Component.DIT, ComponentRecipe(floor_db=1), target_mnn=target)
    assert ("subtract_row_maximum" in report.counts()) is runs


def test_other_activations_stay() -> None:
    model = graph("(float[4] x) => (float[4] y) { y = Sigmoid(x) }")
    assert subtract_row_maximum(model) == 0
