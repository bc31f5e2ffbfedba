"""Adapters at run time: composed without torch, they do through slots what they do when they are merged."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sa3_convert.bundle.manifest import ArtifactKind
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.bundle import verify_bundle
from sa3_convert.check.inputs import sample_inputs
from sa3_convert.check.metrics import sums_of
from sa3_convert.checkpoint.lora_file import LORA_TYPES, LoraRequest
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.cli import app
from sa3_convert.components import ADAPTED, SLOT_INPUTS, Component, contract
from sa3_convert.errors import BundleError, CheckpointError, LoraError, UsageError
from sa3_convert.networks.build import build_network
from sa3_convert.ort import OrtSession
from sa3_convert.runtime.adapters import Adapters, rank_of, stored_weights
from sa3_convert.runtime.audio import read_audio
from sa3_convert.runtime.engines import EngineName, bundle_engine
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest, located
from sa3_convert.runtime.setting_values import AdapterRequest
from tests.bundles import RANK
from tests.checkpoint.adapters import CONV, QKV, SECONDS, key, toy_adapter
from tests.conftest import GOLDEN

ADAPTERS = GOLDEN / "small" / "lora"
"""For a checkpoint of the same dimensions as the toy."""
LAYERS = [QKV, CONV, SECONDS, "model.transformer.layers.1.ff.ff.0.proj", "model.to_timestep_embed.2"]


@pytest.fixture
def bundle(toy_slots: Bundle) -> Bundle:
    return toy_slots


@pytest.fixture
def int8(toy_int8_slots: Bundle) -> Bundle:
    return toy_int8_slots


def adapters_of(bundle: Bundle, rank: int = RANK) -> Adapters:
    return Adapters(bundle.layout, rank, stored_weights(bundle))


def merged(toy: Path, component: Component, requests: Sequence[AdapterRequest]) -> tuple[dict[str, Any], Any]:
    """Return inputs, and what the network gives for them with adapters in its weights."""
    checkpoint = Checkpoint.open(toy).with_loras([LoraRequest(r.path, r.strength) for r in requests])
    sample = sample_inputs(component, checkpoint.layout, seed=5, latents=33)
    network = build_network(component, checkpoint.layout, checkpoint.state(component))
    inputs = [torch.from_numpy(sample.feeds[port.name]) for port in contract(component, checkpoint.layout).inputs]
    return dict(sample.feeds), network(*inputs).numpy()


def ratio(expected: Any, found: Any) -> float:
    return sums_of(expected, found, what="output").fidelity().signal_to_noise_db


@cache
def session(path: Path, engine: EngineName, component: Component) -> Any:
    opened = Bundle.open(path)
    return bundle_engine(opened, engine, {}, rank=rank_of(opened, engine)).load(component)


Through = Callable[[Bundle, EngineName, Component, Sequence[AdapterRequest]], float]


@pytest.fixture
def through_slots(toy: Path) -> Through:
    """Return how close a model with adapters in its slots is to the network with them in its weights."""

    def run(bundle: Bundle, engine: EngineName, component: Component, requests: Sequence[AdapterRequest]) -> float:
        feeds, expected = merged(toy, component, requests)
        composed = adapters_of(bundle).composed(component, requests).feeds
        (found,) = session(bundle.path, engine, component).run({**feeds, **composed}).values()
        return ratio(expected, found)

    return run


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["lora", "dora-rows"])
@pytest.mark.parametrize("engine", ["mnn", "onnxruntime"])
def test_golden_adapters_do_what_they_do_merged(
    through_slots: Through, bundle: Bundle, engine: EngineName, kind: str, strength: float
) -> None:
    request = AdapterRequest(ADAPTERS / f"{kind}.safetensors", strength)
    assert through_slots(bundle, engine, Component.DIT, [request]) > 110


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("kind", LORA_TYPES)
def test_every_type_does_what_it_does_merged(
    toy: Path, through_slots: Through, bundle: Bundle, tmp_path: Path, kind: str, strength: float
) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", toy, kind, LAYERS)
    for component in ADAPTED:
        assert through_slots(bundle, "mnn", component, [AdapterRequest(path, strength)]) > 110


def test_adapters_follow_one_another(toy: Path, through_slots: Through, bundle: Bundle, tmp_path: Path) -> None:
    first = toy_adapter(tmp_path / "1.safetensors", toy, "dora-rows", LAYERS, seed=1)
    second = toy_adapter(tmp_path / "2.safetensors", toy, "bora", LAYERS, seed=2)
    for order in ([first, second], [second, first]):
        assert through_slots(bundle, "mnn", Component.DIT, [AdapterRequest(path, 0.7) for path in order]) > 110


def test_of_quantised_weights_norms_are_those_that_are_stored(
    toy: Path, through_slots: Through, int8: Bundle, tmp_path: Path
) -> None:
    """INT8 leaves 36 dB of this model; magnitudes over stored weights add nothing to that."""
    path = toy_adapter(tmp_path / "a.safetensors", toy, "bora", LAYERS)
    engines: tuple[EngineName, ...] = ("mnn", "onnxruntime-int8", "onnxruntime-fp16")
    plain = [through_slots(int8, engine, Component.DIT, []) for engine in engines]
    adapted = [through_slots(int8, engine, Component.DIT, [AdapterRequest(path)]) for engine in engines]
    assert min(plain) > 30
    assert min(adapted) > 30


@pytest.mark.parametrize("engine", ["mnn", "onnxruntime-int8"])
def test_with_nothing_in_its_slots_a_quantised_model_is_the_plain_one(
    toy: Path, int8: Bundle, engine: EngineName
) -> None:
    feeds, expected = merged(toy, Component.DIT, [])
    (plain,) = bundle_engine(int8, engine, {}).load(Component.DIT).run(feeds).values()
    empty = adapters_of(int8).composed(Component.DIT, []).feeds
    assert not any(array.any() for array in empty.values())
    (slotted,) = session(int8.path, engine, Component.DIT).run({**feeds, **empty}).values()
    assert ratio(expected, slotted) == pytest.approx(ratio(expected, plain), abs=0.1)


def test_the_integer_dit_with_slots_runs_in_parts_and_gives_the_bits_of_the_whole(
    toy: Path, int8: Bundle, tmp_path: Path
) -> None:
    """Other adapters in the next step are heard, in what is computed ahead too."""
    kind: ArtifactKind = "onnx-int8-slots"
    parts = [Path(part.path).name for part in int8.artifact(Component.DIT, kind).parts]
    assert parts == ["dit_slots.prepare.onnx", "dit_slots.time.onnx", "dit_slots.step.onnx"]
    whole = OrtSession(int8.checked(Component.DIT, kind).path, threads=1, optimise=True)
    path = toy_adapter(tmp_path / "a.safetensors", toy, "bora", [QKV, "model.transformer.layers.0.cross_attn.to_kv"])
    adapters = adapters_of(int8)
    feeds = dict(sample_inputs(Component.DIT, int8.layout, seed=0, latents=16).feeds)
    outputs = []
    for t, given in ((0.9, []), (0.5, [AdapterRequest(path)]), (0.5, []), (0.5, [AdapterRequest(path, 0.5)])):
        fed = {**feeds, "t": np.array([t], np.float32), **adapters.composed(Component.DIT, given).feeds}
        outputs.append(session(int8.path, "onnxruntime-int8", Component.DIT).run(fed)["out"])
        np.testing.assert_array_equal(outputs[-1], whole.run(fed)["out"], strict=True)
    assert min(np.abs(outputs[a] - outputs[b]).max() for a, b in ((1, 2), (1, 3), (2, 3))) > 1e-3


def test_what_a_bundle_has_is_verified(bundle: Bundle, int8: Bundle) -> None:
    for one, engines in ((bundle, ["mnn"]), (int8, ["mnn", "onnxruntime-int8", "onnxruntime-fp16"])):
        result = verify_bundle(one, components=(Component.DIT,), quick=True)
        assert [verdict.engine for verdict in result.adapted] == engines
        assert result.passed
        cases = {measured.case.rpartition("=")[2] for verdict in result.adapted for measured in verdict.measurements}
        assert cases == {"none", "lora", "bora"}
        for plain, slotted in zip(result.verdicts, result.adapted, strict=True):
            assert slotted.worst.signal_to_noise_db > plain.worst.signal_to_noise_db - 3


def decaying(toy: Path, path: Path, seed: int, rank: int, fall: float) -> Path:
    """Write an adapter whose step has singular values that fall by a factor from one to the next."""
    toy_adapter(path, toy, "lora", LAYERS, rank=rank, seed=seed)
    falls = np.float32(fall) ** np.arange(rank)
    tensors = {
        name: (value * falls).astype(np.float32) if name.endswith("lora_B") else value.astype(np.float32)
        for name, value in load_file(path).items()
    }
    save_file(tensors, path, {"lora_config": json.dumps({"rank": rank, "alpha": rank, "adapter_type": "lora"})})
    return path


def test_ranks_are_joined_up_to_that_of_the_slots_and_beyond_it_compressed(
    toy: Path, through_slots: Through, bundle: Bundle, tmp_path: Path
) -> None:
    paths = [decaying(toy, tmp_path / f"{n}.safetensors", n, RANK, 0.4) for n in range(2)]
    requests = [AdapterRequest(path) for path in paths]
    composed = adapters_of(bundle).composed(Component.DIT, requests)
    assert 30 < composed.compressed_db < 60
    wide = adapters_of(bundle, 2 * RANK).composed(Component.DIT, requests)
    assert wide.compressed_db == np.inf
    assert through_slots(bundle, "mnn", Component.DIT, requests) > 25


def test_what_compression_would_spoil_is_refused(toy: Path, bundle: Bundle, tmp_path: Path) -> None:
    requests = [AdapterRequest(decaying(toy, tmp_path / f"{n}.safetensors", n, RANK, 1.0)) for n in range(3)]
    with pytest.raises(LoraError, match=r"rank above that of the bundle's slots, 8.* dB"):
        adapters_of(bundle).composed(Component.DIT, requests)


def test_a_pipeline_changes_adapters_from_one_generation_to_the_next(toy: Path, bundle: Bundle, tmp_path: Path) -> None:
    path = ADAPTERS / "lora.safetensors"
    request = GenerateRequest("pad", seconds=1.0, steps=2, seed=3)
    with Pipeline.from_bundle(bundle.path, "mnn", keep_loaded=True, threads=1) as pipeline:
        plain = pipeline.generate(request, allow=["clipping"]).report.latents
        made = {}
        for strength in (1.0, 0.5, 0.0):
            pipeline.adapters = [AdapterRequest(path, strength)]
            made[strength] = pipeline.generate(request, allow=["clipping"]).report.latents
        pipeline.adapters = ()
        again = pipeline.generate(request, allow=["clipping"]).report.latents
    np.testing.assert_array_equal(plain, again)
    assert ratio(plain, made[0.0]) > 80
    assert ratio(plain, made[1.0]) < ratio(plain, made[0.5]) < 30
    with Pipeline.from_checkpoint(toy, loras=[f"{path}:0.5"]) as reference:
        expected = reference.generate(request, allow=["clipping"]).report.latents
    assert ratio(expected, made[0.5]) > 80


@pytest.mark.parametrize("kind", ["lora", "bora", "lora-xs"])
def test_networks_take_adapters_with_a_bundle_and_without(
    toy: Path, toy_fp32: Bundle, tmp_path: Path, kind: str
) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", toy, kind, LAYERS)
    request = GenerateRequest("pad", seconds=1.0, steps=1, seed=3)
    with Pipeline.from_checkpoint(toy, loras=[f"{path}:0.5"]) as reference:
        expected = reference.generate(request, allow=["clipping"]).report.latents
    given = [AdapterRequest(path, 0.5)]
    with Pipeline.from_bundle(toy_fp32.path, "torch", checkpoint=toy, adapters=given) as pipeline:
        assert ratio(expected, pipeline.generate(request, allow=["clipping"]).report.latents) > 90
    with Pipeline.from_checkpoint(toy) as pipeline:
        plain = pipeline.generate(request, allow=["clipping"]).report.latents
        pipeline.adapters = given
        found = pipeline.generate(request, allow=["clipping"]).report.latents
    assert ratio(expected, plain) < 30
    assert ratio(expected, found) > 90


def test_a_pipeline_with_adapters_is_of_an_engine_that_takes_them(
    bundle: Bundle, int8: Bundle, toy_int8: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor of this test would have the plain model run in integers by ONNX Runtime."""
    monkeypatch.setattr("sa3_convert.runtime.placement.integer_products", lambda: "vnni")
    given = [AdapterRequest(ADAPTERS / "lora.safetensors")]
    for one, engine in ((int8, "onnxruntime-int8"), (bundle, "mnn")):
        assert Pipeline.from_bundle(one.path, adapters=given).models.engine.name == engine
    assert Pipeline.from_bundle(int8.path).models.engine.name == "onnxruntime-int8"
    with pytest.raises(BundleError, match="--adapter-slots"):
        Pipeline.from_bundle(toy_int8.path, adapters=given)


