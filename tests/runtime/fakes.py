"""An engine whose models are simple functions, and pipelines over it."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import Component
from sa3_convert.errors import BundleError
from sa3_convert.runtime.engines import EngineName, OnHost
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.prompts import PromptTokenizer
from tests.runtime.conftest import Parts, StandIn

Floats = NDArray[np.float32]


def decode(latents: Floats) -> Floats:
    """Each latent's first two channels, held, as the two channels of the audio."""
    return 0.1 * np.repeat(latents[:, :2], 4096, axis=2)


def _functions() -> dict[Component, tuple[str, Callable[..., Any]]]:
    return {
        Component.TEXT_ENCODER: (
            "last_hidden_state",
            lambda input_ids, attention_mask: np.repeat(input_ids[:, :, None], 64, axis=2).astype(np.float32),
        ),
        Component.NUMBER_CONDITIONER: ("embedding", lambda seconds: np.full((1, 1, 64), seconds[0], np.float32)),
        Component.DIT: ("out", lambda x, **_: np.float32(0.5) * x),
        Component.DECODER: ("audio", decode),
        Component.ENCODER: ("encoder_latent", lambda patched_audio: patched_audio[:, :32, ::16]),
    }


class FakeEngine(OnHost):
    """Loads stand-ins; remembers which and that they were closed."""

    name: EngineName = "mnn"

    def __init__(self, lacking: tuple[Component, ...] = (), **replaced: Callable[..., Any]) -> None:
        self.lacking = lacking
        self.replaced = replaced
        self.loaded: list[tuple[Component, StandIn]] = []

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"engine": "fake"}

    def load(self, component: Component) -> StandIn:
        if component in self.lacking:
            raise BundleError(f"no {component.value}")
        output, function = _functions()[component]
        session = StandIn(output, self.replaced.get(component.value, function))
        self.loaded.append((component, session))
        return session

    def feeds(self, component: Component) -> list[dict[str, NDArray[Any]]]:
        return [feed for found, session in self.loaded if found is component for feed in session.feeds]

    @property
    def order(self) -> list[Component]:
        return [component for component, _ in self.loaded]


def pipeline(parts: Parts, engine: FakeEngine, layout: CheckpointLayout | None = None, **options: Any) -> Pipeline:
    layout = layout or parts.layout
    return Pipeline(layout, engine, PromptTokenizer(parts.tokenizer, layout.text_encoder), parts.bottleneck, **options)
