"""`summary.md`: a report for a pull request."""

from collections.abc import Iterator, Sequence

from sa3_convert.bundle.table import markdown_text
from sa3_convert.lab.report.formatting import shown_db, shown_floor, shown_size, with_prompts
from sa3_convert.lab.report.schema import Change, Report
from sa3_convert.system.untrusted import printable

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
        yield markdown_text(report.end_to_end.judgement)
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
    yield from _changed("the conversion", report.since_conversion)
    if report.since_report is not None:
        yield from _changed("the earlier report", report.since_report)


def _changed(since: str, changes: Sequence[Change]) -> Iterator[str]:
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