def test_an_engine_without_slots_names_those_that_have_some(bundle: Bundle) -> None:
    given = [AdapterRequest(ADAPTERS / "lora.safetensors")]
    with pytest.raises(
        BundleError, match=r"onnxruntime-int8\. Use --engine mnn or onnxruntime, convert .* --with-ort-int8"
    ):
        rank_of(bundle, "onnxruntime-int8")
    request = GenerateRequest("pad", seconds=1.0, steps=1, adapters=tuple(given))
    with Pipeline.from_bundle(bundle.path, "onnxruntime") as pipeline:
        assert pipeline.generate(request, allow=["clipping"]).report.engine["engine"] == "onnxruntime"


def test_an_interval_is_of_noise_levels(bundle: Bundle) -> None:
    path = ADAPTERS / "lora.safetensors"

    def latents(*adapters: str) -> Any:
        settings = {"prompt": "pad", "seconds": 1.0, "steps": 4, "seed": 3, "adapters": list(adapters)}
        with Pipeline.from_bundle(bundle.path, "mnn", threads=1) as pipeline:
            return pipeline.generate(GenerateRequest.from_json(settings), allow=["clipping"]).report.latents

    whole, none = latents(str(path)), latents()
    np.testing.assert_array_equal(latents(f"{path}@0-1"), whole)
    np.testing.assert_array_equal(latents(f"{path}:1@0-0.4", f"{path}:1@0.41-1"), whole)
    early = latents(f"{path}@0.9-1")
    assert np.abs(early - whole).max() > 1e-3
    assert np.abs(early - none).max() > 1e-3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.st", ("a.st", 1.0, 0.0, 1.0)),
        ("a.st:0.8", ("a.st", 0.8, 0.0, 1.0)),
        ("a.st:0.8@0.2-1.0", ("a.st", 0.8, 0.2, 1.0)),
        ("a@b:c.st@.5-1", ("a@b:c.st", 1.0, 0.5, 1.0)),
    ],
)
def test_a_request_is_read_and_written(text: str, parts: tuple[Any, ...]) -> None:
    request = AdapterRequest.parse(text)
    assert (str(request.path), request.strength, request.low, request.high) == parts
    assert AdapterRequest.parse(str(request)) == request


