"""Figures summed up, and the floor that decides."""

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sa3_convert.check.metrics import sums_of
from sa3_convert.check.results import BundleFidelity, ComponentFidelity, Measurement, Verdict, advice
from sa3_convert.cli.comparison_tables import render_fidelity as render
from sa3_convert.components import Component
from sa3_convert.errors import VerificationError
from sa3_convert.lab.generations.full import Verification


def measured(case: str, error: float, *, value: float = 1.0) -> Measurement:
    reference = np.full(10, value, np.float32)
    return Measurement(case, "audio", sums_of(reference, reference + np.float32(error)))


RESULT = ComponentFidelity(Component.DECODER, (measured("seed=0 T=8", 0.5), measured("seed=1 T=64", 0.25)))
WORST = 20 * np.log10(2)
BEST = 20 * np.log10(4)


def test_the_worst_case_is_named_and_gives_the_worst_figures() -> None:
    assert RESULT.worst_case.case == "seed=0 T=8"
    assert RESULT.worst.signal_to_noise_db == pytest.approx(WORST)
    assert RESULT.worst.max_abs_error == 0.5


def test_the_mean_is_over_cases() -> None:
    assert RESULT.mean.signal_to_noise_db == pytest.approx((WORST + BEST) / 2)
    assert RESULT.mean.mean_abs_error == pytest.approx(0.375)


def test_a_constant_output_that_is_exact_does_not_lift_the_mean() -> None:
    padding = Measurement("seed=0 T=8", "padding", sums_of(np.ones(5, np.float32), np.ones(5, np.float32)))
    with_padding = ComponentFidelity(Component.DECODER, (*RESULT.measurements, padding))
    assert with_padding.mean == RESULT.mean


def test_the_pooled_ratio_is_over_all_elements() -> None:
    assert RESULT.pooled.signal_to_noise_db == pytest.approx(10 * np.log10(20 / (10 * 0.25 + 10 * 0.0625)))


def test_a_floor_that_is_reached_exactly_passes() -> None:
    RESULT.check_floor(RESULT.worst.signal_to_noise_db)


def test_below_the_floor_the_message_names_case_figure_and_a_floor_that_passes() -> None:
    with pytest.raises(VerificationError, match=r"decoder: audio of case seed=0 T=8 has 6\.02 dB, .*floor_db: 6\."):
        RESULT.check_floor(6.1)
    RESULT.check_floor(6.0)


@pytest.mark.parametrize("floor", [9.5, 28.0, 90.0])
def test_far_below_the_floor_no_other_floor_is_advised(floor: float) -> None:
    with pytest.raises(VerificationError, match="too far below for another floor") as error:
        RESULT.check_floor(floor)
    assert "floor_db" not in str(error.value)


@pytest.mark.parametrize("ratio", [0.09, -1.0])
def test_no_floor_that_a_recipe_may_not_have_is_advised(ratio: float) -> None:
    assert "floor_db" not in advice(ratio, 1.5)


def test_no_measurements_are_no_result() -> None:
    with pytest.raises(VerificationError, match="nothing was compared"):
        ComponentFidelity(Component.DIT, ())


def bundle(*floors: float) -> BundleFidelity:
    return BundleFidelity(
        "small-music", "int8", tuple(Verdict(RESULT.component, RESULT.measurements, floor, "int8") for floor in floors)
    )


def test_a_bundle_passes_only_if_every_model_does() -> None:
    bundle(1, 2).check()
    with pytest.raises(VerificationError, match="floor is 41 dB"):
        bundle(1, 41).check()


def test_every_model_that_falls_short_is_named() -> None:
    with pytest.raises(VerificationError, match=r"(?s)floor is 40 dB.*floor is 41 dB"):
        bundle(40, 41).check()


def test_the_json_holds_verdict_floor_and_every_case() -> None:
    data: dict[str, Any] = Verification.of(bundle(1, 41)).to_data()
    assert data["passed"] is False
    assert [c["passed"] for c in data["components"]] == [True, False]
    first = data["components"][0]
    assert first["worst_case"].items() >= {"case": "seed=0 T=8", "output": "audio"}.items()
    assert [c["case"] for c in first["cases"]] == ["seed=0 T=8", "seed=1 T=64"]
    assert {"signal_to_noise_db", "cosine", "max_abs_error", "mean_abs_error"} <= first["cases"][0].keys()


def text(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_shows_figure_floor_case_and_verdict() -> None:
    shown = text(render(bundle(1, 41)))
    assert all(part in shown for part in ("decoder", "int8", "6.0", "41", "ok", "failed"))


def test_the_table_has_room_for_the_longest_name_and_what_halves_leave() -> None:
    verdict = Verdict(
        Component.NUMBER_CONDITIONER, RESULT.measurements, 41, "int8", engine="onnxruntime-int8", half_db=54.66
    )
    row = text(render(BundleFidelity("small-music", "int8", (verdict,)))).splitlines()[-1].split()
    assert row[:3] == ["number_conditioner", "int8", "ORT"]
    assert row[-2:] == ["54.7", "failed"]
