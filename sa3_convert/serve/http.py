"""The HTTP interface: routes over the jobs, and the guard before everything that is served."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import fields
from typing import Any, BinaryIO, Literal, get_type_hints
from urllib.parse import parse_qs, urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel, Field, create_model
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sa3_convert import __version__
from sa3_convert.errors import InputError, Sa3Error
from sa3_convert.runtime.conditioning import max_seconds
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.runtime.wav import chunks
from sa3_convert.serve import LOCAL
from sa3_convert.serve.asked import flac_of
from sa3_convert.serve.jobs import AUDIO, BusyError, Job, Jobs
from sa3_convert.system.untrusted import SMALL, parse_json

_BLOCK = 1 << 16
_COOKIE = "sa3_token"
_HEADERS = {
    # A page that is told so asks nobody else, whatever a library in it would like to.
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_LOGIN = (
    "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>sa3-convert</title>"
    "<form method=post action=/login><label>Token <input name=token type=password autofocus></label> "
    "<button>Open</button></form>"
)


class Guard:
    """Lets in what comes from this page or from a program: right host, right origin, and the token if there is one."""

    def __init__(self, app: ASGIApp, *, host: str, token: str | None) -> None:
        self._app, self._token = app, token
        self._hosts = None if host in ("0.0.0.0", "::") else {*LOCAL, host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = await self._refusal(Request(scope, receive))
        await (refusal or self._app)(scope, receive, guarded)

    async def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            return _sentence(421, f"This server is not called {host[:100]!r}.")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return _sentence(403, "Another site's page may not ask this server.")
        if self._token is None:
            return None
        if request.method == "POST" and request.url.path == "/login":
            given = parse_qs((await _body(request)).decode(errors="replace")).get("token", [""])[0]
            if not self._is_right(given):
                return HTMLResponse(f"{_LOGIN}<p>That is not the token.", 401)
            opened = RedirectResponse("/", 303)
            opened.set_cookie(_COOKIE, given, httponly=True, samesite="strict")
            return opened
        if self._is_right(_given(request.headers)):
            return None
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(_LOGIN, 401)
        return _sentence(401, "Send the token: Authorization: Bearer TOKEN.", {"WWW-Authenticate": "Bearer"})

    def _is_right(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self._token or "").encode())


def _name(host: str) -> str | None:
    """Return the name that is asked for, without its port; None if it is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _given(headers: Headers) -> str:
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token if kind.lower() == "bearer" else cookie_parser(headers.get("cookie", "")).get(_COOKIE, "")


def _sentence(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status, headers)


