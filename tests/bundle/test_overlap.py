"""What is written is nothing that is read and nothing twice, by whatever names."""

import os
from pathlib import Path

import pytest

from sa3_convert.bundle.overlap import require_apart, require_outside
from sa3_convert.errors import UsageError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "weights").write_text("w")
    (tmp_path / "a.wav").write_text("a")
    (tmp_path / "link.wav").symlink_to("a.wav")
    (tmp_path / "dangling.wav").symlink_to("q/../new.wav")
    (tmp_path / "hard.wav").hardlink_to("a.wav")
    (tmp_path / "there").symlink_to("q")
    return tmp_path


@pytest.mark.parametrize("name", ["a.wav", "./a.wav", "q/../a.wav", "there/../a.wav", "link.wav", "hard.wav", "ABS"])
def test_a_file_that_is_read_is_not_written_by_any_name(here: Path, name: str) -> None:
    name = name.replace("ABS", str(here / "a.wav"))
    with pytest.raises(UsageError, match=r"--json .* would replace what is read: --from a\.wav"):
        require_apart([("--json", Path(name))], [("--from", Path("a.wav"))])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("new.wav", "q/../new.wav"),
        ("new.wav", "dangling.wav"),
        ("a.wav", "hard.wav"),
        ("a.wav", "A.WAV"),
        ("é.wav", "é.wav"),
        ("-", "/dev/stdout"),
        ("-", "-"),
        ("/dev/fd/1", "/proc/self/fd/1"),
    ],
)
def test_two_outputs_are_not_one_file(here: Path, first: str, second: str) -> None:
    with pytest.raises(UsageError, match="are one file"):
        require_apart([("-o", Path(first)), ("--json", Path(second))], [])


def test_what_is_apart_may_be_written(here: Path) -> None:
    os.mkfifo("pipe")
    os.mkfifo("other")
    writes = [Path(name) for name in ("new.wav", "new.json", "q/new.wav", "pipe", "other", os.devnull, os.devnull)]
    require_apart([("-o", path) for path in writes], [("--from", Path("a.wav")), ("BUNDLE", Path("q"))])


@pytest.mark.parametrize("name", ["q/weights", "there/weights", "q/deep/config", "hard-weights"])
def test_no_file_of_a_folder_that_is_read_is_written(here: Path, name: str) -> None:
    (here / "q" / "deep").mkdir()
    (here / "q" / "deep" / "config").touch()
    (here / "hard-weights").hardlink_to("q/weights")
    with pytest.raises(UsageError, match="would replace what is read: CHECKPOINT q"):
        require_apart([("--out", Path(name))], [("CHECKPOINT", Path("q"))])


@pytest.mark.parametrize("name", ["graph.onnx.data", "model.mnn.weight"])
def test_the_weights_beside_a_model_are_read_with_it(here: Path, name: str) -> None:
    (here / name).touch()
    with pytest.raises(UsageError, match="would replace"):
        require_apart([("--out", Path(name))], [("FILE", Path(name).with_suffix(""))])


@pytest.mark.parametrize(("name", "where"), [("q", "in"), ("q/new", "in"), ("there/new", "in"), (".", "around")])
def test_no_folder_is_made_in_one_that_is_read_or_around_it(here: Path, name: str, where: str) -> None:
    with pytest.raises(UsageError, match=f"is {where} what is read"):
        require_outside([("--to", Path(name))], [("BUNDLE", Path("q"))])


def test_a_folder_beside_what_is_read_may_be_made(here: Path) -> None:
    require_outside([("--to", Path("q-too"))], [("BUNDLE", Path("q")), ("CHECKPOINT", Path("owner/name"))])
