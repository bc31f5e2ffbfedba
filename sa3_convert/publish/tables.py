"""Tables of a card: how fast, how close and how stored. What nobody measured is left out, and so is an empty table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sa3_convert.bundle.manifest import RIGHT_IN_HALF_DB, Artifact, Manifest, Name
from sa3_convert.bundle.table import Bench, BenchRow, Count, Machine, markdown_code
from sa3_convert.check.metrics import MAX_DB
from sa3_convert.components import Component, slots
from sa3_convert.errors import BundleError
from sa3_convert.publish.measured import Distribution, EndToEnd, Report, ReportedModel, SelfTest

Lines = list[str]


def models_of(manifest: Manifest) -> dict[Component, Artifact]:
    """Return a bundle's models for MNN."""
    return {a.component: a for a in manifest.artifacts if a.kind == "mnn" and a.component is not None}


def table(header: Sequence[str], rows: Iterable[Sequence[str | None]]) -> Lines:
    """Return a table without the columns that have no figure; nothing if it has no rows. None is not known."""
    known = [list(row) for row in rows]
    kept = [i for i in range(len(header)) if any(row[i] is not None for row in known)]
    if not known or not kept:
        return []
    shown = [[header[i] for i in kept], ["---"] * len(kept)]
    shown += [["–" if row[i] is None else str(row[i]) for i in kept] for row in known]
    return [*(f"| {' | '.join(row)} |" for row in shown), ""]


def side_by_side(header: str, columns: Mapping[str, Mapping[str, str | None]]) -> Lines:
    """Return a table with a column for each bundle and a row for each fact that one of them has."""
    facts = dict.fromkeys(fact for column in columns.values() for fact in column)
    rows = [[fact, *(column.get(fact) for column in columns.values())] for fact in facts]
    return table([header, *columns], [row for row in rows if any(cell is not None for cell in row[1:])])


_SLOTTED: Final = (
    "They are run in place of those without, and take LoRAs as two more inputs: other ones, or other strengths, "
    "in every step, with nothing loaded anew. `sa3-convert run … --adapter FILE:0.8` does; `contract.json` tells "
    "apps where the numbers of each layer go, and how they follow from a file's. Ratios are the worst with "
    "nothing in the slots and with two kinds of adapters."
)
"""What a card says below the models that take LoRAs."""


def adapters(manifest: Manifest) -> Lines:
    """Return the models that take LoRAs as inputs, and how they are used."""
    header = ["file", "rank", "layers", "size", "stored as", "worst ratio"]
    rows: list[list[str | None]] = []
    for one in manifest.artifacts:
        if one.component is not None and one.rank is not None and one.kept_at is None:
            bytes_of = size(one.total_bytes)
            ratio = None if one.fidelity is None else _db(one.fidelity.signal_to_noise_db)
            layers = str(len(slots(one.component, manifest.layout)))
            rows.append([markdown_code(one.path), str(one.rank), layers, bytes_of, one.precision, ratio])
    return [*table(header, rows), _SLOTTED, ""] if rows else []


def speed(bench: Bench) -> Lines:
    """Return the times of generations with the models kept, and what they were measured on."""
    lines = _times(bench.rows)
    engines = {row.engine for row in bench.rows}
    threads = {str(one.threads) for name, one in bench.engines.items() if name in engines and one.threads is not None}
    facts = _measured_on(bench.machine, engines) | {
        "threads": ", ".join(sorted(threads)) or None,
        "generations of each": str(bench.repeats),
        "denoising steps": None if bench.steps is None else str(bench.steps),
    }
    return [*lines, *side_by_side("measured on", {"": facts})] if lines else []


def _times(rows: Sequence[BenchRow]) -> Lines:
    stages = ("text_encoder", "number_conditioner", "dit", "decoder", "other", "total")
    header = ["audio", "engine", "text encoder", "number conditioner", "DiT", "decoder", "other", "total"]

    def cells(row: BenchRow) -> list[str | None]:
        times = [f"{getattr(row.seconds, stage):.3f} s" for stage in stages]
        memory = (None if count is None else mib(count, 0) for count in (row.peak_bytes, row.device_bytes))
        return [f"{row.duration:g} s", markdown_code(row.engine), *times, f"{row.real_time_factor:.2f}", *memory]

    warm = [row for row in rows if row.temperature == "warm"]
    lines = table([*header, "real-time factor", "peak memory", "of the GPU"], map(cells, warm))
    what = "The median of generations with the models loaded. The real-time factor is seconds of audio per second of "
    what += "work; memory is that of a process that loads one model at a time."
    return [*lines, what, ""] if lines else []


