"""What is kept between runs is believed whole or not at all: seals, and everything that is kept under one."""

import contextlib
import json
import random
from pathlib import Path

import numpy as np
import pytest

from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.lab.doctor import results as saved
from sa3_convert.lab.doctor.results import Answer, Diagnosis, ProbeResult
from sa3_convert.system.machine import version_of
from sa3_convert.system.sealed import read_sealed, write_sealed
from tests.damage import damaged


@pytest.mark.parametrize("content", [b"", b"{}", bytes(range(256)) * 100])
def test_what_was_written_is_read_back(tmp_path: Path, content: bytes) -> None:
    write_sealed(tmp_path / "kept", content)
    assert read_sealed(tmp_path / "kept") == content


def test_a_file_without_a_seal_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"{}" * 100)
    with pytest.raises(ValueError, match="is not what was written there"):
        read_sealed(tmp_path / "kept")


def test_a_file_under_another_name_is_not_believed(tmp_path: Path) -> None:
    write_sealed(tmp_path / "one", b"content")
    (tmp_path / "one").rename(tmp_path / "two")
    with pytest.raises(ValueError, match="is not what was written there"):
        read_sealed(tmp_path / "two")


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    write_sealed(tmp_path / "kept", b"x" * 1001)
    assert len(read_sealed(tmp_path / "kept", 1001)) == 1001
    with pytest.raises(OSError, match="more than"):
        read_sealed(tmp_path / "kept", 1000)


def test_no_damage_of_a_sealed_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    content = json.dumps({"fingerprint": "a" * 64, "layers": {f"l{n}": [n / 7] for n in range(50)}}).encode()
    write_sealed(path, content)
    whole = path.read_bytes()
    for seed in range(1000):
        path.write_bytes(damaged(random.Random(seed), whole))
        with contextlib.suppress(ValueError):
            assert read_sealed(path) == content, seed


def test_no_damage_of_a_diagnosis_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    probe = ProbeResult("softmax", "a", {"precision high, memory normal": Answer("works", 120.0)})
    diagnosis = Diagnosis(version_of("MNN"), "cpu", saved.this_machine(), (probe,), 1.5, {"cores": 2})
    path = saved.save(diagnosis)
    whole = path.read_bytes()
    for seed in range(1000):
        path.write_bytes(damaged(random.Random(seed), whole))
        assert saved.saved("cpu") in (None, diagnosis), seed
    path.write_bytes(whole)
    assert saved.saved("cpu") == diagnosis


def test_no_damage_of_a_kept_reference_is_believed(tmp_path: Path) -> None:
    kept = {
        "latents": np.random.default_rng(0).standard_normal((2, 8, 5)).astype(np.float32),
        "ids": np.arange(6, dtype=np.int32).reshape(2, 3).T,
        "scalar": np.array(3.5),
        "none": np.zeros((0, 4), np.float32),
    }
    computed = {"latents": np.zeros(1, np.float32)}
    ReferenceStore(tmp_path).get(lambda: kept, seed=1)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for seed in range(1000):
        path.write_bytes(damaged(random.Random(seed), whole))
        store = ReferenceStore(tmp_path)
        found = store.get(lambda: computed, seed=1)
        if not store.computed:
            _require_equal(found, kept)
    path.write_bytes(whole)
    _require_equal(ReferenceStore(tmp_path).get(lambda: computed, seed=1), kept)


def _require_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:  # type: ignore[type-arg]
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
        assert found[name].flags.writeable
