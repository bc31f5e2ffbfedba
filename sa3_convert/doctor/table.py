"""A diagnosis for the terminal."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from sa3_convert.doctor.known import changes
from sa3_convert.doctor.results import Answer, Diagnosis, ProbeResult

_STYLES = {"works": "green", "cpu": "yellow"}


def render(diagnosis: Diagnosis, *, everything: bool) -> Table:
    """Return one row per probe that does not just work, or per probe."""
    table = Table(title=f"MNN {diagnosis.mnn} on {diagnosis.backend}", title_justify="left")
    table.add_column("probe", no_wrap=True)
    table.add_column("asked")
    table.add_column("answer", no_wrap=True)
    table.add_column("dB", justify="right", no_wrap=True)
    table.add_column("what this tool does")
    for result in diagnosis.results:
        worst = result.worst
        if everything or worst.outcome != "works":
            style = _STYLES.get(worst.outcome, "red")
            table.add_row(result.probe, _asked(result), Text(worst.outcome, style), _ratio(worst), _done(result))
    return table


def summary(diagnosis: Diagnosis) -> Iterator[str]:
    """Yield what the table amounts to, a line each."""
    bad = diagnosis.defects()
    needed = [r.probe for r in diagnosis.results if r.needed_by and r.probe in bad]
    yield (
        f"{len(diagnosis.results)} probes in {diagnosis.seconds:.0f} s: {len(diagnosis.results) - len(bad)} work, "
        f"{len(bad)} do not; what the converted models need "
        + ("all works." if not needed else f"does not all work: {', '.join(needed)}.")
    )
    found = changes(diagnosis)
    if found is None:
        yield f"Nothing is recorded yet for MNN on {diagnosis.backend}."
    elif found or found.version != diagnosis.mnn:
        yield found.describe()


def surroundings_lines(found: dict[str, Any]) -> Iterator[str]:
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
