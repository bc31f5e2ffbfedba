"""The options of `run`, by what they are about, and those that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sa3_convert.cli import paths
from sa3_convert.cli.paths import opens, reads, writes
from sa3_convert.components import Component
from sa3_convert.mnn.compatibility import MnnVersion

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint
    from sa3_convert.recipe import Recipe

CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT", help="Folder of a checkpoint, or a hub id that was fetched before.", callback=paths.opens
    ),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:STRENGTH]",
        help="LoRA (.safetensors) to merge into the weights; 1 is its full strength. Several are applied in order.",
        callback=paths.reads,
    ),
]
BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder that `convert` made.", callback=paths.opens)
]
ComponentOption = Annotated[
    list[Component] | None, typer.Option("--component", help="Only this component; may be given several times.")
]
OneComponentOption = Annotated[Component, typer.Option("--component", help="The component.")]
JsonFileOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write the figures as JSON; - is standard output, and tables then go to standard error.",
        callback=paths.writes,
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, max=256, help="Threads; all cores when not given.")
]


def open_recipe(recipe: Path) -> "Recipe":
    """Read the recipe that the user named, by path or by the name of one of ours.

    Raises:
        RecipeError: it is not there, or not valid.

    """
    from sa3_convert.recipe import load_recipe, recipe_file

    return load_recipe(recipe_file(recipe))


def open_checkpoint(checkpoint: str, loras: list[str] | None) -> "Checkpoint":
    """Open what the user named, with its LoRAs; what these change is listed on stderr.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others.
        UsageError: a LoRA's strength is no number, or a LoRA is given twice.

    """
    from sa3_convert.checkpoint.lora_file import LoraRequest
    from sa3_convert.checkpoint.reader import Checkpoint, resolve_checkpoint

    requests = [LoraRequest.parse(text) for text in loras or ()]
    opened = Checkpoint.open(resolve_checkpoint(checkpoint)).with_loras(requests)
    if opened.loras:
        from sa3_convert.cli.console import lora_table, stderr

        for lora in opened.loras:
            stderr.print(lora_table(lora))
    return opened


EngineChoice = Literal["mnn", "onnxruntime", "onnxruntime-int8", "torch"]
Sampler = Literal["pingpong", "euler", "rk4", "dpmpp"]
Format = Literal["pcm16", "pcm24", "float"]

OutputOption = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE.wav",
        help="Where to write the audio; with --batch a folder; - is standard output.",
    ),
]
PromptOption = Annotated[str | None, typer.Option("--prompt", help="What to generate.")]
SecondsOption = Annotated[float | None, typer.Option("--seconds", help="Duration; 10 when not given.")]
StepsOption = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps; what suits the model when not given.")
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="The same seed gives the same start noise everywhere; 0 when not given.")
]
SamplerOption = Annotated[Sampler | None, typer.Option("--sampler", help="What suits the model when not given.")]
CfgScaleOption = Annotated[float | None, typer.Option("--cfg-scale", help="Guidance; 1 is none.")]
ApgScaleOption = Annotated[
    float | None,
    typer.Option("--apg-scale", help="Share of the guidance's parallel part that is removed; 1 when not given."),
]
NegativePromptOption = Annotated[str | None, typer.Option("--negative-prompt", help="What guidance moves away from.")]
InitAudioOption = Annotated[
    Path | None, typer.Option("--init-audio", metavar="FILE", help="Start from this audio.", callback=reads)
]
InitNoiseOption = Annotated[
    float | None, typer.Option("--init-noise-level", help="How much of it is replaced by noise; 0.9 when not given.")
]
InpaintAudioOption = Annotated[
    Path | None,
    typer.Option("--inpaint-audio", metavar="FILE", help="Keep this audio but --inpaint.", callback=reads),
]
InpaintOption = Annotated[
    list[str] | None,
    typer.Option("--inpaint", metavar="START:END", help="Seconds to generate anew; several times."),
]
BatchOption = Annotated[
    Path | None,
    typer.Option(
        "--batch",
        metavar="FILE.jsonl",
        help="One generation per line, a JSON object of settings (prompt, seconds, seed, …, output); other options are "
        "the defaults. What an interrupted run has done is not done again.",
        callback=reads,
    ),
]
StreamOption = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Hand audio on while it is decoded: raw samples to standard output, or with -o a WAV that can be read "
        "while it grows, under a name that is told first.",
    ),
]
KeepLoadedOption = Annotated[
    bool, typer.Option("--keep-loaded", help="With --batch: keep all models in memory from one line to the next.")
]
EngineOption = Annotated[
    EngineChoice,
    typer.Option(
        "--engine",
        help="What runs the models; onnxruntime-int8 needs `convert --with-ort-int8`, torch needs --checkpoint.",
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", metavar="DIR", help="For --engine torch: what the bundle was made from.", callback=opens
    ),
]
MemoryOption = Annotated[
    Literal["normal", "high", "low"], typer.Option("--memory", help="MNN: low keeps weights quantised in memory.")
]
PrecisionOption = Annotated[
    Literal["normal", "high", "low"], typer.Option("--precision", help="MNN: high computes in float32.")
]
SplitOption = Annotated[
    bool,
    typer.Option(
        "--split-dit", help="MNN: compute once what stays the same in all steps; needs `convert --with-split-dit`."
    ),
]
BackendOption = Annotated[
    Literal["cpu", "cuda", "opencl", "vulkan"],
    typer.Option(
        "--device", "--backend", help="Where models run; MNN places a component on the CPU if `doctor` found it wrong."
    ),
]
PlaceOption = Annotated[
    list[str] | None,
    typer.Option("--place", metavar="COMPONENT=DEVICE", help="MNN: run this component there, whatever the probes say."),
]
FormatOption = Annotated[Format, typer.Option("--format", help="How samples are stored.")]
DitherOption = Annotated[bool, typer.Option("--dither", help="Dither integer samples.")]
AllowOption = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="CHECK", help="Waive an output check: silence, clipping, … (several times)."),
]
FromOption = Annotated[
    Path | None,
    typer.Option("--from", metavar="FILE.json", help="Settings written by --json; replays them.", callback=reads),
]
SideFileOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write settings and times; - is standard output.", callback=writes),
]

RecipeOption = Annotated[
    Path,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="How to store each component: a file, or the name of one of ours.",
        callback=paths.reads,
    ),
]
TargetOption = Annotated[
    MnnVersion | None,
    typer.Option(
        "--target-mnn",
        help="The oldest MNN that the models must be right on; when not given, the oldest that can read what the "
        "recipe stores.",
    ),
]
DEFAULT_RECIPE = Path("configs/int8.yaml")
