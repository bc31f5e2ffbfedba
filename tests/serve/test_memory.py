"""Which bundles the worker keeps in memory."""

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile

from sa3_convert.bundle.reader import Bundle
from sa3_convert.serve.worker import Served, _Worker
from tests.serve.conftest import serving
from tests.serve.test_http import made_by_pipeline, samples

PIECE = {"prompt": "warm pad", "seconds": 1, "steps": 2, "seed": 3}


class Worked:
    """A worker in this process, whose memory is what its bundles take on disk."""

    def __init__(self, bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch, room: float) -> None:
        served = {name: Served(bundle.path, "mnn", {"threads": 1}) for name in ("one", "two", "three")}
        self._folder, self._size, self._number = folder, served["one"].bytes(), 0
        self._heard, own = multiprocessing.Pipe()
        self._worker = _Worker(own, served, int(room * self._size))
        taken = lambda _: SimpleNamespace(rss=len(self.open) * self._size)  # noqa: E731
        monkeypatch.setattr(psutil.Process, "memory_info", taken)

    @property
    def open(self) -> list[str]:
        """Return the bundles in memory, the least recently used first."""
        return list(self._worker._open)

    def make(self, model: str) -> tuple[bool, np.ndarray]:
        """Make the piece; return whether its model was loaded for it, and the samples."""
        self._number += 1
        output = self._folder / f"{self._number}.wav"
        self._worker._make({"id": "a", "model": model, "settings": PIECE, "output": str(output), "told": {}})
        told: list[dict[str, Any]] = []
        while self._heard.poll():
            told.append(json.loads(self._heard.recv_bytes()))
        assert told[-1]["event"] == "done", told[-1]
        return "loading" in [one["event"] for one in told], soundfile.read(output, dtype="int16")[0]


def test_the_least_recently_used_is_freed_and_gives_the_same_samples_when_it_is_loaded_again(
    toy_int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worked(toy_int8, tmp_path, monkeypatch, 2.5)
    first = {name: worker.make(name) for name in ("one", "two")}
    assert all(loaded for loaded, _ in first.values())
    two = worker._worker._open["two"]
    assert not worker.make("one")[0]
    assert worker.make("three")[0]
    assert worker.open == ["one", "three"]
    assert two.models._kept == {}
    loaded, again = worker.make("two")
    assert loaded
    assert worker.open == ["three", "two"]
    assert np.array_equal(again, first["two"][1])


def test_a_bundle_that_is_larger_than_the_limit_is_kept_alone(
    toy_int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worked(toy_int8, tmp_path, monkeypatch, 0.5)
    assert [worker.make(name)[0] for name in ("one", "one", "two", "one")] == [True, False, True, True]
    assert worker.open == ["one"]


def test_a_server_below_its_limit_answers_with_the_same_samples(toy_int8: Bundle, tmp_path: Path) -> None:
    wanted = made_by_pipeline(toy_int8, **PIECE)
    with serving(toy_int8, tmp_path, keep_bytes=1) as served:
        for model in ("one", "two", "two", "one"):
            job = served.start(**PIECE, model=model)
            assert served.ended(job)["state"] == "done"
            assert np.array_equal(samples(served.client.get(f"/v1/jobs/{job}/audio").content), wanted)
        loaded = ["loading" in [e["event"] for e in served.events(name)] for name in served.jobs.known]
    assert loaded == [True, True, False, True]
