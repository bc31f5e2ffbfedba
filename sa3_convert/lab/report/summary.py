"""`summary.md`: a report for a pull request, and what changed since the conversion or an earlier report."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from sa3_convert.bundle.table import markdown_text
from sa3_convert.check.results import CLAIM_CEILING_DB
from sa3_convert.errors import InputError
from sa3_convert.lab.report.formatting import shown_db, shown_floor, shown_size, with_prompts
from sa3_convert.lab.report.schema import Change, Made, Report, ReportedModel
from sa3_convert.system.untrusted import parse_json, printable, read_text

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


_MOST_CHANGES = 30


def render_summary(report: Report) -> str:
    """Return Markdown: the verdict, a row per model, what changed, and how to have each worst case again."""
    return printable("\n".join(_lines(report)).rstrip()) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"## {markdown_text(report.made.variant)}, recipe {markdown_text(report.made.recipe)}"
    yield ""
    yield f"**{markdown_text(report.verdict)}**"
    yield ""
    problems = [with_prompts(problem.what) for problem in report.problems]
    problems += [found.verdict for found in report.bisections if found.fell_short]
    if problems:
        yield from (f"- {markdown_text(problem)}" for problem in problems)
        yield ""
    yield from _table(report)
    yield ""
    if report.generations is not None:
        yield from _generations(report)
    if report.end_to_end is not None:
        yield markdown_text(" ".join([report.end_to_end.judgement, *(one.judgement for one in report.recognitions)]))
        yield ""
    yield from _changes(report)
    yield from _commands(report)
    yield from _not_run(report)


def _table(report: Report) -> Iterator[str]:
    yield "| model | verdict | worst dB | floor | 5 % | mean | inputs | stored as | size |"
    yield "|---|---|---:|---:|---:|---:|---:|---|---:|"
    for c in report.components:
        verdict = "passed" if c.passed else "**failed**"
        figures = (shown_db(c.spread.worst), f"{c.floor_db:g}", shown_db(c.spread.percentile_5))
        cells = (c.name, verdict, *figures, shown_db(c.spread.mean), c.spread.count, c.precision)
        yield f"| {' | '.join(str(cell) for cell in cells)} | {shown_size(c.bytes)} |"
    yield f"| all | | | | | | | | {shown_size(report.made.bytes)} |"


def _generations(report: Report) -> Iterator[str]:
    assert report.generations is not None
    yield f"| over generations of {report.generations.steps} steps | worst dB | floor | 5 % | mean | runs |"
    yield "|---|---:|---:|---:|---:|---:|"
    for d in report.generations.distributions:
        figures = (shown_db(d.spread.worst), shown_floor(d.floor_db), shown_db(d.spread.percentile_5))
        yield f"| {d.name} | {' | '.join(figures)} | {shown_db(d.spread.mean)} | {d.spread.count} |"
    yield ""


def _changes(report: Report) -> Iterator[str]:
    yield "### What changed"
    yield ""
    yield from _changed_figures("the conversion", report.since_conversion)
    if report.since_report is not None:
        yield from _changed_figures("the earlier report", report.since_report)


def _changed_figures(since: str, changes: Sequence[Change]) -> Iterator[str]:
    if not changes:
        yield f"Since {since}: nothing."
        yield ""
        return
    yield f"| since {since} | before | now |"
    yield "|---|---|---|"
    for change in changes[:_MOST_CHANGES]:
        yield f"| {markdown_text(change.what)} | {markdown_text(change.before)} | {markdown_text(change.now)} |"
    if len(changes) > _MOST_CHANGES:
        yield f"| and {len(changes) - _MOST_CHANGES} more, in report.json | | |"
    yield ""


def _commands(report: Report) -> Iterator[str]:
    yield "### The worst cases again"
    yield ""
    yield "```"
    yield from (component.replay for component in report.components if component.engine == "mnn")
    if report.generations is not None:
        yield from (distribution.replay for distribution in report.generations.distributions)
    yield "```"
    yield ""


def _not_run(report: Report) -> Iterator[str]:
    if report.not_run:
        yield "### Not run"
        yield ""
        yield from (f"- {markdown_text(missing.what)} `{missing.command}`" for missing in report.not_run)
