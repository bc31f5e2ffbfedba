"""One call, or one command, finds out everything about a bundle."""

import json
import pickle
import random
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.progress import Progress as Bar

import sa3_convert.cli.app as cli
from sa3_convert.arrays import Arrays
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.metrics import Fidelity
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.cli.full import _Stages
from sa3_convert.components import Component, contract
from sa3_convert.errors import BundleError, ConversionError, UsageError, VerificationError
from sa3_convert.lab.generations import full, shared
from sa3_convert.lab.generations.distribution import (
    FREE_RUNNING,
    TEACHER_FORCED,
    Distribution,
    GenerationFidelity,
    Observation,
)
from sa3_convert.lab.generations.end_to_end import staged_pipelines
from sa3_convert.lab.generations.full import Verification, recognised, verify_fully, with_bisections, workload
from sa3_convert.lab.generations.trajectory import FULL_CASES, GenerationCase, all_cases, case_feeds, end_to_end_cases
from sa3_convert.lab.miniature.judge import MODES, Mode, Recognition
from sa3_convert.runtime.engines import EngineName
from sa3_convert.runtime.output_checks import CHECKS
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.scheduling import Latest

CASES = all_cases((0, 4), (1,), (0.5, 1.0))
STEPS = 2


class Witness:
    def __init__(self) -> None:
        self.stages: dict[str, int] = {}
        self.heard: dict[tuple[str, str], NDArray[np.float32]] = {}

    def report(self, what: str, done: int, total: int) -> None:
        assert 0 <= done < total
        self.stages[what] = total

    def hear(self, case: GenerationCase, side: str, audio: NDArray[np.float32]) -> None:
        self.heard[case.name, side] = audio


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


def witnessed(bundle: Bundle, store: Path, **how: Any) -> tuple[Verification, Witness]:
    witness = Witness()
    findings = verify_fully(
        bundle,
        cases=CASES,
        steps=STEPS,
        quick=True,
        store=ReferenceStore(store),
        threads=2,
        report=witness.report,
        heard=witness.hear,
        **how,
    )
    return findings, witness


@pytest.fixture(scope="module")
def verified(toy_int8: Bundle, store: Path) -> tuple[Verification, Witness]:
    return witnessed(toy_int8, store)


def with_floor(findings: Verification, component: Component, floor_db: float) -> Verification:
    verdicts = [replace(v, floor_db=floor_db) if v.component is component else v for v in findings.verdicts]
    return replace(findings, verdicts=tuple(verdicts))


def test_a_sound_bundle_passes_and_every_part_is_there(verified: tuple[Verification, Witness]) -> None:
    findings, _ = verified
    findings.check()
    assert findings.passed
    assert findings.generations is not None
    assert findings.generations.of(TEACHER_FORCED).count == len(CASES) * STEPS
    assert findings.end_to_end is not None
    assert [c.case for c in findings.end_to_end.cases] == ["prompt=0 seed=1 seconds=1"]
    assert findings.bisections == {}


def test_the_json_is_finite_and_says_what_ran(verified: tuple[Verification, Witness]) -> None:
    data = json.loads(json.dumps(verified[0].to_data(), allow_nan=False))
    assert (data["engine"], data["passed"], data["problems"]) == ("mnn", True, [])
    assert len(data["generations"]["distributions"]) == 6
    assert {"target", "chaos"} < set(data["end_to_end"]["cases"][0])


def test_the_audio_of_both_sides_and_of_chance_can_be_heard(verified: tuple[Verification, Witness]) -> None:
    heard = verified[1].heard
    assert {side for _, side in heard} == {"reference", "target", "chaos"}
    assert all(audio.shape == (2, 44100) for audio in heard.values())


def test_all_work_is_planned(toy_int8: Bundle, verified: tuple[Verification, Witness]) -> None:
    planned = workload(toy_int8, CASES, steps=STEPS, quick=True)
    # What the reference generates end to end was computed for the distributions.
    assert set(verified[1].stages) - {"end to end, reference"} == set(planned)
    assert all(cost >= 0 for cost in planned.values())


