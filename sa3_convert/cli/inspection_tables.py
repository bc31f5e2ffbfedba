"""What was looked at as tables for the terminal: what a `.mnn` file holds, and what the probes found."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sa3_convert.lab.doctor.records import changes
from sa3_convert.lab.doctor.results import Answer, Diagnosis, ProbeResult
from sa3_convert.mnn.compatibility import oldest_reader
from sa3_convert.mnn.file.contents import ModelStorage, Port
from sa3_convert.mnn.file.weights import WeightStorage
from sa3_convert.mnn.layer_rules import layer_name

_STYLES = {"works": "green", "cpu": "yellow"}


def probe_table(diagnosis: Diagnosis, *, everything: bool) -> Table:
    """Return one row per probe that does not just work, or per probe."""
    table = Table(title=f"MNN {diagnosis.mnn} on {diagnosis.backend}", title_justify="left")
    table.add_column("probe", no_wrap=True)
    table.add_column("asked", overflow="fold")
    table.add_column("answer", no_wrap=True)
    table.add_column("dB", justify="right", no_wrap=True)
    table.add_column("what this tool does", overflow="fold")
    for result in diagnosis.results:
        worst = result.worst
        if everything or worst.outcome != "works":
            style = _STYLES.get(worst.outcome, "red")
            table.add_row(result.probe, _asked(result), Text(worst.outcome, style), _ratio(worst), _done(result))
    return table


def verdict_lines(diagnosis: Diagnosis) -> Iterator[str]:
    """Yield whether the converted models are safe on this MNN, then what is behind that."""
    bad = diagnosis.defects()
    failing = [result for result in diagnosis.results if result.needed_by and result.probe in bad]
    word = "not everything" if failing else "everything"
    yield f"MNN {diagnosis.mnn} on {diagnosis.backend}: {word} that the converted models need works."
    for result in failing:
        components = ", ".join(component.value for component in result.needed_by)
        where = _asked(result).removeprefix(result.asks)
        yield f"  {result.probe}: {result.worst.outcome}{where} (needed by {components})"
    sound = len(diagnosis.results) - len(bad)
    yield f"{len(diagnosis.results)} probes in {diagnosis.seconds:.0f} s: {sound} work, {len(bad)} do not."
    found = changes(diagnosis)
    if found is None:
        yield f"Nothing is recorded yet for MNN on {diagnosis.backend} of {diagnosis.architecture}."
    elif found or found.version != diagnosis.mnn:
        yield found.describe()


def surroundings_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield versions, processor, devices and backends."""
    yield ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    memory = "unknown" if found["memory_bytes"] is None else f"{found['memory_bytes'] / 2**30:.1f} GiB"
    yield (
        f"{found['processor']}, {found['usable_cores']} of {found['cores']} cores, "
        f"{' '.join(found['instructions']) or 'no instruction sets of note'}; memory {memory}"
    )
    devices = ", ".join(
        f"{g['name']} ({g['memory_bytes'] / 2**30:.0f} GiB, driver {g['driver']})" for g in found["gpus"]
    )
    yield f"NVIDIA GPUs: {devices or 'none that NVML tells of'}"
    yield f"CUDA: {found['cuda_driver']}"
    yield f"MNN: {_present(found['mnn_backends'])}"
    providers = found["onnxruntime_providers"]
    yield f"ONNX Runtime: {'not installed' if providers is None else ', '.join(providers)}"
    torch = found["torch_cuda"]
    if torch is None:
        yield "torch: not installed"
    elif torch["version"] is None:
        yield "torch: a build without CUDA"
    else:
        yield f"torch: CUDA {torch['version']}, {'a device' if torch['available'] else 'no device'}"


def _present(backends: dict[str, bool] | None) -> str:
    if backends is None:
        return "not installed"
    there = [name for name, present in backends.items() if present]
    absent = [name for name, present in backends.items() if not present]
    return f"has {', '.join(there)}" + (f"; not {', '.join(absent)}" if absent else "")


def _asked(result: ProbeResult) -> str:
    settings = len(result.answers)
    bad = [name for name, answer in result.answers.items() if answer.outcome != "works"]
    detail = result.worst.detail
    where = f"; at {', '.join(bad)}" if settings > 1 and 0 < len(bad) < settings else ""
    return result.asks + where + (f": {detail}" if detail else "")


def _ratio(answer: Answer) -> str:
    return "" if answer.db is None else f"{answer.db:.1f}"


def _done(result: ProbeResult) -> str:
    if result.hazard is None:
        return "nothing: " + ", ".join(component.value for component in result.needed_by) + " need it"
    return result.avoided


_SMALL_CONSTANT: Final = 1024
"""Bytes below which constants are summed up in one line."""


def render_storage(storage: ModelStorage) -> Group:
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
