"""The report's folder: whole or not there; the next run takes its place, and nothing of anyone else's is touched."""

from collections.abc import Mapping
from pathlib import Path

from sa3_convert.errors import UsageError
from sa3_convert.files import partial_folder, write_text
from sa3_convert.untrusted import read_json
from sa3_convert.verify.report.schema import KIND

DATA = "report.json"
PAGE = "index.html"
SUMMARY = "summary.md"
_NAMES = {DATA, PAGE, SUMMARY}


def check_folder(folder: Path) -> None:
    """Check, before any long work, that a report can be written there.

    Raises:
        UsageError: a file stands there, or a folder with files that are no report's, or one that cannot be replaced.

    """
    if not folder.exists():
        return
    if folder.is_mount() or folder.resolve() == Path.cwd():
        raise UsageError(f"{folder} cannot be replaced as a whole. Name a folder inside it.")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file. Name a folder for the report.")
    names = {entry.name for entry in folder.iterdir()}
    if names and not (names <= _NAMES and _is_report(folder / DATA)):
        raise UsageError(
            f"{folder} holds {sorted(names - _NAMES or names)[0]}, which is no part of a report. Name a new or empty "
            "folder, or one that holds an earlier report."
        )


def _is_report(file: Path) -> bool:
    try:
        data = read_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("kind") == KIND


def write_folder(folder: Path, contents: Mapping[str, str]) -> None:
    """Write a report's files under a temporary name and rename the folder; an earlier report is replaced.

    Args:
        folder: where; `check_folder` says whether it may be.
        contents: text by file name.

    Raises:
        UsageError: see `check_folder`; or the folder cannot be written.

    """
    check_folder(folder)
    try:
        _replace(folder.resolve(), contents)
    except OSError as error:
        raise UsageError(f"The report cannot be written to {folder}: {error.strerror or error}.") from None


def _replace(folder: Path, contents: Mapping[str, str]) -> None:
    with partial_folder(folder) as old, partial_folder(folder) as new:
        for name, text in contents.items():
            write_text(new / name, text)
        stood = folder.exists()
        try:
            if stood:
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            # Between the two renames the earlier report goes back.
            if stood and not folder.exists():
                old.rename(folder)
            raise
