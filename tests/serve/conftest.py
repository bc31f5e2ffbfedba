"""A server in a thread of the tests' process, and its worker beside it."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.serve.jobs import Jobs
from sa3_convert.serve.server import _listening, server
from sa3_convert.serve.worker import Served


class Client:
    """How a server is asked."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.client = httpx.Client(base_url=self.address, timeout=60, trust_env=False)

    def post(self, **settings: Any) -> Any:
        return self.client.post("/v1/generate", json={"prompt": "warm pad", "seconds": 1, "steps": 2, **settings})

    def start(self, **settings: Any) -> str:
        answer = self.post(**settings)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def events(self, job: str, **headers: str) -> list[dict[str, Any]]:
        """Return all events of a job, when it is over."""
        text = self.client.get(f"/v1/jobs/{job}/events", headers=headers).text
        return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]

    def ended(self, job: str) -> dict[str, Any]:
        self.events(job)
        return dict(self.client.get(f"/v1/jobs/{job}").json())

    def await_event(self, job: str, event: str) -> None:
        with self.client.stream("GET", f"/v1/jobs/{job}/events") as answer:
            assert any(line == f"event: {event}" for line in answer.iter_lines())


class Serving(Client):
    """A server of this process."""

    def __init__(self, jobs: Jobs, port: int) -> None:
        super().__init__(f"http://127.0.0.1:{port}")
        self.jobs, self.folder = jobs, jobs.folder

    def worker(self) -> psutil.Process:
        """Return the process that holds the models."""
        assert self.jobs._worker is not None
        return next(iter(psutil.Process(self.jobs._worker.process.pid).children()))


@contextmanager
def serving(
    bundle: Bundle,
    folder: Path,
    token: str | None = None,
    queue: int = 8,
    keep_bytes: int = 1 << 40,
    adapters: Mapping[str, Path] | None = None,
) -> Iterator[Serving]:
    one = Served(bundle.path, "mnn", {"threads": 1}, adapters=dict(adapters or {}))
    served = {"one": one, "two": replace(one, adapters={})}
    jobs = Jobs(served, folder, queue=queue, keep_bytes=keep_bytes)
    with _listening("127.0.0.1", 0) as listening:
        run = server(jobs, "127.0.0.1", token, lambda _: None)
        thread = threading.Thread(target=run.run, args=([listening],))
        thread.start()
        while not run.started:
            time.sleep(0.01)
        try:
            yield Serving(jobs, listening.getsockname()[1])
        finally:
            run.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def served(toy_int8: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(toy_int8, tmp_path_factory.mktemp("served")) as running:
        yield running
