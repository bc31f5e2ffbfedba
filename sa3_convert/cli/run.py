"""`run`: prompts to audio."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Context, Option

from sa3_convert.cli import options as o
from sa3_convert.cli import paths
from sa3_convert.errors import InputError, UsageError
from sa3_convert.system.streams import STANDARD_OUTPUT, is_stream
from sa3_convert.system.untrusted import read_json

_SETTINGS = (
    "prompt", "seconds", "steps", "seed", "sampler", "cfg_scale", "apg_scale", "negative_prompt", "init_audio",
    "init_noise_level", "inpaint_audio", "inpaint",
)  # fmt: skip
"""Options that are settings of a request, by its names."""

_guidance, _audio = o.panel("Guidance"), o.panel("From audio")
_many, _files = o.panel("Batches and streams"), o.panel("Files and checks")

OutputOption = Annotated[
    Path | None,
    Option(
        "-o",
        "--output",
        metavar="FILE.wav",
        help="Where to write the audio; with --batch a folder; - is standard output.",
    ),
]
PromptOption = Annotated[str | None, Option(help="What to generate.")]
SecondsOption = Annotated[float | None, Option(help="Duration; 10 when not given.")]
StepsOption = Annotated[int | None, Option(help="Denoising steps; what suits the model when not given.")]
SeedOption = Annotated[
    int | None, Option(help="The same seed gives the same start noise everywhere; 0 when not given.")
]
SamplerOption = Annotated[
    Literal["pingpong", "euler", "rk4", "dpmpp"] | None, Option(help="What suits the model when not given.")
]
CfgScaleOption = Annotated[float | None, _guidance(help="Guidance; 1 is none.")]
ApgScaleOption = Annotated[
    float | None, _guidance(help="Share of the guidance's parallel part that is removed; 1 when not given.")
]
NegativePromptOption = Annotated[str | None, _guidance(help="What guidance moves away from.")]
InitAudioOption = Annotated[Path | None, _audio(metavar="FILE", help="Start from this audio.", callback=paths.reads)]
InitNoiseOption = Annotated[float | None, _audio(help="How much of it is replaced by noise; 0.9 when not given.")]
InpaintAudioOption = Annotated[
    Path | None, _audio(metavar="FILE", help="Keep this audio but --inpaint.", callback=paths.reads)
]
InpaintOption = Annotated[
    list[str] | None, _audio(metavar="START:END", help="Seconds to generate anew; several times.")
]
BatchOption = Annotated[
    Path | None,
    _many(
        metavar="FILE.jsonl",
        help="One generation per line, a JSON object of settings (prompt, seconds, seed, …, output); other options are "
        "the defaults. What an interrupted run has done is not done again.",
        callback=paths.reads,
    ),
]
StreamOption = Annotated[
    bool,
    _many(
        "--stream",
        help="Hand audio on while it is decoded: raw samples to standard output, or with -o a WAV that can be read "
        "while it grows, under a name that is told first.",
    ),
]
KeepLoadedOption = Annotated[
    bool, _many("--keep-loaded", help="With --batch: keep all models in memory from one line to the next.")
]
EngineOption = Annotated[
    Literal["mnn", "onnxruntime", "onnxruntime-int8", "torch"],
    o.runtime(help="What runs the models; onnxruntime-int8 needs `convert --with-ort-int8`, torch needs --checkpoint."),
]
CheckpointOption = Annotated[
    Path | None,
    o.runtime(metavar="DIR", help="For --engine torch: what the bundle was made from.", callback=paths.opens),
]
SplitOption = Annotated[
    bool,
    o.runtime(
        "--split-dit", help="MNN: compute once what stays the same in all steps; needs `convert --with-split-dit`."
    ),
]
PlaceOption = Annotated[
    list[str] | None,
    o.runtime(metavar="COMPONENT=DEVICE", help="MNN: run this component there, whatever the probes say."),
]
FormatOption = Annotated[Literal["pcm16", "pcm24", "float"], _files("--format", help="How samples are stored.")]
DitherOption = Annotated[bool, _files("--dither", help="Dither integer samples.")]
AllowOption = Annotated[
    list[str] | None, _files(metavar="CHECK", help="Waive an output check: silence, clipping, … (several times).")
]
FromOption = Annotated[
    Path | None,
    Option("--from", metavar="FILE.json", help="Settings written by --json; replays them.", callback=paths.reads),
]


def run(
    bundle: o.BundleArgument,
    context: Context,
    output: OutputOption = None,
    prompt: PromptOption = None,
    seconds: SecondsOption = None,
    steps: StepsOption = None,
    seed: SeedOption = None,
    sampler: SamplerOption = None,
    cfg_scale: CfgScaleOption = None,
    apg_scale: ApgScaleOption = None,
    negative_prompt: NegativePromptOption = None,
    init_audio: InitAudioOption = None,
    init_noise_level: InitNoiseOption = None,
    inpaint_audio: InpaintAudioOption = None,
    inpaint: InpaintOption = None,
    batch: BatchOption = None,
    stream: StreamOption = False,
    keep_loaded: KeepLoadedOption = False,
    engine: EngineOption = "mnn",
    checkpoint: CheckpointOption = None,
    lora: o.LoraOption = None,
    memory: o.MemoryOption = "normal",
    precision: o.PrecisionOption = "high",
    backend: o.BackendOption = "cpu",
    place: PlaceOption = None,
    split_dit: SplitOption = False,
    sample_format: FormatOption = "pcm16",
    dither: DitherOption = False,
    allow: AllowOption = None,
    from_file: FromOption = None,
    json_file: o.JsonOption = None,
    threads: o.ThreadsOption = None,
) -> None:
    """Generate audio: from text, from audio, or anew within audio."""
    given = {name: value for name in _SETTINGS if (value := context.params[name]) not in (None, [], ())}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    if inpaint:
        settings["inpaint"] = [_region(text) for text in inpaint]
    _check_mode(output, batch, stream, keep_loaded, from_file, json_file)
    output = output or STANDARD_OUTPUT
    if batch is None:
        paths.writes_as(context, "--output", output)
    if (engine == "torch") != (checkpoint is not None):
        raise UsageError("--engine torch and --checkpoint DIR belong together.")
    if lora and engine != "torch":
        raise UsageError("A bundle has its LoRAs in its weights (`convert --lora`); --lora is for --engine torch.")

    from sa3_convert.cli.generate import Target, generate_batch, generate_one

    options = _engine_options(engine, backend, memory, precision, place or (), split_dit)
    options |= {} if threads is None else {"threads": threads}
    options |= {} if checkpoint is None else {"checkpoint": checkpoint, "loras": tuple(lora or ())}
    target = Target(bundle, engine, options, output, sample_format, dither, tuple(allow or ()), json_file)
    if batch is not None:
        generate_batch(target, batch, settings, keep_loaded=keep_loaded, reads=paths.reads_as(context, ()))
    else:
        request, origin = _request(settings, from_file)
        paths.reads_as(context, ((f"--from {from_file}:", path) for path in request.audio_files()))
        generate_one(target, request, stream=stream, origin=origin)


def _engine_options(
    engine: str, backend: o.Device, memory: o.Level, precision: o.Level, place: Sequence[str], split: bool
) -> dict[str, Any]:
    """Return what an engine is opened with; places are told."""
    if engine == "mnn":
        from sa3_convert.cli.generate import placed

        where = placed(backend, precision, memory, place, split=split)
        return {"memory": memory, "precision": precision, "backend": backend, "split": split, **where}
    if (memory, precision, split) != ("normal", "high", False) or place:
        raise UsageError("--memory, --precision, --place and --split-dit are settings of --engine mnn.")
    if backend not in ("cpu", "cuda"):
        raise UsageError(f"--device {backend} is for --engine mnn; --engine {engine} runs on cpu or cuda.")
    return {"backend": backend}


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
