"""The page: a form, what it made, and two models side by side. All that a user typed is shown as text."""

import asyncio
import os
import secrets
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio import processing_utils

from sa3_convert.errors import Sa3Error, UsageError
from sa3_convert.serve.asked import flac_of, loudness_of, spectrogram_of
from sa3_convert.serve.compare import Comparison
from sa3_convert.serve.form import (
    MOST,
    OTHERS,
    STAGES,
    Form,
    Values,
    adapters_of,
    form_of,
    progress,
    strength_of,
    usual,
)
from sa3_convert.serve.jobs import AUDIO, MAX_UPLOAD, Job, Jobs

GLANCE = 0.05
"""Seconds that a click may wait."""
_CSS = "footer {display: none} .gradio-container {max-width: 1100px !important}"


def add_page(app: FastAPI, jobs: Jobs) -> None:
    """Put the page before all routes that the app has not yet."""
    # What it is sent, and what it shows, lies in the folder that was named.
    os.environ["GRADIO_TEMP_DIR"] = str(jobs.folder)
    for name in [name for name in vars(processing_utils) if "ssrf_protected" in name or name == "save_url_to_cache"]:
        setattr(processing_utils, name, _asks_nobody)
    system = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"])
    gr.mount_gradio_app(
        app,
        page(jobs),
        path="/",
        theme=theme,
        css=_CSS,
        max_file_size=MAX_UPLOAD,
        show_error=False,
        ssr_mode=False,
        footer_links=[],
    )


def _asks_nobody(*_: object, **__: object) -> str:
    raise UsageError("Audio is taken from this page, not from an address.")


def page(jobs: Jobs) -> Any:
    """Return the page over jobs."""
    with gr.Blocks(title="sa3-convert", analytics_enabled=False) as blocks:
        made, now = gr.State([]), gr.State([])
        with gr.Row():
            with gr.Column():
                form = form_of(jobs)
            with gr.Column():
                result = _result()
        with gr.Accordion("Compare two models", open=False):
            Comparison(jobs, form, now).wire()
        _Session(jobs, form, result, made, now).wire()
    blocks.queue(default_concurrency_limit=None, api_open=False)
    # It looks for what to do a thousand times a second otherwise, also while nobody is there.
    blocks._queue.sleep_when_free = blocks._queue.progress_update_sleep_when_free = GLANCE
    return blocks


@dataclass(frozen=True, slots=True)
class _Result:
    """What was made."""

    pieces: Any
    player: Any
    spectrogram: Any
    figures: Any
    command: Any
    files: tuple[Any, ...]
    again: Any
    as_init: Any
    as_inpaint: Any

    def shown(self, jobs: Jobs, job: Job) -> Values:
        """Return what shows a piece."""
        assert job.result is not None
        told, wav = job.result, str(job.path)
        notes = "\n".join(told["warnings"])
        figures = (
            f"{told['duration']:.2f} s, peak {told['peak']:.3f}, {loudness_of(job.path):.1f} LUFS, "
            f"made in {sum(told['seconds'].values()):.1f} s by {job.model} on "
            f"{told['engine']['engine']}, seed {told['request']['seed']}\n{notes}"
        )
        paths = [wav, str(flac_of(job.path)), str(job.path.with_suffix(".json"))]
        return {
            self.player: wav,
            self.spectrogram: str(spectrogram_of(job.path)),
            self.figures: figures.strip(),
            self.command: command_of(jobs, job),
            **{button: gr.DownloadButton(value=path) for button, path in zip(self.files, paths, strict=True)},
        }


def _result() -> _Result:
    player = gr.Audio(label="Piece", interactive=False, buttons=[])
    spectrogram = gr.Image(label="Spectrogram", interactive=False, height=150, buttons=[])
    figures = gr.Textbox(label="Figures", interactive=False, lines=2)
    with gr.Row():
        files = tuple(gr.DownloadButton(kind, min_width=60, size="sm") for kind in ("WAV", "FLAC", "JSON"))
    with gr.Row():
        again = gr.Button("Again with these settings", size="sm")
        as_init = gr.Button("Use as start", size="sm")
        as_inpaint = gr.Button("Regenerate regions of it", size="sm")
    label = "The command line that does the same"
    command = gr.Code(label=label, language="shell", interactive=False, wrap_lines=True, lines=1, max_lines=6)
    pieces = gr.Radio([], label="History of this session")
    return _Result(pieces, player, spectrogram, figures, command, files, again, as_init, as_inpaint)


