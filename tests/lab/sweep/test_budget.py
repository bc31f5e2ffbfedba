"""Bytes that all components share: what an error does to the end result is measured, and decides who gets them."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.reader import Checkpoint, resolve_checkpoint
from sa3_convert.checkpoint.variants import MINIATURE
from sa3_convert.cli import app as cli
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.lab.common import Common
from sa3_convert.lab.generations.end_to_end import measure_end_to_end, staged_pipelines
from sa3_convert.lab.generations.trajectory import GenerationCase
from sa3_convert.lab.planner.allocation import Option
from sa3_convert.lab.planner.measuring import layers_to_measure, measure
from sa3_convert.lab.planner.planner import bytes_beside, table_error
from sa3_convert.lab.planner.sensitivity import LayerSensitivity, Sensitivity
from sa3_convert.lab.sweep import harm
from sa3_convert.lab.sweep.budget import within
from sa3_convert.recipe import ComponentRecipe, Recipe, load_recipe, own_recipes
from sa3_convert.runtime.pipeline import Pipeline
from tests.bundles import Convert

BASE = load_recipe(own_recipes()["small"])
CHOSEN = (Component.TEXT_ENCODER, Component.NUMBER_CONDITIONER, Component.DECODER)
BASES = {component: BASE.for_component(component) for component in CHOSEN}
EVEN = dict.fromkeys(CHOSEN, 1.0)
MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(toy: Path) -> Checkpoint:
    return Checkpoint.open(toy)


@pytest.fixture(scope="module")
def known(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[Component, Sensitivity]:
    common = Common(checkpoint.folder, tmp_path_factory.mktemp("cache"), threads=1)
    return {one: measure(common, one, "fp16", lambda *_: None) for one in CHOSEN}


def test_the_plans_fit_together_into_the_budget(checkpoint: Checkpoint, known: dict[Component, Sensitivity]) -> None:
    budget = MIB
    plans = within(checkpoint, BASES, known, EVEN, budget)
    sizes = [made.size for made in plans.values()]
    assert 0.97 * budget < sum(sizes) <= budget


def test_who_hurts_more_gets_more(checkpoint: Checkpoint, known: dict[Component, Sensitivity]) -> None:
    budget = 900 << 10
    even = within(checkpoint, BASES, known, EVEN, budget)
    tilted = within(checkpoint, BASES, known, EVEN | {Component.DECODER: 1e4}, budget)
    assert tilted[Component.DECODER].size > even[Component.DECODER].size
    assert tilted[Component.DECODER].predicted_db > even[Component.DECODER].predicted_db + 3
    assert tilted[Component.TEXT_ENCODER].size < even[Component.TEXT_ENCODER].size


def test_no_component_is_given_up(checkpoint: Checkpoint, known: dict[Component, Sensitivity]) -> None:
    plans = within(checkpoint, BASES, known, EVEN | {Component.TEXT_ENCODER: 1e-12}, MIB)
    assert plans[Component.TEXT_ENCODER].predicted_db >= 10
    assert sum(made.size for made in plans.values()) <= MIB


def test_the_token_table_gets_the_type_that_costs_least(
    checkpoint: Checkpoint, known: dict[Component, Sensitivity]
) -> None:
    def table(harms: dict[Component, float], budget: int) -> str:
        return within(checkpoint, BASES, known, harms, budget)[Component.TEXT_ENCODER].recipe.embedding

    assert table(EVEN, 8 * MIB) == "float"
    assert table(EVEN | {Component.TEXT_ENCODER: 1e-9}, 800 << 10) == "int4"


def test_the_table_alone_costs_more_the_fewer_bits_it_has(checkpoint: Checkpoint) -> None:
    kinds = ("float", "int8", "int4")
    recipes = [ComponentRecipe(floor_db=1, floats="fp16", embedding=kind) for kind in kinds]
    errors = [table_error(checkpoint, recipe) for recipe in recipes]
    # A toy's numbers are FP16's own.
    assert errors[0] == 0 < errors[1] < errors[2] / 10 < 0.1


def test_what_is_too_small_for_any_plan_is_refused(checkpoint: Checkpoint, known: dict[Component, Sensitivity]) -> None:
    with pytest.raises(
        UsageError,
        match=r"number_conditioner, decoder are together smaller than 0\.\d\d MiB",
    ):
        within(checkpoint, BASES, known, EVEN, 1000)


def coarse(checkpoint: Checkpoint, component: Component) -> Sensitivity:
    """Layers that are of no use at two bits, and nearly exact at eight."""
    candidates = (Option(2, None, 1000, 1.0), Option(8, None, 4000, 1e-4))
    layer = LayerSensitivity(shape=(1, 1), curvature=1, candidates=candidates)
    layers = dict.fromkeys(layers_to_measure(checkpoint, component), layer)
    return Sensitivity(fingerprint="x", scales="fp16", layers=layers)


@pytest.mark.parametrize("others", [(), (Component.DECODER,)])
def test_what_a_usable_plan_needs_is_kept_to_and_a_byte_less_is_refused(
    checkpoint: Checkpoint, others: tuple[Component, ...]
) -> None:
    chosen = (Component.NUMBER_CONDITIONER, *others)
    bases = {one: BASES[one] for one in chosen}
    known = {one: coarse(checkpoint, one) for one in chosen}
    least = sum(bytes_beside(checkpoint, one, bases[one]) + 4000 * len(known[one].layers) for one in chosen)
    plans = within(checkpoint, bases, known, EVEN, least)
    assert sum(made.size for made in plans.values()) == least
    assert all(made.predicted_db > 10 for made in plans.values())
    said = rf"together smaller than {least / MIB:.2f} MiB, none of them below 10 dB"
    with pytest.raises(UsageError, match=re.escape(said)):
        within(checkpoint, bases, known, EVEN, least - 1)


def test_what_does_no_harm_is_no_division_by_nothing(
    checkpoint: Checkpoint, known: dict[Component, Sensitivity]
) -> None:
    plans = within(checkpoint, BASES, known, EVEN | {Component.NUMBER_CONDITIONER: 0.0}, MIB)
    assert plans[Component.NUMBER_CONDITIONER].predicted_db >= 10
    assert sum(made.size for made in plans.values()) <= MIB


def test_harm_is_measured_once_and_is_more_where_less_comes_after(
    checkpoint: Checkpoint, known: dict[Component, Sensitivity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harm, "CASES", (replace(harm.CASES[0], seconds=0.5),))
    one_layer = {
        component: Sensitivity(
            fingerprint="x",
            scales="fp16",
            layers={
                next(iter(layers_to_measure(checkpoint, component))): LayerSensitivity(
                    shape=(1, 1), curvature=1, candidates=()
                )
            },
        )
        for component in Component
    }
    known = one_layer | known
    found = harm.harms(checkpoint, (), known, tmp_path, threads=1)
    assert set(found) == set(Component)
    assert all(value > 0 for value in found.values())
    # A duration's one token moves the sound less than what writes the sound.
    assert found[Component.NUMBER_CONDITIONER] < found[Component.DECODER]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it was measured before")

    monkeypatch.setattr(Pipeline, "from_checkpoint", refuse)
    assert harm.harms(checkpoint, (), known, tmp_path, threads=1) == found


def test_the_command_writes_one_recipe_for_all(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harm, "CASES", (replace(harm.CASES[0], seconds=0.5),))
    words = ["sweep", str(toy), "--component", "number_conditioner", "--budget-mib", "0.03"]
    words += ["--out", str(tmp_path / "out")]
    assert cli.run([*words, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert cli.run(words) == 0
    made = load_recipe(tmp_path / "out" / "within-0.03.yaml")
    assert made.name == "within-0.03"
    assert made.for_component(Component.NUMBER_CONDITIONER).floor_db > 1
    assert made.for_component(Component.DIT) == BASE.for_component(Component.DIT)


@pytest.mark.slow
def test_in_no_more_bytes_than_small_what_is_heard_is_nearer(toy: Path, tmp_path: Path, converted: Convert) -> None:
    def made(recipe: str | Recipe, name: str) -> Bundle:
        return converted(toy, recipe, tmp_path / name, with_reference=True)[0].bundle

    def models(bundle: Bundle) -> int:
        return sum(entry.bytes for a in bundle.manifest.artifacts if a.kind == "mnn" for entry in a.files)

    def distance(bundle: Bundle) -> float:
        with staged_pipelines(bundle, threads=1) as (references, target):
            found = measure_end_to_end(references, target, [GenerationCase(6, 0, 2.0)])
        return found.cases[0].target.audio.mean_spectral_distance_db

    small = made("small", "small")
    words = ["--budget-mib", str(models(small) / MIB), "--out", str(tmp_path / "out"), "--threads", "1"]
    assert cli.run(["sweep", str(toy), *words]) == 0
    shared = made(load_recipe(next((tmp_path / "out").glob("within-*.yaml"))), "shared")
    assert models(shared) <= models(small)
    assert distance(shared) < distance(small) / 2


def test_what_moves_the_sound_and_what_loses_sounds_have_the_same_say() -> None:
    spectra = {Component.DIT: 30.0, Component.DECODER: 10.0}
    lost = {Component.DIT: 0.0, Component.DECODER: 5.0}
    assert harm.together(spectra, lost) == {Component.DIT: 0.75, Component.DECODER: 1.25}
    nothing = dict.fromkeys(lost, 0.0)
    assert harm.together(spectra, nothing) == {Component.DIT: 0.75, Component.DECODER: 0.25}
    assert harm.together(spectra, {}) == harm.together(spectra, nothing)


def test_sounds_of_the_miniature_that_are_lost_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(resolve_checkpoint(MINIATURE))
    common = Common(checkpoint.folder, tmp_path, threads=1)
    chosen = (Component.NUMBER_CONDITIONER, Component.DECODER)
    known = {one: measure(common, one, "fp16", lambda *_: None) for one in chosen}
    monkeypatch.setattr(harm, "CASES", (replace(harm.CASES[0], seconds=0.5),))
    monkeypatch.setattr(harm, "judged", partial(harm.judged, count=6))
    measures: list[Mapping[Component, float]] = []
    monkeypatch.setattr(harm, "together", lambda *told: measures.extend(told) or dict(told[0]))
    harm.harms(checkpoint, (), known, tmp_path, threads=1)
    spectra, lost = measures
    assert all(spectra[one] > 0 for one in chosen)
    # Noise of 10 dB lies in all that a decoder makes, and no duration is off by so much that a sound is another.
    assert lost[Component.NUMBER_CONDITIONER] == 0 < lost[Component.DECODER]
