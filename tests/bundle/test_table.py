"""The table of bundles holds what their manifests say."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sa3_convert.bundle.manifest import Bundle
from sa3_convert.bundle.table import markdown_table
from sa3_convert.cli.app import app
from sa3_convert.components import Component
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
    assert header == ["variant", "recipe", "text_encoder", "number_conditioner", "all"]
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


def test_the_command_prints_the_table(small: Bundle, other: Bundle) -> None:
    result = CliRunner().invoke(app, ["table", str(small.path), str(other.path)])
    assert result.exit_code == 0
    assert result.stdout.strip() == markdown_table([Bundle.open(small.path), Bundle.open(other.path)])


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["table", str(tmp_path)])
    assert result.exit_code != 0
    assert "variant" not in result.stdout
