"""What a `.mnn` file holds, as data: ports, operators, weights, constants, and sums over them."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from sa3_convert.mnn.file.flatbuffer import Extent
from sa3_convert.mnn.file.weights import WeightStorage

_LARGEST: Final = 5


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output; of outputs a file stores the name alone."""

    name: str
    type: str | None = None
    shape: tuple[int, ...] | None = None
    """-1 stands for a length that the caller decides."""


@dataclass(frozen=True, slots=True)
class ParameterStorage:
    """A float vector of an operator that is not its weight: a bias, a norm's gamma."""

    role: str
    type: str
    elements: int
    values: Extent


@dataclass(frozen=True, slots=True)
class ConstantStorage:
    """A constant tensor: an embedding, a table, a shape."""

    name: str
    """Name of the tensor that it provides."""
    graph: str
    type: str
    shape: tuple[int, ...]
    elements: int
    values: Extent | None
    """None: the file gives the shape alone."""

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return 0 if self.values is None else self.values.bytes

    @property
    def is_float(self) -> bool:
        """Whether its values are floating-point numbers."""
        return self.type in ("fp16", "bf16", "fp32", "fp64")


@dataclass(frozen=True, slots=True)
class OperatorStorage:
    """One operator."""

    name: str
    graph: str
    """Name of the subgraph that it belongs to; empty for the main graph."""
    type: str
    """MNN's name for it."""
    parameter_kind: int
    """Number of the kind of its parameters (`schema.Kind`); 0 if it has none."""
    function: str | None
    """Which function, of a unary or binary operator."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight: WeightStorage | None
    parameters: tuple[ParameterStorage, ...]


@dataclass(frozen=True, slots=True)
class TypeTotal:
    """Sums over everything that is stored as one type."""

    weights: int
    constants: int
    parameters: int
    elements: int
    bytes: int
    scale_bytes: int


@dataclass(frozen=True)
class ModelStorage:
    """What a file holds."""

    path: Path
    bytes: int
    weight_file_bytes: int
    """Size of the `.weight` file beside it; 0 if the model does not use one."""
    mnn_version: str | None
    source: str | None
    """Framework that it was converted from."""
    label: str | None
    """The word that the converter was given for it (`--bizCode`)."""
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: tuple[OperatorStorage, ...]
    constants: tuple[ConstantStorage, ...]
    identity: Extent | None
    """Where the random identifier stands that MNN gives to every file that it writes."""

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of the `.mnn` itself that are weights, scales, constants and other parameters, each counted once."""
        end = total = 0
        for extent in sorted(self._extents(), key=lambda extent: extent.offset):
            if not extent.external:
                start = max(extent.offset, end)
                end = max(extent.offset + extent.bytes, end)
                total += max(end - start, 0)
        return total

    @property
    def overhead_bytes(self) -> int:
        """Bytes of the `.mnn` that are structure and names."""
        return self.bytes - self.payload_bytes

    def weighted(self) -> Iterator[tuple[OperatorStorage, WeightStorage]]:
        """Yield every weight with its operator."""
        for operator in self.operators:
            if operator.weight is not None:
                yield operator, operator.weight

    def totals(self) -> Mapping[str, TypeTotal]:
        """Return sums per stored type, largest first."""
        sums: dict[str, Counter[str]] = {}
        for _, weight in self.weighted():
            size = weight.payload.bytes + (weight.indices.bytes if weight.indices else 0)
            _add(sums, weight.type, "weights", weight.elements, size, weight.scale_bytes)
        for constant in self.constants:
            _add(sums, constant.type, "constants", constant.elements, constant.bytes)
        for operator in self.operators:
            for parameter in operator.parameters:
                _add(sums, parameter.type, "parameters", parameter.elements, parameter.values.bytes)
        ordered = sorted(sums.items(), key=lambda item: (-item[1]["bytes"], item[0]))
        fields = TypeTotal.__dataclass_fields__
        return {kind: TypeTotal(**{name: counts[name] for name in fields}) for kind, counts in ordered}

    def summary(self) -> dict[str, Any]:
        """Return the gist, JSON-ready and small enough for a manifest."""
        largest = sorted(self.constants, key=lambda constant: -constant.bytes)[:_LARGEST]
        return {
            "bytes": self.bytes,
            "weight_file_bytes": self.weight_file_bytes,
            "payload_bytes": self.payload_bytes,
            "overhead_bytes": self.overhead_bytes,
            "mnn_version": self.mnn_version,
            "source": self.source,
            "label": self.label,
            "inputs": [_port(port) for port in self.inputs],
            "outputs": [_port(port) for port in self.outputs],
            "operators": dict(sorted(Counter(operator.type for operator in self.operators).items())),
            "types": {kind: asdict(total) for kind, total in self.totals().items()},
            "weights": self._schemes(),
            "largest_constants": [_constant(constant) for constant in largest],
        }

    def to_json(self) -> str:
        """Return everything as JSON text: the gist, each operator and each constant."""
        whole = {
            "file": str(self.path),
            **self.summary(),
            "layers": [_operator(operator) for operator in self.operators],
            "constants": [_constant(constant) for constant in self.constants],
        }
        return json.dumps(whole, indent=2, ensure_ascii=False)

    def _schemes(self) -> list[dict[str, Any]]:
        groups: dict[tuple[Any, ...], Counter[str]] = {}
        for _, weight in self.weighted():
            key = (weight.type, weight.symmetric, weight.block_size, weight.scale_type)
            _add(groups, key, "layers", weight.elements, weight.payload.bytes, weight.scale_bytes)
        names = ("type", "symmetric", "block_size", "scale_type")
        ordered = sorted(groups.items(), key=lambda item: -item[1]["elements"])
        return [{**dict(zip(names, key, strict=True)), **counts} for key, counts in ordered]

    def _extents(self) -> Iterator[Extent]:
        for _, weight in self.weighted():
            yield from (extent for extent in (weight.payload, weight.scales, weight.indices) if extent is not None)
        for operator in self.operators:
            yield from (parameter.values for parameter in operator.parameters)
        yield from (constant.values for constant in self.constants if constant.values is not None)