@pytest.mark.parametrize("text", ["", "a:nan", "a:1e999", "a@0.5-0.2", "a@0-2", ":1"])
def test_what_is_no_request_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        AdapterRequest.parse(text)


def test_settings_keep_adapters() -> None:
    request = GenerateRequest("pad", adapters=(AdapterRequest(Path("loras/a.st"), 0.5, 0.2),))
    told = request.to_json(Path("loras"))
    assert told["adapters"] == ["a.st:0.5@0.2-1"]
    assert GenerateRequest.from_json(located(told, Path("loras"))).adapters == request.adapters
    with pytest.raises(UsageError, match="adapters"):
        GenerateRequest.from_json({"prompt": "pad", "adapters": "a.st"})


def test_the_command_line_applies_adapters_keeps_them_and_makes_the_same_again(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["--prompt", "pad", "--seconds", "1", "--steps", "2"]
    adapter = ["--adapter", f"{ADAPTERS / 'lora.safetensors'}:0.5@0.2-1.0"]

    def made(name: str, *options: str) -> bytes:
        assert app.run(["run", str(bundle.path), "-o", str(tmp_path / name), *options]) == 0
        return read_audio(tmp_path / name, 44100, max_seconds=2).tobytes()

    plain, adapted = made("plain.wav", *wanted), made("adapted.wav", *wanted, *adapter)
    assert plain != adapted
    plain_engine, adapted_engine = (line for line in capsys.readouterr().err.splitlines() if line.startswith("Engine "))
    assert adapted_engine == f"{plain_engine.removesuffix('.')}, and its models take adapters."
    assert made("again.wav", "--from", str(tmp_path / "adapted.wav")) == adapted


def test_a_bundle_without_slots_says_how_to_get_them(toy_fp32: Bundle) -> None:
    request = GenerateRequest("pad", seconds=1, steps=1, adapters=(AdapterRequest(Path("a.st")),))
    with pytest.raises(BundleError, match="--adapter-slots"), Pipeline.from_bundle(toy_fp32.path, "mnn") as pipeline:
        pipeline.generate(request)


Damage = Callable[[Path], None]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _replace(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], **config: Any) -> None:
    stated = {"rank": 4, "alpha": 8, "adapter_type": "lora"} | config
    save_file(change(load_file(path)), path, {"lora_config": json.dumps(stated)})


