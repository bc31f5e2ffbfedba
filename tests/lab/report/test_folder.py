"""The folder of a report: whole, replaced as a whole, and never someone else's."""

from pathlib import Path

import pytest

from sa3_convert.errors import UsageError
from sa3_convert.lab.report.build import DATA, PAGE, SUMMARY, check_folder, write_folder
from tests.lab.report import samples

CONTENTS = {PAGE: "page", DATA: samples.report().to_json(), SUMMARY: "summary"}


def files(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}


def test_a_new_folder_holds_the_three_files_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "deep" / "report", CONTENTS)
    assert files(tmp_path / "deep" / "report") == CONTENTS
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["report"]


def test_an_empty_folder_is_taken_and_an_earlier_report_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    write_folder(folder, CONTENTS)
    write_folder(folder, CONTENTS | {PAGE: "another"})
    assert files(folder)[PAGE] == "another"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize(
    "foreign",
    [{"notes.txt": "mine"}, {PAGE: "my own page"}, {**CONTENTS, "notes.txt": "mine"}, {DATA: "{}"}, {DATA: "no JSON"}],
)
def test_what_is_no_report_is_left_alone(foreign: dict[str, str], tmp_path: Path) -> None:
    for name, text in foreign.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="no part of a report"):
        check_folder(tmp_path)
    with pytest.raises(UsageError):
        write_folder(tmp_path, CONTENTS)
    assert files(tmp_path) == foreign


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_folder(tmp_path / "report")


def test_where_one_stands_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="Name a folder inside it"):
        check_folder(Path())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_folder(tmp_path / "file" / "report", CONTENTS)


@pytest.mark.parametrize("failing", ["write", "rename"])
def test_a_failure_leaves_the_earlier_report_and_nothing_else(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "report"
    write_folder(folder, CONTENTS)
    if failing == "write":
        monkeypatch.setattr("os.fsync", _fail)
    else:
        replace = Path.replace

        def interrupted(path: Path, target: Path) -> Path:
            if path.is_dir() and (path / PAGE).read_text() == "another":
                raise KeyboardInterrupt
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises((UsageError, KeyboardInterrupt), match=r"No space|^$"):
        write_folder(folder, CONTENTS | {PAGE: "another"})
    assert files(folder) == CONTENTS
    assert [entry.name for entry in tmp_path.iterdir()] == ["report"]


def _fail(*_: object) -> None:
    raise OSError("No space left on device")
