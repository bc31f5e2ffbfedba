"""`run`: prompts to audio."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from typer import Context, Option

from sa3_convert.cli import options as o
from sa3_convert.cli import paths
from sa3_convert.cli.settings import OPTIONS, Wanted, given, in_words_of, variations_of, wanted
from sa3_convert.errors import UsageError
from sa3_convert.system.streams import STANDARD_OUTPUT, is_stream

if TYPE_CHECKING:
    from sa3_convert.cli.generate import Target

_guidance, _schedule, _audio = o.panel("Guidance"), o.panel("Schedule"), o.panel("From audio")
_loop = o.panel("Loops")
_many, _files = o.panel("Batches and streams"), o.panel("Files and checks")

OutputOption = Annotated[
    Path | None,
    Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Where to write the audio: .wav, .flac, .ogg or .mp3; with --batch a folder; - is standard output.",
    ),
]
PromptOption = Annotated[str | None, Option(help="What to generate.")]
SecondsOption = Annotated[
    float | None, Option(help="Duration; that of the given audio when not given, and 10 without any.")
]
BpmOption = Annotated[float | None, _loop(help="Beats per minute of a loop; the prompt is to say them, too.")]
BarsOption = Annotated[
    int | None, _loop(help="Make a loop of so many bars, whose end leads into its beginning, instead of --seconds.")
]
BeatsPerBarOption = Annotated[int | None, _loop(help="4 when not given.")]
StepsOption = Annotated[int | None, Option(help="Denoising steps; what suits the model when not given.")]
SeedOption = Annotated[
    str | None,
    Option(
        metavar="NUMBER|random",
        help="The same seed gives the same start noise everywhere; 0 when not given. A random one is told, and kept.",
    ),
]
VariationsOption = Annotated[
    int | None,
    _many(
        "-n",
        "--variations",
        min=1,
        max=1000,
        help="So many pieces with seeds that follow one another: pad-1.wav, pad-2.wav, … of -o pad.wav.",
    ),
]
PeakOption = Annotated[
    Literal["limit", "attenuate", "clip"] | None,
    _files(help="What becomes of peaks beyond full scale; limit when not given, as the reference does on devices."),
]
LoudnessOption = Annotated[
    float | None, _files(metavar="LUFS", help="Bring the whole to a loudness, such as -14; needs the extra `audio`.")
]
PlayOption = Annotated[
    bool, _files("--play", help="Play what was made, where there is a loudspeaker; needs the extra `audio`.")
]
ForceOption = Annotated[
    bool, _files("--force", help="Replace files that exist; without it only what the same settings made.")
]
SamplerOption = Annotated[
    Literal["pingpong", "euler", "rk4", "dpmpp"] | None, Option(help="What suits the model when not given.")
]
CfgScaleOption = Annotated[float | None, _guidance(help="Guidance; 1 is none.")]
ApgScaleOption = Annotated[
    float | None, _guidance(help="Share of the guidance's parallel part that is removed; 1 when not given.")
]
CfgIntervalOption = Annotated[
    str | None,
    _guidance(metavar="LOW:HIGH", help="Noise levels, 0 to 1, at which there is guidance; all when not given."),
]
CfgRescaleOption = Annotated[
    float | None, _guidance(help="0 to 1: how far the deviation that guidance adds is taken back; 0 when not given.")
]
CfgNormOption = Annotated[
    float | None, _guidance(help="Longest norm of what guidance adds, before --apg-scale; 0, no bound, when not given.")
]
NegativePromptOption = Annotated[str | None, _guidance(help="What guidance moves away from.")]
DistShiftOption = Annotated[
    str | None,
    _schedule(
        metavar="TYPE[:NAME=NUMBER,…]",
        help="How noise levels are spaced: logsnr, flux, full or none; the checkpoint's own when not given.",
    ),
]
DurationPaddingOption = Annotated[
    float | None, _schedule(help="Seconds that are generated beyond the duration and not heard; 6 when not given.")
]
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
    Literal["auto", "mnn", "onnxruntime", "onnxruntime-int8", "onnxruntime-fp16", "torch"],
    o.runtime(
        help="What runs the models. auto is the fastest that the bundle, this machine and the other options have, and "
        "is told; onnxruntime-int8 needs `convert --with-ort-int8`, onnxruntime-fp16 `--with-onnx fp16`, torch a "
        "checkpoint."
    ),
]
CheckpointOption = Annotated[
    Path | None,
    o.runtime(
        metavar="DIR",
        help="For --engine torch: what the bundle was made from, unless that is BUNDLE.",
        callback=paths.opens,
    ),
]
SplitOption = Annotated[
    bool,
    o.runtime(
        "--split-dit", help="MNN: compute once what all steps share; needs `convert --with-split-dit`, no --adapter."
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
    Option(
        "--from",
        metavar="FILE",
        help="Replay the settings that --json wrote, or those in audio that was made here; options override them.",
        callback=paths.reads,
    ),
]

AdapterOption = Annotated[
    list[str] | None,
    Option(
        "--adapter",
        metavar="FILE[:STRENGTH][@LOW-HIGH]",
        help="Apply a LoRA, at noise levels LOW to HIGH if given (several times); needs `convert --adapter-slots`.",
        callback=paths.reads,
    ),
]


USUAL: Mapping[str, Any] = {"memory": "normal", "precision": "high", "split_dit": False, "place": None}
"""Options that not every engine has, and what they are when nobody sets them."""
_ENGINES_NAMES = {"split_dit": "split", "place": "places"}
"""What engines call them, where that is something else."""


def run(
    bundle: o.BundleArgument,
    context: Context,
    output: OutputOption = None,
    prompt: PromptOption = None,
    seconds: SecondsOption = None,
    steps: StepsOption = None,
    seed: SeedOption = None,
    sampler: SamplerOption = None,
    bpm: BpmOption = None,
    bars: BarsOption = None,
    beats_per_bar: BeatsPerBarOption = None,
    cfg_scale: CfgScaleOption = None,
    apg_scale: ApgScaleOption = None,
    cfg_interval: CfgIntervalOption = None,
    cfg_rescale: CfgRescaleOption = None,
    cfg_norm_threshold: CfgNormOption = None,
    negative_prompt: NegativePromptOption = None,
    dist_shift: DistShiftOption = None,
    duration_padding: DurationPaddingOption = None,
    init_audio: InitAudioOption = None,
    init_noise_level: InitNoiseOption = None,
    inpaint_audio: InpaintAudioOption = None,
    inpaint: InpaintOption = None,
    batch: BatchOption = None,
    stream: StreamOption = False,
    keep_loaded: KeepLoadedOption = False,
    workers: o.WorkersOption = None,
    scheduler: o.SchedulerOption = None,
    variations: VariationsOption = None,
    engine: EngineOption = "auto",
    checkpoint: CheckpointOption = None,
    lora: o.LoraOption = None,
    adapters: AdapterOption = None,
    memory: o.MemoryOption = "normal",
    precision: o.PrecisionOption = "high",
    backend: o.BackendOption = "cpu",
    place: PlaceOption = None,
    split_dit: SplitOption = False,
    sample_format: FormatOption = "pcm16",
    dither: DitherOption = False,
    allow: AllowOption = None,
    peak: PeakOption = None,
    loudness: LoudnessOption = None,
    play: PlayOption = False,
    force: ForceOption = False,
    from_file: FromOption = None,
    offline: o.OfflineOption = False,
    json_file: o.JsonOption = None,
    threads: o.ThreadsOption = None,
) -> None:
    """Generate audio: from text, from audio, or anew within audio."""
    _check_mode(context.params)
    target = _target(context.params)
    if batch:
        _generate_batch(context, target)
    else:
        _generate_one(context, target, wanted(given(context.params), from_file))


def _target(how: Mapping[str, Any]) -> "Target":
    """Return what generates, but for the engine: which it is, and with what, is found out when all else is right."""
    from sa3_convert.cli.generate import Target

    output, allow = how["output"] or STANDARD_OUTPUT, tuple(how["allow"] or ())
    kept = (output, how["sample_format"], how["dither"], allow, how["json_file"], how["force"])
    return Target(how["bundle"], "mnn", {}, *kept)


def _generate_batch(context: Context, target: "Target") -> None:
    from sa3_convert.cli.generate import generate_batch
    from sa3_convert.runtime.batch_file import read_batch
    from sa3_convert.scheduling import threads_each

    how = context.params
    runner = o.runner_on(how["workers"], how["scheduler"])
    items = read_batch(how["batch"], given(how), OPTIONS)
    brought = _brought(target, context, {}, any(item.request.adapters for item in items))
    if how["workers"] is not None and how["threads"] is None:
        brought = replace(brought, options={**brought.options, "threads": threads_each(how["workers"])})
    generate_batch(brought, items, keep_loaded=how["keep_loaded"], reads=paths.reads_as(context, ()), runner=runner)


def _generate_one(context: Context, target: "Target", asked: Wanted) -> None:
    from sa3_convert.cli.generate import generate
    from sa3_convert.runtime.request import GenerateRequest

    count, from_file = context.params["variations"] or 1, context.params["from_file"]
    for output in target.outputs(count):
        paths.writes_as(context, "--output", output)
    with in_words_of(asked.called):
        request = GenerateRequest.from_json(asked.settings)
        paths.reads_as(context, ((f"--from {from_file}:", path) for path in request.files()))
        how = {name: context.params[name] for name in ("stream", "play")}
        brought = _brought(target, context, asked.origin, bool(request.adapters))
        generate(brought, variations_of(request, count), origin=asked.origin, **how)


def _brought(target: "Target", context: Context, origin: Mapping[str, Any], adapters: bool) -> "Target":
    """Return the target with its engine, and the folder of its bundle: of the hub what that engine opens comes."""
    from sa3_convert.runtime.engines import kinds_of

    how = context.params
    how = how | (_chosen(context, target.bundle, origin, adapters) if how["engine"] == "auto" else {})
    options = engine_options(how)
    kinds = kinds_of(how["engine"], split=options.get("split", False), adapters=adapters)
    folder = o.brought(target.bundle, how["offline"], kinds)
    return replace(target, bundle=folder, engine=how["engine"], options=options, chosen=how.get("chosen"))


def _chosen(context: Context, bundle: Path, origin: Mapping[str, Any], adapters: bool) -> dict[str, Any]:
    """Return the engine for a device and the other options, with what goes with it; it is told.

    What is made again from the settings in a file gets the engine that made that, and its settings, where they are.
    """
    from sa3_convert.cli.generate import chosen_engine

    how = context.params
    made = origin.get("engine", {})
    made = made if made.get("backend") == how["backend"] else {}
    split = made.get("dit") == "split" and not adapters
    again = {"memory": made.get("memory"), "precision": made.get("precision"), "split_dit": split}
    again = {
        name: value
        for name, value in again.items()
        if (value is True or value in get_args(o.Level)) and not _is_given(context, name)
    }
    # Its manifest says what there is; models are downloaded when it is known which.
    folder = o.brought(bundle, how["offline"], {"tokenizer"})
    checkpoint = how["checkpoint"] is not None
    known = {"checkpoint": checkpoint, "before": made.get("engine"), "adapters": adapters}
    engine, why = chosen_engine(folder, how["backend"], own_settings(how | again), **known)
    chosen = again | {"engine": engine, "chosen": why}
    return chosen if engine == "torch" or how["backend"] == "cpu" else chosen | {"checkpoint": None}


def own_settings(how: Mapping[str, Any]) -> list[str]:
    """Return, by engines' names, what was set that not every engine has."""
    return [_ENGINES_NAMES.get(n, n) for n in USUAL if n in how and how[n] not in (USUAL[n], [], ())]


