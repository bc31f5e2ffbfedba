import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_convert.errors import BundleError
from sa3_convert.runtime.autoencode import Bottleneck

GOOD: dict[str, Any] = {
    "scaling_factor": [[[2.0], [4.0]]],
    "bias": [[[1.0], [0.0]]],
    "running_std": [0.5],
}


def written(tmp_path: Path, values: object) -> Path:
    path = tmp_path / "bottleneck_params.json"
    path.write_text(json.dumps(values))
    return path


def test_encoding_scales_shifts_and_divides(tmp_path: Path) -> None:
    encoded = np.ones((1, 2, 3), np.float32)
    latents = Bottleneck.read(written(tmp_path, GOOD), 2).encode(encoded)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents[0], [[6, 6, 6], [8, 8, 8]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": [[1.0, 2.0]]}, r"scaling_factor has shape \[1, 2\]"),
        ({"bias": [[[1.0]]]}, r"bias has shape \[1, 1, 1\]"),
        ({"bias": [[[float("nan")], [0.0]]]}, "NaN"),
        ({"bias": [[[1e39], [0.0]]]}, "not finite"),
        ({"running_std": [0.0]}, "running_std"),
        ({"running_std": [-1.0]}, "running_std"),
        ({"running_std": 0.5}, "running_std"),
        ({"running_std": ["x"]}, "ValueError"),
        ({"scaling_factor": [[[1.0], [2.0, 3.0]]]}, "ValueError"),
    ],
)
def test_numbers_that_cannot_be_are_a_damaged_bundle(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Bottleneck.read(written(tmp_path, GOOD | change), 2)


@pytest.mark.parametrize("missing", sorted(GOOD))
def test_a_missing_key_is_named(tmp_path: Path, missing: str) -> None:
    values = {key: value for key, value in GOOD.items() if key != missing}
    with pytest.raises(BundleError, match=missing):
        Bottleneck.read(written(tmp_path, values), 2)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff", b'{"bias": '])
def test_a_file_that_is_no_such_json_is_a_damaged_bundle(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bottleneck_params.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"bottleneck_params\.json"):
        Bottleneck.read(path, 2)


def test_a_missing_file_is_a_damaged_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        Bottleneck.read(tmp_path / "bottleneck_params.json", 2)
