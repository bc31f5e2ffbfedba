"""Fixtures of the MNN room: a converter that remembers, and graphs for it."""

from pathlib import Path

import pytest

from tests.mnn.converted import Converter, mixed_graph


@pytest.fixture(scope="session")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Converter:
    """MNN's converter with bare flags; the same conversion is made once."""
    return Converter(tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with an embedding, linears, a convolution, a 3-D product and a norm."""
    return mixed_graph(tmp_path_factory.mktemp("mixed") / "mixed.onnx")
