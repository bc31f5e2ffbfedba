"""A conversion for an older MNN: another graph for the converter, the same reference; by default, one at no cost."""

from pathlib import Path

import pytest

import sa3_convert.cli.app as cli
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.components import Component
from sa3_convert.mnn.compatibility import oldest_reader
from sa3_convert.mnn.file.storage import read_storage
from tests.bundles import Convert


def maxima(bundle: Bundle, component: Component) -> int:
    operators = read_storage(bundle.file(component, "mnn")).operators
    return sum(operator.type == "Reduction" and "max" in operator.name for operator in operators)


def signal_to_noise(bundle: Bundle, component: Component) -> float:
    fidelity = bundle.artifact(component).fidelity
    assert fidelity is not None
    return fidelity.signal_to_noise_db


@pytest.fixture(scope="module")
def sliding(converted: Convert, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Decoders with sliding windows, whose masks no proof covers."""
    folder = tmp_path_factory.mktemp("sliding")
    synthesize(folder / "checkpoint", "medium", "toy", 0, "gaussian")
    return {
        target: converted(
            folder / "checkpoint", "fp32", folder / target, components=(Component.DECODER,), target_mnn=target
        )[0].bundle
        for target in ("3.0", "3.6")
    }


@pytest.fixture(scope="module")
def bounded(converted: Convert, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bounded")
    components = (Component.TEXT_ENCODER, Component.DIT, Component.DECODER)
    return {
        target: converted(toy, "fp32", folder / target, components=components, target_mnn=target)[0].bundle
        for target in ("3.0", "3.1", "3.6")
    }


def test_before_3_6_the_row_maximum_is_subtracted_where_it_may_be_low(sliding: dict[str, Bundle]) -> None:
    assert maxima(sliding["3.0"], Component.DECODER) > 0
    assert maxima(sliding["3.6"], Component.DECODER) == 0
    for bundle in sliding.values():
        assert signal_to_noise(bundle, Component.DECODER) > 100


@pytest.mark.parametrize("component", [Component.TEXT_ENCODER, Component.DIT, Component.DECODER])
def test_what_cannot_be_low_is_left_alone(bounded: dict[str, Bundle], component: Component) -> None:
    assert [maxima(bundle, component) for bundle in bounded.values()] == [0, 0, 0]


@pytest.mark.parametrize("component", [Component.TEXT_ENCODER, Component.DIT, Component.DECODER])
def test_each_target_reads_what_was_made_for_it(bounded: dict[str, Bundle], component: Component) -> None:
    for target, bundle in bounded.items():
        assert oldest_reader(read_storage(bundle.file(component, "mnn"))).version <= target
        assert bundle.artifact(component).target_mnn == target
        assert signal_to_noise(bundle, component) > 100


def test_silu_is_spelled_out_for_3_0_only(bounded: dict[str, Bundle]) -> None:
    versions = [oldest_reader(read_storage(bundle.file(Component.DIT, "mnn"))).version for bundle in bounded.values()]
    assert versions == ["3.0", "3.1", "3.5"]


def test_by_default_it_is_for_the_oldest_that_reads_it(converted: Convert, toy: Path, tmp_path: Path) -> None:
    components = (Component.NUMBER_CONDITIONER, Component.DIT)
    bundle = converted(toy, "int8", tmp_path / "default", components=components)[0].bundle
    assert [bundle.artifact(component).target_mnn for component in components] == ["3.1", "3.6"]


def test_scales_that_the_target_cannot_read_are_exit_2(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(toy), "--out", str(tmp_path / "out"), "--target-mnn", "3.5"]
    assert cli.run(arguments) == 2
    assert "--target-mnn 3.6" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_an_unknown_version_is_exit_2(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert", str(toy), "--out", str(tmp_path / "out"), "--target-mnn", "2.9"]) == 2
    assert "3.0" in capsys.readouterr().err
