"""What counts as a shortfall on ARM64; the tier itself is `make arm`."""

from dataclasses import replace

import pytest

from tests.arm.__main__ import shortfalls, together
from tests.arm.measure import Figure

X86 = [Figure("int8", "dit", setting, "x86_64", db, None) for setting, db in (("high", 37), ("normal", 37.2))]
X86 += [Figure("int8", "dit", "memory low", "x86_64", 34, None), Figure("fp32", "dit", "high", "x86_64", 120, None)]


@pytest.mark.parametrize(
    ("setting", "emulated_db", "least"),
    [("high", None, 36.5), ("normal", None, 36.7), ("low", None, 36.7), ("memory low", None, 31), ("half", 37, 32.99)],
)
def test_a_figure_is_held_to_x86_or_to_what_halves_leave_of_it(
    setting: str, emulated_db: float | None, least: float
) -> None:
    figure = Figure("int8", "dit", setting, "aarch64", least + 0.01, emulated_db)
    assert not shortfalls(X86, [figure], "max")
    [line] = shortfalls(X86, [replace(figure, db=least - 0.01)], "max")
    assert f"int8 dit at {setting} on max: {least - 0.01:.1f} dB" in line


def test_what_float32_reaches_everywhere_is_enough() -> None:
    assert not shortfalls(X86, [Figure("fp32", "dit", "high", "aarch64", 90, None)], "max")


def test_two_equal_errors_leave_three_decibels_less() -> None:
    assert together(40, 40) == pytest.approx(36.99, abs=0.01)
