"""A stage's result is whole or absent."""

from pathlib import Path
from typing import Any

import pytest

from sa3_convert.stage_cache import StageCache


def write_result(folder: Path) -> dict[str, Any]:
    (folder / "model.bin").write_bytes(b"weights")
    return {"answer": 42}


def test_a_result_is_made_once(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    first, reused_first = cache.get("export", "key", write_result)
    second, reused_second = cache.get("export", "key", write_result)
    assert (reused_first, reused_second) == (False, True)
    assert first == second
    assert second.notes == {"answer": 42}
    assert second.file("model.bin").read_bytes() == b"weights"


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    result, _ = cache.get("export", "key", write_result)
    result.file("model.bin").write_bytes(b"weightz")
    again, reused = cache.get("export", "key", write_result)
    assert not reused
    assert again.file("model.bin").read_bytes() == b"weights"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"x": "y"}}'])
def test_a_damaged_note_is_no_result(tmp_path: Path, text: str) -> None:
    cache = StageCache(tmp_path)
    result, _ = cache.get("export", "key", write_result)
    (result.folder / "entry.json").write_text(text)
    assert cache.find("export", "key") is None


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("stop")

    cache = StageCache(tmp_path)
    with pytest.raises(RuntimeError, match="stop"):
        cache.get("export", "key", fail)
    assert list((tmp_path / "export").iterdir()) == []
    assert not cache.has("export", "key")


def test_what_a_dead_process_left_is_swept(tmp_path: Path) -> None:
    leftover = tmp_path / "export" / ".key.0123456789abcdef.partial"
    leftover.mkdir(parents=True)
    (leftover / "big").write_bytes(b"x")
    StageCache(tmp_path).get("export", "key", write_result)
    assert not leftover.exists()


def test_a_dropped_result_is_made_again(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    cache.get("export", "key", write_result)
    cache.drop("export", "key")
    _, reused = cache.get("export", "key", write_result)
    assert not reused
