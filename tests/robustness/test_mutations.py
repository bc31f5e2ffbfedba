"""A model that was changed, with every hash adapted, ends no command but by an exit code and a sentence."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sa3_convert.bundle.reader import Bundle
from tests.robustness.mutations import MODELS, TOKENIZER, UNCHANGED

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def judged(converted: Any, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle with its references beside it, so that `verify` needs nothing else."""
    out = tmp_path_factory.mktemp("judged") / "bundle"
    bundle: Bundle = converted(toy, "int8", out, with_reference=True)[0].bundle
    return bundle


def trials(bundle: Bundle, folder: Path, count: int, *components: str) -> list[dict[str, Any]]:
    words = [sys.executable, "-m", "tests.robustness.mutations", str(bundle.path), str(folder), str(count), "0"]
    silent = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*words, *components], cwd=ROOT, env=silent, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("count", [5, pytest.param(1000, marks=pytest.mark.slow)])
def test_changed_models_are_no_crash(count: int, judged: Bundle, tmp_path: Path) -> None:
    found = trials(judged, tmp_path, count, *MODELS)
    assert len(found) == 2 * count
    assert [trial for trial in found if trial["problems"]] == []
    assert [trial["code"] for trial in found if trial["change"] == UNCHANGED] == [0, 0]
    if count > 100:
        # Some must get as far as MNN and end it, or nothing was tried.
        ended = [trial for trial in found if "ended the command" in trial["said"]]
        assert len(ended) > count / 50
        outcomes = Counter((trial["command"], trial["code"]) for trial in found)
        print(f"{count} changed models: {dict(outcomes)}, {len(ended)} would have ended the interpreter")  # noqa: T201


@pytest.mark.parametrize("count", [5, pytest.param(500, marks=pytest.mark.slow)])
def test_changed_tokenizers_are_no_crash(count: int, judged: Bundle, tmp_path: Path) -> None:
    found = trials(judged, tmp_path, count, TOKENIZER)
    assert len(found) == count
    assert [trial for trial in found if trial["problems"]] == []
