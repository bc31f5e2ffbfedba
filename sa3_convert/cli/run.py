"""`run`: prompts to audio."""

from pathlib import Path
from typing import Any

import typer

from sa3_convert.cli import options as o
from sa3_convert.cli import paths
from sa3_convert.cli.options import BundleArgument, LoraOption, ThreadsOption
from sa3_convert.errors import InputError, UsageError
from sa3_convert.system.streams import STANDARD_OUTPUT, is_stream
from sa3_convert.system.untrusted import read_json


def run(
    bundle: BundleArgument,
    context: typer.Context,
    output: o.OutputOption = None,
    prompt: o.PromptOption = None,
    seconds: o.SecondsOption = None,
    steps: o.StepsOption = None,
    seed: o.SeedOption = None,
    sampler: o.SamplerOption = None,
    cfg_scale: o.CfgScaleOption = None,
    apg_scale: o.ApgScaleOption = None,
    negative_prompt: o.NegativePromptOption = None,
    init_audio: o.InitAudioOption = None,
    init_noise_level: o.InitNoiseOption = None,
    inpaint_audio: o.InpaintAudioOption = None,
    inpaint: o.InpaintOption = None,
    batch: o.BatchOption = None,
    stream: o.StreamOption = False,
    keep_loaded: o.KeepLoadedOption = False,
    engine: o.EngineOption = "mnn",
    checkpoint: o.CheckpointOption = None,
    lora: LoraOption = None,
    memory: o.MemoryOption = "normal",
    precision: o.PrecisionOption = "high",
    backend: o.BackendOption = "cpu",
    place: o.PlaceOption = None,
    split_dit: o.SplitOption = False,
    sample_format: o.FormatOption = "pcm16",
    dither: o.DitherOption = False,
    allow: o.AllowOption = None,
    from_file: o.FromOption = None,
    json_file: o.SideFileOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Generate audio: from text, from audio, or anew within audio."""
    given: dict[str, Any] = {
        "prompt": prompt,
        "seconds": seconds,
        "steps": steps,
        "seed": seed,
        "sampler": sampler,
        "cfg_scale": cfg_scale,
        "apg_scale": apg_scale,
        "negative_prompt": negative_prompt,
        "init_audio": None if init_audio is None else str(init_audio),
        "init_noise_level": init_noise_level,
        "inpaint_audio": None if inpaint_audio is None else str(inpaint_audio),
        "inpaint": [_region(text) for text in inpaint] if inpaint else None,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    _check_mode(output, batch, stream, keep_loaded, from_file, json_file)
    output = output or STANDARD_OUTPUT
    if batch is None:
        paths.writes_as(context, "--output", output)

    from sa3_convert.cli.generate import Target, generate_batch, generate_one

    options: dict[str, Any] = {} if threads is None else {"threads": threads}
    if engine == "mnn":
        from sa3_convert.cli.generate import placed

        places = placed(backend, precision, memory, place or ())
        options |= {
            "memory": memory,
            "precision": precision,
            "backend": backend,
            "places": places,
            "split": split_dit,
        }
    elif (memory, precision, split_dit) != ("normal", "high", False) or place:
        raise UsageError("--memory, --precision, --place and --split-dit are settings of --engine mnn.")
    elif backend in ("cpu", "cuda"):
        options |= {"backend": backend}
    else:
        raise UsageError(f"--device {backend} is for --engine mnn; --engine {engine} runs on cpu or cuda.")
    if (engine == "torch") != (checkpoint is not None):
        raise UsageError("--engine torch and --checkpoint DIR belong together.")
    if lora and engine != "torch":
        raise UsageError("A bundle has its LoRAs in its weights (`convert --lora`); --lora is for --engine torch.")
    if checkpoint is not None:
        options |= {"checkpoint": checkpoint, "loras": tuple(lora or ())}
    target = Target(bundle, engine, options, output, sample_format, dither, tuple(allow or ()), json_file)
    if batch is not None:
        generate_batch(target, batch, settings, keep_loaded=keep_loaded, reads=paths.reads_as(context, ()))
    else:
        request, origin = _request(settings, from_file)
        paths.reads_as(context, ((f"--from {from_file}:", path) for path in request.audio_files()))
        generate_one(target, request, stream=stream, origin=origin)


def _check_mode(
    output: Path | None,
    batch: Path | None,
    stream: bool,
    keep_loaded: bool,
    from_file: Path | None,
    json_file: Path | None,
) -> None:
    """Refuse options that contradict each other."""
    if batch is not None:
        if output is None or is_stream(output) or output.is_file():
            raise UsageError("--batch writes several files; name their folder with -o DIR.")
        clash = [
            name for name, is_given in (("--stream", stream), ("--from", from_file), ("--json", json_file)) if is_given
        ]
        if clash:
            raise UsageError(f"{clash[0]} is for one generation; --batch keeps settings and times in results.jsonl.")
    elif keep_loaded:
        raise UsageError("--keep-loaded is for --batch; one generation uses each model once.")
    elif output is None and not stream:
        raise UsageError("Say where to write with -o FILE.wav, or give --stream to write samples to standard output.")


def _region(text: str) -> list[float]:
    start, colon, end = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return [float(start), float(end)]
    except ValueError:
        raise UsageError(f"--inpaint {text!r} is no region; write START:END in seconds, such as 2.5:4.") from None


def _request(settings: dict[str, Any], from_file: Path | None) -> tuple[Any, dict[str, Any]]:
    """Return the request that the options, or a file of `--json`, describe, and what that file tells beside it."""
    from sa3_convert.runtime.request import GenerateRequest

    if from_file is None:
        if "prompt" not in settings:
            raise UsageError('Give --prompt "what to generate", --from FILE.json, or --batch FILE.jsonl.')
        return GenerateRequest.from_json(settings), {}
    if settings:
        name = next(iter(settings)).replace("_", "-")
        raise UsageError(f"--from brings its own prompt and settings; leave --{name} away.")
    unread = f"{from_file} cannot be read as the settings that `run --json` writes"
    try:
        origin = read_json(from_file)
    except OSError as error:
        raise InputError(f"{unread}: {error.strerror or error}.") from None
    except ValueError as error:
        raise InputError(f"{unread}: {error}.") from None
    if not isinstance(origin, dict) or not isinstance(found := origin.pop("request", None), dict):
        raise InputError(f"{unread}: it has no request.")
    for name, kind in (("variant", str), ("models", dict)):
        if not isinstance(origin.get(name, kind()), kind):
            raise InputError(f"{unread}: {name} is of another kind.")
    return GenerateRequest.from_json(found), origin