def _add(sums: dict[Any, Counter[str]], key: Any, what: str, elements: int, size: int, scale_bytes: int = 0) -> None:
    counts = sums.setdefault(key, Counter())
    counts.update({what: 1, "elements": elements, "bytes": size, "scale_bytes": scale_bytes})


def _port(port: Port) -> dict[str, Any]:
    return {"name": port.name, "type": port.type, "shape": None if port.shape is None else list(port.shape)}


def _constant(constant: ConstantStorage) -> dict[str, Any]:
    return {
        "name": constant.name,
        **({"graph": constant.graph} if constant.graph else {}),
        "type": constant.type,
        "shape": list(constant.shape),
        "elements": constant.elements,
        "bytes": constant.bytes,
        "external": constant.values is not None and constant.values.external,
    }


def _operator(operator: OperatorStorage) -> dict[str, Any]:
    return {
        "name": operator.name,
        **({"graph": operator.graph} if operator.graph else {}),
        "type": operator.type,
        **({"function": operator.function} if operator.function else {}),
        "inputs": list(operator.inputs),
        "outputs": list(operator.outputs),
        **({"weight": _weight(operator.weight)} if operator.weight else {}),
        **({"parameters": [_parameter(item) for item in operator.parameters]} if operator.parameters else {}),
    }


def _parameter(parameter: ParameterStorage) -> dict[str, Any]:
    return {
        "role": parameter.role,
        "type": parameter.type,
        "elements": parameter.elements,
        "bytes": parameter.values.bytes,
    }


def _weight(weight: WeightStorage) -> dict[str, Any]:
    return {
        "type": weight.type,
        "bits": weight.bits,
        "stored": weight.stored,
        "shape": list(weight.shape),
        "symmetric": weight.symmetric,
        "block_size": weight.block_size,
        "rows": weight.rows,
        "scale_type": weight.scale_type,
        "bytes": weight.payload.bytes,
        "scale_bytes": weight.scale_bytes,
        "external": weight.payload.external,
    }
