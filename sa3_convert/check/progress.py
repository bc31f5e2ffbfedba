"""How long work tells what it is doing."""

from collections.abc import Callable

from sa3_convert.components import Component
from sa3_convert.runtime.engines import EngineName

Progress = Callable[[str, int, int], None]
"""(what is being done, how much of it is done, how much there is of it)"""


def sampled_stage(component: Component, engine: EngineName) -> str:
    """Return the name of running a model on sampled inputs."""
    return f"{component.value}, sampled inputs, {engine}"


def reference_stage(component: Component) -> str:
    """Return the name of computing a reference over all cases."""
    return f"{component.value}, reference"
