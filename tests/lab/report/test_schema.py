"""`report.json`: its schema is the committed one, and its figures are finite."""

import json
import math
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from sa3_convert.check.metrics import MAX_DB
from sa3_convert.check.results import Spread
from sa3_convert.lab.generations.full import Verification
from sa3_convert.lab.report.schema import Report
from sa3_convert.lab.sweep.result import Sweep
from tests.lab.report import samples

DOCS = Path(__file__).parents[3] / "docs"
SCHEMAS = {
    "report": Report.model_json_schema(mode="serialization"),
    "verify": TypeAdapter(Verification).json_schema(mode="serialization"),
    "sweep": Sweep.model_json_schema(mode="serialization"),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_committed_schemas_are_those_of_the_code(name: str) -> None:
    assert json.loads((DOCS / f"{name}.schema.json").read_text(encoding="utf-8")) == SCHEMAS[name]


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_part_of_the_schemas_is_explained(name: str) -> None:
    assert all("description" in part for part in SCHEMAS[name]["$defs"].values())


def test_what_is_measured_has_one_class_in_both_files() -> None:
    shared = {"Figures", "Measurement", "Observation", "EndToEnd", "EndToEndCase", "Divergence", "AudioFidelity"}
    report, verify = (SCHEMAS[name]["$defs"] for name in ("report", "verify"))
    assert all(report[part] == verify[part] for part in shared)


def test_a_report_survives_being_written_and_read() -> None:
    report = samples.report()
    text = report.to_json()
    assert Report.model_validate_json(text) == report
    assert json.loads(text)["schema"] == 1


@pytest.mark.parametrize(("given", "kept"), [(math.inf, MAX_DB), (-math.inf, -MAX_DB), (12.5, 12.5)])
def test_infinite_ratios_are_bounded(given: float, kept: float) -> None:
    assert Spread(count=1, mean=given, percentile_5=given, worst=given).worst == kept


@pytest.mark.parametrize("field", ["cosine", "max_abs_error", "signal_to_noise_db"])
def test_nan_is_refused(field: str) -> None:
    with pytest.raises(ValidationError):
        samples.Figures(**samples.figures() | {field: math.nan})


def test_infinite_errors_are_refused() -> None:
    with pytest.raises(ValidationError):
        samples.Figures(**samples.figures() | {"max_abs_error": math.inf})


def test_a_key_that_the_schema_does_not_know_is_refused() -> None:
    with pytest.raises(ValidationError, match="extra"):
        Report.model_validate(json.loads(samples.report().to_json()) | {"extra": 1})


def test_a_report_that_names_no_files_of_its_models_is_still_read() -> None:
    data = json.loads(samples.report().to_json())
    for component in data["components"]:
        del component["files"]
    assert Report.model_validate(data).components[0].files == ()
