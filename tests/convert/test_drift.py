"""Drift on a real bundle: no false alarm, every injected loss found, nothing damaged compared."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import sa3_convert.cli.app as cli
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, InputError, VerificationError
from sa3_convert.lab.drift.baseline import Baseline, BundleBaseline, read_baseline, write_baseline
from sa3_convert.lab.drift.drift import (
    Plan,
    check_drift,
    find_baseline,
    no_report,
    origin_of,
    speed_figures,
    update_baseline,
)
from sa3_convert.lab.generations.trajectory import all_cases
from sa3_convert.recipe import load_recipe
from tests.bundles import CONFIGS, Convert
from tests.convert.losing import lose

CASES = all_cases((0, 7), (0, 1), (2.0,))
Copy = Callable[[], Path]


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan(CASES, speed=False, threads=1, store=ReferenceStore(tmp_path_factory.mktemp("references")))


@pytest.fixture(scope="session")
def kept(toy_int8: Bundle, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline file that was made from the toy bundle."""
    path = tmp_path_factory.mktemp("baseline") / "drift.json"
    update_baseline(path, toy_int8, "first baseline", plan)
    return path


@pytest.fixture
def copy_of_int8(toy_int8: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    # As deep as the bundle itself: where its reference is kept stands in the manifest as a relative path.
    return lambda: Path(shutil.copytree(toy_int8.path, tmp_path_factory.mktemp("copy"), dirs_exist_ok=True))


def changed(kept: Path, folder: Path, **origin: object) -> Path:
    """Write a baseline whose origin was another."""
    known = read_baseline(kept)
    assert known is not None
    bundle = known.bundles[0]
    other = bundle.model_copy(update={"origin": bundle.origin.model_copy(update=origin)})
    write_baseline(folder / "drift.json", Baseline(schema_version=1, bundles=(other,)))
    return folder / "drift.json"


def found(kept: Path, bundle: Bundle) -> BundleBaseline:
    return find_baseline(kept, bundle)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_clean_repeat_raises_no_alarm_whatever_the_threads(
    toy_int8: Bundle, kept: Path, plan: Plan, threads: int
) -> None:
    again = Plan(threads=threads, speed=False)
    result = check_drift(toy_int8, found(kept, toy_int8), again)
    assert result.failures == ()
    assert {row.status for row in result.rows} == {"held"}


def test_another_conversion_raises_no_alarm(
    converted: Convert, toy: Path, cache: Path, kept: Path, plan: Plan, tmp_path: Path
) -> None:
    shutil.copytree(cache / "export", tmp_path / "cache" / "export")
    again = converted(toy, "int8", tmp_path / "again", cache=tmp_path / "cache")[0].bundle
    assert check_drift(again, found(kept, again), plan).passed


@pytest.mark.parametrize("component", list(Component))
def test_a_loss_of_one_decibel_in_one_component_is_found(
    copy_of_int8: Copy, kept: Path, plan: Plan, component: Component
) -> None:
    bundle = lose(copy_of_int8(), component, 1.0)
    result = check_drift(bundle, found(kept, bundle), plan)
    moved = {(row.figure.component, row.figure.kind) for row in result.failures}
    assert (component, "fidelity") in moved
    assert all(kind in ("fidelity", "step") for _, kind in moved)
    assert [line for line in result.changes if "file:" in line] == [f"file: {component.value}.mnn has other bytes"]


def test_a_worse_rounding_is_found_and_the_recipe_is_named(
    converted: Convert, toy: Path, kept: Path, plan: Plan, tmp_path: Path
) -> None:
    first, rest = (CONFIGS / "int8.yaml").read_text().split("  number_conditioner:")
    first = first.replace("bits: 8", "bits: 7").replace("floor_db: 28", "floor_db: 20")
    (tmp_path / "worse.yaml").write_text(f"{first}  number_conditioner:{rest}")
    bundle = converted(toy, load_recipe(tmp_path / "worse.yaml"), tmp_path / "worse")[0].bundle
    result = check_drift(bundle, found(kept, bundle), plan)
    fallen = {(row.figure.component, row.figure.name.split(":")[0]) for row in result.failures}
    assert (Component.TEXT_ENCODER, "generations") in fallen
    # What the text encoder loses reaches the DiT when it runs free, and there alone.
    assert all(c is Component.TEXT_ENCODER or name.startswith("free-running") for c, name in fallen)
    assert "recipe: components.text_encoder.weights.bits 8 → 7" in result.changes
    assert any(row.figure.kind == "storage" for row in result.failures)


def test_a_damaged_bundle_is_compared_with_nothing(copy_of_int8: Copy, kept: Path, plan: Plan) -> None:
    folder = copy_of_int8()
    model = folder / "dit.mnn"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.unlink()
    model.write_bytes(data)
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match=r"dit\.mnn"):
        check_drift(bundle, found(kept, bundle), plan)


def test_a_bundle_that_fails_verification_becomes_no_baseline(copy_of_int8: Copy, plan: Plan, tmp_path: Path) -> None:
    bundle = lose(copy_of_int8(), Component.NUMBER_CONDITIONER, 9.0)
    with pytest.raises(VerificationError):
        update_baseline(tmp_path / "drift.json", bundle, "why not", plan)
    assert list(tmp_path.iterdir()) == []


