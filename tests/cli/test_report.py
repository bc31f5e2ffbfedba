"""`verify --report` on the command line."""

import json
from pathlib import Path

import pytest

import sa3_convert.cli.app as cli
from sa3_convert.bundle.reader import Bundle
from sa3_convert.lab.report.build import DATA, PAGE, SUMMARY
from sa3_convert.recipe import load_recipe
from tests.bundles import CONFIGS, Convert

QUICK = ("--quick", "--component", "number_conditioner")


def verify(bundle: Bundle, *options: str) -> int:
    return cli.run(["verify", str(bundle.path), *QUICK, *options])


def test_a_report_is_written_replaced_and_compared(
    toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "report"
    assert verify(toy_int8, "--report", str(folder)) == 0
    assert {file.name for file in folder.iterdir()} == {PAGE, DATA, SUMMARY}
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert "index.html (" in capsys.readouterr().err

    assert verify(toy_int8, "--report", str(folder)) == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first

    again = tmp_path / "again"
    assert verify(toy_int8, "--report", str(again), "--since", str(folder / DATA), "--no-bisect") == 0
    data = json.loads((again / DATA).read_text())
    assert data["since_report"] == []
    assert {missing["part"] for missing in data["not_run"]} == {"components", "generations", "end_to_end", "layers"}


def test_a_bundle_that_falls_short_has_its_report_and_exit_5(converted: Convert, toy: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from sa3_convert.check.bundle import verify_bundle

    bundle = converted(toy, load_recipe(CONFIGS / "int8.yaml"), tmp_path / "int8")[0].bundle
    with pytest.MonkeyPatch.context() as patch:

        def strict(*arguments: object, **options: object) -> object:
            found = verify_bundle(*arguments, **options)  # type: ignore[arg-type]
            return replace(found, verdicts=tuple(replace(v, floor_db=99.0) for v in found.verdicts))

        patch.setattr("sa3_convert.check.bundle.verify_bundle", strict)
        assert verify(bundle, "--report", str(tmp_path / "report"), "--no-bisect") == 5
    assert (tmp_path / "report" / SUMMARY).read_text().splitlines()[2].startswith("**Failed: 1 of 1 models")


def test_a_folder_with_other_files_is_refused_before_any_work(
    toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert verify(toy_int8, "--report", str(tmp_path)) == 2
    printed = capsys.readouterr()
    assert "thesis.txt" in printed.err
    assert "number_conditioner" not in printed.err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_since_needs_a_report_to_write_and_one_to_read(toy_int8: Bundle, tmp_path: Path) -> None:
    assert verify(toy_int8, "--since", str(tmp_path / "report.json")) == 2
    assert verify(toy_int8, "--report", str(tmp_path / "new"), "--since", str(tmp_path / "report.json")) == 3
    assert not (tmp_path / "new").exists()
