"""Bisecting a bundle's model, and the inputs that a user brings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.inputs import sample_inputs
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, InputError
from sa3_convert.lab.bisect.bisect import bisect_bundle, read_feeds
from tests.lab.bisect.sessions import LAYOUT


def test_a_sound_model_of_a_bundle_is_blamed_for_nothing(bundle: Bundle) -> None:
    result = bisect_bundle(bundle, Component.DIT, latents=12, threads=2)
    assert result.suspect is None, result.verdict()
    assert len(result.operators) > 200


def test_given_inputs_are_used(bundle: Bundle) -> None:
    feeds = {"seconds": np.array([33.0], np.float32)}
    one = bisect_bundle(bundle, Component.NUMBER_CONDITIONER, feeds=feeds, threads=1)
    other = bisect_bundle(bundle, Component.NUMBER_CONDITIONER, threads=1)
    assert one.operators[-1].error_out_db != other.operators[-1].error_out_db


def test_a_file_that_is_not_the_manifests_is_refused(copy_of: Callable[[], Path]) -> None:
    folder = copy_of()
    path = folder / "dit.mnn"
    path.write_bytes(path.read_bytes() + b"\x00")
    with pytest.raises(BundleError, match=r"dit\.mnn"):
        bisect_bundle(Bundle.open(folder), Component.DIT)


def saved(path: Path, **changes: Any) -> Path:
    feeds = dict(sample_inputs(Component.DIT, LAYOUT, seed=1, latents=6).feeds) | changes
    np.savez(path, allow_pickle=False, **{name: array for name, array in feeds.items() if array is not None})
    return path


def test_inputs_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    feeds = read_feeds(saved(tmp_path / "in.npz"), Component.DIT, LAYOUT)
    for name, array in sample_inputs(Component.DIT, LAYOUT, seed=1, latents=6).feeds.items():
        np.testing.assert_array_equal(feeds[name], array, strict=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t": None}, "takes"),
        ({"extra": np.zeros(1)}, "extra"),
        ({"t": np.zeros(1)}, "t is float64"),
        ({"t": np.zeros(2, np.float32)}, r"t is float32 \[2\]"),
        ({"t": np.array([np.nan], np.float32)}, "finite"),
        ({"x": np.zeros((1, 32, 7), np.float32)}, "one T"),
        ({"x": np.zeros((32, 6), np.float32)}, "x is"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_feeds(saved(tmp_path / "in.npz", **changes), Component.DIT, LAYOUT)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"\x93NUMPY", b"hello"])
def test_what_is_no_npz_file_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "in.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"no \.npz file"):
        read_feeds(path, Component.DIT, LAYOUT)


def test_a_single_array_is_no_file_of_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"no \.npz file"):
        read_feeds(tmp_path / "in.npy", Component.DIT, LAYOUT)


def test_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    np.savez(path, x=np.array([object()], dtype=object))
    with pytest.raises(InputError, match=r"no \.npz file"):
        read_feeds(path, Component.DIT, LAYOUT)
