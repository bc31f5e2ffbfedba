"""`run`: prompts to audio."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sa3_convert.cli.options import BundleArgument, ThreadsOption
from sa3_convert.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(run)


def run(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.wav", help="Where to write the audio.")],
    prompt: Annotated[str | None, typer.Option(help="What to generate.")] = None,
    seconds: Annotated[float, typer.Option(help="Duration.")] = 10.0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; what suits the model when not given.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same start noise everywhere.")] = 0,
    sampler: Annotated[
        Literal["pingpong", "euler", "rk4", "dpmpp"] | None, typer.Option(help="What suits the model when not given.")
    ] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Guidance; 1 is none.")] = None,
    apg_scale: Annotated[float, typer.Option(help="Share of the guidance's parallel part that is removed.")] = 1.0,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance moves away from.")] = None,
    init_audio: Annotated[Path | None, typer.Option(metavar="FILE", help="Start from this audio.")] = None,
    init_noise_level: Annotated[float | None, typer.Option(help="How much of it is replaced by noise.")] = None,
    inpaint_audio: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep this audio but --inpaint.")] = None,
    inpaint: Annotated[
        list[str] | None, typer.Option(metavar="START:END", help="Seconds to generate anew; several times.")
    ] = None,
    engine: Annotated[Literal["mnn", "onnxruntime"], typer.Option(help="What runs the models.")] = "mnn",
    memory: Annotated[
        Literal["normal", "high", "low"], typer.Option(help="MNN: low keeps weights quantised in memory.")
    ] = "normal",
    sample_format: Annotated[
        Literal["pcm16", "pcm24", "float"], typer.Option("--format", help="How samples are stored.")
    ] = "pcm16",
    dither: Annotated[bool, typer.Option("--dither", help="Dither integer samples.")] = False,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="CHECK", help="Waive an output check: silence, clipping, …")
    ] = None,
    from_file: Annotated[
        Path | None, typer.Option("--from", metavar="FILE.json", help="Settings written by --json; replays them.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write settings and times.")] = None,
    threads: ThreadsOption = None,
) -> None:
    """Generate audio: from text, from audio, or anew within audio."""
    from sa3_convert.cli.generating import generate_to_file
    from sa3_convert.runtime.request import GenerateRequest

    settings: dict[str, Any] = {
        "seconds": seconds,
        "steps": steps,
        "seed": seed,
        "sampler": sampler,
        "cfg_scale": cfg_scale,
        "apg_scale": apg_scale,
        "negative_prompt": negative_prompt,
        "init_audio": init_audio,
        "init_noise_level": init_noise_level,
        "inpaint_audio": inpaint_audio,
        "inpaint": tuple(_region(text) for text in inpaint or ()),
    }
    if from_file is not None:
        if prompt is not None:
            raise UsageError("--from brings its own prompt and settings; leave --prompt away.")
        request = _replayed(from_file)
    elif prompt is None:
        raise UsageError('Give --prompt "what to generate", or --from FILE.json.')
    else:
        request = GenerateRequest(prompt=prompt, **settings)
    options: dict[str, Any] = {} if threads is None else {"threads": threads}
    if engine == "mnn":
        options["memory"] = memory
    generate_to_file(
        bundle,
        request,
        output,
        engine=engine,
        options=options,
        sample_format=sample_format,
        dither=dither,
        allow=tuple(allow or ()),
        json_file=json_file,
    )


def _region(text: str) -> tuple[float, float]:
    start, colon, end = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(start), float(end)
    except ValueError:
        raise UsageError(f"--inpaint {text!r} is no region; write START:END in seconds, such as 2.5:4.") from None


def _replayed(path: Path) -> Any:
    import json

    from sa3_convert.errors import InputError
    from sa3_convert.runtime.request import GenerateRequest

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        settings = data["request"]
        if not isinstance(settings, dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} cannot be read as the settings that `run --json` writes.") from None
    return GenerateRequest.from_json(settings)
