"""Shared fixtures: the golden checkpoints and tensors of the reference implementation."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

pytest_plugins = ["tests.bundles"]


@pytest.fixture(scope="session", autouse=True)
def own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Diagnoses of this machine must not change what the tests see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
        yield


GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One golden family: its checkpoint folder, its cases, its tensors."""

    folder: Path
    checkpoint: Path
    cases: tuple[dict[str, Any], ...]
    tensors: dict[str, NDArray[Any]] = field(repr=False)

    def of(self, component: str) -> Iterator[dict[str, Any]]:
        return (case for case in self.cases if case["component"] == component)


def load_golden(family: str) -> Golden:
    folder = GOLDEN / family
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    return Golden(folder, folder / "checkpoint", tuple(cases), load_file(folder / "expected.safetensors"))


@pytest.fixture(scope="session")
def golden_small() -> Golden:
    return load_golden("small")


@pytest.fixture(scope="session")
def golden_base() -> Golden:
    return load_golden("base")


@pytest.fixture(scope="session")
def golden_medium() -> Golden:
    return load_golden("medium")


@pytest.fixture(scope="session", params=["small", "medium"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each family that has weights of its own."""
    return load_golden(request.param)


def assert_close_to_peak(actual: NDArray[Any], expected: NDArray[Any], tolerance: float) -> None:
    """Assert that shapes are equal and the largest difference is within `tolerance` of the largest magnitude."""
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    peak = float(np.abs(expected).max())
    error = float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max())
    assert error <= tolerance * peak, f"{error / peak:.2e} of the peak"