@dataclass(frozen=True, slots=True)
class _Session:
    """What the buttons do."""

    jobs: Jobs
    form: Form
    result: _Result
    made: Any
    """The pieces of this session: label and id, the last first."""
    now: Any
    """Ids of what is being made."""

    async def generate(self, values: Values) -> AsyncIterator[Values]:
        """Make a piece, or variations, and show each when it is ready."""
        running: list[Job] = []
        try:
            settings, count = (
                await self.form.settings(values, self.jobs),
                int(values[self.form.fields["variations"]] or 1),
            )
            for number in range(min(count, MOST)):
                seed = settings.get("seed", 0) + number
                running.append(self.jobs.submit({**settings, "seed": seed}, values[self.form.fields["model"]]))
        except Sa3Error as error:
            for job in running:
                self.jobs.cancel(job)
            yield {self.form.status: str(error)}
            return
        yield {self.now: [job.id for job in running], self.form.status: STAGES["queued"]}
        done, said = list(values[self.made]), []
        for number, job in enumerate(running, 1):
            async for words in progress(job):
                yield {self.form.status: f"{number} of {len(running)} {words}" if len(running) > 1 else words}
            said.append(job.sentence or job.state)
            if job.state == "done":
                done = [(_label(job), job.id), *done]
                shown = await asyncio.to_thread(self.result.shown, self.jobs, job)
                yield {**shown, self.made: done, self.result.pieces: gr.Radio(done, value=job.id)}
        yield {self.form.status: "\n".join(dict.fromkeys(said)), self.now: []}

    async def show(self, values: Values) -> Values:
        """Show a piece of the history."""
        job = self.jobs.known.get(values[self.result.pieces] or "")
        return (
            await asyncio.to_thread(self.result.shown, self.jobs, job)
            if job
            else {self.form.status: "It was too long ago."}
        )

    def audio_of(self, name: str | None) -> str | None:
        """Return the file of a piece."""
        job = self.jobs.known.get(name or "")
        return str(job.path) if job else None

    def again(self, name: str | None) -> Values:
        """Fill the form with the settings of a piece."""
        job = self.jobs.known.get(name or "")
        if job is None or job.result is None:
            return {self.form.status: "Choose a piece of the history first."}
        given = {name: one for name, one in self.form.fields.items() if name not in OTHERS}
        told = {**job.result["request"], **dict.fromkeys(AUDIO)}
        told |= {name: str(self.jobs.audio(job.settings[name])) for name in AUDIO if job.settings.get(name)}
        told |= {strength_of(name): 0 for name in adapters_of(self.jobs)}
        asked = (text.rpartition(":") for text in job.settings.get("adapters", ()))
        told |= {strength_of(name): float(strength) for name, _, strength in asked}
        told["regions"] = ", ".join(f"{start:g}:{end:g}" for start, end in told["inpaint"])
        return {**{one: told[name] for name, one in given.items()}, self.form.fields["model"]: job.model}

    def cancel(self, names: list[str]) -> None:
        """Let go of what is being made."""
        for name in names:
            if job := self.jobs.known.get(name):
                self.jobs.cancel(job)

    def wire(self) -> None:
        """Connect the form with what it makes."""
        everything = {*self.form.fields.values(), self.made}
        shown = [
            self.result.player,
            self.result.spectrogram,
            self.result.figures,
            self.result.command,
            *self.result.files,
        ]
        outputs = [self.form.status, self.now, self.made, self.result.pieces, *shown]
        gr.on(
            [self.form.generate.click, self.form.fields["prompt"].submit],
            self.generate,
            everything,
            outputs,
            show_progress="hidden",
        )
        self.result.pieces.input(self.show, {self.result.pieces}, [*shown, self.form.status], show_progress="hidden")
        self.result.again.click(self.again, self.result.pieces, [*self.form.fields.values(), self.form.status])
        self.result.as_init.click(self.audio_of, self.result.pieces, self.form.fields["init_audio"])
        self.result.as_inpaint.click(self.audio_of, self.result.pieces, self.form.fields["inpaint_audio"])
        self.form.fields["model"].input(
            lambda model: list(usual(self.jobs, model).values()),
            self.form.fields["model"],
            [self.form.fields[n] for n in usual(self.jobs, next(iter(self.jobs.served)))],
        )
        self.form.dice.click(lambda: secrets.randbelow(1 << 32), None, self.form.fields["seed"])
        self.form.cancel.click(self.cancel, self.now, None)


def _label(job: Job) -> str:
    assert job.result is not None
    told = job.result["request"]
    prompt = told["prompt"] if len(told["prompt"]) <= 40 else f"{told['prompt'][:39]}…"
    return f"{prompt or '(no prompt)'} · seed {told['seed']} · {job.result['duration']:.1f} s · {job.model}"


def command_of(jobs: Jobs, job: Job) -> str:
    """Return the command line that makes the same piece."""
    served, words = jobs.served[job.model], list[str]()
    plain = {"backend": "cpu", "memory": "normal", "precision": "high", "split": False, **usual(jobs, job.model)}
    asked = {"engine": served.engine, **served.options, **job.settings}
    for name, value in asked.items():
        if value is None or (name in plain and plain[name] == value) or name in ("places", "never_low", "threads"):
            continue
        if name in AUDIO:
            value = jobs.audio(value)
        elif name == "adapters":
            name, value = "adapter", jobs.located(job.settings, job.model)[name]
        elif name == "cfg_interval":
            value = f"{value[0]:g}:{value[1]:g}"
        elif name == "dist_shift":
            rest = ",".join(f"{key}={number}" for key, number in value.items() if key != "type")
            value = f"{value['type']}:{rest}" if rest else value["type"]
        each = [f"{start:g}:{end:g}" for start, end in value] if name == "inpaint" else value
        each = each if isinstance(each, list) else [each]
        for one in each:
            # A prompt may begin with a dash.
            words += [f"--{name.replace('_', '-')}={one}"] if str(one).startswith("-") else [
                f"--{name.replace('_', '-')}", str(one)]  # fmt: skip
    return shlex.join(["sa3-convert", "run", str(served.path), *words, "-o", "piece.wav"])
