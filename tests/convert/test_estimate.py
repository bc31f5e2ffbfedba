"""What a conversion takes is told before it starts, and refused where it cannot be."""

import re
from pathlib import Path

import pytest

import sa3_convert.cli.app as cli
from sa3_convert.components import Component
from sa3_convert.convert.plan import estimate, total
from sa3_convert.recipe import ComponentRecipe, WeightScheme
from tests.bundles import CONFIGS

GIB = 2**30
PLAIN = ComponentRecipe(floor_db=1, weights=WeightScheme(bits=8))
PLANNED = ComponentRecipe(floor_db=1, weights=WeightScheme(bits=8, rounding="least_squares"))


def test_nothing_to_do_takes_nothing() -> None:
    assert estimate((), GIB, PLAIN).seconds == 0
    assert total([]).memory_bytes == 0


def test_more_weights_more_stages_and_planned_rounding_take_longer() -> None:
    short = estimate(("mnn", "verify"), GIB, PLAIN)
    assert estimate(("mnn", "verify"), 2 * GIB, PLAIN).seconds > short.seconds
    assert estimate(("export", "mnn", "verify"), GIB, PLAIN).seconds > short.seconds
    assert estimate(("mnn", "verify"), GIB, PLANNED).seconds > short.seconds
    assert estimate(("verify",), GIB, PLANNED) == estimate(("verify",), GIB, PLAIN)


@pytest.mark.parametrize(
    ("stages", "gib", "measured"),
    [
        (("round",), 1.05, 4.57),
        (("export", "verify"), 5.41, 6.68),
        (("export", "verify"), 1.59, 3.6),
        (("export", "mnn", "verify"), 1.71, 6.94),
    ],
)
def test_memory_is_near_what_true_size_components_took(stages: tuple[str, ...], gib: float, measured: float) -> None:
    assert estimate(stages, round(gib * GIB), PLANNED).memory_bytes / GIB == pytest.approx(measured, rel=0.15)


def test_a_toy_needs_little_memory() -> None:
    assert estimate(("export", "round", "mnn", "verify"), 1_000_000, PLAIN).memory_bytes < 0.7 * GIB


def test_components_follow_one_another() -> None:
    one, other = estimate(("export",), GIB, PLAIN), estimate(("export",), 3 * GIB, PLAIN)
    both = total([one, other])
    assert both.seconds == pytest.approx(one.seconds + other.seconds)
    assert both.memory_bytes == other.memory_bytes


def test_too_little_memory_is_told_before_anything_starts(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(toy), "--recipe", str(CONFIGS / "int8.yaml"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sa3_convert.convert.plan.available_memory", lambda: GIB // 8)
    assert cli.run(command) == 3
    told = capsys.readouterr().err
    assert "Not enough memory" in told
    assert "0.1 GiB are free" in told
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_time_and_memory_of_what_is_left_to_do(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(toy), "--recipe", str(CONFIGS / "int8.yaml"), "--out", str(tmp_path / "out")]
    one = ["--component", Component.NUMBER_CONDITIONER.value]
    assert cli.run([*command, *one]) == 0
    capsys.readouterr()
    assert cli.run([*command, "--component", "dit", *one, "--dry-run"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if len(line.split()) > 2}
    assert "export → mnn → verify" in lines["dit"]
    assert re.search(r"\d s  export", lines["dit"])
    assert "up to date" in lines["number_conditioner"]
    assert not re.search(r"\d s  ", lines["number_conditioner"])
    assert "MiB of disk" in lines["total"]
