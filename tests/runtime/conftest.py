"""Pipelines and models over the golden checkpoints."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays
from sa3_convert.checkpoint.dimensions import CheckpointLayout, TextEncoderLayout
from sa3_convert.runtime.autoencode import Bottleneck
from sa3_convert.runtime.engines import TorchEngine, checkpoint_parts
from sa3_convert.runtime.prompts import PromptTokenizer
from sa3_convert.runtime.request import GenerateRequest
from tests.conftest import GOLDEN, Golden

Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Parts:
    """A golden checkpoint, opened."""

    engine: TorchEngine
    tokenizer: Path
    bottleneck: Bottleneck

    @property
    def layout(self) -> CheckpointLayout:
        return self.engine.checkpoint.layout

    @property
    def text(self) -> TextEncoderLayout:
        assert self.layout.text_encoder is not None
        return self.layout.text_encoder

    @property
    def prompts(self) -> PromptTokenizer:
        return PromptTokenizer(self.tokenizer, self.text)


def open_parts(family: str, **options: Any) -> Parts:
    """Open a family; `base` has the weights of `small` and an objective of its own."""
    engine, tokenizer, bottleneck = checkpoint_parts(GOLDEN / weights_of(family) / "checkpoint", options)
    if family == "base":
        layout = dataclasses.replace(engine.checkpoint.layout, objective="rectified_flow")
        engine = dataclasses.replace(engine, checkpoint=dataclasses.replace(engine.checkpoint, layout=layout))
    return Parts(engine, tokenizer, bottleneck)


def weights_of(family: str) -> str:
    return "small" if family == "base" else family


@pytest.fixture(scope="session")
def small() -> Parts:
    return open_parts("small")


@pytest.fixture(scope="session")
def base() -> Parts:
    return open_parts("base")


@pytest.fixture(scope="session")
def parts(golden: Golden) -> Parts:
    """The checkpoint that belongs to `golden`."""
    return open_parts(golden.folder.name)


def golden_request(golden: Golden, case: Mapping[str, Any]) -> GenerateRequest:
    """Return the request that a golden `generate` case describes."""
    audio: dict[str, Any] = {}
    if "init_audio" in case:
        audio = {"init_audio": golden.tensors[case["init_audio"]], "init_noise_level": case["init_noise_level"]}
    if "inpaint_audio" in case:
        regions = zip(case["inpaint_mask_start_seconds"], case["inpaint_mask_end_seconds"], strict=True)
        audio = {"inpaint_audio": golden.tensors[case["inpaint_audio"]], "inpaint": tuple(regions)}
    return GenerateRequest(
        case["prompt"],
        seconds=case["duration"],
        steps=case["steps"],
        seed=case["seed"],
        cfg_scale=case.get("cfg_scale", 1.0),
        negative_prompt=case.get("negative_prompt"),
        peak="clip",
        **audio,
    )


class StandIn:
    """A session that computes its output with a function and remembers its feeds."""

    def __init__(self, output: str, function: Callable[..., Any]) -> None:
        self.output = output
        self.function = function
        self.feeds: list[dict[str, NDArray[Any]]] = []
        self.closed = False

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        assert not self.closed
        self.feeds.append(dict(feeds))
        return {self.output: self.function(**feeds)}

    def close(self) -> None:
        self.closed = True