def test_the_bar_ends_where_all_is_done(toy_int8: Bundle, verified: tuple[Verification, Witness]) -> None:
    work = workload(toy_int8, CASES, steps=STEPS, quick=True)
    with Bar(disable=True) as bar:
        stages = _Stages(bar, work)
        for what, count in verified[1].stages.items():
            stages.show(what, 0, count)
        stages.end()
        assert bar.tasks[0].completed == pytest.approx(bar.tasks[0].total)


def test_a_component_alone_is_no_work_end_to_end(toy_int8: Bundle) -> None:
    planned = workload(toy_int8, CASES, steps=STEPS, quick=True, components=(Component.DECODER,))
    assert not any(stage.startswith("end to end") for stage in planned)


def test_a_second_verification_computes_no_reference_and_finds_the_same(
    toy_int8: Bundle, store: Path, verified: tuple[Verification, Witness]
) -> None:
    again = ReferenceStore(store)
    findings = verify_fully(toy_int8, cases=CASES, steps=STEPS, quick=True, store=again, threads=2)
    assert again.computed == 0
    assert findings.to_data() == verified[0].to_data()


def shuffled(tasks: Sequence[Any], run: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    """Run tasks as workers might: sent, and in an order that no more than their needs decide."""
    tasks, run = pickle.loads(pickle.dumps((tasks, run)))
    draw, done = random.Random(0), dict[str, Any]()
    while ready := [t for t in tasks if t.name not in done and all(name in done for name in t.needs)]:
        task = draw.choice(ready)
        done[task.name] = pickle.loads(pickle.dumps(run(task, *(done[name] for name in task.needs))))
        yield task, done[task.name]


def test_workers_find_the_same_to_the_digit_whatever_they_do_first(
    toy_int8: Bundle, store: Path, verified: tuple[Verification, Witness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_held", held := Latest[Any, Any]())
    findings, witness = witnessed(toy_int8, store, runner=shuffled)
    assert findings.to_data() == verified[0].to_data()
    assert set(witness.stages) == set(workload(toy_int8, CASES, steps=STEPS, quick=True, on_workers=True))
    assert witness.heard.keys() == verified[1].heard.keys()
    assert all(np.array_equal(audio, verified[1].heard[what]) for what, audio in witness.heard.items())
    held.close()


def test_a_case_that_no_worker_comes_to_an_end_with_ends_a_verification(toy_int8: Bundle, store: Path) -> None:
    def dying(tasks: Sequence[Any], run: object) -> Iterator[tuple[Any, Any]]:
        yield tasks[0], ConversionError("Worker after worker ended.")

    with pytest.raises(ConversionError, match="Worker after worker"):
        verify_fully(toy_int8, cases=CASES, steps=STEPS, store=ReferenceStore(store), runner=dying)  # type: ignore[arg-type]


def test_another_bundle_under_the_same_path_is_refused_by_a_worker(toy_int8: Bundle, store: Path) -> None:
    how: dict[str, Any] = {"engine": "mnn", "steps": STEPS, "quick": True, "threads": 1}
    staged = replace(shared.Staged.of(toy_int8, ReferenceStore(store), **how), hashes=("0" * 64,))
    with pytest.raises(BundleError, match="is another bundle"):
        shared._opened(staged)


def test_one_component_can_be_looked_at_alone(toy_int8: Bundle, store: Path) -> None:
    findings = verify_fully(
        toy_int8,
        cases=CASES[:1],
        steps=STEPS,
        components=(Component.DIT,),
        quick=True,
        store=ReferenceStore(store),
        threads=2,
    )
    assert findings.generations is not None
    assert [d.name for d in findings.generations.distributions] == [TEACHER_FORCED, FREE_RUNNING]
    assert [v.component for v in findings.verdicts] == [Component.DIT]
    assert findings.end_to_end is None


def test_a_generation_below_the_floor_is_a_failure_that_names_a_floor_that_passes(
    verified: tuple[Verification, Witness],
) -> None:
    generations = verified[0].generations
    assert generations is not None
    worst = generations.of("decoder")
    findings = with_floor(verified[0], Component.DECODER, worst.worst + 0.5)
    assert not findings.passed
    with pytest.raises(VerificationError, match=f"decoder: generation {worst.worst_case} has .*floor_db: "):
        findings.check()


def with_generation(findings: Verification, name: str, ratio: float) -> Verification:
    """Let a distribution consist of one bad observation."""
    bad = Observation(CASES[1].name, Fidelity(ratio, 0.5, 1.0, 0.5), 1)
    return replace(findings, generations=GenerationFidelity(STEPS, (Distribution(name, (bad,)),)))


def test_a_free_running_generation_has_no_floor(verified: tuple[Verification, Witness]) -> None:
    assert with_generation(verified[0], FREE_RUNNING, 1).passed
    assert not with_generation(verified[0], TEACHER_FORCED, 1).passed


def test_what_falls_short_is_bisected_at_its_worst_case(
    toy_int8: Bundle, store: Path, verified: tuple[Verification, Witness], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Arrays] = {}

    def spy(bundle: Bundle, component: Component, *, feeds: Arrays, **_: object) -> Any:
        asked[component.value] = feeds
        return object()

    monkeypatch.setattr(full, "bisect_bundle", spy)
    decoder = next(v for v in verified[0].verdicts if v.component is Component.DECODER)
    findings = with_floor(verified[0], Component.DECODER, decoder.worst.signal_to_noise_db + 1)
    findings = with_generation(findings, TEACHER_FORCED, 1)
    with staged_pipelines(toy_int8, store=ReferenceStore(store), steps=STEPS, threads=2) as (references, _):
        found = with_bisections(toy_int8, findings, references, threads=2).bisections
        path = references.trajectory(CASES[1])
    assert list(found) == [Component.DIT, Component.DECODER]
    assert asked["decoder"]["latents"].shape[2] == int(decoder.worst_case.case.split("T=")[1])
    np.testing.assert_array_equal(asked["dit"]["x"], path.inputs[1])


def test_what_falls_short_on_sampled_inputs_is_bisected_without_generations(
    toy_int8: Bundle, verified: tuple[Verification, Witness]
) -> None:
    short = with_floor(replace(verified[0], generations=None), Component.NUMBER_CONDITIONER, 60)
    found = with_bisections(toy_int8, short, threads=2).bisections
    assert list(found) == [Component.NUMBER_CONDITIONER]
    # Eight bits explain what is lost: the floor is to blame, no operator.
    assert found[Component.NUMBER_CONDITIONER].suspect is None


@pytest.mark.parametrize("component", list(Component))
def test_a_cases_inputs_are_what_the_component_takes(toy_int8: Bundle, store: Path, component: Component) -> None:
    step = 1 if component is Component.DIT else None
    with staged_pipelines(toy_int8, store=ReferenceStore(store), steps=STEPS, threads=2) as (references, _):
        feeds = case_feeds(references, component, CASES[0], step)
        ports = contract(component, toy_int8.layout).inputs
        assert set(feeds) == {port.name for port in ports}
        assert all(str(feeds[port.name].dtype) == port.dtype for port in ports)
        with pytest.raises(UsageError, match="--step"):
            case_feeds(references, component, CASES[0], None if step else 0)


def test_only_the_miniature_is_heard_by_each_engine_in_each_mode(
    toy_int8: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quickly(pipeline: Pipeline, engine: str, *, mode: Mode, steps: int, **_: Any) -> Recognition:
        audio = pipeline.generate(GenerateRequest("a tone", seconds=1, steps=1), allow=CHECKS).audio
        return Recognition(engine, steps, audio.shape[-1], mode)

    monkeypatch.setattr(full, "judged", quickly)
    engines: tuple[EngineName, ...] = ("onnxruntime", "mnn")
    assert recognised(toy_int8, engines) == ()
    monkeypatch.setattr(full, "is_miniature", lambda layout: layout == toy_int8.layout)
    found = recognised(toy_int8, engines, MODES[:2], steps=4)
    assert found == tuple(Recognition(engine, 4, 44100, mode) for engine in engines for mode in MODES[:2])


def test_an_engine_that_the_bundle_has_nothing_for_is_refused(toy_int8: Bundle) -> None:
    with pytest.raises(BundleError, match="--with-ort-int8"):
        verify_fully(toy_int8, cases=CASES, steps=STEPS, engine="onnxruntime-int8")


def test_four_generations_are_compared_end_to_end_in_full_and_fewer_of_a_part() -> None:
    chosen = end_to_end_cases(FULL_CASES)
    assert [(c.prompt, c.seed, c.seconds) for c in chosen] == [(p, 0, 5.0) for p in (0, 1, 2, 6)]
    assert end_to_end_cases(all_cases((3, 4), (2,), (7.0,))) == (GenerationCase(3, 2, 7.0),)


def run(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


SUBSET = ("--prompts", "0", "--seeds", "1", "--seconds", "0.5", "--steps", STEPS)


def test_the_command_shows_figures_and_how_to_have_the_worst_again(
    toy_int8: Bundle, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "findings.json"
    where = ("--references", store)
    assert run("verify", toy_int8.path, "--full", "--quick", *SUBSET, *where, "--json", file) == 0
    data = json.loads(file.read_text())
    shown = capsys.readouterr().out
    assert f"{data['generations']['distributions'][2]['worst']:.1f}" in shown
    assert data["end_to_end"]["judgement"][:40] in shown
    command = next(line for line in shown.splitlines() if "bisect" in line and "number_conditioner" in line)
    assert cli.run(shlex.split(command)[1:]) == 0
    assert "No operator makes more error than its storage explains" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "--prompts", "0"), "add --full"),
        (("verify", "--workers", "2"), "add --full"),
        (("verify", "--references", "x"), "add --full"),
        (("verify", "--full", "--prompts", "8"), "--prompts '8'"),
        (("verify", "--full", "--prompts", "zero"), "write for example 0,1,2,3,4,5,6,7"),
        (("verify", "--full", "--seconds", "nan"), "--seconds 'nan'"),
        (("verify", "--full", "--seconds", "0"), "write for example 2,5,10"),
        (("verify", "--full", "--seeds", "-1"), "--seeds '-1'"),
        (("verify", "--full", "--seeds", "18446744073709551616"), "write for example 0,1"),
        (("verify", "--full", "--case", "prompt=0 seed=0 seconds=1.2.3"), "is no case"),
        (("verify", "--full", "--case", "prompt=0"), "is no case"),
        (("verify", "--full", "--case", "prompt=0 seed=0 seconds=1", "--seeds", "1"), "do not go with it"),
        (("verify", "--full", "--seconds", "1000"), "beyond this model's limit"),
        (("bisect", "--component", "dit", "--step", "1"), "add --case"),
        (("bisect", "--component", "dit", "--case", "prompt=0 seed=0 seconds=0.5"), "--step"),
        (("bisect", "--component", "dit", "--case", "dog"), "is no case"),
    ],
)
def test_wrong_usage_is_exit_2(
    toy_int8: Bundle, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *rest = arguments
    assert run(command, toy_int8.path, *rest) == 2
    assert message in capsys.readouterr().err


def test_a_backend_that_mnn_does_not_have_is_exit_7(toy_int8: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bisect", toy_int8.path, "--component", "number_conditioner", "--backend", "cuda") == 7
    assert "has no CUDA backend" in capsys.readouterr().err
    assert run("bisect", toy_int8.path, "--component", "number_conditioner", "--backend", "cpu") == 0
