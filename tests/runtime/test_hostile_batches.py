"""Batches and results with hostile words at any place are refused, or generate into their own folder alone."""

import contextlib
import json
import random
from pathlib import Path

import pytest

from sa3_convert.errors import InputError, OutputRejectedError, UsageError
from sa3_convert.runtime.batch import RESULTS, BatchOptions, run_batch
from sa3_convert.runtime.batch_file import read_batch
from tests.robustness.contained import PATHS, Surroundings, mutations
from tests.runtime.conftest import Parts
from tests.runtime.fakes import FakeEngine, pipeline

LINE = {"prompt": "pad", "seed": 1, "seconds": 0.2, "steps": 1, "output": "pad.wav"}


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_written_outside_of_a_batchs_folder(small: Parts, tmp_path: Path, seed: int) -> None:
    rng, watch = random.Random(seed), Surroundings(tmp_path)
    batch, folder = watch.allowed / "batch.jsonl", watch.allowed / "out"
    folder.mkdir()
    taken = 0
    for _, line in mutations(LINE, 100, seed):
        named = json.dumps(LINE | {"output": rng.choice(PATHS)})
        batch.write_text(rng.choice((line, named, f"{line}\n{named}")), encoding="utf-8", errors="replace")
        (folder / RESULTS).write_text(f"{line}\n{named}\n", encoding="utf-8", errors="replace")
        with contextlib.suppress(InputError, UsageError, OutputRejectedError):
            items = read_batch(batch)
            if all((item.request.seconds or 10) < 5 for item in items):
                taken += len(list(run_batch(pipeline(small, FakeEngine()), items, BatchOptions(folder))))
        assert watch.changed() == []
    assert taken
