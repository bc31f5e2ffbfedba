"""`verify --report`: a verification and its bundle as the data of a report, and the folder that holds it."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from sa3_convert.bundle.manifest import Artifact
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.results import Progress, Spread, Verdict
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.lab.bisect.bisect import bisect_bundle
from sa3_convert.lab.bisect.walk import BisectResult, OperatorError, limit_db
from sa3_convert.lab.generations.distribution import FREE_RUNNING, Distribution, component_of, ratios_by_step
from sa3_convert.lab.generations.full import Verification
from sa3_convert.lab.report.formatting import bisect_command, fixed, replay
from sa3_convert.lab.report.page import Heard, render_page
from sa3_convert.lab.report.schema import (
    KIND,
    Bisection,
    Generations,
    Made,
    ModelFile,
    NotRun,
    Operator,
    Problem,
    Report,
    ReportedDistribution,
    ReportedModel,
    StepSpread,
    StoredType,
)
from sa3_convert.lab.report.summary import changes_since_conversion, changes_since_report, render_summary
from sa3_convert.runtime.engines import KINDS
from sa3_convert.system.files import atomic_folder, write_text
from sa3_convert.system.machine import tool_versions
from sa3_convert.system.untrusted import read_json

DATA = "report.json"
PAGE = "index.html"
SUMMARY = "summary.md"
_NAMES = {DATA, PAGE, SUMMARY}


def check_folder(folder: Path) -> None:
    """Check, before any long work, that a report can be written there.

    Raises:
        UsageError: a file stands there, or a folder with files that are no report's, or one that cannot be replaced.

    """
    if not folder.exists():
        return
    if folder.is_mount() or folder.resolve() == Path.cwd():
        raise UsageError(f"{folder} cannot be replaced as a whole. Name a folder inside it.")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file. Name a folder for the report.")
    names = {entry.name for entry in folder.iterdir()}
    if names and not (names <= _NAMES and _is_report(folder / DATA)):
        raise UsageError(
            f"{folder} holds {sorted(names - _NAMES or names)[0]}, which is no part of a report. Name a new or empty "
            "folder, or one that holds an earlier report."
        )


def _is_report(file: Path) -> bool:
    try:
        data = read_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("kind") == KIND


def write_folder(folder: Path, contents: Mapping[str, str]) -> None:
    """Write a report's files under a temporary name and rename the folder; an earlier report is replaced.

    Raises:
        UsageError: see `check_folder`; or the folder cannot be written.

    """
    check_folder(folder)
    try:
        with atomic_folder(folder, replace=True) as made:
            for name, text in contents.items():
                write_text(made / name, text)
    except OSError as error:
        raise UsageError(f"The report cannot be written to {folder}: {error.strerror or error}.") from None


OPERATORS = "operators"
"""What `bisected_models` calls its work."""


def bisected_models(
    bundle: Bundle,
    found: Verification,
    *,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[Component, BisectResult]:
    """Bisect, on sampled inputs, each MNN model that was verified and that there is no bisection of."""
    missing = [v.component for v in found.verdicts if v.engine == "mnn" and v.component not in found.bisections]
    layers = {}
    for done, component in enumerate(missing):
        progress(OPERATORS, done, len(missing))
        layers[component] = bisect_bundle(bundle, component, threads=threads)
    return layers


def write_report(
    folder: Path,
    bundle: Bundle,
    found: Verification,
    *,
    layers: Mapping[Component, BisectResult],
    heard: Heard,
    since: Report | None = None,
) -> None:
    """Write `index.html`, `report.json` and `summary.md`; the same arguments give the same bytes.

    Args:
        folder: new, empty, or an earlier report, which is replaced.
        bundle: what was verified.
        found: what was found.
        layers: models operator by operator; those that fell short are in what was found already.
        heard: audio of the end-to-end comparison by case and side.
        since: an earlier report, to say what changed.

    Raises:
        UsageError: the folder holds something else.

    """
    report = build_report(bundle, found, layers, has_audio=bool(heard), since=since)
    page = render_page(report, heard, bundle.layout.sample_rate)
    write_folder(folder, {PAGE: page, DATA: report.to_json(), SUMMARY: render_summary(report)})


def build_report(
    bundle: Bundle,
    found: Verification,
    layers: Mapping[Component, BisectResult],
    *,
    has_audio: bool = False,
    since: Report | None = None,
) -> Report:
    """Return everything that a report says.

    Args:
        bundle: what was verified.
        found: what was found.
        layers: models operator by operator on sampled inputs; one that fell short is in what was found already.
        has_audio: whether the audio of the end-to-end comparison was kept.
        since: an earlier report, to say what changed.

    Raises:
        pydantic.ValidationError: a figure is NaN, or of another kind than the schema says: a bug.

    """
    models = tuple(_model(bundle, found, verdict) for verdict in found.verdicts)
    bisected = {**layers, **found.bisections}
    made = _made(bundle, models)
    generations = None
    if found.generations is not None:
        distributions = tuple(_distribution(bundle, found, d) for d in found.generations.distributions)
        generations = Generations(engine=found.engine, steps=found.generations.steps, distributions=distributions)
    report = Report(
        passed=found.passed,
        verdict=verdict_sentence(found),
        problems=tuple(_problems(bundle, found, models)),
        made=made,
        since_conversion=changes_since_conversion(made, models),
        since_report=None,
        components=models,
        generations=generations,
        end_to_end=found.end_to_end,
        recognitions=found.recognitions,
        bisections=tuple(_bisection(bundle, c, bisected[c], c in found.bisections) for c in Component if c in bisected),
        not_run=tuple(_not_run(bundle, found, bisected, has_audio)),
    )
    return report if since is None else report.model_copy(update={"since_report": changes_since_report(since, report)})


def _made(bundle: Bundle, models: tuple[ReportedModel, ...]) -> Made:
    return Made(
        bundle=str(bundle.path),
        variant=bundle.manifest.label,
        recipe=bundle.manifest.recipe,
        checkpoint=bundle.manifest.checkpoint.source,
        digests={c.value: digest for c, digest in bundle.manifest.checkpoint.digests.items()},
        converted_with=bundle.manifest.tools,
        verified_with=tool_versions(),
        bytes=sum(model.bytes for model in models),
    )


def _problems(bundle: Bundle, found: Verification, models: tuple[ReportedModel, ...]) -> Iterator[Problem]:
    """Yield the problems with the commands that look into them: sampled inputs first, then generations."""
    commands = [model.replay for model, v in zip(models, found.verdicts, strict=True) for _ in v.problems]
    commands += [replay(distribution, bundle.path) for distribution in found.short.values()]
    for what, command in zip(found.problems, commands, strict=True):
        yield Problem(what=what, command=command)


def _model(bundle: Bundle, found: Verification, verdict: Verdict) -> ReportedModel:
    artifact = bundle.artifact(verdict.component, KINDS[verdict.engine])
    worst = verdict.worst_case.case
    return ReportedModel(
        component=verdict.component,
        engine=verdict.engine,
        precision=verdict.precision,
        passed=_passed(found, verdict),
        floor_db=verdict.floor_db,
        claimed_db=verdict.claimed_db,
        measured_db=verdict.measured_db,
        spread=Spread.of([figures.signal_to_noise_db for figures in verdict.by_case.values()]),
        worst=verdict.worst,
        worst_case=worst,
        replay=bisect_command(bundle.path, verdict.component, worst),
        cases=verdict.measurements,
        bytes=artifact.total_bytes,
        files=tuple(ModelFile(path=entry.path, bytes=entry.bytes, sha256=entry.sha256) for entry in artifact.files),
        stored=_stored(artifact),
    )


def _stored(artifact: Artifact) -> tuple[StoredType, ...]:
    """Return what a model's bytes are; they add up to its files."""
    if artifact.storage is None:
        return ()
    types = artifact.storage["types"]
    sizes = {name: total["bytes"] for name, total in types.items()}
    sizes["scales"] = sum(total["scale_bytes"] for total in types.values())
    sizes["structure"] = artifact.total_bytes - sum(sizes.values())
    ranked = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    return tuple(StoredType(type=name, bytes=size) for name, size in ranked if size > 0)


