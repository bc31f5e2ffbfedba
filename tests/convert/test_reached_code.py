"""Whatever runs in a stage is among the code that the stage is named by: found by watching whole conversions."""

import gc
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from sa3_convert.components import Component
from sa3_convert.convert.cache import Notes
from sa3_convert.convert.code_digest import PACKAGE, Source
from sa3_convert.convert.stages import STAGES, Stage
from sa3_convert.passes import integers
from sa3_convert.recipe import load_recipe
from tests.bundles import CONFIGS, Convert
from tests.convert.test_convert import with_component


@contextmanager
def watched(calls: set[tuple[str, str]]) -> Iterator[None]:
    """Note every function of the package that is called, by module and name at its top level."""
    inside = str(PACKAGE)

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # Bodies of classes and modules run when they are loaded, whoever asks for them first.
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED and code.co_filename.startswith(inside):
            calls.add((frame.f_globals["__name__"], code.co_qualname.partition(".")[0]))

    # A generator that a test before has left would be closed, in its own code, wherever it is collected.
    gc.collect()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


BESIDE = {("sa3_convert.system.log", "_Keep"), ("sa3_convert.system.files", "_Descriptor")}
"""What runs whatever a stage does: it takes in what is logged, and lets go of what nobody holds any more."""
SLOTS = {"export-slots", "slots", "ort-int8-slots", "onnx-fp16-slots"}


@pytest.mark.parametrize(
    ("component", "stages"),
    [
        (Component.NUMBER_CONDITIONER, {"export", "mnn", "verify", "ort-int8", "onnx-fp16"} | SLOTS),
        pytest.param(Component.TEXT_ENCODER, {"export", "round", "mnn", "verify"}, marks=pytest.mark.slow),
        pytest.param(
            Component.DIT, {"export", "mnn", "verify", "ort-int8", "onnx-fp16", "split"} | SLOTS, marks=pytest.mark.slow
        ),
        pytest.param(Component.DECODER, {"export", "mnn", "verify", "ort-int8", "onnx-fp16"}, marks=pytest.mark.slow),
        pytest.param(Component.ENCODER, {"export", "mnn", "verify", "ort-int8", "onnx-fp16"}, marks=pytest.mark.slow),
    ],
)
def test_every_function_that_a_stage_calls_is_followed(
    converted: Convert,
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    component: Component,
    stages: set[str],
) -> None:
    calls: dict[str, set[tuple[str, str]]] = {}

    def watch(stage: Stage) -> Stage:
        @wraps(stage.work)
        def watching(**given: Any) -> Notes:
            with watched(calls.setdefault(stage.name, set())):
                return stage.work(**given)

        return replace(stage, work=watching)

    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, watch(stage))
    # How close the models come on this machine is not what is looked at.
    monkeypatch.setattr(integers, "FLOORS_DB", dict.fromkeys(Component, 1.0))
    recipe = with_component(load_recipe(CONFIGS / "int8.yaml"), component, floor_db=1.0)
    converted(
        toy,
        recipe,
        tmp_path / "out",
        cache=tmp_path / "cache",
        components=(component,),
        with_ort_int8="ort-int8" in stages,
        with_onnx="fp16" if "onnx-fp16" in stages else None,
        with_split_dit=True,
        adapter_slots=2,
    )
    assert calls.keys() == stages
    source = Source(PACKAGE)
    for name, called in calls.items():
        reached = source.reached([("sa3_convert.convert.work", STAGES[name].work.__name__)])
        named = {(module, function) for module, function in called if not function.startswith("<")}
        assert len(named) > 10
        assert {one for one in named - BESIDE if one not in reached} == set()
