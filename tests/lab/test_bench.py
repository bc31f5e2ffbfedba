import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import Component
from sa3_convert.errors import BackendError, BundleError, UsageError
from sa3_convert.lab import bench as benching
from sa3_convert.lab.bench import (
    Contender,
    Figures,
    Row,
    TimedEngine,
    bench,
    contenders,
    decoded_with_overlap,
    measured,
    median_run,
    peak_memory,
)
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.system.machine import machine
from sa3_convert.system.machine import peak_memory as own_peak
from tests.runtime.conftest import Parts, open_parts
from tests.runtime.fakes import FakeEngine, pipeline


@pytest.fixture
def small() -> Parts:
    return open_parts("small")


seconds = st.floats(0, 1e4)
figures = st.builds(Figures, seconds, seconds, seconds, seconds, seconds, seconds, st.integers(1, 100))


@given(figures=figures.filter(lambda figures: figures.total > 1e-9))
def test_the_figures_of_a_row_add_up(figures: Figures) -> None:
    row = Row("mnn", 30.0, "warm", figures, (figures.total,), None).to_json()
    parts = ("load", "text_encoder", "number_conditioner", "dit", "decoder", "other")
    assert row["seconds"]["total"] == pytest.approx(sum(row["seconds"][name] for name in parts))
    assert row["seconds"]["dit_step"] * row["dit_runs"] == pytest.approx(row["seconds"]["dit"])
    assert row["real_time_factor"] * row["seconds"]["total"] == pytest.approx(30.0)


@given(runs=st.lists(figures, min_size=1, max_size=9))
def test_the_median_run_is_one_of_the_runs_with_as_many_below_as_above(runs: list[Figures]) -> None:
    chosen = median_run(runs)
    assert chosen in runs
    below = sum(run.total < chosen.total for run in runs)
    above = sum(run.total > chosen.total for run in runs)
    assert below <= len(runs) // 2
    assert above <= len(runs) // 2


