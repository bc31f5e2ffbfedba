"""What changed since a model was converted, and since an earlier report."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from sa3_convert.check.results import CLAIM_CEILING_DB
from sa3_convert.errors import InputError
from sa3_convert.lab.report.formatting import shown_db, shown_size
from sa3_convert.lab.report.schema import Change, Made, Report, ReportedModel
from sa3_convert.system.untrusted import parse_json, read_text

_LARGEST = 256 << 20
_NOTICEABLE_DB = 0.1
"""Below this, ratios differ between machines."""


def read_report(path: Path) -> Report:
    """Read a `report.json`.

    Raises:
        InputError: it is missing, damaged, or of another version.

    """
    try:
        text = read_text(path, _LARGEST)
        parse_json(text)
        return Report.model_validate_json(text)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        why = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f"{'.'.join(str(part) for part in first['loc']) or 'its text'}: {first['msg']}"
        raise InputError(
            f"{path} is no report of this version: {why}. `sa3-convert verify --report` makes one."
        ) from None


def changes_since_conversion(made: Made, components: Sequence[ReportedModel]) -> tuple[Change, ...]:
    """Return versions, and figures on the conversion's own inputs, that differ from those in the manifest."""
    changes = list(_changed("", made.converted_with, made.verified_with))
    for component in components:
        if component.claimed_db is not None and component.measured_db is not None:
            what = f"{component.name}, worst of the conversion's inputs"
            changes += _moved(what, component.claimed_db, component.measured_db)
    return tuple(changes)


def changes_since_report(before: Report, now: Report) -> tuple[Change, ...]:
    """Return what differs between two reports: verdict, origin, versions, sizes and figures."""
    heads = _head(before), _head(now)
    if before.end_to_end and now.end_to_end:
        for head, side in zip(heads, (before.end_to_end, now.end_to_end), strict=True):
            head["change, compared with a nudge"] = f"{side.chaos_ratio:.1f} times"
    changes = [
        *_changed("", *heads),
        *_changed("checkpoint, ", before.made.digests, now.made.digests),
        *_changed("converted with ", before.made.converted_with, now.made.converted_with),
        *_changed("verified with ", before.made.verified_with, now.made.verified_with),
        *_changed("", _models(before), _models(now)),
    ]
    earlier, ratios = _ratios(before), _ratios(now)
    for what in (what for what in earlier if what in ratios):
        changes += _moved(what, earlier[what], ratios[what])
    return tuple(changes)


def _head(report: Report) -> dict[str, str]:
    made = report.made
    facts = {"variant": made.variant, "recipe": made.recipe, "checkpoint": made.checkpoint}
    return {"verdict": "passed" if report.passed else "failed", **facts}


def _models(report: Report) -> dict[str, str]:
    facts: dict[str, str] = {}
    for model in report.components:
        facts |= {
            model.name: "passed" if model.passed else "failed",
            f"{model.name}, size": shown_size(model.bytes),
            f"{model.name}, stored as": model.precision,
            f"{model.name}, floor": f"{model.floor_db:g} dB",
        }
    return facts


def _ratios(report: Report) -> dict[str, float]:
    """Return ratios that can be compared: those over the same number of inputs."""
    spreads = {f"{c.name}, {c.spread.count} inputs": c.spread for c in report.components}
    if report.generations is not None:
        spreads |= {f"{d.name}, {d.spread.count} runs": d.spread for d in report.generations.distributions}
    return {f"{what}, {name}": getattr(spread, name) for what, spread in spreads.items() for name in ("worst", "mean")}


def _changed(prefix: str, before: dict[str, str], now: dict[str, str]) -> Iterator[Change]:
    for key in before | now:
        if before.get(key) != now.get(key):
            yield Change(what=prefix + key, before=_short(before.get(key)), now=_short(now.get(key)))


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return f"{value[:12]}…" if len(value) == 64 else value


def _moved(what: str, before: float, now: float) -> list[Change]:
    if abs(min(before, CLAIM_CEILING_DB) - min(now, CLAIM_CEILING_DB)) < _NOTICEABLE_DB:
        return []
    return [Change(what=what, before=f"{shown_db(before)} dB", now=f"{shown_db(now)} dB")]
