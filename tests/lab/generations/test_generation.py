"""Whole generations on two sides, with models that are functions of their inputs."""

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter
from rich.console import Console

from sa3_convert.arrays import Session
from sa3_convert.bundle.manifest import BOTTLENECK, Artifact, CheckpointOrigin, FileEntry, Manifest
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.metrics import MAX_DB, Fidelity
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.cli.comparison_tables import render_end_to_end, render_generations
from sa3_convert.components import Component
from sa3_convert.errors import UsageError, VerificationError
from sa3_convert.lab.generations.distribution import (
    FREE_RUNNING,
    TEACHER_FORCED,
    Distribution,
    GenerationFidelity,
    Observation,
    measure_components,
)
from sa3_convert.lab.generations.end_to_end import EndToEnd, measure_end_to_end
from sa3_convert.lab.generations.trajectory import (
    PROMPTS,
    GenerationCase,
    Memory,
    StagedPipeline,
    all_cases,
    case_feeds,
    recorded,
    replayed,
)
from sa3_convert.lab.report.formatting import replay
from sa3_convert.runtime.engines import EngineName, OnHost
from sa3_convert.runtime.pipeline import Pipeline
from tests.conftest import GOLDEN
from tests.lab.bisect.sessions import LAYOUT, StandIn

STEPS = 3
CASES = all_cases((0, 4), (0,), (0.5, 1.0))


def make_bundle(folder: Path) -> Bundle:
    folder.mkdir()
    shutil.copy(GOLDEN / "small" / "checkpoint" / "t5gemma-b-b-ul2" / "tokenizer.json", folder)
    channels = LAYOUT.autoencoder.latent_dim
    numbers = {"scaling_factor": [[[1.0]] * channels], "bias": [[[0.0]] * channels], "running_std": [1.0]}
    (folder / BOTTLENECK).write_text(json.dumps(numbers))
    artifacts = [
        Artifact(**dict(FileEntry.of(folder, "tokenizer.json")), kind="tokenizer"),
        Artifact(**dict(FileEntry.of(folder, BOTTLENECK)), kind="bottleneck_params"),
    ]
    for component in Component:
        for kind in ("mnn", "onnx"):
            name = f"{component.value}.{kind}"
            (folder / name).write_text(name)
            artifacts.append(Artifact(**dict(FileEntry.of(folder, name)), kind=kind, component=component))
    manifest = Manifest(
        schema_version=1,
        variant="small-music",
        recipe="int8",
        checkpoint=CheckpointOrigin(),
        tools={},
        layout=LAYOUT,
        artifacts=tuple(artifacts),
    )
    return Bundle(folder, manifest)


