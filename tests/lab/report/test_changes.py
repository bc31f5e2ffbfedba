"""What changed, against the manifest and against an earlier report."""

from pathlib import Path

import pytest

from sa3_convert.components import Component
from sa3_convert.errors import InputError
from sa3_convert.lab.report.summary import changes_since_conversion, changes_since_report, read_report
from tests.lab.report import samples

TOOLS = {"MNN": "3.6.1"}


def test_the_same_reports_have_no_changes() -> None:
    assert changes_since_report(samples.report(), samples.report()) == ()
    assert changes_since_conversion(samples.made(), (samples.component(),)) == ()


def test_another_tool_and_another_figure_than_the_manifest_are_named() -> None:
    made = samples.made(converted_with=TOOLS, verified_with={"MNN": "3.7.0", "numpy": "2"})
    changes = changes_since_conversion(made, (samples.component(claimed_db=38.0, measured_db=36.0),))
    assert [(c.what, c.before, c.now) for c in changes] == [
        ("MNN", "3.6.1", "3.7.0"),
        ("numpy", "none", "2"),
        ("dit, worst of the conversion's inputs", "38.0 dB", "36.0 dB"),
    ]


@pytest.mark.parametrize(("claimed", "measured"), [(38.0, 38.05), (110.0, 95.0), (None, 38.0)])
def test_what_differs_between_machines_is_no_change(claimed: float | None, measured: float) -> None:
    component = samples.component(claimed_db=claimed, measured_db=measured)
    assert changes_since_conversion(samples.made(), (component,)) == ()


def test_verdict_size_floor_checkpoint_and_figures_are_compared_with_an_earlier_report() -> None:
    before = samples.report()
    now = samples.report(
        passed=False,
        made=samples.made(digests={"dit": "cd" * 32}),
        components=(
            samples.component(passed=False, floor_db=39.0, bytes=4096, spread=samples.spread(36.0)),
            samples.component(Component.ENCODER),
        ),
        end_to_end=None,
    )
    found = {change.what: (change.before, change.now) for change in changes_since_report(before, now)}
    assert found["verdict"] == ("passed", "failed")
    assert found["checkpoint, dit"] == ("abababababab…", "cdcdcdcdcdcd…")
    assert found["dit, size"] == ("2.9 KiB", "4.0 KiB")
    assert found["dit, floor"] == ("30 dB", "39 dB")
    assert found["dit, 4 inputs, worst"] == ("38.0 dB", "36.0 dB")
    assert found["decoder"] == ("passed", "none")
    assert found["encoder"] == ("none", "passed")
    assert not any("nudge" in what for what in found)


def test_ratios_over_other_inputs_are_not_compared() -> None:
    more = samples.report(components=(samples.component(spread=samples.spread(20.0, count=9)),))
    assert not any("worst" in change.what for change in changes_since_report(samples.report(), more))


def test_an_earlier_report_is_read(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(samples.report().to_json(), encoding="utf-8")
    assert read_report(tmp_path / "report.json") == samples.report()


@pytest.mark.parametrize("text", ["", "{}", "no JSON", '{"schema": 2}'])
def test_what_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="no report of this version"):
        read_report(tmp_path / "report.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_report(tmp_path / "nothing.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_report(tmp_path)
