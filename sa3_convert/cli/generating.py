"""What `run` does: drive the pipeline, show where it is, write the file when it is whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sa3_convert.bundle.manifest import Bundle
from sa3_convert.cli.console import stderr, stdout
from sa3_convert.files import write_text
from sa3_convert.runtime.audio import SampleFormat, audio_writer, check_output_path
from sa3_convert.runtime.engines import EngineName
from sa3_convert.runtime.events import AudioChunk, Report, Started, Stepped
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest

_STAGES = {"text": "reading the prompt", "encode": "encoding audio", "denoise": "denoising", "decode": "decoding"}


def generate_to_file(
    bundle: Path,
    request: GenerateRequest,
    output: Path,
    *,
    engine: EngineName,
    options: Mapping[str, Any],
    sample_format: SampleFormat,
    dither: bool,
    allow: tuple[str, ...],
    json_file: Path | None,
) -> None:
    """Generate one piece into `output`; the file appears when it is whole and has passed its checks."""
    check_output_path(output, sample_format)
    with Pipeline.from_bundle(bundle, engine, **options) as pipeline:
        manifest = Bundle.open(bundle).manifest
        rate = pipeline.layout.sample_rate
        metadata = {
            "request": request.to_json(),
            "variant": manifest.variant,
            "recipe": manifest.recipe,
            "models": {a.component.value: a.sha256 for a in manifest.artifacts if a.component and a.kind == "mnn"},
        }
        report: Report | None = None
        peak = 0.0
        with (
            audio_writer(output, rate, sample_format=sample_format, dither=dither, metadata=metadata) as writer,
            _progress() as progress,
        ):
            task = progress.add_task("starting", total=None)
            for event in pipeline.stream(request, allow=allow):
                if isinstance(event, Started):
                    progress.update(task, description=_STAGES[event.stage], total=None, completed=0)
                elif isinstance(event, Stepped):
                    progress.update(task, total=event.steps, advance=1)
                elif isinstance(event, AudioChunk):
                    writer.write(event.samples)
                    peak = max(peak, float(np.abs(event.samples).max(initial=0.0)))
                else:
                    report = event
    assert report is not None
    for warning in report.warnings:
        stderr.print(f"Note: {warning}")
    if json_file is not None:
        data = metadata | {
            "request": report.request.to_json(),
            "engine": dict(report.engine),
            "seconds": dict(report.seconds),
        }
        write_text(json_file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    total = sum(report.seconds.values())
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    length = report.lengths.samples / rate
    stdout.print(
        f"{output}: {length:.2f} s of audio at {rate} Hz, peak {peak:.3f}, seed {report.request.seed}, "
        f"{report.request.steps} {report.request.sampler} steps\n"
        f"in {total:.1f} s ({stages}), {length / total:.2f} × real time, on {_described(report.engine)}",
        soft_wrap=True,
    )


def _described(engine: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in engine.items())


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TextColumn("{task.completed}"), TimeRemainingColumn())
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
