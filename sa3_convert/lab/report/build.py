"""Findings, and the bundle that they are about, as the data of a report."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from sa3_convert.bundle.manifest import Artifact
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.results import ComponentFidelity, Verdict
from sa3_convert.cli.comparison_tables import replay
from sa3_convert.components import Component
from sa3_convert.errors import InputError
from sa3_convert.lab.bisect.result import BisectResult, OperatorError, limit_db
from sa3_convert.lab.generations.audio_metrics import WINDOWS
from sa3_convert.lab.generations.cases import GenerationCase
from sa3_convert.lab.generations.distribution import FREE_RUNNING, Distribution, GenerationFidelity, component_of
from sa3_convert.lab.generations.end_to_end import NUDGE, EndToEnd
from sa3_convert.lab.generations.full import Findings
from sa3_convert.lab.report import schema
from sa3_convert.lab.report.schema import Change, ComponentReport, Made, Report
from sa3_convert.lab.report.summary import floor_of, passed, shown_db, shown_name, shown_size, verdict_sentence
from sa3_convert.system.machine import tool_versions
from sa3_convert.system.untrusted import parse_json, read_text


def build_report(
    bundle: Bundle,
    findings: Findings,
    layers: Mapping[Component, BisectResult],
    *,
    has_audio: bool = False,
    since: schema.Report | None = None,
) -> schema.Report:
    """Return everything that a report says.

    Args:
        bundle: what was verified.
        findings: what was found.
        layers: models operator by operator on sampled inputs; one that fell short is in the findings already.
        has_audio: whether the audio of the end-to-end comparison was kept.
        since: an earlier report, to say what changed.

    Raises:
        pydantic.ValidationError: a figure is NaN, or of another kind than the schema says: a bug.

    """
    components = tuple(_component(bundle, findings, verdict) for verdict in findings.bundle.verdicts)
    sampled = {c: found for c, found in layers.items() if c not in findings.bisections}
    bisections = [(c, found, True) for c, found in findings.bisections.items()]
    bisections += [(c, found, False) for c, found in sampled.items()]
    made = _made(bundle, components)
    report = schema.Report(
        passed=findings.passed,
        verdict=verdict_sentence(findings),
        problems=tuple(_problems(bundle, findings, components)),
        made=made,
        since_conversion=changes_since_conversion(made, components),
        since_report=None,
        components=components,
        generations=None if findings.generations is None else _generations(bundle, findings, findings.generations),
        end_to_end=None if findings.end_to_end is None else _end_to_end(findings.end_to_end),
        bisections=tuple(
            _bisection(bundle, component, found, fell_short)
            for component, found, fell_short in sorted(bisections, key=lambda b: list(Component).index(b[0]))
        ),
        not_run=tuple(_not_run(bundle, findings, {c for c, _, _ in bisections}, has_audio)),
    )
    return report if since is None else report.model_copy(update={"since_report": changes_since_report(since, report)})


def _made(bundle: Bundle, components: Sequence[schema.ComponentReport]) -> schema.Made:
    return schema.Made(
        bundle=str(bundle.path),
        variant=bundle.manifest.label,
        recipe=bundle.manifest.recipe,
        checkpoint=bundle.manifest.checkpoint.source,
        digests={c.value: digest for c, digest in bundle.manifest.checkpoint.digests.items()},
        converted_with=bundle.manifest.tools,
        verified_with=tool_versions(),
        bytes=sum(component.bytes for component in components),
    )


def _problems(
    bundle: Bundle, findings: Findings, components: Sequence[schema.ComponentReport]
) -> Iterator[schema.Problem]:
    """Yield the findings' problems with the commands that look into them: sampled inputs first, then generations."""
    commands = [
        component.replay
        for component, verdict in zip(components, findings.bundle.verdicts, strict=True)
        for _ in verdict.problems
    ]
    commands += [replay(distribution, bundle.path) for distribution in findings.short.values()]
    for what, command in zip(findings.problems, commands, strict=True):
        yield schema.Problem(what=what, command=command)


def _component(bundle: Bundle, findings: Findings, verdict: Verdict) -> schema.ComponentReport:
    fidelity = verdict.fidelity
    artifact = bundle.artifact(fidelity.component, "mnn" if verdict.engine == "mnn" else "onnx-int8")
    worst = fidelity.worst_case.case
    return schema.ComponentReport(
        component=fidelity.component,
        engine=verdict.engine,
        precision=verdict.precision,
        passed=passed(findings, verdict),
        floor_db=verdict.floor_db,
        claimed_db=verdict.claimed_db,
        measured_db=verdict.measured_db,
        spread=_spread(list(_by_case(fidelity).values())),
        worst=schema.Figures.model_validate(fidelity.worst),
        worst_case=worst,
        replay=_bisect_command(bundle, fidelity.component, worst),
        cases=tuple(schema.Case(case=m.case, output=m.output, **_figures(m.fidelity)) for m in fidelity.measurements),
        bytes=sum(entry.bytes for entry in artifact.files),
        stored=_stored(artifact),
    )


def _figures(fidelity: object) -> dict[str, float]:
    return schema.Figures.model_validate(fidelity).model_dump()


def _by_case(fidelity: ComponentFidelity) -> dict[str, float]:
    """Return each input's worst ratio."""
    cases: dict[str, float] = {}
    for measurement in fidelity.measurements:
        ratio = measurement.fidelity.signal_to_noise_db
        cases[measurement.case] = min(ratio, cases.get(measurement.case, ratio))
    return cases