def _is_given(context: Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def engine_options(how: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an engine is opened with; places are told."""
    engine, backend, place = how["engine"], how["backend"], how["place"] or ()
    _check_torch(how)
    if how["lora"] and engine != "torch":
        raise UsageError("A bundle has its LoRAs in its weights (`convert --lora`); --lora is for --engine torch.")
    options: dict[str, Any] = {"backend": backend} | {name: how[name] for name in ("threads",) if how[name]}
    precise = {name: how[name] for name in ("memory", "precision")}
    if engine == "mnn":
        from sa3_convert.cli.generate import placed

        where = placed(backend, **precise, overrides=place, split=how["split_dit"])
        return {**options, **precise, "split": how["split_dit"], **where}
    if how["memory"] != "normal" or how["split_dit"] or place:
        raise UsageError("--memory, --place and --split-dit are settings of --engine mnn.")
    if how["precision"] != "high":
        if (engine, how["precision"]) != ("torch", "normal"):
            raise UsageError("--precision low is for --engine mnn, and normal for mnn and torch.")
        options["precision"] = how["precision"]
    if backend not in ("cpu", "cuda"):
        raise UsageError(f"--device {backend} is for --engine mnn; --engine {engine} runs on cpu or cuda.")
    if engine == "torch":
        options |= {"loras": tuple(how["lora"] or ())}
        options |= {"checkpoint": how["checkpoint"]} if how["checkpoint"] is not None else {}
    return options


def _check_torch(how: Mapping[str, Any]) -> None:
    """Refuse the torch engine without the checkpoint that it runs, and a checkpoint that nothing runs."""
    if how["engine"] != "torch":
        if how["checkpoint"] is not None:
            raise UsageError("--checkpoint DIR is for --engine torch.")
        return
    from sa3_convert.checkpoint.config import is_checkpoint

    if how["checkpoint"] is None and not is_checkpoint(how["bundle"]):
        raise UsageError(
            "--engine torch runs a checkpoint: name its folder in place of the bundle, or what the bundle was made "
            "from with --checkpoint DIR."
        )


def _check_mode(how: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other."""
    output = how["output"]
    if how["seconds"] is not None and (how["bpm"], how["bars"]) != (None, None):
        raise UsageError("--bpm and --bars say how long a loop is; leave --seconds away.")
    if how["batch"] is not None:
        if output is None or is_stream(output) or output.is_file():
            raise UsageError("--batch writes several files; name their folder with -o DIR.")
        single = {
            "--stream": "stream",
            "--from": "from_file",
            "--json": "json_file",
            "--variations": "variations",
            "--play": "play",
        }
        if clash := [option for option, name in single.items() if how[name]]:
            raise UsageError(f"{clash[0]} is not for batches; --batch keeps settings and times in results.jsonl.")
    elif how["workers"] or how["scheduler"]:
        raise UsageError("--workers and --scheduler are for --batch: they make its lines.")
    elif how["keep_loaded"]:
        raise UsageError("--keep-loaded is for --batch; one generation uses each model once.")
    elif (how["variations"] or 1) > 1 and (output is None or is_stream(output)):
        raise UsageError("--variations writes several files; name them with -o FILE.wav.")
    elif how["play"] and (output is None or is_stream(output)):
        raise UsageError("--play plays a file; name it with -o FILE.wav.")
    elif output is None and not how["stream"]:
        raise UsageError("Say where to write with -o FILE.wav, or give --stream to write samples to standard output.")
