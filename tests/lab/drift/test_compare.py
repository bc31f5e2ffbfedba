"""Which figures moved, and what else did."""

import pytest

from sa3_convert.components import Component
from sa3_convert.lab.drift.baseline import Figure
from sa3_convert.lab.drift.compare import Drift, compare_figures, worst_cases
from tests.lab.drift.test_baseline import ORIGIN, baseline, ratio

SIZE = Figure(component=Component.DIT, kind="size", name="bytes", value=100.0, rule="may not rise", tolerance=5)
STORED = Figure(component=Component.DIT, kind="storage", name="storage", value="2 × int8", rule="may not change")
SPEED = Figure(component=Component.DIT, kind="speed", name="time", value=1.0, rule="may not rise", tolerance=0.5)


def to(figure: Figure, value: float | str) -> Figure:
    return figure.model_copy(update={"value": value})


def only(before: Figure | None, now: Figure | None, **changes: object) -> Drift:
    """Compare one figure beside another one that stays."""
    rest = ratio(name="rest")
    then = baseline(*(f for f in (before, rest) if f))
    found = [f for f in (now, rest) if f]
    return compare_figures(then, found, ORIGIN.model_copy(update=changes))


@pytest.mark.parametrize(
    ("before", "value", "status"),
    [
        (ratio(38.0), 38.0, "held"),
        (ratio(38.0), 37.91, "held"),
        (ratio(38.0), 37.89, "moved"),
        (ratio(38.0), 38.05, "held"),
        (ratio(38.0), 39.0, "better"),
        (SIZE, 105.0, "held"),
        (SIZE, 106.0, "moved"),
        (SIZE, 50.0, "better"),
        (STORED, "2 × int8", "held"),
        (STORED, "2 × fp16", "moved"),
        (SPEED, 1.4, "held"),
        (SPEED, 1.6, "moved"),
        (SPEED, 0.4, "better"),
    ],
)
def test_each_figure_has_its_own_rule(before: Figure, value: float | str, status: str) -> None:
    found = only(before, to(before, value))
    assert found.rows[0].status == status
    assert found.passed is (status != "moved")


def test_a_figure_that_is_gone_or_new_is_drift() -> None:
    assert [row.status for row in only(ratio(), None).failures] == ["gone"]
    assert [row.status for row in only(None, ratio()).failures] == ["new"]


def test_speed_is_not_judged_on_another_processor_nor_when_it_was_left_out() -> None:
    assert only(SPEED, to(SPEED, 9.0), processor="another").rows[0].status == "not judged"
    assert only(SPEED, None).rows[0].status == "not judged"
    assert only(None, SPEED).passed


def test_models_for_another_engine_are_judged_where_both_have_them() -> None:
    name = "sampled inputs, onnxruntime-int8: worst"
    assert only(ratio(name=name), None).rows[0].status == "not judged"
    assert only(None, ratio(name=name)).passed
    assert only(ratio(30.0, name=name), ratio(20.0, name=name)).rows[0].status == "moved"


def test_the_furthest_value_that_passes_is_stated() -> None:
    assert only(ratio(38.0), ratio(1.0)).rows[0].allowed == pytest.approx(37.9)
    assert only(SIZE, SIZE).rows[0].allowed == 105
    assert only(STORED, STORED).rows[0].allowed == "2 × int8"


def test_nothing_changed_says_nothing() -> None:
    assert only(ratio(), ratio()).changes == ()


def test_an_upgrade_of_mnn_is_named_wherever_it_took_part() -> None:
    newer = {"MNN": "3.7.0", "torch": "2.9"}
    assert only(ratio(), ratio(), converted_with=newer).changes == ("tool: converted with MNN 3.6.1 → 3.7.0",)
    newer = {"MNN": "3.7.0", "onnxruntime": "1.32"}
    assert only(ratio(), ratio(), measured_with=newer).changes == ("tool: measured with MNN 3.6.1 → 3.7.0",)


def test_a_changed_recipe_is_shown_key_by_key() -> None:
    recipe = {"name": "int8", "components": {"dit": {"weights": {"bits": 4, "layers": [{"bits": 8}]}}}}
    assert set(only(ratio(), ratio(), recipe=recipe).changes) == {
        "recipe: components.dit.weights.bits 8 → 4",
        "recipe: components.dit.weights.layers [] → absent",
        "recipe: components.dit.weights.layers.0.bits absent → 8",
    }


def test_other_weights_code_files_and_machines_are_named() -> None:
    found = only(
        ratio(), ratio(), checkpoint={"dit": "zz"}, code={"mnn": "bb", "passes": "zz"}, files={"dit.mnn": "zz"},
        processor="another",
    )  # fmt: skip
    assert found.changes == (
        "checkpoint: other weights of dit",
        "our code: passes changed",
        "file: dit.mnn has other bytes",
        "machine: a processor → another",
    )


def test_the_case_to_look_at_is_the_models_own_worst_in_a_generation() -> None:
    figures = (
        ratio(1.0, name="sampled inputs: worst", case="seed=3 T=8", step=None),
        ratio(2.0, name="free-running: worst", case="prompt=1 seed=0 seconds=2", step=7),
        ratio(9.0, name="teacher-forced: mean", case="prompt=2 seed=0 seconds=2", step=1),
        ratio(8.0, name="teacher-forced: worst", case="prompt=3 seed=0 seconds=2", step=2),
        SIZE,
    )
    then = baseline(*(f.model_copy(update={"value": 100.0}) if f is not SIZE else f for f in figures))
    found = compare_figures(then, figures, ORIGIN)
    assert [(f.case, f.step) for f in worst_cases(found.failures)] == [("prompt=3 seed=0 seconds=2", 2)]


def test_json_holds_every_row_with_what_it_was_held_to() -> None:
    data = only(ratio(38.0), ratio(30.0)).to_data()
    assert data["passed"] is False
    assert data["baseline"]["reason"] == "first"
    row = data["rows"][0]
    assert (row["before"], row["now"], row["status"]) == (38.0, 30.0, "moved")
    assert row["allowed"] == pytest.approx(37.9)
    assert (row["case"], row["step"]) == ("prompt=0 seed=1 seconds=2", 3)
