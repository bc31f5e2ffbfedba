"""Run a network on a device: arrays that are there stay there, and what is run again is replayed as a CUDA graph."""

import contextlib
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sa3_convert.arrays import Placed
from sa3_convert.errors import BackendError
from sa3_convert.networks.dit import CONDITIONING
from sa3_convert.networks.fast import Remembered
from sa3_convert.system.machine import gpu_state

_LANES: Final = 4
"""Conditions and lengths of which static tensors and graphs are kept; guidance takes two."""
_BYTES_PER_NUMBER: Final = 200
"""Of a decoder's activations at their most, for each number of a token's width."""


class TorchSession:
    """A network on a device. Fed tensors it returns tensors, which stay where they are; else arrays.

    Read-only arrays are what stays the same from run to run. The first run under them is eager, and records what
    follows from them alone; on a CUDA device the second is captured as a graph, and later ones replay it.
    """

    def __init__(self, network: nn.Module, inputs: Sequence[str], output: str, device: str) -> None:
        with _memory("The network"):
            self._network = network.to(device)
        self._inputs, self._output, self._device = tuple(inputs), output, device
        self._remembered = Remembered(network)
        self._placed = Placed(self._place)
        self._lanes: list[_Lane] = []
        self._replays = device == "cuda"

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run once; see `arrays.Session.run`."""
        if feeds.keys() != set(self._inputs):
            raise ValueError(f"the network takes {', '.join(self._inputs)}, not {', '.join(feeds)}")
        with torch.inference_mode(), _float32_products(), _memory(f"A run of {self._output}"):
            given = [feeds[name] for name in self._inputs]
            fixed = [isinstance(x, np.ndarray) and not x.flags.writeable for x in given]
            places = [self._placed if is_fixed else self._place for is_fixed in fixed]
            tensors = [x if isinstance(x, Tensor) else place(x) for x, place in zip(given, places, strict=True)]
            steady = all(fixed[i] for i, name in enumerate(self._inputs) if name in CONDITIONING)
            output = self._lane(tensors, fixed).run(tensors, fixed, steady=steady, replay=self._replays)
        return {self._output: output if any(isinstance(x, Tensor) for x in given) else output.cpu().numpy()}

    def room(self, width: int) -> int:
        """Return for how many tokens of this width the device has room at once; 0 on the CPU, where less is faster."""
        if self._device != "cuda":
            return 0
        # What models before this one have left is free, too.
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        return int(free // (width * _BYTES_PER_NUMBER))

    def _place(self, array: NDArray[Any]) -> Tensor:
        # torch warns of arrays that cannot be written; nothing here writes into them.
        contiguous = np.ascontiguousarray(array)
        return torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy()).to(self._device)

    def _lane(self, tensors: Sequence[Tensor], fixed: Sequence[bool]) -> "_Lane":
        """Return the lane of these constants; else the one of two of these shapes that was used less recently."""
        shapes = tuple(x.shape for x in tensors)
        of_shape = [lane for lane in self._lanes if lane.shapes == shapes]
        lane = next((lane for lane in of_shape if lane.has(_chosen(tensors, fixed))), None)
        if lane is None:
            lane = of_shape[0] if len(of_shape) > 1 else _Lane(self._network, self._remembered, shapes)
        # The most recent ones stand last.
        self._lanes = [*(one for one in self._lanes if one is not lane), lane][-_LANES:]
        return lane


class _Lane:
    """One set of constants and shapes: what follows from the constants, and the graph that reads both."""

    def __init__(self, network: nn.Module, remembered: Remembered, shapes: Sequence[Any]) -> None:
        self.shapes = shapes
        self._network, self._remembered = network, remembered
        self._kept: dict[nn.Module, Tensor] = {}
        self._constants: tuple[Tensor, ...] | None = None
        self._static: list[Tensor] = []
        self._graph: tuple[Callable[[], None], Tensor] | None = None

    def has(self, constants: tuple[Tensor, ...]) -> bool:
        """Whether these very tensors were the constants of the last run."""
        known = self._constants
        return known is not None and len(known) == len(constants) and all(map(operator.is_, known, constants))

    def run(self, tensors: Sequence[Tensor], fixed: Sequence[bool], *, steady: bool, replay: bool) -> Tensor:
        """Run once. `steady` says that all from which something is remembered is among the constants."""
        constants = _chosen(tensors, fixed)
        again = steady and self.has(constants)
        self._constants = constants
        self._remembered.under(self._kept, record=not again)
        if again and replay:
            return self._replayed(tensors, fixed)
        output: Tensor = self._network(*tensors)
        for static, x in zip(self._static, tensors, strict=False):
            static.copy_(x)
        return output

    def _replayed(self, tensors: Sequence[Tensor], fixed: Sequence[bool]) -> Tensor:
        if self._graph is None:
            self._static = [x.clone() for x in tensors]
            self._graph = captured(self._network, self._static)
        replay, output = self._graph
        for static, x, is_fixed in zip(self._static, tensors, fixed, strict=True):
            if not is_fixed:
                static.copy_(x)
        replay()
        # The next replay writes over it.
        return output.clone()


def _chosen(tensors: Sequence[Tensor], fixed: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(x for x, is_fixed in zip(tensors, fixed, strict=True) if is_fixed)


def captured(network: nn.Module, static: Sequence[Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Return what runs a network again on tensors that keep their places, as a CUDA graph, and where the result is."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output: Tensor = network(*static)
    return graph.replay, output


class DeviceNoise:
    """torch's own stream of noise, drawn ahead on the CPU for one shape, and sent to the device in one go."""

    def __init__(self, seed: int, device: str, draws: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._device, self._draws = device, draws
        self._ahead: list[Tensor] = []

    def __call__(self, shape: Sequence[int]) -> Any:
        """Return the next draw; all have one shape."""
        if not self._ahead:
            drawn = torch.empty((self._draws, *shape), pin_memory=self._device == "cuda")
            for one in drawn:
                torch.randn(tuple(shape), generator=self._generator, out=one)
            self._ahead = list(drawn.to(self._device, non_blocking=True))[::-1]
        if self._ahead[-1].shape != tuple(shape):
            raise ValueError(f"noise was drawn ahead for {list(self._ahead[-1].shape)}, not {list(shape)}")
        return self._ahead.pop()


@contextlib.contextmanager
def _float32_products() -> Iterator[None]:
    """Multiply float32 in float32 while the block runs, as torch does not by default, and sum halves in float32."""
    places: tuple[tuple[Any, str], ...] = (
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    )
    before = [getattr(place, name) for place, name in places]
    try:
        for place, name in places:
            setattr(place, name, False)
        yield
    finally:
        for (place, name), value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextlib.contextmanager
def _memory(what: str) -> Iterator[None]:
    """Turn a device's lack of memory into an error with numbers."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        wanted = f"{asked[1]} more" if asked else "more memory than there is"
        raise BackendError(
            f"{what} needs {wanted} on the device; {gpu_state()}. Generate less at a time, end what else uses the GPU, "
            "use --precision normal, or --device cpu."
        ) from None
