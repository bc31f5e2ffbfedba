"""Checkpoints to read and to damage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sa3_convert.checkpoint.synthetic import synthesize

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="session")
def small_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "small-music"
    synthesize(folder, "small-music")
    return folder


@pytest.fixture
def copy(small_toy: Path, tmp_path: Path) -> Path:
    """A checkpoint of this test's own."""
    return Path(shutil.copytree(small_toy, tmp_path / "checkpoint"))


def edit_json(path: Path, edit: Edit) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