def _measured_on(machine: Machine, engines: Iterable[str]) -> dict[str, str | None]:
    versions = {name: machine.versions.get(name) for name in ("MNN", "onnxruntime", "torch")}
    needed = ["MNN", *(name for name in ("onnxruntime", "torch") if any(e.startswith(name) for e in engines))]
    return {
        "processor": None if machine.processor is None else markdown_code(machine.processor),
        "instructions": ", ".join(map(markdown_code, machine.instructions)) or None,
        "processors used": None if machine.usable_cores is None else str(machine.usable_cores),
        "memory": None if machine.memory_bytes is None else mib(machine.memory_bytes, 0),
        "system": None if machine.system is None else markdown_code(machine.system),
        "versions": ", ".join(f"{n} {markdown_code(versions[n] or '')}" for n in needed if versions[n]) or None,
    }


def selftest(found: SelfTest) -> Lines:
    """Return what engines did on a device, and first that it was with other weights than a card's models have."""
    verdict = "passed" if found.all_pass else "**failed**"
    shape = "the true shapes" if found.size == "full" else "a toy's shapes"
    intro = (
        f"`sa3-convert selftest` on `{found.device}` {verdict}. It tells about engines and devices: its models have "
    )
    intro += f"random weights in {shape} of {markdown_code(found.variant)}, and none of them is a model of this card."
    judged: dict[str, dict[str, str]] = {}
    for one in found.findings:
        known = [db for db in (one.db, one.again_db) if db is not None]
        judged.setdefault(one.engine, {})[one.what] = f"{_db(min(known)) if known else 'failed'}"
    parts = tuple(dict.fromkeys(one.what for one in found.findings))
    golden: dict[str, dict[str, str]] = {}
    for case in found.golden:
        golden.setdefault(case.what, {})[case.engine] = "failed" if case.of_peak is None else f"{case.of_peak:.1e}"
    engines = tuple(dict.fromkeys(case.engine for case in found.golden))
    cuda = found.device == "cuda"
    facts = _measured_on(found.surroundings, {row.engine for row in found.rows}) | {
        "GPU": markdown_code(found.surroundings.cuda_driver) if cuda else None,
        "driver": ", ".join(markdown_code(gpu.driver) for gpu in found.surroundings.gpus) or None if cuda else None,
        "not there": ", ".join(map(markdown_code, found.absent)) or None,
    }
    fidelity_rows = [[markdown_code(name), *(cells.get(part) for part in parts)] for name, cells in judged.items()]
    golden_rows = [[markdown_code(what), *(cells.get(name) for name in engines)] for what, cells in golden.items()]
    lines = [intro, "", *_times(found.rows)]
    if judged:
        lines += ["Signal-to-noise ratio against float32 on the CPU, the worse of two runs:", ""]
        lines += table(["engine", *map(markdown_code, parts)], fidelity_rows)
    if golden:
        lines += ["Largest difference from what the reference implementation gave for a toy, in parts of its peak:", ""]
        lines += table(["case", *map(markdown_code, engines)], golden_rows)
    return [*lines, *side_by_side("measured on", {"": facts})]


def fidelity(manifest: Manifest, report: Report | None) -> Lines:
    """Return how close models are: what a report says of them, else what their conversion measured."""
    told = {model.component: model for model in report.models} if report is not None else {}
    header = ["component", "inputs", "worst", "5 % are below", "mean", "floor", "worst cosine", "in half precision"]
    rows = [_closeness(artifact, told.get(component)) for component, artifact in models_of(manifest).items()]
    # Without any figure there is nothing to say but the floors.
    lines = table(header, [row for row in rows if row[2] is not None])
    if not lines:
        return []
    by = "`verify` on sampled inputs" if told else "the conversion on its own inputs"
    intro = f"Signal-to-noise ratio of each model's output against its fp32 reference in ONNX Runtime, by {by}."
    intro += (
        f" In half precision: what half inputs and half arithmetic alone leave, emulated; from {RIGHT_IN_HALF_DB:g}"
    )
    lines = [f"{intro} dB on a model may run with MNN's low precision.", "", *lines]
    if report is None:
        return lines
    failed = [model.component.value for model in report.models if not model.passed]
    lines += ["**This verification failed.**" + (f" Too far off: {', '.join(failed)}." if failed else ""), ""] * (
        not report.passed
    )
    return [*lines, *_generations(report.of_generations), *([] if report.heard is None else _end_to_end(report.heard))]


def _closeness(artifact: Artifact, model: ReportedModel | None) -> list[str | None]:
    component = artifact.component
    assert component is not None
    floor, half = _known_db(artifact.floor_db), _known_db(artifact.half_db)
    if model is not None:
        spread = model.spread
        ratios = [_db(spread.worst), _db(spread.percentile_5), _db(spread.mean)]
        return [component.value, str(spread.count), *ratios, floor, f"{model.worst.cosine:.5f}", half]
    known = artifact.fidelity
    worst, cosine = (None, None) if known is None else (_db(known.signal_to_noise_db), f"{known.cosine:.5f}")
    return [component.value, None, worst, None, None, floor, cosine, half]