async def _body(request: Request) -> bytes:
    """Return the body of a request, of bounded size."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > SMALL:
            raise HTTPException(413, "That is too long.")
    return bytes(body)


_ADAPTERS = (
    "LoRAs by the names that /v1/models lists, in the order in which they are applied: NAME[:STRENGTH][@LOW-HIGH]"
)


def schema() -> dict[str, Any]:
    """Return the JSON schema of what is posted: a line of a batch, with ids in place of files, and the model."""
    hints = get_type_hints(GenerateRequest)
    kinds: dict[str, Any] = {
        f.name: (str | None if f.name in AUDIO else hints[f.name], ... if f.name == "prompt" else f.default)
        for f in fields(GenerateRequest)
    }
    kinds["seed"] = int | Literal["random"], 0
    kinds["inpaint"] = list[tuple[float, float]], []
    kinds["adapters"] = list[str], Field([], description=_ADAPTERS)
    kinds["model"] = str | None, None
    model: type[BaseModel] = create_model("Generate", __config__={"extra": "forbid"}, **kinds)
    return model.model_json_schema(ref_template="#/components/schemas/{model}")


def interface(jobs: Jobs) -> FastAPI:
    """Return the routes; the jobs run as long as they are served."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(jobs.run())
        yield
        await jobs.close()
        await task

    # Its pages of documentation would come from elsewhere; the document itself stays.
    app = FastAPI(title="sa3-convert", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.exception_handler(Sa3Error)
    async def explained(_: Request, error: Sa3Error) -> JSONResponse:
        if isinstance(error, BusyError):
            return _sentence(429, str(error), {"Retry-After": str(error.seconds)})
        return _sentence(422, str(error))

    _add_jobs(app, jobs)
    _add_audio(app, jobs)
    _add_figures(app, jobs)
    _publish(app)
    from sa3_convert.serve.page import add_page

    add_page(app, jobs)
    return app


def _found(jobs: Jobs, name: str) -> Job:
    if (job := jobs.known.get(name)) is None:
        raise HTTPException(404, "There is no such job, or it was too long ago.")
    return job


def _add_jobs(app: FastAPI, jobs: Jobs) -> None:
    @app.post(
        "/v1/generate", status_code=202, responses={422: {"description": "Why not"}, 429: {"description": "Full"}}
    )
    async def generate(request: Request) -> dict[str, Any]:
        try:
            settings = parse_json((await _body(request)).decode())
        except ValueError as error:
            raise InputError(f"The body is not JSON: {error}.") from None
        if not isinstance(settings, dict):
            raise InputError("The body is no JSON object.")
        return jobs.submit(settings, settings.pop("model", None)).told()

    @app.get("/v1/jobs/{job}")
    async def job(job: str) -> dict[str, Any]:
        return _found(jobs, job).told()

    @app.get("/v1/jobs/{job}/events", response_class=StreamingResponse)
    async def events(job: str, request: Request) -> StreamingResponse:
        found, seen = _found(jobs, job), request.headers.get("last-event-id", "0")

        async def lines() -> AsyncIterator[str]:
            async for number, event in found.follow(int(seen) if seen.isdecimal() else 0):
                yield f"id: {number}\nevent: {event['event']}\ndata: {json.dumps(event)}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    @app.delete("/v1/jobs/{job}")
    async def cancel(job: str) -> dict[str, Any]:
        found = _found(jobs, job)
        jobs.cancel(found)
        return found.told()


def _add_audio(app: FastAPI, jobs: Jobs) -> None:
    @app.post("/v1/audio", status_code=201)
    async def upload(request: Request) -> dict[str, str]:
        return {"id": await jobs.upload(request.stream())}

    @app.get("/v1/jobs/{job}/audio", response_class=Response)
    async def audio(job: str, format: Literal["wav", "flac", "pcm"] = "wav") -> Response:  # noqa: A002 - of the URL
        found = _found(jobs, job)
        while not (found.over or (found.growing and format != "flac")):
            await found.changed.wait()
        if found.state in ("failed", "cancelled"):
            raise HTTPException(409, found.sentence or "It was cancelled.")
        if found.state == "done" and format == "wav":
            return FileResponse(found.path, media_type="audio/wav", filename=found.path.name)
        if format == "flac":
            path = await asyncio.to_thread(flac_of, found.path)
            return FileResponse(path, media_type="audio/flac", filename=path.name)
        file, start, size = _opened(found)
        headers = {"content-length": str(size + (start if format == "wav" else 0))}
        rate = jobs.manifests[found.model][0].sample_rate
        kind = "audio/wav" if format == "wav" else f"audio/L16;rate={rate};channels=2;endianness=little-endian"
        file.seek(0 if format == "wav" else start)
        return StreamingResponse(_grown(found, file, int(headers["content-length"])), headers=headers, media_type=kind)


def _opened(job: Job) -> tuple[BinaryIO, int, int]:
    """Return the WAV of a job, and where its samples begin and how many bytes they have."""
    try:
        file: BinaryIO = (job.growing or job.path).open("rb")
    except FileNotFoundError:  # it has got its name in the meantime
        file = job.path.open("rb")
    file.seek(12)
    for name, size in chunks(file):
        if name == b"data":
            return file, file.tell(), size
    file.close()
    raise InputError(f"{job.path.name} is no WAV.")


async def _grown(job: Job, file: BinaryIO, size: int) -> AsyncIterator[bytes]:
    """Yield what is in a file as it gets there; an answer that ends early says that there will not be more."""
    with file:
        while size:
            changed, over = job.changed, job.over
            if piece := file.read(min(_BLOCK, size)):
                size -= len(piece)
                yield piece
            elif over:
                raise ConnectionAbortedError(job.sentence or "It was cancelled.")
            else:
                await changed.wait()


def _add_figures(app: FastAPI, jobs: Jobs) -> None:
    @app.get("/v1/models")
    async def models() -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "variant": manifest.variant,
                "recipe": manifest.recipe,
                "engine": jobs.served[name].engine,
                "chosen": jobs.served[name].chosen,
                "adapters": list(jobs.served[name].adapters),
                "sample_rate": layout.sample_rate,
                "max_seconds": max_seconds(layout),
            }
            for name, (layout, manifest) in jobs.manifests.items()
        ]

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "waiting": jobs.waiting, "running": jobs.running}

    registry = CollectorRegistry()
    registry.register(_Figures(jobs))

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Figures:
    """What `/metrics` tells, read when it is asked for."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def collect(self) -> list[Metric]:
        jobs = self._jobs
        ended = CounterMetricFamily("sa3_jobs", "Generations that are over", labels=["state"])
        for state in ("done", "failed", "cancelled", "refused"):
            ended.add_metric([state], jobs.counts[state])
        return [
            ended,
            GaugeMetricFamily("sa3_jobs_waiting", "Generations that wait", jobs.waiting),
            GaugeMetricFamily("sa3_jobs_running", "Generations under way", int(jobs.running)),
            CounterMetricFamily("sa3_worker_restarts", "Workers that died", jobs.counts["restarts"]),
            CounterMetricFamily("sa3_audio_seconds", "Audio made", jobs.audio_seconds),
            CounterMetricFamily("sa3_busy_seconds", "Time of generating", jobs.busy_seconds),
        ]


def _publish(app: FastAPI) -> None:
    """Put what the routes read by themselves into the OpenAPI document."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        found = plain()
        kinds = schema()
        found.setdefault("components", {}).setdefault("schemas", {}).update(kinds.pop("$defs", {}), Generate=kinds)
        reference = {"schema": {"$ref": "#/components/schemas/Generate"}}
        body = {"required": True, "content": {"application/json": reference}}
        found["paths"]["/v1/generate"]["post"]["requestBody"] = body
        sent = {"schema": {"type": "string", "format": "binary"}}
        found["paths"]["/v1/audio"]["post"]["requestBody"] = {"content": {"application/octet-stream": sent}}
        return found

    app.openapi = document  # type: ignore[method-assign]
