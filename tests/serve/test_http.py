"""The HTTP interface: what `run` makes, jobs and their ends, and who may ask."""

import asyncio
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli.app import run
from sa3_convert.runtime.audio import read_metadata
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.serve import jobs as jobs_module
from sa3_convert.serve.http import _grown, schema
from sa3_convert.serve.jobs import Job, _Process
from tests.serve.conftest import Client, Serving, serving
from tests.test_readme import ROOT, blocks

LONG = {"seconds": 100, "steps": 1000}
"""More than any of these tests waits for."""


def samples(content: bytes) -> np.ndarray:
    return np.asarray(soundfile.read(io.BytesIO(content), dtype="int16")[0])


def made_by_pipeline(bundle: Bundle, **settings: object) -> np.ndarray:
    with Pipeline.from_bundle(bundle.path, threads=1) as pipeline:
        return as_pcm16(pipeline.generate(GenerateRequest(**settings)).audio)  # type: ignore[arg-type]


def as_pcm16(audio: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(audio.T.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)


def test_the_samples_are_those_of_run_in_every_format(served: Serving, toy_int8: Bundle) -> None:
    settings = {"prompt": "warm pad", "seconds": 1.5, "steps": 3, "seed": 7}
    job = served.start(**settings)
    wanted = made_by_pipeline(toy_int8, **settings)
    told = served.ended(job)
    assert told["state"] == "done"
    address = f"/v1/jobs/{job}/audio"
    assert np.array_equal(samples(served.client.get(address).content), wanted)
    assert np.array_equal(samples(served.client.get(address, params={"format": "flac"}).content), wanted)
    raw = served.client.get(address, params={"format": "pcm"}).content
    assert np.array_equal(np.frombuffer(raw, "<i2").reshape(-1, 2), wanted)
    assert read_metadata(served.folder / f"{job}.flac")["request"]["seed"] == 7
    kept = json.loads((served.folder / f"{job}.json").read_text())
    assert kept["request"] == told["result"]["request"]
    assert kept["peak"] == pytest.approx(np.abs(wanted).max() / 32768, abs=1e-4)


def test_what_is_listened_to_while_it_is_made_is_the_same(served: Serving) -> None:
    job = served.start(seconds=20)
    heard = served.client.get(f"/v1/jobs/{job}/audio").content
    assert served.ended(job)["state"] == "done"
    assert heard == served.client.get(f"/v1/jobs/{job}/audio").content
    assert [event["event"] for event in served.events(job)].count("audio") > 1


def test_audio_is_handed_on_as_it_grows_and_cut_where_it_ends_early(tmp_path: Path) -> None:
    async def listened(ends: bool) -> list[bytes]:
        job, file = Job("a", "m", {}, tmp_path / "a.wav"), (tmp_path / "grows").open("wb", buffering=0)
        stream = _grown(job, (tmp_path / "grows").open("rb"), 6)
        file.write(b"abc")
        heard = [await anext(stream)]
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        assert not waiting.done()
        if ends:
            job.end("failed", "It is silent.")
        else:
            file.write(b"def")
            job.tell("audio")
        return [*heard, await waiting]

    assert asyncio.run(listened(False)) == [b"abc", b"def"]
    with pytest.raises(ConnectionAbortedError, match="silent"):
        asyncio.run(listened(True))


def test_a_job_tells_each_step_and_can_be_followed_from_anywhere(served: Serving) -> None:
    job = served.start(steps=3, seed="random")
    events = served.events(job)
    assert [(e["done"], e["of"]) for e in events if e["event"] == "step"] == [(1, 3), (2, 3), (3, 3)]
    assert (events[0]["event"], events[-1]["event"]) == ("queued", "done")
    assert served.events(job, **{"last-event-id": str(len(events) - 1)}) == events[-1:]
    told = served.ended(job)
    assert told["settings"]["seed"] == told["result"]["request"]["seed"]


def test_a_running_and_a_waiting_job_are_cancelled_at_once(served: Serving) -> None:
    running, waiting = served.start(**LONG), served.start(**LONG)
    served.await_event(running, "step")
    before = time.monotonic()
    assert served.client.delete(f"/v1/jobs/{waiting}").json()["state"] == "cancelled"
    served.client.delete(f"/v1/jobs/{running}")
    assert served.ended(running)["state"] == "cancelled"
    assert served.ended(served.start())["state"] == "done"
    assert time.monotonic() - before < 8
    assert served.client.get(f"/v1/jobs/{running}/audio").status_code == 409
    assert [p for p in served.folder.iterdir() if p.name.endswith(".partial") or running in p.name] == []


def test_a_worker_that_does_not_heed_a_cancel_is_ended(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    job = served.start(**LONG)
    served.await_event(job, "step")
    served.worker().suspend()
    served.client.delete(f"/v1/jobs/{job}")
    assert served.ended(job)["state"] == "cancelled"
    assert served.ended(served.start())["state"] == "done"


def test_a_killed_worker_costs_its_job_and_no_other(served: Serving) -> None:
    job, later = served.start(**LONG), served.start()
    served.await_event(job, "step")
    served.worker().kill()
    told = served.ended(job)
    assert told["state"] == "failed"
    assert "memory ran out" in told["sentence"]
    assert served.ended(later)["state"] == "done"
    served.worker().kill()
    assert served.ended(served.start())["state"] == "done"
    assert [p.name for p in served.folder.iterdir() if p.name.endswith(".partial")] == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "not JSON"),
        ("[]", "no JSON object"),
        ("{}", "prompt is missing"),
        ('{"prompt": "x", "prompt": "y"}', "twice"),
        ('{"prompt": "x", "secs": 3}', "seconds"),
        ('{"prompt": "x", "seconds": 1e9}', "limit"),
        ('{"prompt": "x", "steps": true}', "whole number"),
        ('{"prompt": "x", "model": "three"}', "one, two"),
        ('{"prompt": "x", "model": ["one"]}', "no model"),
        ('{"prompt": "x", "init_audio": "/etc/passwd"}', "id of an upload"),
        ('{"prompt": "x", "inpaint_audio": "../../x", "inpaint": [[0, 1]]}', "id of an upload"),
        ('{"prompt": "x", "init_audio": 7}', "id of an upload"),
        ('{"prompt": "x", "output": "a.wav"}', "no setting"),
        ("[" * 10000, "JSON"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(served: Serving, body: str, said: str) -> None:
    answer = served.client.post("/v1/generate", content=body)
    assert answer.status_code == 422
    assert said in answer.json()["detail"]


def test_a_body_of_any_length_is_not_read(served: Serving) -> None:
    assert served.client.post("/v1/generate", content=b" " * (1 << 26)).status_code == 413


def test_a_full_queue_says_when_to_come_back(served: Serving) -> None:
    made = [served.start(**LONG)]
    served.await_event(made[0], "started")
    made += [served.start(**LONG) for _ in range(served.jobs.queue)]
    answer = served.post()
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert "wait already" in answer.json()["detail"]
    for job in made:
        served.client.delete(f"/v1/jobs/{job}")
    assert {served.ended(job)["state"] for job in made} == {"cancelled"}


def wav(seconds: float, channels: int = 2) -> bytes:
    made = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (int(22050 * seconds), channels))
    soundfile.write(made, noise, 22050, format="WAV")
    return made.getvalue()


def test_audio_is_uploaded_and_generated_from(served: Serving, toy_int8: Bundle, tmp_path: Path) -> None:
    (tmp_path / "given").write_bytes(wav(1.5))
    name = served.client.post("/v1/audio", content=wav(1.5)).json()["id"]
    assert name == served.client.post("/v1/audio", content=wav(1.5)).json()["id"]
    more = {"prompt": "warm pad", "steps": 2, "init_noise_level": 0.5}
    job = served.client.post("/v1/generate", json={**more, "init_audio": name}).json()["id"]
    assert served.ended(job)["state"] == "done"
    wanted = made_by_pipeline(toy_int8, **more, init_audio=tmp_path / "given")
    assert np.array_equal(samples(served.client.get(f"/v1/jobs/{job}/audio").content), wanted)
    regions = {"inpaint_audio": job, "inpaint": [[0.2, 0.4], [0.8, 1.0]]}
    again = served.ended(served.start(seconds=1.5, **regions))
    assert again["state"] == "done"
    assert again["result"]["request"]["inpaint"] == regions["inpaint"]


def test_given_audio_that_cannot_be_used_fails_its_job_in_a_sentence(served: Serving) -> None:
    for content, said in ((b"no audio", "read as audio"), (wav(0.1, channels=6), "mono or stereo")):
        name = served.client.post("/v1/audio", content=content).json()["id"]
        told = served.ended(served.start(init_audio=name))
        assert told["state"] == "failed"
        assert said in told["sentence"]
        assert str(served.folder) not in told["sentence"]


def test_given_audio_that_is_gone_when_its_turn_comes_fails_its_job_and_no_other(served: Serving) -> None:
    name = served.client.post("/v1/audio", content=wav(0.7)).json()["id"]
    first, job = served.start(**LONG), served.start(init_audio=name)
    (served.folder / "uploads" / name).unlink()
    served.client.delete(f"/v1/jobs/{first}")
    told = served.ended(job)
    assert told["state"] == "failed"
    assert "Given audio is named by the id" in told["sentence"]
    assert served.ended(served.start())["state"] == "done"


def test_workers_that_all_end_at_once_fail_their_job(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Stillborn(_Process):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            started.append(self)
            self.process.kill()

    monkeypatch.setattr(jobs_module, "_Process", Stillborn)
    served.worker().kill()
    told = served.ended(served.start())
    assert told["state"] == "failed"
    assert "Several processes in a row ended before they took it" in told["sentence"]
    # The first of the dead was the one of before.
    assert len(started) == 2
    monkeypatch.undo()
    assert served.ended(served.start())["state"] == "done"


def test_uploads_are_bounded_and_leave_nothing(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set((served.folder / "uploads").iterdir())
    monkeypatch.setattr(jobs_module, "MAX_UPLOAD", 1 << 20)
    answer = served.client.post("/v1/audio", content=b"\0" * ((1 << 20) + 1))
    assert answer.status_code == 422
    assert "1 MiB" in answer.json()["detail"]
    assert served.client.post("/v1/audio", content=b"").status_code == 422
    assert set((served.folder / "uploads").iterdir()) == before


def test_other_hosts_and_other_sites_are_refused(served: Serving) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "[::1", ""):
        assert served.client.get("/health", headers={"host": host}).status_code == 421
    assert served.client.get("/health", headers={"origin": "http://evil.example"}).status_code == 403
    assert served.client.get("/health", headers={"origin": "null"}).status_code == 403
    assert served.client.get("/health", headers={"origin": "http://[::1"}).status_code == 403
    fine = served.client.get("/health", headers={"origin": served.address})
    assert fine.status_code == 200
    assert "default-src 'self'" in fine.headers["content-security-policy"]


def test_a_token_is_asked_of_everybody(toy_int8: Bundle, tmp_path: Path) -> None:
    with serving(toy_int8, tmp_path, token="secret") as served:
        assert served.client.get("/v1/models").status_code == 401
        assert served.client.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert served.client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert "<form" in served.client.get("/", headers={"accept": "text/html"}).text
        assert served.client.post("/login", data={"token": "wrong"}).status_code == 401
        opened = served.client.post("/login", data={"token": "secret"})
        assert "httponly" in opened.headers["set-cookie"].lower()
        assert served.client.get("/v1/models").status_code == 200


def test_models_health_and_figures_are_told(served: Serving) -> None:
    assert served.ended(served.start())["state"] == "done"
    assert [model["name"] for model in served.client.get("/v1/models").json()] == ["one", "two"]
    assert served.client.get("/health").json()["status"] == "ok"
    lines = dict(x.rsplit(" ", 1) for x in served.client.get("/metrics").text.splitlines() if x[0] != "#")
    assert float(lines['sa3_jobs_total{state="done"}']) >= 1
    assert float(lines["sa3_audio_seconds_total"]) >= 1


def test_the_schema_is_the_batch_lines(served: Serving) -> None:
    assert schema()["properties"].keys() == {f.name for f in dataclasses.fields(GenerateRequest)} | {"model"}
    document = served.client.get("/openapi.json").json()
    body = document["paths"]["/v1/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/Generate"}
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]


def test_the_guides_client_runs_as_it_stands(served: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, client = blocks((ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(client.replace("http://127.0.0.1:7860", served.address), "guide.md", "exec"), {})
    assert soundfile.info("pad.wav").duration == 10


def test_only_who_asks_for_a_token_listens_to_others(
    toy_int8: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["serve", str(toy_int8.path), "--host", "0.0.0.0"]) == 2
    assert "--token" in capsys.readouterr().err
    assert run(["serve", str(toy_int8.path), "--engine", "nonsense"]) == 2
    assert "onnxruntime-int8" in capsys.readouterr().err
    assert run(["serve", str(tmp_path / "nowhere")]) == 3


COMMAND = [sys.executable, "-m", "sa3_convert", "serve"]


def test_a_signal_cancels_what_runs_and_leaves_nothing_half_written(toy_int8: Bundle, tmp_path: Path) -> None:
    command = [*COMMAND, str(toy_int8.path), "-o", str(tmp_path / "out"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        served = Client(next(line for line in process.stderr if line.startswith("Open ")).split()[1])
        job = served.start(**LONG)
        served.await_event(job, "step")
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 143
    assert "1 generations were cancelled" in said
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == []


ALONE = """
import json, os, subprocess, sys, urllib.request
command, bundle, out = sys.argv[1:]
process = subprocess.Popen([sys.executable, "-m", "sa3_convert", "serve", bundle, "-o", out, "--port", "0"],
                           stderr=subprocess.PIPE, text=True)
address = next(line for line in process.stderr if line.startswith("Open ")).split()[1]
body = json.dumps({"prompt": "pad", "seconds": 1, "steps": 1}).encode()
job = json.load(urllib.request.urlopen(address + "v1/generate", body))["id"]
print(len(urllib.request.urlopen(address + f"v1/jobs/{job}/audio").read()))
process.terminate()
"""


def test_it_works_where_there_is_no_network(toy_int8: Bundle, tmp_path: Path) -> None:
    alone = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"No namespace without a network can be made here: {error}.")
    command = [*alone, sys.executable, "-c", ALONE, "serve", str(toy_int8.path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"no_proxy": "*"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 44100 * 4
