"""Two models side by side, known or blind."""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import gradio as gr

from sa3_convert.errors import Sa3Error
from sa3_convert.serve.blind import PAIRS, BlindTest, Pair
from sa3_convert.serve.form import Form, Values, progress
from sa3_convert.serve.jobs import Job, Jobs


class Comparison:
    """What compares two models under the settings of the form."""

    def __init__(self, jobs: Jobs, form: Form, now: Any) -> None:
        self.jobs, self.form, self.now = jobs, form, now
        names = list(jobs.served)
        with gr.Row():
            self.chosen = [gr.Dropdown(names, value=names[n % len(names)], label=f"Model {'AB'[n]}") for n in range(2)]
        with gr.Row():
            self.both, self.blind = gr.Button("Generate on both"), gr.Button(f"Blind test of {PAIRS} pairs")
        self.said = gr.Textbox(label="Comparison", interactive=False, lines=2)
        with gr.Row():
            self.players = [gr.Audio(label=f"Model {'AB'[n]}", interactive=False, buttons=[]) for n in range(2)]
        with gr.Row(visible=False) as self.answers:
            self.first, self.second = gr.Button("It is the first"), gr.Button("It is the second")
        self.kept, self.test = gr.DownloadButton("The test as JSON", visible=False), gr.State(None)

    async def make(
        self, models: tuple[str, ...], settings: Mapping[str, Any], what: Callable[[Job], str]
    ) -> AsyncIterator[Any]:
        """Yield what is to be shown on the way, and then the jobs that are done."""
        running: list[Job] = []
        try:
            for model in models:
                running.append(self.jobs.submit(settings, model))
        except Sa3Error as error:
            for job in running:
                self.jobs.cancel(job)
            yield {self.said: str(error)}
            return
        yield {self.now: [job.id for job in running]}
        for job in running:
            async for words in progress(job):
                yield {self.said: f"{what(job)} {words}"}
        if failed := [job for job in running if job.state != "done"]:
            yield {self.said: failed[0].sentence or failed[0].state, self.now: []}
        else:
            yield running

    async def compare(self, values: Values) -> AsyncIterator[Values]:
        """Make a piece with both."""
        try:
            settings = await self.form.settings(values, self.jobs)
        except Sa3Error as error:
            yield {self.said: str(error)}
            return
        yield {self.test: None, self.answers: gr.Row(visible=False), self.kept: gr.DownloadButton(visible=False)}
        models = tuple(values[one] for one in self.chosen)
        async for step in self.make(models, settings, lambda job: f"{job.model}:"):
            if isinstance(step, list):
                both_shown = {p: gr.Audio(str(j.path), label=j.model) for p, j in zip(self.players, step, strict=True)}
                step = {**both_shown, self.said: "Listen.", self.now: []}
            yield step

    async def begin(self, values: Values) -> AsyncIterator[Values]:
        """Begin a blind test."""
        try:
            begun = BlindTest(
                values[self.chosen[0]], values[self.chosen[1]], await self.form.settings(values, self.jobs)
            )
        except Sa3Error as error:
            yield {self.said: str(error)}
            return
        yield {self.kept: gr.DownloadButton(visible=False)}
        async for step in self.ask(begun):
            yield step

    async def ask(self, test_now: BlindTest) -> AsyncIterator[Values]:
        """Make a pair and ask about it."""
        number, order = len(test_now.pairs) + 1, test_now.order()
        seed = test_now.settings.get("seed", 0) + number - 1
        yield {self.answers: gr.Row(visible=False)}
        async for step in self.make(order, {**test_now.settings, "seed": seed}, lambda _: f"Pair {number} of {PAIRS}"):
            if isinstance(step, list):
                test_now.pairs.append(Pair(seed, order[0], [job.id for job in step]))
                question = f"Pair {number} of {PAIRS}: which one is {test_now.a}?"
                labels = ("The first", "The second")
                shown = {p: gr.Audio(str(j.path), label=w) for p, j, w in zip(self.players, step, labels, strict=True)}
                step = {
                    **shown,
                    self.said: question,
                    self.test: test_now,
                    self.answers: gr.Row(visible=True),
                    self.now: [],
                }
            yield step

    async def answered(self, test_now: BlindTest | None, answer: str) -> AsyncIterator[Values]:
        """Take an answer; ask again, or tell the result."""
        if test_now is None or not test_now.pairs or test_now.pairs[-1].answer is not None:
            return
        test_now.pairs[-1].answer = answer
        if len(test_now.pairs) < PAIRS:
            async for step in self.ask(test_now):
                yield step
            return
        path = test_now.save(self.jobs.folder)
        done = gr.DownloadButton(value=str(path), visible=True)
        yield {self.said: test_now.verdict(), self.answers: gr.Row(visible=False), self.kept: done, self.test: None}

    async def is_first(self, test_now: BlindTest | None) -> AsyncIterator[Values]:
        """Take the first for model A."""
        async for step in self.answered(test_now, "first"):
            yield step

    async def is_second(self, test_now: BlindTest | None) -> AsyncIterator[Values]:
        """Take the second for model A."""
        async for step in self.answered(test_now, "second"):
            yield step

    def wire(self) -> None:
        """Connect the buttons."""
        asked = {*self.form.fields.values(), *self.chosen}
        outputs = [self.said, self.now, self.test, self.answers, self.kept, *self.players]
        self.both.click(self.compare, asked, outputs, show_progress="hidden")
        self.blind.click(self.begin, asked, outputs, show_progress="hidden")
        self.first.click(self.is_first, self.test, outputs, show_progress="hidden")
        self.second.click(self.is_second, self.test, outputs, show_progress="hidden")
