"""The baseline file: whole, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sa3_convert.components import Component
from sa3_convert.errors import InputError
from sa3_convert.lab.drift.baseline import (
    Baseline,
    BundleBaseline,
    Figure,
    Origin,
    Update,
    read_baseline,
    write_baseline,
)

ORIGIN = Origin(
    converted_with={"MNN": "3.6.1", "torch": "2.9"},
    measured_with={"MNN": "3.6.1", "onnxruntime": "1.32"},
    processor="a processor",
    recipe={"name": "int8", "components": {"dit": {"weights": {"bits": 8, "layers": []}}}},
    checkpoint={"dit": "aa"},
    code={"mnn": "bb", "passes": "cc"},
    files={"dit.mnn": "dd"},
)


def ratio(value: float = 38.0, **changes: Any) -> Figure:
    data = {
        "component": Component.DIT,
        "kind": "fidelity",
        "name": "teacher-forced: mean",
        "value": value,
        "rule": "may not fall",
        "tolerance": 0.1,
        "case": "prompt=0 seed=1 seconds=2",
        "step": 3,
    }
    return Figure.model_validate(data | changes)


def baseline(*figures: Figure, **changes: Any) -> BundleBaseline:
    data = {
        "variant": "small-music",
        "recipe": "int8",
        "size": "toy",
        "cases": ("prompt=0 seed=1 seconds=2",),
        "steps": 8,
        "figures": figures or (ratio(),),
        "origin": ORIGIN,
        "history": (Update(date="2026-11-24T00:00:00+00:00", reason="first", tools={"MNN": "3.6.1"}),),
    }
    return BundleBaseline.model_validate(data | changes)


def written(path: Path) -> dict[str, Any]:
    write_baseline(path, Baseline(schema_version=1, bundles=(baseline(),)))
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    data = written(tmp_path / "drift.json")
    assert data["schema"] == 1
    assert read_baseline(tmp_path / "drift.json") == Baseline(schema_version=1, bundles=(baseline(),))


def test_a_missing_file_is_none(tmp_path: Path) -> None:
    assert read_baseline(tmp_path / "none.json") is None


def test_a_folder_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_bytes(b"\xff\xfe{")
    for path in (tmp_path, tmp_path / "b.json"):
        with pytest.raises(InputError, match="cannot be read"):
            read_baseline(path)


def test_one_bundle_is_replaced_and_the_others_stay() -> None:
    first, second = baseline(), baseline(recipe="fp16")
    both = Baseline(schema_version=1, bundles=(first,)).replacing(second)
    again = both.replacing(baseline(ratio(40.0)))
    assert again.find(second.key) == second
    assert len(again.bundles) == 2
    assert again.find(first.key) == baseline(ratio(40.0))
    assert again.find(("small-sfx", "int8", "toy")) is None


def set_at(*path: Any, value: Any) -> Any:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


BUNDLE = ("bundles", 0)
FIGURE = (*BUNDLE, "figures", 0)


@pytest.mark.parametrize(
    "change",
    [
        set_at("schema", value=2),
        set_at("schema", value=None),
        set_at("bundles", value=[]),
        set_at("more", value=1),
        set_at(*BUNDLE, "figures", value=[]),
        set_at(*BUNDLE, "cases", value=[]),
        set_at(*BUNDLE, "cases", value=["prompt=99 seed=0 seconds=2"]),
        set_at(*BUNDLE, "cases", value=["nonsense"]),
        set_at(*BUNDLE, "history", value=[]),
        set_at(*BUNDLE, "steps", value=0),
        set_at(*FIGURE, "value", value=float("nan")),
        set_at(*FIGURE, "value", value=float("inf")),
        set_at(*FIGURE, "value", value="text"),
        set_at(*FIGURE, "tolerance", value=-1),
        set_at(*FIGURE, "tolerance", value=float("inf")),
        set_at(*FIGURE, "rule", value="may do anything"),
        set_at(*FIGURE, "component", value="vocoder"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "drift.json"
    data = written(path)
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="is damaged"):
        read_baseline(path)


def test_a_figure_or_a_bundle_may_not_stand_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    for key in (("bundles",), (*BUNDLE, "figures")):
        data = written(path)
        part = data
        for step in key:
            part = part[step]
        part.append(part[0])  # type: ignore[attr-defined]
        path.write_text(json.dumps(data))
        with pytest.raises(InputError, match="twice"):
            read_baseline(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "drift.json"
    written(path)
    text = path.read_text().rstrip()
    path.write_text(text[: data.draw(st.integers(0, len(text) - 1))])
    with pytest.raises(InputError, match="is damaged"):
        read_baseline(path)


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError):
        read_baseline(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "drift.json"
    written(path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_baseline(path, Baseline(schema_version=1, bundles=(baseline(ratio(1.0)),)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
