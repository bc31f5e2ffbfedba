"""The summary for a pull request."""

from sa3_convert.lab.report.schema import Change, NotRun, Problem
from sa3_convert.lab.report.summary import render_summary
from tests.lab.report import samples


def test_the_verdict_stands_first_and_a_row_for_each_model_follows() -> None:
    lines = render_summary(samples.report()).splitlines()
    assert lines[2] == "**Passed: all is well.**"
    assert "| dit | passed | 38.0 | 30 | 38.5 | 40.0 | 4 | int8 | 2.9 KiB |" in lines
    assert "| decoder | 38.0 | 30 | 38.5 | 40.0 | 4 |" in lines
    assert lines.index("### What changed") < lines.index("### The worst cases again")


def test_what_was_recognised_is_told() -> None:
    assert "Inpainting on mnn: 9 of 10 sounds are recognised" in render_summary(samples.report())
    assert "recognised" not in render_summary(samples.report(recognitions=()))


def test_worst_cases_have_their_commands_and_what_was_not_run_has_too() -> None:
    missing = NotRun(part="generations", what="Nothing was generated.", command="sa3-convert verify b --full")
    text = render_summary(samples.report(generations=None, end_to_end=None, not_run=(missing,)))
    assert "sa3-convert bisect 'my bundle' --component dit --seed 3 --latents 8\n" in text
    assert "- Nothing was generated. `sa3-convert verify b --full`" in text


def test_problems_and_the_operator_to_blame_stand_above_the_table() -> None:
    short = samples.component(passed=False)
    problem = Problem(what="dit: too little.", command="sa3-convert bisect b")
    text = render_summary(
        samples.report(
            passed=False, problems=(problem,), components=(short,), bisections=(samples.bisection(own=20.0),)
        )
    )
    assert text.index("- dit: too little.") < text.index("is the worst.") < text.index("| model |")
    assert "| dit | **failed** |" in text


def test_names_do_not_break_the_markdown() -> None:
    text = render_summary(samples.report())
    assert "<script>" not in text
    assert "\\<script\\>" in text
    assert "\\| pipe \\`tick\\`" in text


def test_changes_are_tables_of_bounded_length() -> None:
    changes = tuple(Change(what=f"w{i}", before="a|b", now="c") for i in range(40))
    text = render_summary(samples.report(since_conversion=changes, since_report=()))
    assert "| w29 | a\\|b | c |" in text
    assert "| w30 |" not in text
    assert "and 10 more" in text
    assert "Since the earlier report: nothing." in text


def test_the_same_report_gives_the_same_text() -> None:
    assert render_summary(samples.report()) == render_summary(samples.report())
