"""How a probe's result is judged."""

import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.errors import ConversionError
from sa3_convert.lab.doctor import examine as room
from sa3_convert.lab.doctor.examine import examine, judged
from sa3_convert.lab.doctor.graphs import converted
from sa3_convert.lab.doctor.probe import GraphProbe, Level, Setting
from sa3_convert.lab.doctor.results import Answer
from sa3_convert.mnn import isolated
from sa3_convert.mnn.compatibility import Backend
from sa3_convert.mnn.worker import Job, JobOutcome

X = np.linspace(-2, 2, 24, dtype=np.float32).reshape(4, 6)
PROBE = GraphProbe(
    id="sum", asks="a sum", text="(float[4, 6] x) => (float[4, 6] y) { y = Add(x, x) }", feeds=({"x": X},)
)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job("", (), ("y",), "cpu", "high", "normal", str(tmp_path / "r.json"))


def test_a_converter_that_writes_nothing_is_an_error_with_its_reason(tmp_path: Path) -> None:
    probe = replace(PROBE, text="(float[4, 6] x) => (float[4, 6] y) { n = IsNaN(x)  y = Cast<to = 1>(n) }")
    with pytest.raises(ConversionError, match="IsNaN"):
        converted(probe, tmp_path)


def answer(
    job: Job,
    target: NDArray[np.float32],
    *,
    backend: Backend = "cpu",
    precision: Level = "high",
    messages: tuple[str, ...] = (),
) -> Answer:
    np.savez(job.arrays, **{"0/y": target})  # type: ignore[arg-type]
    return judged(PROBE, Setting(precision), backend, [{"y": 2 * X}], job, JobOutcome(None, messages))


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


@pytest.mark.parametrize(
    ("db", "precision", "outcome"),
    [
        # Attention of float32 has 82 dB on aarch64; one rounding to half leaves 75 to 77.
        (80, "high", "works"),
        (72, "high", "wrong"),
        (72, "normal", "wrong"),
        (72, "low", "works"),
        (45, "low", "works"),
        (35, "low", "wrong"),
    ],
)
def test_as_much_is_asked_as_the_arithmetic_that_was_asked_for_can_give(
    job: Job, db: float, precision: Level, outcome: str
) -> None:
    assert answer(job, (2 * X * (1 + 10 ** (-db / 20))).astype(np.float32), precision=precision).outcome == outcome


def test_half_arithmetic_is_asked_no_more_than_the_way_of_storing_allows(job: Job) -> None:
    for least, half, outcome in ((12.0, 40.0, "works"), (75.0, 20.0, "works"), (75.0, 40.0, "wrong")):
        np.savez(job.arrays, **{"0/y": 2.05 * X})  # type: ignore[arg-type]
        probe = replace(PROBE, least_db=least, half_db=half)
        found = judged(probe, Setting("low"), "cpu", [{"y": 2 * X}], job, JobOutcome(None, ()))
        assert (found.db, found.outcome) == (pytest.approx(32, abs=0.1), outcome)


def test_half_rounding_is_allowed_on_a_gpu_below_precision_high(job: Job) -> None:
    rounded = (2 * X).astype(np.float16).astype(np.float32)
    assert answer(job, rounded, backend="cuda", precision="normal").outcome == "works"
    assert answer(job, rounded, backend="cuda", precision="high").outcome == "wrong"
    assert answer(job, rounded, backend="cpu", precision="normal").outcome == "wrong"


def test_an_operator_that_fell_back_is_told(job: Job) -> None:
    line = "CUDABackend Don't support type BinaryOp, y"
    assert answer(job, 2 * X, backend="cuda", messages=(line,)).outcome == "cpu"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let probes of CUDA run on a device that is played."""
    command = (sys.executable, "-P", "-s", "-m", "tests.lab.doctor.faulty_worker")
    monkeypatch.setattr(room, "require_backend", lambda backend: None)
    monkeypatch.setattr(isolated, "start", functools.partial(isolated.start, command=command))


def played(name: str, *settings: Setting) -> GraphProbe:
    text = f"(float[4, 6] x) => (float[4, 6] {name}) {{ {name} = Add(x, x) }}"
    return replace(PROBE, id=name, text=text, settings=settings or (Setting(),))


@pytest.mark.usefixtures("device")
def test_a_fault_of_a_device_is_found_and_does_not_colour_the_other_probes() -> None:
    probes = [played(name) for name in ("before", "fault", "between", "nothing", "crash", "after")]
    found = {result.probe: result.worst for result in examine("cuda", probes)}
    assert {name: answer.outcome for name, answer in found.items()} == {
        "before": "works",
        "fault": "fails",
        "between": "works",
        "nothing": "fails",
        "crash": "fails",
        "after": "works",
    }
    assert "24 of 24 numbers of nothing as they were" in found["nothing"].detail
    assert "killed by signal" in found["crash"].detail


def test_memory_low_comes_last_and_every_answer_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Job] = []

    def run(jobs: Sequence[Job], folder: Path, *, apart: bool) -> list[JobOutcome]:
        assert not apart
        ran.extend(jobs)
        return [JobOutcome(job.memory, ()) for job in jobs]

    monkeypatch.setattr(room, "run_jobs", run)
    probes = [played(name, Setting(memory="low"), Setting(), Setting("low")) for name in ("a", "b")]
    results = examine("cpu", probes)
    assert [job.memory for job in ran] == ["normal"] * 4 + ["low"] * 2
    for result in results:
        assert all(name.endswith(f"memory {answer.detail}") for name, answer in result.answers.items())
