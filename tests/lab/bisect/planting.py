"""Faults planted into the bytes of a converted model, and whether a bisection names the layer that has one."""

from pathlib import Path

import numpy as np

from sa3_convert.arrays import Arrays
from sa3_convert.lab.bisect.bisect import bisect
from sa3_convert.lab.bisect.graphs import ReferenceGraph
from sa3_convert.mnn.file.contents import OperatorStorage
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.mnn.layer_rules import layer_name

FAULTS = ("zeroed", "reversed", "shifted", "noise", "scales")


def layers(model: Path) -> list[OperatorStorage]:
    return [operator for operator in read_storage(model).operators if operator.weight]


def plant(model: Path, target: Path, layer: OperatorStorage, fault: str) -> None:
    """Write a copy of a model in which one layer's weights are wrong; its structure stays whole."""
    data = bytearray(model.read_bytes())
    weight = layer.weight
    assert weight is not None
    extent = weight.scales if fault == "scales" else weight.payload
    assert extent is not None
    end = extent.offset + extent.bytes
    # A payload begins with its shape and its code book; the codes themselves come last.
    start = extent.offset if fault == "scales" else end - weight.elements * weight.bits // 8
    data[start:end] = _spoiled(bytes(data[start:end]), fault)
    target.write_bytes(data)


def _spoiled(values: bytes, fault: str) -> bytes:
    if fault == "zeroed":
        return bytes(len(values))
    if fault == "reversed":
        return values[::-1]
    if fault == "shifted":
        return values[-1:] + values[:-1]
    if fault == "noise":
        return np.random.default_rng(0).integers(0, 256, len(values), np.uint8).tobytes()
    # Float32 (minimum, scale) pairs or scales: half as large again.
    return (np.frombuffer(values, np.float32) * np.float32(1.5)).tobytes()


def blames(reference: Path, target: Path, layer: OperatorStorage, feeds: Arrays, threads: int = 2) -> tuple[bool, str]:
    """Bisect, and tell whether the layer is in the piece of graph that is blamed."""
    result = bisect(reference, target, feeds, threads=threads)
    if result.suspect is None:
        return False, result.verdict()
    graph = ReferenceGraph(reference, feeds)
    operators, _ = graph.segment(result.suspect.name, {o.name for o in result.operators})
    made = {name for index in operators for name in graph.nodes[index].output}
    return layer_name(layer.name) in made, f"{layer_name(layer.name)}: {result.verdict()}"
