"""How figures and cases are written."""

import pytest

from sa3_convert.lab.report.formatting import fixed, shown_db, shown_prompt, with_prompts


@pytest.mark.parametrize(
    ("value", "digits", "sign", "shown"),
    [
        (-0.004, 2, "", "0.00"),
        (-0.0, 1, "", "0.0"),
        (-0.004, 2, "+", "+0.00"),
        (-0.006, 2, "+", "-0.01"),
        (12.345, 1, "", "12.3"),
        (-0.4, 0, "", "0"),
    ],
)
def test_a_number_has_its_digits_and_no_sign_of_what_is_rounded_away(
    value: float, digits: int, sign: str, shown: str
) -> None:
    assert fixed(value, digits, sign) == shown


def test_a_ratio_of_equal_arrays_is_infinite() -> None:
    assert [shown_db(ratio) for ratio in (300.0, 38.04, -0.01)] == ["∞", "38.0", "0.0"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("prompt=0 seed=1 seconds=2.5", "“warm analog synth pad”, seed 1, 2.5 s"),
        ("prompt=4 seed=0 seconds=5", "no prompt, seed 0, 5 s"),
        ("seed=3 T=8", "seed=3 T=8"),
        (
            "dit: generation prompt=3 seed=0 seconds=2 step=7 has 1 dB.",
            "dit: generation “dog bark”, seed 0, 2 s, step 7 has 1 dB.",
        ),
    ],
)
def test_a_case_is_called_by_its_prompt_and_a_sampled_input_by_its_name(name: str, shown: str) -> None:
    assert with_prompts(name) == shown


def test_a_long_prompt_loses_its_end() -> None:
    assert shown_prompt("a b" * 20, 10) == "“a ba ba b…”"
    assert shown_prompt("short", 10) == "“short”"
    assert shown_prompt("雨の夜、静かな", 9) == "“雨の夜、…”"
