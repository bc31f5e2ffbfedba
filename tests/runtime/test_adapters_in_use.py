"""What adapters are told to be is what is heard, and written down: noise levels, strengths, files that change."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli import app
from sa3_convert.components import SLOT_INPUTS, Component
from sa3_convert.errors import BundleError, LoraError
from sa3_convert.runtime.adapters import Adapters, stored_weights
from sa3_convert.runtime.audio import read_metadata
from sa3_convert.runtime.events import Report, Stepped
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.runtime.setting_values import AdapterRequest
from tests.bundles import RANK
from tests.checkpoint.adapters import QKV, SECONDS, toy_adapter
from tests.checkpoint.test_lora_names import peft, renamed

SETTINGS: dict[str, Any] = {
    "prompt": "pad",
    "seconds": 0.5,
    "steps": 5,
    "sampler": "euler",
    "dist_shift": {"type": "none"},
}


@pytest.fixture
def path(toy: Path, tmp_path: Path) -> Path:
    return toy_adapter(tmp_path / "a.safetensors", toy)


def made(bundle: Bundle, *adapters: str, **settings: Any) -> Report:
    with Pipeline.from_bundle(bundle.path, "mnn", threads=1) as pipeline:
        request = GenerateRequest.from_json({**SETTINGS, **settings, "adapters": list(adapters)})
        return pipeline.generate(request, allow=["clipping"]).report


def test_a_bound_that_names_the_level_of_a_step_holds_it(toy_slots: Bundle, path: Path) -> None:
    """Levels are float32: that of the second of five equal steps is above 0.8."""
    for exact, wide in (("0-0.8", "0-0.81"), ("0.2-0.6", "0.19-0.61"), ("0.6-1", "0.59-1")):
        expected = made(toy_slots, f"{path}@{wide}").latents
        np.testing.assert_array_equal(made(toy_slots, f"{path}@{exact}").latents, expected)


@pytest.mark.parametrize("numbers", [(0.123456789, 0.1, 0.987654321), (-1.00000001e-9, 1e-7, 1.0), (3e30, 0.0, 0.5)])
def test_numbers_are_written_so_that_they_are_read_back(numbers: tuple[float, float, float]) -> None:
    """Samples follow from every digit, and results of a batch are told apart by this text."""
    request = AdapterRequest(Path("a.st"), *numbers)
    assert AdapterRequest.parse(str(request)) == request


def test_what_runs_between_steps_alone_is_found_before_anything_is_made(
    toy: Path, toy_slots: Bundle, tmp_path: Path
) -> None:
    """Runge-Kutta evaluates the middle of a step, where both are."""
    paths = [toy_adapter(tmp_path / f"{n}.safetensors", toy, rank=RANK, seed=n) for n in range(2)]
    request = {**SETTINGS, "adapters": [f"{paths[0]}@0.4-1", f"{paths[1]}@0-0.6"], "sampler": "rk4", "steps": 1}
    with Pipeline.from_bundle(toy_slots.path, "mnn", threads=1) as pipeline, pytest.raises(LoraError, match="rank"):
        next(pipeline.stream(GenerateRequest.from_json(request)))


def test_an_adapter_that_no_step_is_for_is_told(toy_slots: Bundle, path: Path) -> None:
    told = made(toy_slots, f"{path}@0.85-0.95").warnings
    assert [note for note in told if "has no effect" in note] == [
        f"{path}:1@0.85-0.95 has no effect: no step is at one of its noise levels."
    ]


def test_what_the_duration_alone_would_lose_is_found_before_anything_is_made(
    toy: Path, toy_slots: Bundle, tmp_path: Path
) -> None:
    paths = [toy_adapter(tmp_path / f"{n}.safetensors", toy, "lora", [SECONDS], rank=RANK, seed=n) for n in range(2)]
    request = GenerateRequest.from_json({**SETTINGS, "adapters": [str(path) for path in paths]})
    with Pipeline.from_bundle(toy_slots.path, "mnn", threads=1) as pipeline, pytest.raises(LoraError, match="rank"):
        next(pipeline.stream(request))


def test_layers_narrower_than_the_slots_are_compressed_too(toy: Path, toy_slots: Bundle, tmp_path: Path) -> None:
    layers = [QKV, "model.to_timestep_embed.0", "model.preprocess_conv", SECONDS]
    paths = [toy_adapter(tmp_path / f"{n}.safetensors", toy, "lora", layers, rank=150, seed=n) for n in range(2)]
    adapters = Adapters(toy_slots.layout, 200, stored_weights(toy_slots))
    requests = [AdapterRequest(path) for path in paths]
    for component in (Component.NUMBER_CONDITIONER, Component.DIT):
        assert adapters.composed(component, requests).compressed_db > 100


def test_other_settings_beside_a_file_are_read_again(toy: Path, toy_slots: Bundle, tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    theirs = renamed(toy_adapter(tmp_path / "ours", toy, "lora", [QKV]), tmp_path / "p.safetensors", peft, {})
    adapters = Adapters(toy_slots.layout, RANK, stored_weights(toy_slots))
    before = adapters.composed(Component.DIT, [AdapterRequest(theirs)]).feeds[SLOT_INPUTS[1]]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 16}))
    after = adapters.composed(Component.DIT, [AdapterRequest(theirs)]).feeds[SLOT_INPUTS[1]]
    np.testing.assert_array_equal(after, 2 * before)


def test_files_that_were_not_used_lately_leave_memory(toy_slots: Bundle, path: Path) -> None:
    adapters = Adapters(toy_slots.layout, RANK, stored_weights(toy_slots))
    for number in range(20):
        other = path.with_name(f"{number}.safetensors")
        shutil.copy(path, other)
        adapters.open([AdapterRequest(path), AdapterRequest(other)])
    assert len(adapters._opened) == 8
    assert path in adapters._opened
    everything = [AdapterRequest(path.with_name(f"{number}.safetensors")) for number in range(20)]
    adapters.open(everything)
    assert len(adapters._opened) == 20


def test_bases_are_not_taken_from_weights_with_loras_in_them(toy: Path, path: Path, tmp_path: Path) -> None:
    """Merging takes those of the weight before any adapter, which is not there any more."""
    second = toy_adapter(tmp_path / "xs.safetensors", toy, "lora-xs", seed=1)
    with Pipeline.from_checkpoint(toy, loras=[str(path)]) as pipeline:
        pipeline.adapters = [AdapterRequest(second)]
        with pytest.raises(LoraError, match="without its bases"):
            next(pipeline.stream(GenerateRequest.from_json(SETTINGS)))


def test_magnitudes_are_not_of_weights_that_came_into_the_place_of_those_that_run(
    toy_slots: Bundle, toy: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(toy_slots.path, folder)
    bundle = Bundle.open(folder)
    weights = stored_weights(bundle)
    layer = QKV.removeprefix("model.")
    assert weights(Component.DIT, layer).any()
    model = bundle.file(Component.DIT)
    shutil.copy(model, tmp_path / "other")
    (tmp_path / "other").replace(model)
    with pytest.raises(BundleError, match="was replaced or changed"):
        weights(Component.DIT, layer)


def test_a_report_has_the_adapters_of_the_pipeline_as_they_were_at_the_start(toy_slots: Bundle, path: Path) -> None:
    given = AdapterRequest(path, 0.123456789, 0.1, 1.0)
    request = GenerateRequest.from_json(SETTINGS)
    with Pipeline.from_bundle(toy_slots.path, "mnn", threads=1, adapters=[given]) as pipeline:
        for event in pipeline.stream(request, allow=["clipping"]):
            if isinstance(event, Stepped):
                pipeline.adapters = ()
            elif isinstance(event, Report):
                report = event
    assert report.request.adapters == (given,)
    again = GenerateRequest.from_json(report.request.to_json())
    assert again.adapters == (given,)
    np.testing.assert_array_equal(made(toy_slots, str(given)).latents, report.latents)


def test_a_batch_finds_an_adapter_that_is_not_there_before_its_first_line(
    toy_slots: Bundle, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "pad", "seconds": 0.5, "steps": 1, "adapters": [name]} for name in (path.name, "b.safetensors")]
    (tmp_path / "batch.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    assert app.run(["run", str(toy_slots.path), "--batch", str(tmp_path / "batch.jsonl"), "-o", str(out)]) == 3
    assert "Line 2: " in (told := capsys.readouterr().err)
    assert "b.safetensors is missing" in told
    assert not out.exists()


def test_a_file_tells_which_adapters_made_it_and_a_replay_says_if_they_are_others(
    toy: Path, toy_slots: Bundle, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = tmp_path / "first.wav", tmp_path / "again.wav"
    wanted = ["--prompt", "pad", "--seconds", "0.5", "--steps", "1", "--adapter", str(path)]
    assert app.run(["run", str(toy_slots.path), *wanted, "-o", str(first)]) == 0
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_metadata(first)["adapters"] == [{"name": path.name, "sha256": sha256}]
    replay = ["run", str(toy_slots.path), "--from", str(first), "-o", str(again)]
    capsys.readouterr()
    assert app.run(replay) == 0
    assert "is another file" not in capsys.readouterr().err
    path.unlink()
    toy_adapter(path, toy, seed=9)
    assert app.run([*replay, "--force"]) == 0
    assert "a.safetensors is another file than it was then" in capsys.readouterr().err