def _nan(path: Path) -> None:
    first = key(QKV, "lora_A")
    _replace(path, lambda found: found | {first: np.full_like(found[first], np.nan)})


def _wrong_shape(path: Path) -> None:
    first = key(QKV, "lora_A")
    _replace(path, lambda found: found | {first: np.ascontiguousarray(found[first][:, :-1])})


def _unknown_layer(path: Path) -> None:
    names = {key(QKV, factor): key("model.transformer.layers.99.x", factor) for factor in ("lora_A", "lora_B")}
    _replace(path, lambda found: {names.get(name, name): value for name, value in found.items()})


def _rank_0(path: Path) -> None:
    _replace(path, lambda found: found, rank=0)


def _huge_rank(path: Path) -> None:
    _replace(path, lambda found: found, rank=1 << 30)


def _huge_values(path: Path) -> None:
    _replace(path, lambda found: {name: np.full(v.shape, 3e38, np.float32) for name, v in found.items()})


@pytest.mark.parametrize(
    "damage", [_truncate, _nan, _wrong_shape, _unknown_layer, _rank_0, _huge_rank, _huge_values, Path.unlink]
)
def test_a_damaged_adapter_is_refused_before_a_model_is_loaded(
    toy: Path, bundle: Bundle, tmp_path: Path, damage: Damage
) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", toy, "lora", LAYERS)
    damage(path)
    request = GenerateRequest("pad", seconds=1, steps=1, adapters=(AdapterRequest(path, 2.0),))
    with Pipeline.from_bundle(bundle.path, "mnn") as pipeline:
        with pytest.raises((LoraError, CheckpointError), match=r"a\.safetensors"):
            pipeline.generate(request)
        assert not pipeline.models._kept


def test_what_is_finite_in_float64_alone_is_refused(toy: Path, bundle: Bundle, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", toy, "dora-rows", LAYERS)

    def magnified(found: dict[str, Any]) -> dict[str, Any]:
        numbers = {"lora_B": 1e30, "lora_A": 1e-30}
        return {n: np.full(v.shape, numbers.get(n.split(".")[-1], 3e38), np.float32) for n, v in found.items()}

    _replace(path, magnified, adapter_type="dora-rows")
    with pytest.raises(LoraError, match="is not finite with"):
        adapters_of(bundle).composed(Component.DIT, [AdapterRequest(path)])


def test_an_adapter_that_changes_while_it_is_used_is_read_again(toy: Path, bundle: Bundle, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", toy)
    adapters, request = adapters_of(bundle), AdapterRequest(path)
    before = adapters.composed(Component.DIT, [request]).feeds
    assert adapters.composed(Component.DIT, [request]).feeds is before
    path.unlink()
    toy_adapter(path, toy, seed=9)
    after = adapters.composed(Component.DIT, [request]).feeds
    assert np.abs(after[SLOT_INPUTS[0]] - before[SLOT_INPUTS[0]]).max() > 0.1