def _distribution(bundle: Bundle, found: Verification, distribution: Distribution) -> ReportedDistribution:
    component = component_of(distribution.name)
    steps = ratios_by_step(distribution.observations)
    return ReportedDistribution(
        name=distribution.name,
        component=component,
        floor_db=None if distribution.name == FREE_RUNNING else found.floors[component],
        spread=Spread.of([o.signal_to_noise_db for o in distribution.observations]),
        worst_case=distribution.worst_case,
        worst_step=distribution.worst_step,
        replay=replay(distribution, bundle.path),
        by_step=tuple(StepSpread.of(ratios, step=step, best=max(ratios)) for step, ratios in steps.items()),
        observations=distribution.observations,
    )


def _bisection(bundle: Bundle, component: Component, found: BisectResult, fell_short: bool) -> Bisection:
    return Bisection(
        component=component,
        fell_short=fell_short,
        verdict=found.verdict(),
        suspect=None if found.suspect is None else found.suspect.name,
        operators=tuple(_operator(operator) for operator in found.operators),
        incomparable=len(found.incomparable),
        replay=bisect_command(bundle.path, component),
    )


def _operator(operator: OperatorError) -> Operator:
    names = Operator.model_fields.keys() - {"limit_db"}
    return Operator(limit_db=limit_db(operator.stored), **{name: getattr(operator, name) for name in names})


