"""Jobs: a bounded queue before the worker, what each tells on its way, and the folder that they write into."""

import asyncio
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from sa3_convert.bundle.manifest import Manifest
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.errors import InputError, Sa3Error, UsageError, told_by_system
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.runtime.setting_values import RANDOM
from sa3_convert.serve.adapters import located
from sa3_convert.serve.worker import Served, hidden, work
from sa3_convert.system.files import sweep

State = Literal["queued", "running", "done", "failed", "cancelled"]
MAX_UPLOAD = 1 << 28
"""Bytes; more than the longest piece of any model as floating point."""
_MAX_UPLOADS = 1 << 34
_SENDING = ".sending-"
_REMEMBERED = 1000
"""Jobs that are over and can still be asked for; their files stay."""
_GRACE = 1.0
"""Seconds in which a worker may let go of a cancelled job by itself."""
_MAX_MESSAGE = 1 << 22
_DEATHS = 3
"""Workers that may end before one of them takes a job."""
AUDIO = ("init_audio", "inpaint_audio")
_ID = re.compile(r"[0-9a-f]{32}")
_DIED = "The process that ran the models ended, most likely because memory ran out. Another one has taken its place."
_STILLBORN = "Several processes in a row ended before they took it; there may be no memory to start one."


class BusyError(Sa3Error):
    """The queue is full; `seconds` is when a place may be free."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} generations wait already. Ask again in {seconds} seconds.")
        self.seconds = seconds


@dataclass(slots=True, eq=False)
class Job:
    """One piece that was asked for."""

    id: str
    model: str
    settings: Mapping[str, Any]
    """As asked, with the names of given audio."""
    path: Path
    state: State = "queued"
    sentence: str | None = None
    """Why it failed."""
    result: Mapping[str, Any] | None = None
    """What stands in the JSON beside the audio."""
    growing: Path | None = None
    """Where the audio can be read while it grows."""
    events: list[dict[str, Any]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced, at the next event."""
    cancelling: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("done", "failed", "cancelled")

    def tell(self, event: str, **more: Any) -> None:
        """Add an event, and wake who follows."""
        self.events.append({"event": event, **more})
        before, self.changed = self.changed, asyncio.Event()
        before.set()

    def end(self, state: State, sentence: str | None = None, **more: Any) -> None:
        """Bring it to its end."""
        self.state, self.sentence = state, sentence
        self.tell(state, **({"sentence": sentence} if sentence else {}), **more)

    async def follow(self, seen: int = 0) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """Yield the events from one on, numbered from 1, until it is over."""
        while True:
            changed = self.changed
            for event in self.events[seen:]:
                seen += 1
                yield seen, event
            if self.over and seen == len(self.events):
                return
            await changed.wait()

    def told(self) -> dict[str, Any]:
        """Return what a client is told."""
        return {
            "id": self.id, "model": self.model, "state": self.state, "sentence": self.sentence,
            "settings": self.settings, "result": self.result,
        }  # fmt: skip


