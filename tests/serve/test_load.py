"""Many clients at once."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from tests.serve.conftest import Client, serving
from tests.serve.test_http import as_pcm16, samples


@pytest.mark.slow
def test_two_hundred_requests_of_eight_clients_are_all_answered_and_none_mixed_up(
    toy_int8: Bundle, tmp_path: Path
) -> None:
    """One worker is killed, twenty are cancelled, twenty more malformed, and the queue is full at times."""
    seeds, cancelled = range(200), set(range(5, 200, 10))
    with Pipeline.from_bundle(toy_int8.path, threads=1, keep_loaded=True) as pipeline:
        wanted = {
            seed: pipeline.generate(GenerateRequest("warm pad", seconds=1, steps=2, seed=seed)).audio for seed in seeds
        }
    refused = []

    def ask(seed: int) -> tuple[int, str]:
        client = Client(served.address)
        if seed % 10 == 0:
            assert client.client.post("/v1/generate", content='{"prompt": 1}').status_code == 422
        while (answer := client.post(seed=seed, model="one" if seed % 2 else "two")).status_code == 429:
            refused.append(seed)
            time.sleep(0.05)
        job = answer.json()["id"]
        if seed in cancelled:
            client.client.delete(f"/v1/jobs/{job}")
        if seed == 100:
            client.await_event(job, "started")
            served.worker().kill()
        return seed, job

    with serving(toy_int8, tmp_path, queue=4) as served:
        memory = []
        with ThreadPoolExecutor(8) as clients:
            for seed, job in clients.map(ask, seeds):
                state = served.ended(job)["state"]
                assert state in (("done", "cancelled") if seed in cancelled else ("done", "failed"))
                if state == "done":
                    heard = samples(served.client.get(f"/v1/jobs/{job}/audio").content)
                    assert np.array_equal(heard, as_pcm16(wanted[seed]))
                if seed in (120, 160, 199):
                    memory.append(served.worker().memory_info().rss)
        counts = served.jobs.counts
    assert refused
    assert counts["done"] + counts["failed"] + counts["cancelled"] == 200
    assert counts["restarts"] >= 1
    assert counts["failed"] <= 1
    assert 10 <= counts["cancelled"] <= 20
    assert max(memory) < 1.15 * memory[0]
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []
