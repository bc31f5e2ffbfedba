"""What is not what it was: against the manifest, and against an earlier report."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from sa3_convert.errors import InputError
from sa3_convert.untrusted import parse_json, read_text
from sa3_convert.verify.report.schema import Change, ComponentReport, Made, Report
from sa3_convert.verify.report.shown import shown_db, shown_name, shown_size

_LARGEST = 256 << 20
_NOTICEABLE_DB = 0.1
"""Below this, ratios differ between machines."""
_CEILING_DB = 80.0
"""Above this, ratios are rounding of float arithmetic, which differs between machines."""


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
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its text"
        raise InputError(
            f"{path} is no report of this version: {where}: {first['msg']}. `sa3-convert verify --report` makes one."
        ) from None
    except ValueError as error:
        raise InputError(
            f"{path} is no report of this version: {error}. `sa3-convert verify --report` makes one."
        ) from None


def changes_since_conversion(made: Made, components: Sequence[ComponentReport]) -> tuple[Change, ...]:
    """Return versions, and figures on the conversion's own inputs, that differ from those in the manifest."""
    changes = list(_changed("", made.converted_with, made.verified_with))
    for component in components:
        if component.claimed_db is not None and component.measured_db is not None:
            what = f"{shown_name(component)}, worst of the conversion's inputs"
            changes += _moved(what, component.claimed_db, component.measured_db)
    return tuple(changes)


def changes_since_report(before: Report, now: Report) -> tuple[Change, ...]:
    """Return what differs between two reports: verdict, origin, versions, sizes and figures."""
    changes = [
        *_changed("", *_heads(before, now)),
        *_changed("checkpoint, ", before.made.digests, now.made.digests),
        *_changed("converted with ", before.made.converted_with, now.made.converted_with),
        *_changed("verified with ", before.made.verified_with, now.made.verified_with),
        *_changed("", _models(before), _models(now)),
    ]
    ratios = _ratios(before), _ratios(now)
    for what in ratios[0]:
        if what in ratios[1]:
            changes += _moved(what, ratios[0][what], ratios[1][what])
    return tuple(changes)


def _heads(*reports: Report) -> list[dict[str, str]]:
    heads = []
    for report in reports:
        made, verdict = report.made, "passed" if report.passed else "failed"
        heads.append(
            {"verdict": verdict, "variant": made.variant, "recipe": made.recipe, "checkpoint": made.checkpoint}
        )
    ratios = [report.end_to_end.chaos_ratio for report in reports if report.end_to_end is not None]
    if len(ratios) == len(reports):
        for head, ratio in zip(heads, ratios, strict=True):
            head["change, compared with a nudge"] = f"{ratio:.1f} times"
    return heads


def _models(report: Report) -> dict[str, str]:
    facts: dict[str, str] = {}
    for component in report.components:
        name = shown_name(component)
        facts[name] = "passed" if component.passed else "failed"
        facts[f"{name}, size"] = shown_size(component.bytes)
        facts[f"{name}, stored as"] = component.precision
        facts[f"{name}, floor"] = f"{component.floor_db:g} dB"
    return facts


def _ratios(report: Report) -> dict[str, float]:
    """Return ratios that can be compared: those over the same number of inputs."""
    spreads = {f"{shown_name(c)}, {c.spread.count} inputs": c.spread for c in report.components}
    if report.generations is not None:
        spreads |= {f"{d.name}, {d.spread.count} runs": d.spread for d in report.generations.distributions}
    return {f"{what}, {name}": getattr(spread, name) for what, spread in spreads.items() for name in ("worst", "mean")}


def _changed(prefix: str, before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Change]:
    for key in [*before, *(key for key in now if key not in before)]:
        if before.get(key) != now.get(key):
            values = (_short(side.get(key)) for side in (before, now))
            yield Change(what=prefix + key, before=next(values), now=next(values))


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return f"{value[:12]}…" if len(value) == 64 else value


def _moved(what: str, before: float, now: float) -> list[Change]:
    if abs(min(before, _CEILING_DB) - min(now, _CEILING_DB)) < _NOTICEABLE_DB:
        return []
    return [Change(what=what, before=f"{shown_db(before)} dB", now=f"{shown_db(now)} dB")]
