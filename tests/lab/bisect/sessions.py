"""Stand-in sessions: a model is a function of its feeds."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays
from sa3_convert.checkpoint.config import read_layout
from sa3_convert.components import Component, contract
from tests.conftest import GOLDEN

LAYOUT = read_layout(GOLDEN / "small" / "checkpoint")

Change = Callable[[NDArray[Any]], NDArray[Any] | None]


class StandIn:
    """Returns seeded values of the contract's output shape; `change` falsifies them."""

    def __init__(self, component: Component, change: Change = lambda array: array) -> None:
        self.component = component
        self.contract = contract(component, LAYOUT)
        self.change = change
        self.calls: list[Arrays] = []

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        self.calls.append(feeds)
        (output,) = self.contract.outputs
        first = next(iter(feeds.values()))
        dynamic = next((p for p in self.contract.inputs if p.is_dynamic), None)
        latents = 1
        if dynamic is not None:
            unit = dynamic.concrete(1)[-1]
            latents = feeds[dynamic.name].shape[-1] // unit
        seed = int(np.abs(first.astype(np.float64)).sum() * 1000) % 2**32
        values = np.random.default_rng(seed).standard_normal(output.concrete(latents)).astype(np.float32)
        changed = self.change(values)
        return {} if changed is None else {output.name: changed}
