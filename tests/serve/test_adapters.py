"""LoRAs of a server: clients name them, give a strength and noise levels, and never a file."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli import app
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.runtime.audio import read_metadata
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.runtime.setting_values import AdapterRequest
from sa3_convert.serve.adapters import named
from sa3_convert.serve.form import form_of
from sa3_convert.serve.page import command_of
from tests.checkpoint.adapters import toy_adapter
from tests.conftest import GOLDEN
from tests.serve.conftest import Serving, serving
from tests.serve.test_http import as_pcm16, samples


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("secret")
    for name, kind in (("warm", "lora"), ("warm:1", "dora-rows"), ("cut", "lora")):
        shutil.copy(GOLDEN / "small" / "lora" / f"{kind}.safetensors", folder / f"{name}.safetensors")
    return named(sorted(folder.iterdir()))


@pytest.fixture(scope="module")
def served(toy_slots: Bundle, loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(toy_slots, tmp_path_factory.mktemp("served"), adapters=loras) as running:
        yield running


def test_the_samples_are_those_of_run_and_names_stand_for_files(
    served: Serving, toy_slots: Bundle, loras: dict[str, Path]
) -> None:
    settings: dict[str, Any] = {"prompt": "warm pad", "seconds": 1, "steps": 2, "seed": 7}
    asked = {
        "warm:0.5@0.2-1": AdapterRequest(loras["warm"], 0.5, 0.2),
        "warm:1:-0.4": AdapterRequest(loras["warm:1"], -0.4),
    }
    made = {}
    for texts in ([], list(asked)):
        job = served.start(**settings, adapters=texts)
        told = served.ended(job)
        assert told["state"] == "done", told["sentence"]
        assert told["result"]["request"]["adapters"] == texts
        made[len(texts)] = samples(served.client.get(f"/v1/jobs/{job}/audio").content)
    with Pipeline.from_bundle(toy_slots.path, "mnn", threads=1) as pipeline:
        plain, adapted = (
            pipeline.generate(GenerateRequest(**settings, adapters=given)).audio for given in ((), (*asked.values(),))
        )
    np.testing.assert_array_equal(made[0], as_pcm16(plain))
    np.testing.assert_array_equal(made[2], as_pcm16(adapted))
    assert (made[0] != made[2]).any()
    files = [json.loads((served.folder / f"{job}.json").read_text()), read_metadata(served.folder / f"{job}.wav")]
    assert [found["request"]["adapters"] for found in files] == [list(asked)] * 2
    assert {found["models"]["dit"] for found in files} == {toy_slots.artifact(Component.DIT, "mnn-slots").sha256}
    assert "secret" not in json.dumps([files, told, served.events(job)])


@pytest.mark.parametrize(
    ("adapters", "sentence"),
    [
        (["cold"], r"There is no adapter 'cold'. There are: cut, warm, warm:1."),
        (["warm2:0.5"], "There is no adapter"),
        (["/etc/passwd"], "There is no adapter"),
        (["../warm.safetensors"], "There is no adapter"),
        (["warm:x"], "There is no adapter"),
        ([""], "There is no adapter"),
        (["warm:nan"], "finite"),
        (["warm:0.5@0.8-0.2"], "no interval of noise levels"),
        ([{"path": "warm"}], "expected a list of texts"),
        ("warm", "expected a list of texts"),
    ],
)
def test_what_names_no_adapter_is_refused_in_a_sentence(served: Serving, adapters: Any, sentence: str) -> None:
    answer = served.post(adapters=adapters)
    assert answer.status_code == 422
    assert sentence in answer.json()["detail"]
    assert "secret" not in answer.text


def test_each_model_says_which_it_takes(served: Serving) -> None:
    assert {m["name"]: m["adapters"] for m in served.client.get("/v1/models").json()} == {
        "one": ["cut", "warm", "warm:1"],
        "two": [],
    }
    assert "This model has none" in served.post(model="two", adapters=["warm"]).json()["detail"]
    document = served.client.get("/openapi.json").json()["components"]["schemas"]
    found = document["Generate"]["properties"]["adapters"]
    assert (found["type"], found["items"]) == ("array", {"type": "string"})
    assert "NAME[:STRENGTH][@LOW-HIGH]" in found["description"]
    assert "AdapterRequest" not in document


def test_what_is_wrong_with_a_file_later_is_told_of_its_name(served: Serving, loras: dict[str, Path]) -> None:
    loras["cut"].write_bytes(loras["cut"].read_bytes()[:-100])
    told = served.ended(served.start(adapters=["cut:0.5"]))
    assert told["state"] == "failed"
    assert told["sentence"].startswith("cut ")


def test_notes_name_no_file_either(served: Serving) -> None:
    job = served.start(prompt="pad", seconds=1, steps=1, adapters=["warm:0.5@0.001-0.002", "warm:1"])
    told = served.ended(job)
    (note,) = (one for one in told["result"]["warnings"] if "no effect" in one)
    assert note.startswith("warm:0.5@0.001-0.002 has no effect")
    assert "secret" not in json.dumps([told, served.events(job), (served.folder / f"{job}.json").read_text()])


def test_the_page_offers_them_with_a_strength(served: Serving, loras: dict[str, Path]) -> None:
    with gr.Blocks():
        form = form_of(served.jobs)
    fields = {field.label: field for field in form.fields.values()}
    values = {field: field.value for field in form.fields.values()}

    def settings() -> dict[str, Any]:
        return asyncio.run(form.settings(values, served.jobs))

    assert "adapters" not in settings()
    values[fields["Strength of warm:1, 0 is without it"]] = 0.5
    assert settings()["adapters"] == ["warm:1:0.5"]
    job = served.jobs.known[served.start(adapters=["warm:1:0.5"])]
    assert f"--adapter {loras['warm:1']}:0.5@0-1 " in command_of(served.jobs, job)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.st and .*b/a\.safetensors would both be called 'a'"):
        named([tmp_path / "a.st", tmp_path / "b" / "a.safetensors"])


def test_the_command_gives_each_model_what_it_takes(
    toy: Path,
    toy_slots: Bundle,
    toy_int8: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: list[Any] = []
    monkeypatch.setattr("sa3_convert.serve.server.serve", lambda served, *_, **__: found.append(served))
    path = toy_adapter(tmp_path / "a.safetensors", toy)

    def serve(*bundles: Bundle) -> int:
        arguments = ["serve", *(str(one.path) for one in bundles), "-o", str(tmp_path / "out")]
        return app.run([*arguments, "--adapter", str(path)])

    assert serve(toy_slots, toy_int8) == 0
    slotted, plain = found[0].values()
    assert (dict(slotted.adapters), dict(plain.adapters)) == ({"a": path}, {})
    assert "its models take adapters" in slotted.chosen
    assert "adapters" not in plain.chosen
    capsys.readouterr()
    assert serve(toy_int8) == 3
    assert "--adapter-slots" in capsys.readouterr().err
    path.write_bytes(b"not one")
    assert serve(toy_slots) == 3
