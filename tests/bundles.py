"""Bundles for the tests, converted once per session: exports are by far the longest part, so all share one cache."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.lora_file import LoraRequest
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.convert.conversion import Outcome, StageEvent, convert
from sa3_convert.convert.plan import ConvertRequest
from sa3_convert.recipe import Recipe, load_recipe

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "toy"
    synthesize(folder, "small-music", "toy", 0, "gaussian")
    return folder


class Runs:
    """What a conversion did, stage by stage."""

    def __init__(self) -> None:
        self.events: list[StageEvent] = []

    def __call__(self, event: StageEvent) -> None:
        self.events.append(event)

    def done(self) -> set[tuple[str, str]]:
        """Return the (component, stage) pairs that were made anew."""
        return {(e.component.value, e.stage) for e in self.events if e.state == "done"}


Convert = Callable[..., tuple[Outcome, Runs]]


@pytest.fixture(scope="session")
def converted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    def run(
        checkpoint: Path, recipe: str | Recipe, out: Path, loras: Sequence[LoraRequest] = (), **options: object
    ) -> tuple[Outcome, Runs]:
        runs = Runs()
        chosen = load_recipe(CONFIGS / f"{recipe}.yaml") if isinstance(recipe, str) else recipe
        # What is forced is made again in its place: never in the cache whose files the shared bundles hold.
        kept = tmp_path_factory.mktemp("forced") if options.get("force") else cache
        settings = {"cache": kept, "threads": 2} | options
        opened = Checkpoint.open(checkpoint).with_loras(loras)
        request = ConvertRequest(checkpoint=opened, recipe=chosen, out=out, **settings)  # type: ignore[arg-type]
        return convert(request, runs), runs

    return run


@pytest.fixture(scope="session")
def toy_fp32(converted: Convert, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return converted(toy, "fp32", tmp_path_factory.mktemp("fp32"))[0].bundle


RANK = 8
"""Of the slots of toys."""


@pytest.fixture(scope="session")
def toy_slots(converted: Convert, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return converted(toy, "fp32", tmp_path_factory.mktemp("slots"), adapter_slots=RANK)[0].bundle


@pytest.fixture(scope="session")
def toy_int8_slots(converted: Convert, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With slots for three engines."""
    out = tmp_path_factory.mktemp("slots-int8")
    return converted(toy, "int8", out, adapter_slots=RANK, with_ort_int8=True, with_onnx="fp16")[0].bundle


@pytest.fixture(scope="session")
def toy_int8(converted: Convert, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return converted(toy, "int8", tmp_path_factory.mktemp("int8"))[0].bundle