class _Process:
    """A worker that runs, from the outside."""

    def __init__(self, served: Mapping[str, Served], keep_bytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, served, keep_bytes), daemon=True)
        self.process.start()
        other.close()
        self._thread = ThreadPoolExecutor(1, "worker")

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone, which reading tells
            self._connection.send_bytes(json.dumps(message).encode())

    async def heard(self) -> dict[str, Any]:
        """Return its next message; `gone` at its end."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, _message, self._connection)

    def end(self) -> None:
        self.process.kill()
        self.process.join(5)
        self._thread.shutdown(wait=False)


def _message(connection: Connection) -> dict[str, Any]:
    try:
        found = json.loads(connection.recv_bytes(_MAX_MESSAGE))
    except (EOFError, OSError, ValueError):
        found = None
    return found if isinstance(found, dict) and isinstance(found.get("event"), str) else {"event": "gone"}


class Jobs:
    """What was asked for and what became of it; lives in one event loop.

    Args:
        served: the bundles by the names that clients choose from.
        folder: where audio, JSON and uploads are written.
        queue: how many may wait.
        keep_bytes: of memory that the worker may have before it lets go of bundles.

    """

    def __init__(self, served: Mapping[str, Served], folder: Path, *, queue: int, keep_bytes: int) -> None:
        self.served, self.folder, self.queue = served, folder.absolute(), queue
        self.manifests: dict[str, tuple[CheckpointLayout, Manifest]] = {}
        for name, one in served.items():
            bundle = Bundle.open(one.path)
            self.manifests[name] = bundle.layout, bundle.manifest
        self.known: OrderedDict[str, Job] = OrderedDict()
        self.counts: dict[str, int] = dict.fromkeys(("done", "failed", "cancelled", "restarts", "refused"), 0)
        self.audio_seconds = self.busy_seconds = 0.0
        self._keep_bytes = keep_bytes
        self._worker: _Process | None = None
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._news = asyncio.Event()
        self._lately: deque[float] = deque([10.0], maxlen=8)
        self._closing = False
        (folder / "uploads").mkdir(parents=True, exist_ok=True)
        for left in (folder / "uploads").glob(f"{_SENDING}*"):
            left.unlink()
        sweep(folder)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def running(self) -> bool:
        """Whether one is being made."""
        return self._current is not None

    def submit(self, settings: Mapping[str, Any], model: Any = None) -> Job:
        """Take in a piece; its settings are those of a line of a batch, given audio named by its id.

        Raises:
            UsageError: settings cannot be, or do not suit the model.
            BusyError: too many wait.

        """
        model = next(iter(self.served)) if model is None else model
        if not isinstance(model, str) or model not in self.served:
            raise UsageError(f"There is no model {model!r}. There are: {', '.join(self.served)}.")
        request = GenerateRequest.from_json(self.located(settings, model))
        if settings.get("seed") == RANDOM:
            settings = {**settings, "seed": request.seed}
        if not request.audio_files():  # else its file is opened, and that is for the worker
            request.resolved(self.manifests[model][0])
        if self._closing or len(self._waiting) >= self.queue:
            self.counts["refused"] += 1
            pause = sum(self._lately) / len(self._lately) * (1 + len(self._waiting)) / 2
            raise BusyError(len(self._waiting), max(1, math.ceil(pause)))
        name = secrets.token_hex(16)
        job = Job(name, model, settings, self.folder / f"{name}.wav")
        job.tell("queued", before=len(self._waiting) + self.running)
        self.known[name] = job
        self._waiting.append(job)
        self._news.set()
        for old in [one.id for one in self.known.values() if one.over][: max(len(self.known) - _REMEMBERED, 0)]:
            del self.known[old]
        return job

    def audio(self, name: Any) -> Path:
        """Return the file of an upload or of a piece that is done, by its id."""
        if isinstance(name, str) and _ID.fullmatch(name):
            for path in (self.folder / "uploads" / name, self.folder / f"{name}.wav"):
                if path.is_file():
                    return path
        raise UsageError("Given audio is named by the id of an upload, or of a generation that is done; this is none.")

    def located(self, settings: Mapping[str, Any], model: str) -> dict[str, Any]:
        """Return settings with files for ids and names; UsageError if one stands for none."""
        found = {k: str(self.audio(v)) if k in AUDIO and v is not None else v for k, v in settings.items()}
        adapters = self.served[model].adapters
        return found | {k: located(found[k], adapters) for k in ("adapters",) if k in found}

    async def upload(self, pieces: AsyncIterator[bytes]) -> str:
        """Keep what a client sends, undecoded, and return the id that it has from its content."""
        folder, digest, size = self.folder / "uploads", hashlib.sha256(), 0
        room = min(MAX_UPLOAD, _MAX_UPLOADS - sum(path.stat().st_size for path in folder.iterdir()))
        sent = folder / f"{_SENDING}{secrets.token_hex(8)}"
        try:
            with sent.open("xb") as stream:
                async for piece in pieces:
                    size += len(piece)
                    if size > room:
                        raise InputError(f"No more than {room >> 20} MiB of audio are taken; send less.")
                    digest.update(piece)
                    stream.write(piece)
            if not size:
                raise InputError("An empty file was sent.")
            sent.replace(folder / digest.hexdigest()[:32])
        except OSError as error:
            raise told_by_system(error) or error from None
        finally:
            sent.unlink(missing_ok=True)
        return digest.hexdigest()[:32]

    def cancel(self, job: Job) -> None:
        """Let go of a piece: at once if it waits, else before the worker's next step, or with the worker."""
        if job.over:
            return
        if job is not self._current or self._worker is None:
            if job in self._waiting:
                self._waiting.remove(job)
            self._ended(job, "cancelled")
            return
        job.cancelling = True
        self._worker.send(cancel=job.id)
        asyncio.get_running_loop().call_later(_GRACE, self._kill_for, job)

    def _kill_for(self, job: Job) -> None:
        if job is self._current and not job.over and self._worker is not None:
            self._worker.process.kill()

    async def run(self) -> None:
        """Have the worker make one piece after the other."""
        self._worker = _Process(self.served, self._keep_bytes)
        while not self._closing:
            self._news.clear()
            if not self._waiting:
                await self._news.wait()
                continue
            self._current = self._waiting.popleft()
            begun = time.monotonic()
            try:
                await self._make(self._current)
            finally:
                self._current = None
            self.busy_seconds += (took := time.monotonic() - begun)
            self._lately.append(took)

    async def _make(self, job: Job) -> None:
        job.state = "running"
        try:
            settings = self.located(job.settings, job.model)
        except UsageError as error:  # what was given when it was asked for is gone
            self._ended(job, "failed", str(error))
            return
        # What files tell is told to clients, too: adapters by their names.
        told = {name: value for name, value in job.settings.items() if name == "adapters"}
        asked = {"id": job.id, "model": job.model, "settings": settings, "output": str(job.path), "told": told}
        heard, deaths = False, 0
        while not job.over:
            if self._worker is None:
                self._worker = _Process(self.served, self._keep_bytes)
            if not heard:
                self._worker.send(**asked)
            message = await self._worker.heard()
            if message["event"] == "gone":
                self._worker.end()
                self._worker = None
                self.counts["restarts"] += 1
                deaths += 1
                sweep(self.folder)
                # What died before it took this job has died of something else, unless they all do.
                if heard or deaths == _DEATHS or self._closing or job.cancelling:
                    why = None if job.cancelling else message.get("sentence") or (_DIED if heard else _STILLBORN)
                    self._ended(job, "cancelled" if job.cancelling else "failed", why)
            elif message.get("job") == job.id:
                heard = True
                self._heard(job, message)

    def _heard(self, job: Job, message: dict[str, Any]) -> None:
        event = message.pop("event")
        del message["job"]
        if event == "growing":
            job.growing = self.folder / Path(message.pop("name")).name
            job.tell(event)
        elif event == "done":
            job.result = message
            self.audio_seconds += message["duration"]
            self._ended(job, event, result=message)
        elif event in ("failed", "cancelled"):
            self._ended(job, event, message.get("sentence"))
        else:
            job.tell(event, **message)

    def _ended(self, job: Job, state: State, sentence: str | None = None, **more: Any) -> None:
        self.counts[state] += 1
        # A client knows no folders, its audio by id, and adapters by name.
        sentence = sentence and hidden(sentence.replace(f"{self.folder}{os.sep}", ""), self.served[job.model].adapters)
        job.end(state, sentence, **more)

    async def close(self) -> int:
        """Cancel what waits and runs, end the worker, and return how many were cancelled."""
        self._closing = True
        left = [job for job in self.known.values() if not job.over]
        for job in left:
            self.cancel(job)
        self._news.set()
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(_GRACE + 2):
                for job in left:
                    async for _ in job.follow():
                        pass
        if self._worker is not None:
            self._worker.process.terminate()
            self._worker.process.join(2)
            self._worker.end()
            self._worker = None
        sweep(self.folder)
        return len(left)
