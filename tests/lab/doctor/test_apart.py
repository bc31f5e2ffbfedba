"""Jobs in processes of their own: what ends one does not end the others."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.errors import ConversionError
from sa3_convert.lab.doctor import apart
from sa3_convert.lab.doctor.examine import judged
from sa3_convert.lab.doctor.probe import GraphProbe, Level, Setting
from sa3_convert.lab.doctor.results import Answer
from sa3_convert.lab.doctor.worker import Job, Ran
from sa3_convert.mnn.session import Backend

X = np.linspace(-2, 2, 24, dtype=np.float32).reshape(4, 6)
PROBE = GraphProbe(
    id="sum", asks="a sum", text="(float[4, 6] x) => (float[4, 6] y) { y = Add(x, x) }", feeds=({"x": X},)
)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    model = apart.converted(PROBE, tmp_path)
    np.savez(tmp_path / "feeds.npz", x=X)
    return Job(str(model), (str(tmp_path / "feeds.npz"),), ("y",), "cpu", "high", "normal", str(tmp_path / "r.json"))


def test_a_job_leaves_its_arrays(job: Job, tmp_path: Path) -> None:
    (ran,) = apart.run_jobs([job], tmp_path)
    assert ran.error is None
    np.testing.assert_array_equal(np.load(job.arrays)["0/y"], 2 * X)


def test_a_job_that_cannot_run_says_why_and_the_next_one_runs(job: Job, tmp_path: Path) -> None:
    broken = replace(job, model=str(tmp_path / "absent.mnn"), report=str(tmp_path / "broken.json"))
    first, second = apart.run_jobs([broken, job], tmp_path)
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

    monkeypatch.setattr(apart, "_start", start)
    assert [ran.error for ran in apart.run_jobs(jobs, tmp_path)] == [None, "killed by signal 11", None]
    assert starts == [3, 1]


def test_a_converter_that_writes_nothing_is_an_error_with_its_reason(tmp_path: Path) -> None:
    probe = replace(PROBE, text="(float[4, 6] x) => (float[4, 6] y) { n = IsNaN(x)  y = Cast<to = 1>(n) }")
    with pytest.raises(ConversionError, match="IsNaN"):
        apart.converted(probe, tmp_path)


def answer(
    job: Job,
    target: NDArray[np.float32],
    *,
    backend: Backend = "cpu",
    precision: Level = "high",
    messages: tuple[str, ...] = (),
) -> Answer:
    np.savez(job.arrays, **{"0/y": target})  # type: ignore[arg-type]
    return judged(PROBE, Setting(precision), backend, [{"y": 2 * X}], job, Ran(None, messages))


def test_equal_numbers_work(job: Job) -> None:
    assert (answer(job, 2 * X).outcome, answer(job, 2 * X).db) == ("works", 300)


def test_other_numbers_are_wrong_by_so_much(job: Job) -> None:
    found = answer(job, 2.2 * X)
    assert found.outcome == "wrong"
    assert found.db == pytest.approx(20, abs=0.1)


def test_another_shape_is_wrong(job: Job) -> None:
    assert "shape [2, 12]" in answer(job, (2 * X).reshape(2, 12)).detail


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_wrong(job: Job, value: float) -> None:
    target = 2 * X
    target[0, 0] = value
    assert answer(job, target).detail == "NaN or infinity"


def test_half_rounding_is_allowed_on_a_gpu_below_precision_high(job: Job) -> None:
    rounded = (2 * X).astype(np.float16).astype(np.float32)
    assert answer(job, rounded, backend="cuda", precision="normal").outcome == "works"
    assert answer(job, rounded, backend="cuda", precision="high").outcome == "wrong"
    assert answer(job, rounded, backend="cpu", precision="normal").outcome == "wrong"


def test_an_operator_that_fell_back_is_told(job: Job) -> None:
    line = "CUDABackend Don't support type BinaryOp, y"
    assert answer(job, 2 * X, backend="cuda", messages=(line,)).outcome == "cpu"