def _generations(found: Sequence[Distribution]) -> Lines:
    header = ["over whole generations", "comparisons", "worst", "5 % are below", "mean"]
    rows = [
        [markdown_code(d.name), str(d.spread.count), *map(_db, (d.spread.worst, d.spread.percentile_5, d.spread.mean))]
        for d in found
    ]
    stepped = [d for d in found if d.by_step]
    steps = sorted({step.step for d in stepped for step in d.by_step})
    cells = [{s.step: f"{_db(s.worst)} / {_db(s.mean)}" for s in d.by_step} for d in stepped]
    names = [f"{markdown_code(d.name)}, worst / mean" for d in stepped]
    return [
        *table(header, rows),
        *table(["denoising step", *names], [[str(step), *(cell.get(step) for cell in cells)] for step in steps]),
    ]


def _end_to_end(found: EndToEnd) -> Lines:
    header = ["prompt", "spectral distance", "its chaos floor", "cosine of latents", "its chaos floor"]
    header += ["loudness", "correlation of envelopes"]
    rows = [
        [
            markdown_code(case.prompt) if case.prompt else "no prompt",
            f"{case.target.audio.mean_spectral_distance_db:.2f} dB",
            f"{case.chaos.audio.mean_spectral_distance_db:.2f} dB",
            f"{case.target.latent_cosine:.5f}",
            f"{case.chaos.latent_cosine:.5f}",
            f"{case.target.audio.loudness_db:+z.2f} dB",
            f"{case.target.audio.envelope_correlation:.4f}",
        ]
        for case in found.cases
    ]
    return [
        "From prompt to audio, against the reference's audio. The chaos floor is what the reference itself does when "
        f"its noise is nudged by {found.nudge:g}: over all generations the spectra of these models are "
        f"{found.chaos_ratio:.2f} times as far away as the nudged reference's.",
        "",
        *table(header, rows),
    ]


class _Scheme(BaseModel):
    """Weights that are stored in one way, as the audit of a file found them."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: Name
    symmetric: bool | None
    block_size: Count | None
    scale_type: Name | None
    layers: Count
    elements: Count
    bytes: Count


class _Storage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    weights: tuple[_Scheme, ...] = Field(default=(), max_length=1000)


def storage(manifest: Manifest) -> Lines:
    """Return how weights are stored, and what the bytes of each file are, as its audit read them."""
    models = {component: a for component, a in models_of(manifest).items() if a.storage is not None}
    totals = {component: a.storage["types"] for component, a in models.items() if a.storage is not None}
    kinds = sorted({kind for types in totals.values() for kind in types})
    sizes = [
        [
            component.value,
            *(size(totals[component][kind]["bytes"]) if kind in totals[component] else None for kind in kinds),
            size(artifact.total_bytes),
        ]
        for component, artifact in models.items()
    ]
    schemes = [_scheme(component, scheme) for component, a in models.items() for scheme in _schemes(component, a)]
    header = ["component", "weights", "block", "scales", "layers", "values", "bytes"]
    lines = [*table(header, schemes), *table(["component", *map(markdown_code, kinds), "file"], sizes)]
    return ["Read back from the files, not from the recipe.", "", *lines] if lines else []


def _schemes(component: Component, artifact: Artifact) -> tuple[_Scheme, ...]:
    try:
        return _Storage.model_validate(artifact.storage, strict=False).weights
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise BundleError(f"The manifest's account of {component.value}'s storage is damaged: {why}.") from None


def _scheme(component: Component, scheme: _Scheme) -> list[str | None]:
    kind = {True: ", symmetric", False: ", asymmetric", None: ""}[scheme.symmetric]
    block = None if scheme.scale_type is None else "channel" if scheme.block_size is None else str(scheme.block_size)
    counts = str(scheme.layers), str(scheme.elements), size(scheme.bytes)
    return [component.value, f"{scheme.type}{kind}", block, scheme.scale_type, *counts]


def mib(count: int, digits: int = 1) -> str:
    """Return a number of bytes in MiB."""
    return f"{count / 2**20:.{digits}f} MiB"


def size(count: int) -> str:
    """Return a number of bytes."""
    return mib(count) if count >= 2**20 else f"{count} bytes"


def _db(ratio: float) -> str:
    return "∞" if ratio >= MAX_DB else f"{ratio:z.1f} dB"


def _known_db(ratio: float | None) -> str | None:
    return None if ratio is None or ratio <= -MAX_DB else _db(ratio)
