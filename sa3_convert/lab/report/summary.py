"""What a verification amounts to: a sentence, and `summary.md` for a pull request."""

from collections.abc import Iterator, Sequence

from sa3_convert.bundle.table import markdown_text
from sa3_convert.check.metrics import MAX_DB
from sa3_convert.check.results import Verdict
from sa3_convert.components import Component
from sa3_convert.lab.generations.full import Findings
from sa3_convert.lab.report.schema import Change, ComponentReport, Report
from sa3_convert.system.untrusted import printable


def shown_db(ratio: float) -> str:
    """Return a ratio; of equal arrays it is infinite."""
    return "∞" if ratio >= MAX_DB else f"{ratio:.1f}"


def shown_floor(floor_db: float | None) -> str:
    """Return a floor, or a dash for what has none."""
    return "–" if floor_db is None else f"{floor_db:g}"


def shown_size(size: int) -> str:
    """Return a size in bytes."""
    if size == 0:
        return "–"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def shown_name(component: ComponentReport) -> str:
    """Return a model's name, with its engine where that is not MNN."""
    name = component.component.value
    return name if component.engine == "mnn" else f"{name}, {component.engine}"


def passed(findings: Findings, verdict: Verdict) -> bool:
    """Return whether a model passed on sampled inputs and, if the generations ran on its engine, in each of them."""
    component = verdict.fidelity.component
    return verdict.passed and not (verdict.engine == findings.engine and component in findings.short)


def floor_of(findings: Findings, component: Component) -> float:
    """Return the floor of the model that the generations ran on."""
    verdicts = findings.bundle.verdicts
    return next(v.floor_db for v in verdicts if v.fidelity.component is component and v.engine == findings.engine)


def verdict_sentence(findings: Findings) -> str:
    """Return whether the models passed, and the one that is closest to its floor, or those that fell short."""
    verdicts = findings.bundle.verdicts
    failed = [verdict for verdict in verdicts if not passed(findings, verdict)]
    if failed:
        fall = "falls" if len(failed) == 1 else "fall"
        stands = "; ".join(_fails(findings, verdict) for verdict in failed)
        return f"Failed: {len(failed)} of {len(verdicts)} models {fall} short: {stands}."
    if len(verdicts) == 1:
        return f"Passed: the only model verified reaches its floor, {_stands(verdicts[0])}."
    closest = min(verdicts, key=lambda verdict: verdict.fidelity.worst.signal_to_noise_db - verdict.floor_db)
    return f"Passed: all {len(verdicts)} models reach their floors. Closest to its floor is {_stands(closest)}."


def _stands(verdict: Verdict) -> str:
    worst = verdict.fidelity.worst.signal_to_noise_db
    return f"{verdict.fidelity.component.value} with {worst:.1f} dB, floor {verdict.floor_db:g} dB"


def _fails(findings: Findings, verdict: Verdict) -> str:
    component = verdict.fidelity.component
    if verdict.fidelity.worst.signal_to_noise_db < verdict.floor_db:
        return _stands(verdict)
    if not verdict.passed:
        return f"{_stands(verdict)}, whose manifest claims more than its file gives"
    worst = findings.short[component].summary.worst
    return f"{component.value} with {worst:.1f} dB in a generation, floor {verdict.floor_db:g} dB"


_MOST_CHANGES = 30


def render_summary(report: Report) -> str:
    """Return Markdown: the verdict, a row per model, what changed, and how to have each worst case again."""
    return printable("\n".join(_lines(report)).rstrip()) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"## {markdown_text(report.made.variant)}, recipe {markdown_text(report.made.recipe)}"
    yield ""
    yield f"**{markdown_text(report.verdict)}**"
    yield ""
    problems = [problem.what for problem in report.problems]
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
        cells = (shown_name(c), verdict, *figures, shown_db(c.spread.mean), c.spread.count, c.precision)
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
