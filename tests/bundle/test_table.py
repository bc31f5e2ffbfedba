"""The table of bundles holds what their manifests say, and what was measured of them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sa3_convert.bundle.reader import Bundle
from sa3_convert.bundle.table import Bench, markdown_table
from sa3_convert.cli.app import app
from sa3_convert.components import Component
from sa3_convert.errors import InputError, UsageError
from tests.bundle.test_manifest import lora_entry, make_bundle, with_loras
from tests.bundles import Convert


@pytest.fixture(scope="module")
def small(converted: Convert, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of one component."""
    out = tmp_path_factory.mktemp("small") / "bundle"
    return converted(toy, "int8", out, components=(Component.NUMBER_CONDITIONER,))[0].bundle


@pytest.fixture(scope="module")
def other(converted: Convert, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of two components."""
    out = tmp_path_factory.mktemp("other") / "bundle"
    components = (Component.NUMBER_CONDITIONER, Component.TEXT_ENCODER)
    return converted(toy, "fp16", out, components=components)[0].bundle


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_each_bundle_is_a_row_and_each_component_of_any_of_them_a_column(small: Bundle, other: Bundle) -> None:
    header, rule, *rows = map(cells, markdown_table([small, other]).splitlines())
    assert header == ["variant", "recipe", "text_encoder", "number_conditioner", "all", "at low"]
    assert set(rule) == {"---"}
    assert [row[:2] for row in rows] == [["small-music", "`int8`"], ["small-music", "`fp16`"]]
    assert {len(row) for row in rows} == {len(header)}
    assert rows[0][2] == "–"


def test_size_and_fidelity_are_those_of_the_manifest(other: Bundle) -> None:
    row = cells(markdown_table([other]).splitlines()[2])
    models = [other.artifact(component) for component in (Component.TEXT_ENCODER, Component.NUMBER_CONDITIONER)]
    for cell, model in zip(row[2:4], models, strict=True):
        assert model.fidelity is not None
        assert cell == f"{model.bytes / 2**20:.1f} MiB, {model.fidelity.signal_to_noise_db:.1f} dB"
    assert row[4] == f"{sum(model.bytes for model in models) / 2**20:.1f} MiB"


def test_what_can_run_with_halves_is_named(small: Bundle, other: Bundle) -> None:
    rows = [cells(line) for line in markdown_table([small, other]).splitlines()[2:]]
    assert [row[-1] for row in rows] == ["none", "text_encoder"]


def test_the_command_prints_the_table(small: Bundle, other: Bundle) -> None:
    result = CliRunner().invoke(app, ["table", str(small.path), str(other.path)])
    assert result.exit_code == 0
    assert result.stdout.strip() == markdown_table([Bundle.open(small.path), Bundle.open(other.path)])


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["table", str(tmp_path)])
    assert result.exit_code != 0
    assert "variant" not in result.stdout


def measured(folder: Path, **changes: object) -> Path:
    """Write what `bench --json` writes, as far as the table reads it."""
    stages = dict.fromkeys(("text_encoder", "number_conditioner", "dit", "decoder", "other"), 0)
    rows = [
        {"engine": engine, "duration": duration, "temperature": kind, "peak_bytes": peak, "real_time_factor": 1}
        | {"seconds": stages | {"total": total}}
        for engine, duration, kind, total, peak in (
            ("mnn", 10, "cold", 9.0, 3 << 20),
            ("mnn", 10, "warm", 4.25, 700 << 20),
            ("torch", 30, "warm", 1, None),
        )
    ]
    data = {"schema": 1, "machine": {}, "variant": "small-music", "recipe": "int8", "rows": rows}
    data |= {"repeats": 3, "steps": None, "engines": {"mnn": {}, "torch": {}}} | changes
    path = folder / "bench.json"
    path.write_text(json.dumps(data))
    return path


def test_what_was_measured_stands_beside_its_bundle_only(small: Bundle, other: Bundle, tmp_path: Path) -> None:
    arguments = ["table", str(small.path), str(other.path), "--bench", str(measured(tmp_path))]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    header, _, first, second = map(cells, result.stdout.strip().splitlines())
    assert header[-2:] == ["10 s by mnn", "30 s by torch"]
    assert first[-2:] == ["4.2 s, 700 MiB", "1.0 s"]
    assert second[-2:] == ["–", "–"]


def test_measurements_of_no_bundle_in_the_table_are_refused(small: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none of the bundles"):
        markdown_table([small], [Bench.read(measured(tmp_path, recipe="fp16"))])
    twice = Bench.read(measured(tmp_path))
    with pytest.raises(UsageError, match="two files"):
        markdown_table([small], [twice, twice])


def test_loras_are_named_and_what_was_measured_with_them_stands_beside_them_only(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path / "plain")
    adapted = with_loras(make_bundle(tmp_path / "adapted"), lora_entry("a|b_*<i>.safetensors"))
    bench = Bench.read(measured(tmp_path, variant=adapted.manifest.label))
    *_, first, second = markdown_table([plain, adapted], [bench]).splitlines()
    assert cells(first)[0] == "small-music"
    assert cells(first)[-1] == "–"
    assert second.startswith(r"| small-music + a\|b\_\*\<i\>.safetensors:0.5 (aaaaaaaaaaaa) | `int8` |")
    assert cells(second)[-1] == "1.0 s"
    with pytest.raises(UsageError, match="none of the bundles"):
        markdown_table([plain], [bench])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"variant": "x"}'])
def test_a_file_that_bench_did_not_write_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(InputError, match="no result of"):
        Bench.read(path)
    with pytest.raises(InputError, match="no result of"):
        Bench.read(tmp_path / "missing.json")