class Ticks:
    """A clock that every look at it moves on by one second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_what_the_engine_does_and_what_is_around_it_make_the_total(
    small: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.perf_counter", Ticks())
    runner = pipeline(small, TimedEngine(FakeEngine()))  # type: ignore[arg-type]
    found = measured(runner, GenerateRequest("pad", seconds=1.0, steps=3))
    # One second between the two looks around each call.
    assert (found.text_encoder, found.number_conditioner, found.dit, found.dit_runs) == (1, 1, 3, 3)
    assert (found.load, found.decoder) == (4, 1)
    assert found.other > 0
    again = measured(runner, GenerateRequest("pad", seconds=1.0, steps=3))
    assert again == found


def test_a_timed_engine_gives_what_its_engine_gives_and_frees_what_it_loaded(small: Parts) -> None:
    request = GenerateRequest("pad", seconds=0.5, steps=2)
    engine = FakeEngine()
    plain = pipeline(small, FakeEngine()).generate(request)
    timed = pipeline(small, TimedEngine(engine)).generate(request)  # type: ignore[arg-type]
    np.testing.assert_array_equal(timed.audio, plain.audio)
    assert timed.report.engine == plain.report.engine
    assert all(session.closed for _, session in engine.loaded)


def test_engines_take_turns_and_every_row_has_its_repeats(
    toy_int8: Bundle, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(benching, "peak_memory", lambda contender, _: (len(contender.name), 7))
    found = contenders(toy_int8.path, ("mnn", "onnxruntime", "torch"), checkpoint=toy, threads=1)
    rows = bench(found, (0.5, 1.0), repeats=2, steps=1, report=order.append)
    at_half = [line.removeprefix("0.5 s, ") for line in order if line.startswith("0.5")]
    names = ["mnn", "onnxruntime", "torch"]
    assert at_half[:9] == [
        *(f"{name}, cold" for name in names),
        *(f"{name}, warm 1 of 2" for name in reversed(names)),
        *(f"{name}, warm 2 of 2" for name in names),
    ]
    assert [(row.duration, row.engine, row.temperature) for row in rows[:4]] == [
        (0.5, "mnn", "cold"),
        (0.5, "mnn", "warm"),
        (0.5, "onnxruntime", "cold"),
        (0.5, "onnxruntime", "warm"),
    ]
    assert len(rows) == 12
    for row in rows:
        assert len(row.totals) == (1 if row.temperature == "cold" else 2)
        assert row.figures.total in row.totals
        assert (row.figures.load > 0) == (row.temperature == "cold")
        assert min(row.figures.text_encoder, row.figures.dit, row.figures.decoder, row.figures.other) > 0
        assert (row.peak_bytes, row.device_bytes) == (len(row.engine), 7)


def test_the_reference_decodes_in_its_own_chunks(toy: Path) -> None:
    found = Contender("torch", str(toy), "torch", {"threads": 1}, as_reference=True)
    with found.open(keep_loaded=True) as runner:
        latents = np.random.default_rng(0).standard_normal((1, 32, 230)).astype(np.float32)
        (audio,) = runner.decode(latents, 1000)
        with runner.models.use(Component.DECODER) as decoder:
            expected = decoded_with_overlap(decoder, latents, runner.layout.autoencoder, chunk=128, overlap=32)
    np.testing.assert_array_equal(audio, expected[:, :, :1000])


def test_peak_memory_is_of_a_process_of_its_own_and_not_of_this_one(toy_int8: Bundle) -> None:
    ballast = np.ones(1 << 26)
    (found,) = contenders(toy_int8.path, ("mnn",), threads=1)
    peak, _ = peak_memory(found, GenerateRequest("pad", seconds=1.0, steps=1))
    assert peak is not None
    assert 20 << 20 < peak < 400 << 20
    own = own_peak()
    assert own is not None
    assert own > ballast.nbytes


def test_a_failure_while_memory_is_measured_is_told(tmp_path: Path) -> None:
    found = Contender("mnn", str(tmp_path), "mnn")
    with pytest.raises(BackendError, match="is no bundle"):
        peak_memory(found, GenerateRequest("pad", seconds=1.0))


def test_another_bundle_under_the_same_name_is_not_measured(toy_int8: Bundle, toy_fp32: Bundle, tmp_path: Path) -> None:
    (tmp_path / "live").symlink_to(toy_int8.path)
    (found,) = contenders(tmp_path / "live", ("mnn",))
    (tmp_path / "live").unlink()
    (tmp_path / "live").symlink_to(toy_fp32.path)
    with pytest.raises(BundleError, match="was replaced by another bundle"):
        found.open(keep_loaded=False)


def test_without_names_everything_that_the_bundle_has_is_measured(toy_int8: Bundle, toy: Path) -> None:
    assert [c.name for c in contenders(toy_int8.path, ())] == ["mnn", "mnn-low", "onnxruntime"]
    assert contenders(toy_int8.path, (), checkpoint=toy)[-1].name == "torch"


@pytest.mark.parametrize("names", [("cuda",), ("mnn", "mnn"), ("torch",)])
def test_what_cannot_be_compared_is_refused(toy_int8: Bundle, names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        contenders(toy_int8.path, names)


def test_a_checkpoint_without_torch_is_refused(toy_int8: Bundle, toy: Path) -> None:
    with pytest.raises(UsageError, match="together"):
        contenders(toy_int8.path, ("mnn",), checkpoint=toy)


def test_an_engine_whose_files_the_bundle_lacks_is_refused(toy_int8: Bundle) -> None:
    with pytest.raises(BundleError, match="--with-ort-int8"):
        contenders(toy_int8.path, ("onnxruntime-int8",))


@pytest.mark.parametrize("changes", [{"durations": ()}, {"repeats": 0}, {"contenders": ()}, {"durations": (1.0, 1e9)}])
def test_nothing_is_measured_if_something_cannot_be(toy_int8: Bundle, changes: dict[str, Any]) -> None:
    asked = {"contenders": contenders(toy_int8.path, ("mnn",)), "durations": (1.0,)} | changes
    report: Callable[[str], None] = pytest.fail
    with pytest.raises(UsageError):
        bench(**asked, report=report)


def test_the_machine_is_described_in_json() -> None:
    found = json.loads(json.dumps(machine()))
    assert found["processor"]
    assert found["usable_cores"] >= 1
    assert found["versions"]["MNN"] != "absent"
