"""From findings to a report's data, and to a folder."""

import json
from dataclasses import replace
from pathlib import Path

from sa3_convert.components import Component
from sa3_convert.lab.generations.distribution import TEACHER_FORCED, Distribution, Observation
from sa3_convert.lab.generations.full import Verification
from sa3_convert.lab.report.build import DATA, PAGE, SUMMARY, bisected_models, build_report, write_report
from sa3_convert.lab.report.schema import Report
from tests.lab.report.conftest import CASES, Verified


def failing(findings: Verification, component: Component) -> Verification:
    """Return findings in which a component's floor is out of reach."""
    verdicts = tuple(replace(v, floor_db=250.0) if v.component is component else v for v in findings.verdicts)
    return replace(findings, verdicts=verdicts)


def test_a_report_says_what_the_findings_say(verified: Verified) -> None:
    report = build_report(verified.bundle, verified.findings, verified.layers, has_audio=True)
    assert report.passed
    assert report.verdict.startswith("Passed: all 5 models reach their floors.")
    assert [c.component for c in report.components] == list(Component)
    for shown, verdict in zip(report.components, verified.findings.verdicts, strict=True):
        assert shown.spread.worst == verdict.worst.signal_to_noise_db
        assert abs(shown.spread.mean - verdict.mean.signal_to_noise_db) < 1e-9
        assert shown.spread.worst <= shown.spread.percentile_5 <= shown.spread.mean
        file = verified.bundle.file(shown.component)
        assert shown.bytes == file.stat().st_size == sum(stored.bytes for stored in shown.stored)
    generations, found = report.generations, verified.findings.generations
    assert generations is not None
    assert found is not None
    assert [d.name for d in generations.distributions] == [d.name for d in found.distributions]
    forced = generations.distributions[2]
    assert [step.mean for step in forced.by_step] == list(found.distributions[2].by_step.values())
    assert forced.spread.count == len(CASES) * 3
    assert report.end_to_end is not None
    assert [case.prompt for case in report.end_to_end.cases] == [case.text for case in CASES]
    assert [b.component for b in report.bisections] == list(Component)
    assert report.not_run == ()


def test_worst_cases_come_with_commands_that_replay_them(verified: Verified) -> None:
    report = build_report(verified.bundle, verified.findings, verified.layers)
    dit = report.components[2]
    seed, latents = (part.split("=")[1] for part in dit.worst_case.split())
    assert dit.replay == (
        f"sa3-convert bisect {verified.bundle.path} --component dit --seed {seed} --latents {latents}"
    )
    assert report.generations is not None
    assert "--case 'prompt=" in report.generations.distributions[2].replay


def test_a_model_that_fell_short_is_named_with_its_bisection(verified: Verified) -> None:
    findings = failing(verified.findings, Component.DIT)
    findings = replace(findings, bisections={Component.DIT: verified.layers[Component.DIT]})
    report = build_report(verified.bundle, findings, verified.layers)
    assert not report.passed
    assert report.verdict.startswith("Failed: 1 of 5 models falls short: dit with ")
    assert [problem.what for problem in report.problems] == list(findings.problems)
    assert report.problems[0].command == report.components[2].replay
    assert "--case 'prompt=" in report.problems[1].command
    assert [b.component for b in report.bisections if b.fell_short] == [Component.DIT]
    assert len(report.bisections) == 5


def test_a_model_that_falls_short_in_a_generation_alone_failed_too(verified: Verified) -> None:
    dit = verified.findings.verdicts[2]
    generations = verified.findings.generations
    assert generations is not None
    below = replace(dit, floor_db=dit.worst.signal_to_noise_db - 1, claimed_db=None)
    verdicts = (*verified.findings.verdicts[:2], below, *verified.findings.verdicts[3:])
    worse = tuple(
        Distribution(d.name, [_with_noise(o, below.floor_db - 2) for o in d.observations])
        if d.name == TEACHER_FORCED
        else d
        for d in generations.distributions
    )
    findings = replace(
        verified.findings,
        verdicts=verdicts,
        generations=replace(generations, distributions=worse),
    )
    report = build_report(verified.bundle, findings, {})
    assert report.verdict.endswith(
        f"dit with {below.floor_db - 2:.1f} dB in a generation, floor {below.floor_db:g} dB."
    )
    assert [component.passed for component in report.components] == [True, True, False, True, True]


def _with_noise(observation: Observation, ratio: float) -> Observation:
    return observation.model_copy(update={"signal_to_noise_db": ratio})


def test_a_model_that_belies_its_manifest_is_told_from_one_below_its_floor(verified: Verified) -> None:
    verdicts = verified.findings.verdicts
    liar = replace(verdicts[0], claimed_db=90.0)
    findings = replace(verified.findings, verdicts=(liar, *verdicts[1:]))
    report = build_report(verified.bundle, findings, {})
    assert "whose manifest claims more than its file gives" in report.verdict
    assert [change.what for change in report.since_conversion] == ["text_encoder, worst of the conversion's inputs"]


def test_what_was_left_out_is_listed(verified: Verified) -> None:
    few = Verification("small-music", "int8", verified.findings.verdicts[2:3])
    report = build_report(verified.bundle, few, {})
    assert report.verdict.startswith("Passed: the only model verified reaches its floor, dit with ")
    assert {missing.part for missing in report.not_run} == {"components", "generations", "end_to_end", "layers"}
    assert all(missing.command.startswith("sa3-convert verify ") for missing in report.not_run)
    kept = build_report(verified.bundle, verified.findings, verified.layers, has_audio=False)
    assert [missing.part for missing in kept.not_run] == ["audio"]


def test_models_that_have_a_bisection_are_not_bisected_again(verified: Verified) -> None:
    others = {c: found for c, found in verified.layers.items() if c is not Component.NUMBER_CONDITIONER}
    found = bisected_models(verified.bundle, replace(verified.findings, bisections=others), threads=2)
    assert list(found) == [Component.NUMBER_CONDITIONER]


def test_the_same_findings_give_the_same_bytes(verified: Verified, tmp_path: Path) -> None:
    read = []
    for name in ("one", "two"):
        write_report(tmp_path / name, verified.bundle, verified.findings, layers=verified.layers, heard=verified.heard)
        read.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert read[0] == read[1]
    assert set(read[0]) == {PAGE, DATA, SUMMARY}
    assert Report.model_validate_json(read[0][DATA]).passed
    json.loads(read[0][DATA], parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))
    assert len(read[0][PAGE]) < 4 << 20
