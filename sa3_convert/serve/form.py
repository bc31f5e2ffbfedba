"""The page's form: what is asked for, as settings, and in words what becomes of it."""

import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from sa3_convert.checkpoint.variants import defaults_of
from sa3_convert.errors import UsageError
from sa3_convert.runtime.conditioning import max_seconds
from sa3_convert.runtime.sampling import SamplerName
from sa3_convert.serve.jobs import AUDIO, Job, Jobs

Values = dict[Any, Any]
"""What fields hold, or are to hold."""
MOST = 8
"""Variations."""
OTHERS = ("variations", "model")
"""Fields that are no settings of a piece."""
STAGES = {
    "queued": "waits for its turn", "started": "begins", "loading": "loads the models", "text": "reads the prompt",
    "encode": "encodes audio", "denoise": "denoises", "decode": "decodes", "growing": "begins", "audio": "decodes",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """What is asked for."""

    fields: Mapping[str, Any]
    """By the names of settings, but for `regions`, `variations` and `model`, and of adapters those of `strength_of`."""
    dice: Any
    generate: Any
    cancel: Any
    status: Any

    async def settings(self, values: Values, jobs: Jobs) -> dict[str, Any]:
        """Return the settings of a batch's line."""
        found = {name: values[one] for name, one in self.fields.items()}
        regions, strength = found.pop("regions"), found.pop("init_noise_level")
        strengths = {name: found.pop(strength_of(name)) for name in adapters_of(jobs)}
        # A browser makes 0 of a number that is left empty; 0 seconds are those of given audio.
        found = {name: v for name, v in found.items() if name not in OTHERS and v not in (None, "")}
        found |= {"seconds": found.get("seconds") or None}
        for name in AUDIO:
            if name in found:
                found[name] = await jobs.upload(_pieces(Path(found[name])))
        if "init_audio" in found:
            found["init_noise_level"] = strength
        if "inpaint_audio" in found:
            found["inpaint"] = _regions(regions or "")
        if adapters := [f"{name}:{value:g}" for name, value in strengths.items() if value]:
            found["adapters"] = adapters
        whole: dict[str, Any] = {name: int(found[name]) for name in ("seed", "steps") if name in found}
        return {"prompt": "", **found, **whole}


def adapters_of(jobs: Jobs) -> tuple[str, ...]:
    """Return the names of all adapters that some model takes."""
    return tuple(dict.fromkeys(name for served in jobs.served.values() for name in served.adapters))


def strength_of(adapter: str) -> str:
    """Return the name of the field with an adapter's strength."""
    return f"strength of {adapter}"


def form_of(jobs: Jobs) -> Form:
    """Put the form into the page that is being built, and return it."""
    names, own = list(jobs.served), usual(jobs, next(iter(jobs.served)))
    longest = min(max_seconds(layout) for layout, _ in jobs.manifests.values())
    fields: dict[str, Any] = {"prompt": gr.Textbox(label="Prompt", lines=2, autofocus=True)}
    fields["model"] = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
    with gr.Row():
        limit, count = f"Seconds, at most {longest:.0f}; 0 as given audio", f"Variations, at most {MOST}"
        fields["seconds"] = gr.Number(10, label=limit, min_width=140)
        fields["variations"] = gr.Number(1, label=count, precision=0, min_width=140)
    with gr.Row(equal_height=True):
        fields["seed"] = gr.Number(0, label="Seed", precision=0, min_width=140)
        dice = gr.Button("Roll the dice", min_width=140)
    with gr.Accordion("More", open=False):
        fields["negative_prompt"] = gr.Textbox(label="Negative prompt (needs guidance)")
        with gr.Row():
            fields["steps"] = gr.Number(own["steps"], label="Steps", precision=0)
            fields["cfg_scale"] = gr.Number(own["cfg_scale"], label="Guidance, 1 is none")
        fields["sampler"] = gr.Dropdown(list(get_args(SamplerName)), value=own["sampler"], label="Sampler")
    with gr.Accordion("Adapters", open=False, visible=bool(adapters_of(jobs))):
        for name in adapters_of(jobs):
            fields[strength_of(name)] = gr.Slider(-2, 2, 0, step=0.05, label=f"Strength of {name}, 0 is without it")
    with gr.Accordion("Start from audio", open=False):
        fields["init_audio"] = _given("Audio to start from")
        fields["init_noise_level"] = gr.Slider(0.01, 1, 0.9, label="Strength: how much of it is replaced")
    with gr.Accordion("Regenerate regions of audio", open=False):
        fields["inpaint_audio"] = _given("Audio to keep but for the regions")
        mark = gr.Button("Mark this place", size="sm")
        how = "Click the waveform where a region begins, and mark; the same where it ends. Or write them."
        fields["regions"] = gr.Textbox(label="Regions in seconds", placeholder="2.5:4, 8:9", info=how)
        mark.click(_marked, [fields["inpaint_audio"], fields["regions"]], fields["regions"], show_progress="hidden")
    with gr.Row():
        generate, cancel = gr.Button("Generate", variant="primary"), gr.Button("Cancel", variant="stop")
    engines = (
        f"{name} on {one.engine}" + (f": {one.chosen}" if one.chosen else "") for name, one in jobs.served.items()
    )
    status = gr.Textbox("\n".join(engines), label="Status", interactive=False, lines=2)
    return Form(fields, dice, generate, cancel, status)


def usual(jobs: Jobs, model: str) -> dict[str, Any]:
    """Return what suits a model."""
    found = defaults_of(jobs.manifests[model][0])
    return {"steps": found.steps, "cfg_scale": found.guidance, "sampler": found.sampler}


def _given(label: str) -> Any:
    return gr.Audio(label=label, sources=["upload", "microphone"], type="filepath", buttons=["download"])


async def progress(job: Job) -> AsyncIterator[str]:
    """Yield in words what happens to a job, until it is over."""
    begun = time.monotonic()
    async for _, event in job.follow():
        kind = event["event"]
        if kind == "step":
            done, of = event["done"], event["of"]
            begun = time.monotonic() if done == 1 else begun
            left = f", about {(time.monotonic() - begun) / (done - 1) * (of - done):.0f} s left" if done > 1 else ""
            yield f"{STAGES['denoise']}: step {done} of {of}{left}"
        elif words := STAGES.get(event.get("stage", kind)):
            yield words


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            yield piece


def _marked(audio: gr.Audio, text: str) -> str:
    """Return regions with one that begins where the player stands, or with the last one ending there."""
    # Gradio hands over the component itself, since that is the type, with where its player stands in seconds.
    if audio.value is None:
        return text
    place = round(float(audio.playback_position), 2)
    if begun := re.fullmatch(r"(.*?)(\d+(?:\.\d+)?):\s*", text):
        start, end = sorted((float(begun[2]), place))
        return f"{begun[1]}{start:g}:{end:g}"
    return ", ".join(filter(None, (text.strip().rstrip(","), f"{place:g}:")))


def _regions(text: str) -> list[list[float]]:
    """Return regions that are written as on the command line, separated by commas."""
    try:
        pairs = [[float(number) for number in part.split(":")] for part in text.split(",") if part.strip()]
    except ValueError:
        pairs = [[]]
    if any(len(pair) != 2 for pair in pairs):
        raise UsageError(f"{text!r} are no regions. Write START:END in seconds, such as 2.5:4, 8:9.")
    return pairs
