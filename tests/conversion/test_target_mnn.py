"""A conversion for an older MNN: another graph for the converter, the same reference."""

from pathlib import Path

import pytest

import sa3_convert.cli.app as cli
from sa3_convert.bundle.manifest import Bundle
from sa3_convert.components import Component
from sa3_convert.mnn.storage import read_storage
from tests.bundles import Convert

COMPONENT = Component.TEXT_ENCODER


def maxima(bundle: Bundle) -> int:
    operators = read_storage(bundle.file(COMPONENT, "mnn")).operators
    return sum(operator.type == "Reduction" and "max" in operator.name for operator in operators)


@pytest.fixture(scope="module")
def old_and_new(converted: Convert, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    folder = tmp_path_factory.mktemp("targets")
    made = []
    for target in ("3.0", "3.6"):
        outcome, runs = converted(toy, "fp32", folder / target, components=(COMPONENT,), target_mnn=target)
        made.append(outcome.bundle)
    assert (COMPONENT.value, "export") not in runs.done()
    return made[0], made[1]


def test_before_3_6_the_row_maximum_is_subtracted(old_and_new: tuple[Bundle, Bundle]) -> None:
    old, new = old_and_new
    assert maxima(old) > 0
    assert maxima(new) == 0


def test_the_manifest_says_for_which_version(old_and_new: tuple[Bundle, Bundle]) -> None:
    assert [bundle.artifact(COMPONENT).target_mnn for bundle in old_and_new] == ["3.0", "3.6"]


def test_the_two_are_as_close_to_the_reference(old_and_new: tuple[Bundle, Bundle]) -> None:
    for bundle in old_and_new:
        fidelity = bundle.artifact(COMPONENT).fidelity
        assert fidelity is not None
        assert fidelity.signal_to_noise_db > 100


def test_an_unknown_version_is_exit_2(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert", str(toy), "--out", str(tmp_path / "out"), "--target-mnn", "2.9"]) == 2
    assert "3.0" in capsys.readouterr().err
