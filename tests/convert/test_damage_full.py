"""What `verify` refuses, `verify --full` and `drift` refuse too, in a whole bundle of five components."""

import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.components import Component
from sa3_convert.errors import Sa3Error
from sa3_convert.lab.drift.drift import Plan, check_drift, find_baseline, update_baseline
from sa3_convert.lab.generations.full import verify_fully
from sa3_convert.lab.generations.trajectory import all_cases
from tests.bundles import Convert
from tests.check.test_damage import (
    Damage,
    extend,
    flip_a_bit,
    lfs_pointer,
    manifest_key,
    refitted,
    relabelled,
    remove,
    say,
    spoil_weights,
    swap,
    truncate,
    zero_weights,
)

CASES = all_cases((0,), (0, 1), (0.5,))
STEPS = 1
MODELS = [f"{component.value}.mnn" for component in Component]
OTHERS = ["recipe.yaml", "tokenizer.json", "bottleneck_params.json", "reference/dit.onnx", "reference/dit.onnx.data"]
Judge = Callable[[Bundle], object]


@pytest.fixture(scope="module")
def whole(converted: Convert, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(toy, "int8", tmp_path_factory.mktemp("whole") / "int8", with_reference=True)[0].bundle.path


@pytest.fixture(scope="module")
def judges(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Judge]:
    folder = tmp_path_factory.mktemp("judges")
    store = ReferenceStore(folder / "references")
    plan = Plan(CASES, STEPS, speed=False, threads=1, store=store)
    update_baseline(folder / "drift.json", Bundle.open(whole), "sound", plan)

    def fully(bundle: Bundle) -> None:
        verify_fully(bundle, cases=CASES, steps=STEPS, quick=True, store=store, threads=1, bisecting=False).check()

    def drift(bundle: Bundle) -> None:
        found = check_drift(bundle, find_baseline(folder / "drift.json", bundle), plan)
        assert found.passed

    return {"verify --full": fully, "drift": drift}


def accepting(judges: dict[str, Judge], folder: Path) -> list[str]:
    accepted = []
    for name, judge in judges.items():
        try:
            judge(Bundle.open(folder))
        except (Sa3Error, AssertionError):
            continue
        accepted.append(name)
    return accepted


def test_the_sound_bundle_is_accepted_by_both(whole: Path, judges: dict[str, Judge]) -> None:
    assert accepting(judges, whole) == ["verify --full", "drift"]


def plain() -> Iterator[tuple[str, Damage]]:
    for name in (*MODELS, *OTHERS):
        yield f"bit flip in {name}", flip_a_bit(name)
        yield f"{name} truncated", truncate(name)
        yield f"{name} extended", extend(name)
        yield f"{name} removed", remove(name)
        yield f"{name} a pointer", lfs_pointer(name)
    for first, second in pairwise(MODELS):
        yield f"{first} and {second} swapped", swap(first, second)


def test_no_damaged_file_is_accepted_by_either(whole: Path, judges: dict[str, Judge], tmp_path: Path) -> None:
    accepted = []
    for seed, (what, damage) in enumerate(plain()):
        folder = Path(shutil.copytree(whole, tmp_path / "copy"))
        damage(folder, np.random.default_rng(seed))
        accepted += [f"{judge}: {what}" for judge in accepting(judges, folder)]
        shutil.rmtree(folder)
    assert accepted == []


FITTED: dict[str, Damage] = {
    **{f"noise in {name}": refitted(spoil_weights(name, 0.3)) for name in MODELS},
    **{f"zeroed weight in {name}": refitted(zero_weights(name)) for name in MODELS},
    "models swapped": refitted(swap("decoder.mnn", "encoder.mnn")),
    "a model called fp16": say(Component.DECODER, "mnn", precision="fp16"),
    "recipe and manifest say fp16": relabelled("fp16", {"weights": None, "floats": "fp16"}),
    "stale recipe name": manifest_key("recipe", "fp16"),
    "no models": manifest_key("artifacts", []),
}


@pytest.mark.parametrize("what", FITTED)
def test_nothing_mislabelled_is_accepted_although_its_hashes_are_right(
    whole: Path, judges: dict[str, Judge], tmp_path: Path, what: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    FITTED[what](folder, np.random.default_rng(0))
    assert accepting(judges, folder) == []


def test_a_model_of_another_checkpoint_is_not_accepted(
    whole: Path, judges: dict[str, Judge], converted: Convert, tmp_path: Path
) -> None:
    synthesize(tmp_path / "other", "small-music", "toy", 1, "gaussian")
    made = converted(tmp_path / "other", "int8", tmp_path / "made", components=(Component.NUMBER_CONDITIONER,))[0]
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    shutil.copy(made.bundle.file(Component.NUMBER_CONDITIONER), folder / "number_conditioner.mnn")
    refitted(lambda folder, random: None)(folder, np.random.default_rng(0))
    assert accepting(judges, folder) == []
