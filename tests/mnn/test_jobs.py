"""Jobs in processes of their own: what ends one does not end the others."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sa3_convert.errors import ConversionError
from sa3_convert.mnn import isolated as runner
from sa3_convert.mnn.isolated import run_jobs
from sa3_convert.mnn.worker import Job
from tests.passes.graphs import graph, mnn_of

X = np.linspace(-2, 2, 24, dtype=np.float32).reshape(4, 6)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    model = mnn_of(graph("(float[4, 6] x) => (float[4, 6] y) { y = Add(x, x) }"), tmp_path)
    np.savez(tmp_path / "feeds.npz", x=X)
    return Job(str(model), (str(tmp_path / "feeds.npz"),), ("y",), "cpu", "high", "normal", str(tmp_path / "r.json"))


def test_a_job_leaves_its_arrays(job: Job, tmp_path: Path) -> None:
    (ran,) = run_jobs([job], tmp_path)
    assert ran.error is None
    np.testing.assert_array_equal(np.load(job.arrays)["0/y"], 2 * X)


def test_a_job_that_cannot_run_says_why_and_the_next_one_runs(job: Job, tmp_path: Path) -> None:
    broken = replace(job, model=str(tmp_path / "absent.mnn"), report=str(tmp_path / "broken.json"))
    first, second = run_jobs([broken, job], tmp_path)
    assert "absent.mnn" in (first.error or "")
    assert second.error is None


def test_a_job_that_ends_the_process_is_blamed_and_the_rest_runs_in_another(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [replace(job, report=str(tmp_path / f"{number}.json")) for number in range(3)]
    starts: list[int] = []

    def start(arguments: Sequence[str], folder: Path, timeout: float) -> str:
        listed = [Job.from_data(data) for data in json.loads(Path(arguments[1]).read_text())]
        starts.append(len(listed))
        for entry in listed:
            if entry.report.endswith("1.json"):
                raise ConversionError("killed by signal 11")
            Path(entry.report).write_text(json.dumps({"error": None, "messages": []}))
        return ""

    monkeypatch.setattr(runner, "start", start)
    assert [ran.error for ran in run_jobs(jobs, tmp_path)] == [None, "killed by signal 11", None]
    assert starts == [3, 1]