class Smooth(StandIn):
    """A stand-in whose output follows its inputs continuously."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if "x" in feeds:
            velocity = np.float32(0.5) * feeds["x"] + np.float32(0.1) * feeds["cross_attn_cond"].mean()
            changed = self.change(velocity)
            assert changed is not None
            return {"out": changed}
        if "latents" in feeds:
            auto = LAYOUT.autoencoder
            audio = np.repeat(feeds["latents"][:, : auto.audio_channels], auto.downsampling_ratio, axis=2)
            changed = self.change(audio)
            assert changed is not None
            return {"audio": changed}
        return super().run(feeds)


class StandInEngine(OnHost):
    name: EngineName = "mnn"
    settings: Mapping[str, Any] = {}

    def __init__(self, changes: Mapping[Component, Callable[[NDArray[Any]], NDArray[Any]]] | None = None) -> None:
        self.changes = changes or {}
        self.loaded: list[Component] = []

    def load(self, component: Component) -> Session:
        self.loaded.append(component)
        return Smooth(component, self.changes.get(component, lambda array: array))


@contextmanager
def sides(
    tmp_path: Path, changes: Mapping[Component, Callable[[NDArray[Any]], NDArray[Any]]] | None = None
) -> Iterator[tuple[StagedPipeline, StagedPipeline]]:
    folder = tmp_path / "bundle"
    bundle = make_bundle(folder) if not folder.exists() else make_bundle(tmp_path / "again")
    reference, target = (Pipeline.of(bundle, StandInEngine(c), keep_loaded="last") for c in (None, changes))
    store = ReferenceStore(tmp_path / "store")
    yield StagedPipeline(bundle, reference, STEPS, store), StagedPipeline(bundle, target, STEPS, Memory())


def scaled(factor: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda array: array * np.float32(factor)


def test_a_case_is_named_so_that_it_can_be_made_again() -> None:
    case = GenerationCase(3, 17, 2.5)
    assert GenerationCase.parse(case.name) == case
    assert case.text == PROMPTS[3]


@given(
    st.integers(0, len(PROMPTS) - 1),
    st.integers(0, 2**64 - 1),
    st.floats(1e-3, 600, allow_nan=False) | st.integers(1, 600),
)
def test_every_case_is_what_its_name_says(prompt: int, seed: int, seconds: float) -> None:
    case = GenerationCase(prompt, seed, seconds)
    assert GenerationCase.parse(case.name) == case


@given(st.text() | st.from_regex(r"prompt=\S* seed=\S* seconds=\S*", fullmatch=True))
def test_any_other_text_is_refused_or_is_the_name_of_what_it_gives(text: str) -> None:
    try:
        case = GenerationCase.parse(text)
    except UsageError:
        return
    assert GenerationCase.parse(case.name) == case


@pytest.mark.parametrize(
    "name",
    [
        "",
        "prompt=0",
        "prompt=99 seed=0 seconds=1",
        "prompt=0 seed=-1 seconds=1",
        "prompt=0 seed=0 seconds=1.2.3",
        "prompt=0 seed=0 seconds=.",
        "prompt=0 seed=" + "9" * 5000 + " seconds=1",
        "prompt=0 seed=0 seconds=nan",
    ],
)
def test_what_is_no_case_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="prompt=0 seed=1 seconds=5"):
        GenerationCase.parse(name)


def test_a_seed_beyond_64_bits_is_refused() -> None:
    with pytest.raises(UsageError, match="seed is 18446744073709551616"):
        GenerationCase.parse("prompt=0 seed=18446744073709551616 seconds=1")
    largest = GenerationCase(0, 2**64 - 1, 1.0)
    assert recorded(lambda x, t: x, LAYOUT, largest, steps=1, nudge=1e-3).valid > 0


def test_the_prompt_set_has_short_long_empty_and_foreign_ones() -> None:
    assert "" in PROMPTS
    assert max(len(p) for p in PROMPTS) > 300
    assert any(not p.isascii() for p in PROMPTS)
    assert len(set(PROMPTS)) == 8


def test_a_trajectory_is_what_its_velocities_say() -> None:
    case = GenerationCase(0, 3, 1.0)
    whole = recorded(lambda x, t: np.tanh(x) * t, LAYOUT, case, steps=4)
    again = replayed(whole.velocities, LAYOUT, case)
    for first, second in zip((*whole.inputs, *whole.latents), (*again.inputs, *again.latents), strict=True):
        np.testing.assert_array_equal(first, second)
    assert len(whole.times) == 4
    assert whole.times[0] == 1


def test_what_is_verified_stage_by_stage_is_what_the_pipeline_generates(tmp_path: Path) -> None:
    with sides(tmp_path) as (_, target):
        for case in CASES:
            generated = target.pipeline.generate(replace(case.request(STEPS), peak="clip"), allow=["clipping"])
            np.testing.assert_array_equal(np.clip(target.audio(case)[0], -1, 1), generated.audio)
            np.testing.assert_array_equal(target.trajectory(case).result, generated.report.latents)


def test_a_nudge_moves_the_start_by_its_size() -> None:
    case = GenerationCase(0, 3, 1.0)
    plain, nudged = (recorded(lambda x, t: x, LAYOUT, case, steps=2, nudge=n) for n in (0.0, 1e-3))
    assert (nudged.inputs[0] - plain.inputs[0]).std() == pytest.approx(1e-3, rel=0.05)


def test_the_same_models_on_both_sides_have_no_error_anywhere(tmp_path: Path) -> None:
    with sides(tmp_path) as (references, target):
        result = measure_components(references, target, CASES)
    assert [d.name for d in result.distributions] == [
        "text_encoder",
        "number_conditioner",
        TEACHER_FORCED,
        FREE_RUNNING,
        "decoder",
        "encoder",
    ]
    assert all(d.worst == MAX_DB for d in result.distributions)
    assert result.of(TEACHER_FORCED).count == len(CASES) * STEPS
    assert result.of("text_encoder").count == 2
    assert result.of("number_conditioner").count == 2


def test_teacher_forced_errors_are_the_steps_own_and_free_running_ones_are_not(tmp_path: Path) -> None:
    with sides(tmp_path, {Component.DIT: scaled(1.01)}) as (references, target):
        result = measure_components(references, target, CASES)
    forced, free = result.of(TEACHER_FORCED), result.of(FREE_RUNNING)
    assert forced.mean == pytest.approx(40, abs=1e-3)
    assert forced.worst == pytest.approx(40, abs=1e-3)
    assert len({round(ratio, 1) for ratio in free.by_step.values()}) > 1
    assert result.of("decoder").worst == MAX_DB


def test_an_error_of_the_text_encoder_reaches_the_free_running_dit_alone(tmp_path: Path) -> None:
    with sides(tmp_path, {Component.TEXT_ENCODER: scaled(1.5)}) as (references, target):
        result = measure_components(references, target, CASES)
    assert result.of("text_encoder").worst == pytest.approx(6.02, abs=0.01)
    assert result.of(TEACHER_FORCED).worst == MAX_DB
    assert result.of(FREE_RUNNING).worst < MAX_DB


def test_the_worst_case_and_step_are_named_and_its_inputs_can_be_had_again(tmp_path: Path) -> None:
    def worse_at_the_end(array: NDArray[Any]) -> NDArray[Any]:
        return array + np.float32(0.01) * (array.std() < 0.4)

    with sides(tmp_path, {Component.DIT: worse_at_the_end}) as (references, target):
        worst = measure_components(references, target, CASES).of(TEACHER_FORCED)
        assert worst.worst_step is not None
        case = GenerationCase.parse(worst.worst_case)
        feeds = case_feeds(references, Component.DIT, case, worst.worst_step)
        path = references.trajectory(case)
        np.testing.assert_array_equal(feeds["x"], path.inputs[worst.worst_step])
        assert feeds["t"][0] == path.times[worst.worst_step]
        with pytest.raises(UsageError, match="no step 3"):
            case_feeds(references, Component.DIT, case, STEPS)


def test_a_second_measurement_runs_no_reference_model(tmp_path: Path) -> None:
    with sides(tmp_path) as (references, target):
        measure_components(references, target, CASES)
    with sides(tmp_path, {Component.DIT: scaled(0.9)}) as (references, target):
        measure_components(references, target, CASES)
        engine = references.pipeline.models.engine
        assert isinstance(engine, StandInEngine)
        assert engine.loaded == []


def test_a_model_that_returns_nan_fails(tmp_path: Path) -> None:
    changes = {Component.DIT: scaled(np.nan)}
    with sides(tmp_path, changes) as (references, target), pytest.raises(VerificationError, match="NaN"):
        measure_components(references, target, CASES)


def test_measuring_nothing_is_no_success(tmp_path: Path) -> None:
    with sides(tmp_path) as (references, target):
        with pytest.raises(VerificationError, match="no cases"):
            measure_components(references, target, ())
        with pytest.raises(VerificationError, match="no cases"):
            measure_end_to_end(references, target, ())


def test_each_model_is_loaded_for_its_stage_only(tmp_path: Path) -> None:
    with sides(tmp_path) as (references, target):
        measure_components(references, target, CASES)
        measure_end_to_end(references, target, CASES)
        reference, judged = references.pipeline.models.engine, target.pipeline.models.engine
        assert isinstance(reference, StandInEngine)
        assert isinstance(judged, StandInEngine)
        # The nudged reference and the audio at the end need some again.
        assert reference.loaded == [*Component, Component.DIT, Component.DECODER]
        assert judged.loaded == [*Component, Component.DECODER]


def test_the_same_models_generate_the_same_audio_and_chaos_is_measured_beside_it(tmp_path: Path) -> None:
    with sides(tmp_path) as (references, target):
        result = measure_end_to_end(references, target, CASES)
    assert all(c.target.audio.mean_spectral_distance_db == 0 for c in result.cases)
    assert all(c.chaos.audio.mean_spectral_distance_db > 0 for c in result.cases)
    assert result.chaos_ratio == 0
    assert "less than such a nudge" in result.judgement


def test_a_target_that_goes_astray_is_told_from_chance(tmp_path: Path) -> None:
    with sides(tmp_path, {Component.DIT: scaled(0.5)}) as (references, target):
        result = measure_end_to_end(references, target, CASES)
    assert result.chaos_ratio > 3
    assert "times as much as such a nudge" in result.judgement
    data = json.loads(TypeAdapter(EndToEnd).dump_json(result))
    assert data["chaos_ratio"] == result.chaos_ratio


def test_the_json_of_a_measurement_holds_every_observation(tmp_path: Path) -> None:
    with sides(tmp_path, {Component.DIT: scaled(1.01)}) as (references, target):
        result = measure_components(references, target, CASES)
    data = json.loads(TypeAdapter(GenerationFidelity).dump_json(result))
    forced = next(d for d in data["distributions"] if d["name"] == TEACHER_FORCED)
    assert len(forced["observations"]) == len(CASES) * STEPS
    assert set(forced["by_step"]) == {"0", "1", "2"}


def test_the_table_shows_every_distribution_and_its_worst_case(tmp_path: Path) -> None:
    with sides(tmp_path, {Component.DIT: scaled(1.01)}) as (references, target):
        result = measure_components(references, target, CASES)
    console = Console(file=io.StringIO(), width=160)
    console.print(render_generations(result, Path("some where")), soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert all(d.name in shown for d in result.distributions)
    assert result.of(FREE_RUNNING).worst_case in shown
    worst = result.of(TEACHER_FORCED)
    replayed = (
        f"sa3-convert bisect 'some where' --component dit --case '{worst.worst_case}' --steps {STEPS} "
        f"--step {worst.worst_step}\n"
    )
    assert replayed in shown


def test_what_cannot_be_bisected_is_measured_again(tmp_path: Path) -> None:
    distribution = Distribution(FREE_RUNNING, (Observation(CASES[0].name, Fidelity(9, 1, 0, 0), 7),))
    command = replay(distribution, Path("b"), references=Path("r"))
    assert command == f"sa3-convert verify b --component dit --case '{CASES[0].name}' --references r --full --quick"
    decoder = Distribution("decoder", (Observation(CASES[0].name, Fidelity(9, 1, 0, 0)),))
    assert replay(decoder, Path("b"), engine="onnxruntime-int8").endswith("--full --quick --engine onnxruntime-int8")


def test_the_figures_of_each_generation_stand_beside_those_of_chance(tmp_path: Path) -> None:
    with sides(tmp_path, {Component.DIT: scaled(0.5)}) as (references, target):
        result = measure_end_to_end(references, target, CASES)
    console = Console(file=io.StringIO(), width=160)
    console.print(render_end_to_end(result), soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert result.judgement in shown
    for case in result.cases:
        assert case.case in shown
        for divergence in (case.target, case.chaos):
            assert f"{divergence.latent_cosine:.5f}" in shown
            assert f"{divergence.audio.spectral_distance_db[1]:.2f}" in shown
            assert f"{divergence.audio.loudness_db:+.2f}" in shown