def test_an_update_keeps_the_reasons_and_the_other_bundles(
    toy_int8: Bundle, kept: Path, plan: Plan, tmp_path: Path
) -> None:
    path = tmp_path / "drift.json"
    known = read_baseline(kept)
    assert known is not None
    other = known.bundles[0].model_copy(update={"variant": "small-sfx"})
    write_baseline(path, known.replacing(other))
    made, change = update_baseline(path, toy_int8, "a second time", plan)
    assert [update.reason for update in made.history] == ["first baseline", "a second time"]
    assert all(update.tools["MNN"] for update in made.history)
    assert change is not None
    assert change.passed
    again = read_baseline(path)
    assert again is not None
    assert again.find(other.key) == other
    assert again.find(made.key) == made


def test_what_figures_depend_on_is_kept(toy_int8: Bundle) -> None:
    origin = origin_of(toy_int8)
    assert origin.converted_with == toy_int8.manifest.tools
    assert set(origin.checkpoint) == {component.value for component in Component}
    assert origin.files["dit.mnn"] == toy_int8.artifact(Component.DIT).sha256
    assert origin.recipe["components"]["text_encoder"]["weights"]["block_size"] == 128
    assert {"passes", "mnn", "rounding", "check"} <= set(origin.code)
    # A room that is not there has the digest of nothing, and would never be seen to change.
    assert hashlib.sha256().hexdigest() not in origin.code.values()


def test_a_baseline_of_another_variant_is_refused_by_name(toy_int8: Bundle, kept: Path, tmp_path: Path) -> None:
    known = read_baseline(kept)
    assert known is not None
    other = known.bundles[0].model_copy(update={"variant": "small-sfx"})
    write_baseline(tmp_path / "drift.json", Baseline(schema_version=1, bundles=(other,)))
    with pytest.raises(InputError, match="knows nothing of small-music int8 toy; it holds small-sfx int8 toy"):
        find_baseline(tmp_path / "drift.json", toy_int8)


def command(bundle: Bundle, baseline: Path, *more: str) -> list[str]:
    return ["drift", str(bundle.path), "--baseline", str(baseline), "--no-speed", "--threads", "1", *more]


def test_the_command_holds_a_bundle_to_its_baseline(
    toy_int8: Bundle, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(command(toy_int8, kept, "--json", str(tmp_path / "drift.json"))) == 0
    shown = capsys.readouterr()
    assert "nothing moved" in shown.out
    assert "A ratio may fall by" in shown.out
    data = json.loads((tmp_path / "drift.json").read_text())
    assert data["passed"] is True
    assert data["rule"].startswith("A ratio may fall")


def test_a_loss_is_exit_6_with_the_rows_the_changes_and_what_to_run_next(
    copy_of_int8: Copy, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = lose(copy_of_int8(), Component.DIT, 1.0)
    known = read_baseline(kept)
    assert known is not None
    older = dict(known.bundles[0].origin.measured_with) | {"MNN": "3.6.0"}
    baseline = changed(kept, tmp_path, measured_with=older)
    assert cli.run(command(bundle, baseline)) == 6
    shown = capsys.readouterr()
    assert "teacher-forced: mean" in shown.out
    assert "changed: tool: measured with MNN 3.6.0 → " in shown.out
    assert "changed: file: dit.mnn has other bytes" in shown.out
    assert f"sa3-convert bisect {bundle.path} --component dit --case 'prompt=" in shown.err
    assert "first baseline" in shown.err
    assert "--update --reason" in shown.err


def test_the_next_command_that_is_named_runs(
    copy_of_int8: Copy, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    bundle = lose(copy_of_int8(), Component.DECODER, 1.0)
    assert cli.run(command(bundle, kept)) == 6
    line = next(line for line in capsys.readouterr().err.splitlines() if "bisect" in line)
    assert cli.run(shlex.split(line)[1:]) == 0


def test_an_update_from_nothing_and_once_more(
    toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "drift.json"
    few = ["--case", "prompt=3 seed=0 seconds=1", "--case", "prompt=3 seed=1 seconds=1"]
    assert cli.run(command(toy_int8, path, "--update", "--reason", "a start", *few)) == 0
    assert "is the baseline now, because: a start" in capsys.readouterr().out
    assert cli.run(command(toy_int8, path, "--update", "--reason", "more")) == 0
    made = read_baseline(path)
    assert made is not None
    assert made.bundles[0].cases == ("prompt=3 seed=0 seconds=1", "prompt=3 seed=1 seconds=1")
    assert len(made.bundles[0].history) == 2


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--update"], 2, "say why"),
        (["--update", "--reason", "  "], 2, "say why"),
        (["--reason", "because"], 2, "are for --update"),
        (["--case", "prompt=0 seed=0 seconds=1"], 2, "are for --update"),
        (["--update", "--reason", "because", "--case", "nonsense"], 2, "is no case"),
        ([], 3, "There is no baseline"),
    ],
)
def test_wrong_usage_is_told_before_any_work(
    toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, said: str
) -> None:
    assert cli.run(command(toy_int8, tmp_path / "drift.json", *options)) == code
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_baseline_is_neither_used_nor_written_over(toy_int8: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    path.write_text('{"schema": 1')
    assert cli.run(command(toy_int8, path)) == 3
    assert cli.run(command(toy_int8, path, "--update", "--reason", "because")) == 3
    assert path.read_text() == '{"schema": 1'


def test_every_component_has_a_ratio_of_speeds(toy_int8: Bundle) -> None:
    figures = list(speed_figures(toy_int8, no_report))
    assert [figure.component for figure in figures] == list(toy_int8.components)
    assert all(isinstance(f.value, float) and f.value > 0 and f.tolerance >= 0.4 * f.value for f in figures)
