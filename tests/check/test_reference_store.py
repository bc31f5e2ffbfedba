"""References are computed once, whatever happens to the files that keep them."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.check.reference_store import ReferenceStore


def value(number: float, size: int = 3) -> Callable[[], dict[str, NDArray[np.float32]]]:
    return lambda: {"a": np.full(size, number, np.float32)}


def refuse() -> dict[str, NDArray[np.float32]]:
    raise AssertionError("computed again")


def test_a_second_request_is_answered_from_the_folder(tmp_path: Path) -> None:
    ReferenceStore(tmp_path).get(value(1), model="x", seed=1)
    again = ReferenceStore(tmp_path)
    np.testing.assert_array_equal(again.get(refuse, model="x", seed=1)["a"], np.ones(3, np.float32), strict=True)
    assert again.computed == 0


def test_anything_else_that_it_depends_on_is_another_entry(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    for seed in range(3):
        assert store.get(value(seed), model="x", seed=seed)["a"][0] == seed
    assert store.computed == 3


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-30], lambda data: b"x" * len(data)])
def test_a_damaged_entry_is_computed_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    ReferenceStore(tmp_path).get(value(1), k=1)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    assert ReferenceStore(tmp_path).get(value(2), k=1)["a"][0] == 2
    assert ReferenceStore(tmp_path).get(refuse, k=1)["a"][0] == 2


def test_a_flipped_bit_in_an_entry_is_not_believed(tmp_path: Path) -> None:
    ReferenceStore(tmp_path).get(value(1, 1000), k=1)
    (file,) = tmp_path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert ReferenceStore(tmp_path).get(value(2, 1000), k=1)["a"][0] == 2


def test_an_entry_under_another_ones_name_is_not_believed(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    store.get(value(1), k=1)
    (one,) = tmp_path.iterdir()
    store.get(value(2), k=2)
    (two,) = set(tmp_path.iterdir()) - {one}
    one.replace(two)
    assert store.get(value(3), k=2)["a"][0] == 3


def test_what_is_no_entry_is_never_dropped(tmp_path: Path) -> None:
    (tmp_path / "mine.npz").write_bytes(b"x" * 100)
    ReferenceStore(tmp_path, limit=10).get(value(1), k=1)
    assert (tmp_path / "mine.npz").exists()


def test_a_computation_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        ReferenceStore(tmp_path).get(refuse, k=1)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_stays_bounded_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, limit=12_000)
    for seed in range(3):
        store.get(value(seed, 1000), seed=seed)
        for age, file in enumerate(sorted(tmp_path.iterdir(), key=lambda f: -f.stat().st_mtime)):
            os.utime(file, (1e9 - age, 1e9 - age))
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 12_000
    assert store.get(refuse, seed=2)["a"][0] == 2


def test_an_entry_larger_than_the_bound_is_kept_until_the_next(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, limit=10)
    store.get(value(1), seed=1)
    assert store.get(refuse, seed=1)["a"][0] == 1