def _not_run(
    bundle: Bundle, found: Verification, bisected: Mapping[Component, BisectResult], has_audio: bool
) -> Iterator[NotRun]:
    folder = shlex.quote(str(bundle.path))
    everything = f"sa3-convert verify {folder} --full --report DIR"
    verified = {verdict.component for verdict in found.verdicts}
    if missing := [component.value for component in bundle.components if component not in verified]:
        yield NotRun(part="components", what=f"Not verified: {', '.join(missing)}.", command=everything)
    if found.generations is None:
        what = "The models were not measured over whole generations, nor the DiT step by step."
        yield NotRun(part="generations", what=what, command=everything)
    if found.end_to_end is None:
        what = "Generations from prompt to audio were not compared."
        yield NotRun(part="end_to_end", what=what, command=everything)
    elif not has_audio:
        yield NotRun(part="audio", what="The audio of the generations was not kept.", command=everything)
    if unseen := [c.value for c in bundle.components if c in verified and c not in bisected]:
        what = f"Not looked at operator by operator: {', '.join(unseen)}."
        yield NotRun(part="layers", what=what, command=f"sa3-convert verify {folder} --report DIR")


def _passed(found: Verification, verdict: Verdict) -> bool:
    """Return whether a model passed on sampled inputs and, if the generations ran on its engine, in each of them."""
    return verdict.passed and not (verdict.engine == found.engine and verdict.component in found.short)


def verdict_sentence(found: Verification) -> str:
    """Return whether the models passed, and the one that is closest to its floor, or those that fell short."""
    verdicts = found.verdicts
    failed = [verdict for verdict in verdicts if not _passed(found, verdict)]
    if failed:
        fall = "falls" if len(failed) == 1 else "fall"
        stands = "; ".join(_fails(found, verdict) for verdict in failed)
        return f"Failed: {len(failed)} of {len(verdicts)} models {fall} short: {stands}."
    if len(verdicts) == 1:
        return f"Passed: the only model verified reaches its floor, {_stands(verdicts[0])}."
    closest = min(verdicts, key=lambda verdict: verdict.worst.signal_to_noise_db - verdict.floor_db)
    return f"Passed: all {len(verdicts)} models reach their floors. Closest to its floor is {_stands(closest)}."


def _stands(verdict: Verdict, ratio: float | None = None, where: str = "") -> str:
    ratio = verdict.worst.signal_to_noise_db if ratio is None else ratio
    return f"{verdict.component.value} with {fixed(ratio, 1)} dB{where}, floor {verdict.floor_db:g} dB"


def _fails(found: Verification, verdict: Verdict) -> str:
    if verdict.worst.signal_to_noise_db < verdict.floor_db:
        return _stands(verdict)
    if not verdict.passed:
        return f"{_stands(verdict)}, whose manifest claims more than its file gives"
    return _stands(verdict, found.short[verdict.component].worst, " in a generation")
