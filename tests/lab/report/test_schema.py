"""`report.json`: its schema is the committed one, and its figures are finite."""

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from sa3_convert.check.metrics import MAX_DB
from sa3_convert.lab.report.schema import Report, Spread
from tests.lab.report import samples

SCHEMA = Path(__file__).parents[3] / "docs" / "report.schema.json"


def test_the_committed_schema_is_that_of_the_code() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == Report.model_json_schema(mode="serialization")


def test_every_key_of_the_schema_is_explained_or_plain() -> None:
    described = Report.model_json_schema(mode="serialization")["$defs"]
    assert all("description" in part for name, part in described.items() if name not in ("Component",))


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