def _spread(ratios: Sequence[float]) -> schema.Spread:
    return schema.Spread(
        count=len(ratios),
        mean=float(np.mean(ratios)),
        percentile_5=float(np.percentile(ratios, 5)),
        worst=min(ratios),
    )


def _stored(artifact: Artifact) -> tuple[schema.StoredType, ...]:
    """Return what a model's bytes are; they add up to its files."""
    if artifact.storage is None:
        return ()
    types = artifact.storage["types"]
    sizes = {name: total["bytes"] for name, total in types.items()}
    sizes["scales"] = sum(total["scale_bytes"] for total in types.values())
    sizes["structure"] = sum(entry.bytes for entry in artifact.files) - sum(sizes.values())
    ranked = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    return tuple(schema.StoredType(type=name, bytes=size) for name, size in ranked if size > 0)


def _bisect_command(bundle: Bundle, component: Component, case: str | None = None) -> str:
    """Return the command that bisects a model; `case` is the name of a sample, as 'seed=3 T=108'."""
    options = dict(part.split("=", 1) for part in (case or "").split())
    words = ["sa3-convert", "bisect", str(bundle.path), "--component", component.value]
    for key, option in (("seed", "--seed"), ("T", "--latents")):
        words += [option, options[key]] if key in options else []
    return shlex.join(words)


def _generations(bundle: Bundle, findings: Findings, found: GenerationFidelity) -> schema.Generations:
    return schema.Generations(
        engine=findings.engine,
        steps=found.steps,
        distributions=tuple(_distribution(bundle, findings, distribution) for distribution in found.distributions),
    )


def _distribution(bundle: Bundle, findings: Findings, distribution: Distribution) -> schema.Distribution:
    steps: dict[int, list[float]] = {}
    for observation in distribution.observations:
        if observation.step is not None:
            steps.setdefault(observation.step, []).append(observation.fidelity.signal_to_noise_db)
    summary, component = distribution.summary, component_of(distribution.name)
    return schema.Distribution(
        name=distribution.name,
        component=component,
        floor_db=None if distribution.name == FREE_RUNNING else floor_of(findings, component),
        spread=_spread([o.fidelity.signal_to_noise_db for o in distribution.observations]),
        worst_case=summary.worst_case,
        worst_step=summary.worst_step,
        replay=replay(distribution, bundle.path),
        by_step=tuple(
            schema.StepSpread(step=step, best=max(ratios), **dict(_spread(ratios)))
            for step, ratios in sorted(steps.items())
        ),
        observations=tuple(
            schema.Observation(case=o.case, step=o.step, **_figures(o.fidelity)) for o in distribution.observations
        ),
    )


def _end_to_end(found: EndToEnd) -> schema.EndToEnd:
    return schema.EndToEnd(
        nudge=NUDGE,
        windows=WINDOWS,
        chaos_ratio=found.chaos_ratio,
        judgement=found.judgement(),
        cases=tuple(
            schema.EndToEndCase(
                case=case.case,
                prompt=GenerationCase.parse(case.case).text,
                target=schema.Divergence.model_validate(case.target),
                chaos=schema.Divergence.model_validate(case.chaos),
            )
            for case in found.cases
        ),
    )


def _bisection(bundle: Bundle, component: Component, found: BisectResult, fell_short: bool) -> schema.Bisection:
    return schema.Bisection(
        component=component,
        fell_short=fell_short,
        verdict=found.verdict(),
        suspect=None if found.suspect is None else found.suspect.name,
        operators=tuple(_operator(operator) for operator in found.operators),
        incomparable=len(found.incomparable),
        replay=_bisect_command(bundle, component),
    )


def _operator(operator: OperatorError) -> schema.Operator:
    names = set(schema.Operator.model_fields) - {"limit_db"}
    return schema.Operator(limit_db=limit_db(operator.stored), **{name: getattr(operator, name) for name in names})


def _not_run(bundle: Bundle, findings: Findings, bisected: set[Component], has_audio: bool) -> list[schema.NotRun]:
    folder = shlex.quote(str(bundle.path))
    everything = f"sa3-convert verify {folder} --full --report DIR"
    verified = {verdict.fidelity.component for verdict in findings.bundle.verdicts}
    missing = [component for component in bundle.components if component not in verified]
    found = []
    if missing:
        names = ", ".join(component.value for component in missing)
        found.append(schema.NotRun(part="components", what=f"Not verified: {names}.", command=everything))
    if findings.generations is None:
        what = "The models were not measured over whole generations, nor the DiT step by step."
        found.append(schema.NotRun(part="generations", what=what, command=everything))
    if findings.end_to_end is None:
        what = "Generations from prompt to audio were not compared."
        found.append(schema.NotRun(part="end_to_end", what=what, command=everything))
    elif not has_audio:
        what = "The audio of the generations was not kept."
        found.append(schema.NotRun(part="audio", what=what, command=everything))
    unseen = [component.value for component in bundle.components if component in verified - bisected]
    if unseen:
        what = f"Not looked at operator by operator: {', '.join(unseen)}."
        found.append(schema.NotRun(part="layers", what=what, command=f"sa3-convert verify {folder} --report DIR"))
    return found


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
