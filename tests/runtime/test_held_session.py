"""A model is held to the file that was checked and to the layout that the manifest has."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays
from sa3_convert.components import Component, contract
from sa3_convert.errors import BundleError, ModelFileError
from sa3_convert.runtime.sessions import HeldSession
from sa3_convert.system.checked_files import CheckedFile
from tests.bundle.test_manifest import LAYOUT
from tests.runtime.conftest import StandIn

PORTS = contract(Component.DECODER, LAYOUT)
CHANNELS = LAYOUT.autoencoder.latent_dim
FEEDS = {"latents": np.zeros((1, CHANNELS, 4), np.float32)}


def held(path: Path, function: Any, output: str = "audio") -> HeldSession:
    path.write_bytes(b"model")
    return HeldSession(StandIn(output, function), (CheckedFile.read(path),), PORTS)


def test_what_fits_the_layout_is_handed_on(tmp_path: Path) -> None:
    made = np.ones((1, 2, 4 * 4096), np.float32)
    session = held(tmp_path / "x.mnn", lambda latents: made)
    assert session.run(FEEDS)["audio"] is made


@pytest.mark.parametrize(
    ("output", "made"),
    [
        ("audio", np.ones((1, 2, 4 * 2048), np.float32)),
        ("audio", np.ones((1, 1, 4 * 4096), np.float32)),
        ("audio", np.ones((1, 2, 4 * 4096), np.int32)),
        ("sound", np.ones((1, 2, 4 * 4096), np.float32)),
    ],
)
def test_a_model_of_another_checkpoint_is_told(tmp_path: Path, output: str, made: NDArray[Any]) -> None:
    session = held(tmp_path / "x.mnn", lambda latents: made, output)
    with pytest.raises(ModelFileError, match=r"x\.mnn is not the model that the bundle's layout describes: audio"):
        session.run(FEEDS)


def test_a_model_that_does_not_take_what_the_layout_says_is_told(tmp_path: Path) -> None:
    def refuse(**feeds: NDArray[Any]) -> NDArray[Any]:
        raise ValueError("latents is [1, 32, 4], the model takes [1, 16, -1]")

    with pytest.raises(ModelFileError, match="layout describes: latents is"):
        held(tmp_path / "x.mnn", refuse).run(FEEDS)


@pytest.mark.parametrize(
    "feeds",
    [{}, {"x": FEEDS["latents"]}, {"latents": np.zeros((1, 4), np.float32)}, {"latents": np.zeros((1, CHANNELS, 4))}],
)
def test_wrong_feeds_stay_the_callers_fault(tmp_path: Path, feeds: Arrays) -> None:
    session = held(tmp_path / "x.mnn", lambda latents: latents)
    with pytest.raises(ValueError, match="latents"):
        session.run(feeds)


def test_a_file_that_is_replaced_between_check_and_load_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.mnn"
    path.write_bytes(b"model")
    file = CheckedFile.read(path)
    (tmp_path / "y.mnn").write_bytes(b"model")
    (tmp_path / "y.mnn").replace(path)
    with pytest.raises(BundleError, match="replaced"):
        HeldSession(StandIn("audio", lambda latents: latents), (file,), PORTS)
