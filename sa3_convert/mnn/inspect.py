"""What a `.mnn` file holds, as tables for the terminal."""

from collections import Counter
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sa3_convert.mnn.contents import ModelStorage, Port
from sa3_convert.mnn.layer_rules import layer_name
from sa3_convert.mnn.readers import oldest_reader
from sa3_convert.mnn.weights import WeightStorage

_SMALL_CONSTANT: Final = 1024
"""Bytes below which constants are summed up in one line."""


def render(storage: ModelStorage) -> Group:
    """Return what a file holds: ports, sums per type, each layer with weights, constants, and the other operators.

    Names come from the file: markup in them is not interpreted; the console escapes what would control a terminal.
    """
    parts: list[RenderableType] = [_headline(storage), _ports(storage), _totals(storage)]
    if any(storage.weighted()):
        parts.append(_layers(storage))
    if storage.constants:
        parts.append(_constants(storage))
    parts.append(_others(storage))
    return Group(*parts)


def _headline(storage: ModelStorage) -> Text:
    version = storage.mnn_version or "unknown"
    text = Text(
        f"{storage.path!s}: {_size(storage.bytes)}, MNN {version}, from {storage.source or '?'}; "
        f"{_size(storage.payload_bytes)} of data, {_size(storage.overhead_bytes)} of structure"
    )
    if storage.weight_file_bytes:
        text.append(f"; {_size(storage.weight_file_bytes)} in the .weight file beside it")
    text.append(f"\nRuns on {oldest_reader(storage)!s}")
    return text


def _ports(storage: ModelStorage) -> Table:
    table = _table("Inputs and outputs", "", "name", "type", "shape")
    for direction, ports in (("in", storage.inputs), ("out", storage.outputs)):
        for port in ports:
            table.add_row(direction, Text(port.name), port.type or "", _port_shape(port))
    return table


def _totals(storage: ModelStorage) -> Table:
    table = _table("Stored as", "type")
    _add_numbers(table, "weights", "constants", "biases, norms", "elements", "size", "scales")
    for kind, total in storage.totals().items():
        counts = (total.weights, total.constants, total.parameters)
        sizes = (_size(total.bytes), _size(total.scale_bytes) if total.scale_bytes else "")
        table.add_row(kind, *(str(count) if count else "" for count in counts), f"{total.elements:,}", *sizes)
    return table


def _layers(storage: ModelStorage) -> Table:
    table = _table("Layers", "name", "weight", "stored", "scale per")
    _add_numbers(table, "size", "scales")
    for operator, weight in storage.weighted():
        scales = f"{_size(weight.scale_bytes)} {weight.scale_type}" if weight.scales else ""
        name = Text(layer_name(operator.name))
        if operator.type != "Convolution":
            name.append(f" ({operator.type})", style="dim")
        table.add_row(name, _weight_shape(weight), *_scheme(weight), _size(weight.payload.bytes), scales)
    return table


def _weight_shape(weight: WeightStorage) -> str:
    is_linear = all(size == 1 for size in weight.shape[2:])
    return "×".join(str(size) for size in (weight.shape[:2] if is_linear else weight.shape))


def _scheme(weight: WeightStorage) -> tuple[str, str]:
    stored = weight.type + (" sparse" if weight.stored.startswith("sparse") else "")
    if weight.symmetric is None:
        return stored, ""
    granularity = "layer" if weight.rows < weight.shape[0] else "channel"
    if weight.block_size is not None:
        granularity = f"{weight.block_size} inputs"
    return f"{stored} {'sym' if weight.symmetric else 'asym'}", granularity


def _constants(storage: ModelStorage) -> Table:
    table = _table("Constants", "name", "stored", "shape")
    _add_numbers(table, "size")
    small = [constant for constant in storage.constants if constant.bytes < _SMALL_CONSTANT]
    for constant in storage.constants:
        if constant.bytes >= _SMALL_CONSTANT:
            shape = "×".join(str(size) for size in constant.shape)
            table.add_row(Text(constant.name), constant.type, shape, _size(constant.bytes))
    if small:
        total = sum(constant.bytes for constant in small)
        table.add_row(f"{len(small)} smaller ones", "", "", _size(total))
    return table


def _others(storage: ModelStorage) -> Text:
    counts = Counter(
        f"{operator.type}({operator.function})" if operator.function else operator.type
        for operator in storage.operators
        if operator.weight is None and operator.type not in ("Const", "Input")
    )
    return Text("Other operators: " + (", ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "none"))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add_numbers(table: Table, *columns: str) -> None:
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)


def _port_shape(port: Port) -> str:
    return "" if port.shape is None else "×".join("?" if size < 0 else str(size) for size in port.shape)


def _size(count: int) -> str:
    if count < 1 << 10:
        return f"{count} B"
    return f"{count / 2**10:.1f} KiB" if count < 1 << 20 else f"{count / 2**20:.1f} MiB"
