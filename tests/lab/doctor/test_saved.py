"""Diagnoses on disk: what is believed and what is not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3_convert.components import Component
from sa3_convert.errors import ConversionError
from sa3_convert.lab.doctor import results as store
from sa3_convert.lab.doctor.records import RECORDS, changes
from sa3_convert.lab.doctor.results import Answer, Diagnosis, ProbeResult, check_conversion, setting_name
from sa3_convert.system.machine import architecture, version_of
from sa3_convert.system.sealed import write_sealed

HIGH, LOW = setting_name("high", "normal"), setting_name("low", "normal")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def diagnosis(**changed: Any) -> Diagnosis:
    results = (
        ProbeResult("softmax", "a", {HIGH: Answer("works", 120.0), LOW: Answer("wrong", 3.0, "y")}, "softmax-low-rows"),
        ProbeResult("conv", "b", {HIGH: Answer("works", 130.0)}, None, "", (Component.DECODER,)),
    )
    made = Diagnosis(version_of("MNN"), "cpu", store.this_machine(), results, 1.5, {"cores": 2})
    return replace(made, **changed)


def with_wrong_conv() -> Diagnosis:
    conv = replace(diagnosis().results[1], answers={HIGH: Answer("wrong", 4.0, "y")})
    return diagnosis(results=(diagnosis().results[0], conv))


def test_what_was_saved_is_read_back() -> None:
    store.save(diagnosis())
    assert store.saved("cpu") == diagnosis()


def test_nothing_saved_is_not_probed() -> None:
    assert store.saved("cpu") is None
    assert "not probed" in (check_conversion(tuple(Component)) or "")


def test_another_backend_is_not_probed() -> None:
    store.save(diagnosis())
    assert store.saved("cuda") is None


def test_another_architecture_on_the_same_processor_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    here = store.this_machine()
    monkeypatch.setattr("platform.machine", lambda: "emulated")
    assert store.this_machine.__wrapped__() != here


@pytest.mark.parametrize("field", ["mnn", "backend", "machine"])
def test_a_file_about_something_else_is_not_believed(field: str) -> None:
    data = diagnosis(**{field: "other"}).to_data()
    write_sealed(store.diagnosis_path("cpu"), json.dumps(data).encode())
    assert store.saved("cpu") is None


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"schema": 1}', '{"schema": 0}', "[" * 100000, "\x00"])
def test_a_damaged_file_is_not_believed(content: str) -> None:
    path = store.save(diagnosis())
    write_sealed(path, content.encode())
    assert store.saved("cpu") is None
    path.write_text(content)
    assert store.saved("cpu") is None


def test_a_file_with_another_outcome_is_not_believed() -> None:
    path = store.save(diagnosis())
    path.write_text(path.read_text().replace('"wrong"', '"works"'))
    assert store.saved("cpu") is None


def test_a_file_cut_anywhere_is_not_believed() -> None:
    path = store.save(diagnosis())
    whole = path.read_bytes()
    for end in range(0, len(whole) - 2, 37):
        path.write_bytes(whole[:end])
        assert store.saved("cpu") is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_other_data_is_a_value_error(data: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Diagnosis.from_data(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("results", 0, "answers"), {}),
        (("results", 0, "answers", HIGH, "outcome"), "perhaps"),
        (("results", 0, "answers", HIGH, "db"), "many"),
        (("results", 1, "needed_by"), ["piano"]),
        (("results", 1), 7),
        (("seconds",), None),
    ],
)
def test_a_changed_part_is_a_value_error(path: tuple[Any, ...], value: Any) -> None:
    data = json.loads(json.dumps(diagnosis().to_data()))
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(ValueError):  # noqa: PT011
        Diagnosis.from_data(data)


def test_the_answer_at_a_setting_counts_and_else_the_worst() -> None:
    softmax = diagnosis().results[0]
    assert softmax.at(HIGH).outcome == "works"
    assert softmax.at(setting_name("normal", "low")).outcome == "wrong"


def test_a_hazard_that_no_component_needs_does_not_stop_a_conversion() -> None:
    store.save(diagnosis())
    assert check_conversion(tuple(Component)) is None


def test_a_needed_spelling_that_is_wrong_stops_it_and_is_named() -> None:
    store.save(with_wrong_conv())
    with pytest.raises(ConversionError, match=r"decoder: .*probe conv wrong \(4 dB\)"):
        check_conversion((Component.DIT, Component.DECODER))
    assert check_conversion((Component.DIT,)) is None


def test_the_same_defects_as_recorded_are_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDS, (version_of("MNN"), "cpu", architecture()), {"softmax": "wrong"})  # type: ignore[misc]
    assert not changes(diagnosis())


def test_what_appeared_and_what_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        RECORDS,  # type: ignore[misc]
        (version_of("MNN"), "cpu", architecture()),
        {"conv": "fails", "unknown-probe": "wrong"},
    )
    found = changes(diagnosis())
    assert found is not None
    assert (found.appeared, found.gone) == ({"softmax": "wrong"}, ("conv",))
    assert "new: softmax wrong" in found.describe()


def test_another_version_is_compared_with_the_newest_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDS, ("3.10.0", "cpu", architecture()), {"softmax": "wrong"})  # type: ignore[misc]
    found = changes(diagnosis(mnn="4.0.0"))
    assert found is not None
    assert found.version == "3.10.0"


def test_another_kind_of_processor_has_records_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDS, (version_of("MNN"), "cpu", "abacus"), {})  # type: ignore[misc]
    found = changes(diagnosis(architecture="abacus"))
    assert found is not None
    assert found.appeared == {"softmax": "wrong"}
    assert changes(diagnosis(architecture="loom")) is None


def test_a_backend_without_a_record_has_no_changes() -> None:
    assert changes(diagnosis(backend="vulkan")) is None
