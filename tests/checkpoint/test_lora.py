"""Merged weights are the reference's, and those of the published formulas in exact arithmetic."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from sa3_convert.checkpoint.lora import singular_bases
from sa3_convert.checkpoint.lora_file import LORA_TYPES, LoraRequest
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.components import Component
from sa3_convert.errors import LoraError, UsageError
from sa3_convert.networks.build import build_network
from tests.checkpoint.adapters import CONV, QKV, SECONDS, key, toy_adapter, weight_of
from tests.conftest import GOLDEN, assert_close_to_peak, load_golden
from tests.networks.conftest import dit_inputs

Exact = NDArray[np.float64]
QKV_PARAMETER = "transformer.layers.0.self_attn.to_qkv.weight"
CONV_PARAMETER = "preprocess_conv.weight"
SECONDS_PARAMETER = "embedder.embedding.1.weight"


def merged(checkpoint: Path, *requests: tuple[Path, float], component: Component = Component.DIT) -> dict[str, Any]:
    loras = [LoraRequest(path, strength) for path, strength in requests]
    return {n: t.numpy() for n, t in Checkpoint.open(checkpoint).with_loras(loras).state(component).items()}


def golden_cases() -> list[Any]:
    return [pytest.param(c, id=f"{Path(c['file']).stem}-{c['strength']}") for c in load_golden("small").of("lora")]


@pytest.mark.parametrize("case", golden_cases())
def test_merged_weights_equal_the_reference(case: dict[str, Any]) -> None:
    golden = load_golden("small")
    state = merged(golden.checkpoint, (golden.folder / case["file"], case["strength"]))
    np.testing.assert_allclose(state[QKV_PARAMETER], golden.tensors[case["merged_to_qkv_0"]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", golden_cases())
def test_the_dit_with_merged_weights_equals_the_reference(case: dict[str, Any]) -> None:
    golden = load_golden("small")
    request = LoraRequest(golden.folder / case["file"], case["strength"])
    checkpoint = Checkpoint.open(golden.checkpoint).with_loras([request])
    dit = build_network(Component.DIT, checkpoint.layout, checkpoint.state(Component.DIT))
    *inputs, mask = dit_inputs(golden, list(golden.of("dit"))[case["dit_case"]])
    velocity = dit(*inputs, torch.ones_like(mask)).numpy()
    assert_close_to_peak(velocity, golden.tensors[case["output_no_mask"]], 1e-4)


def exactly(kind: str, weight: NDArray[np.float32], factors: dict[str, Any], scale: float) -> Exact:
    """Return the adapted weight by the published formulas, in float64."""
    flat = weight.astype(np.float64).reshape(weight.shape[0], -1)
    f = {name: value.astype(np.float64) for name, value in factors.items()}
    if kind.endswith("-xs"):
        u, _, vt = np.linalg.svd(flat, full_matrices=False)
        rank = f["M_xs"].shape[0]
        signs = np.array([np.sign(column[np.abs(column).argmax()]) for column in u.T])
        step = (u * signs)[:, :rank] @ f["M_xs"] @ (vt * signs[:, None])[:rank]
    else:
        step = f["lora_B"] @ f["lora_A"]
    v = flat + scale * step
    base = kind.removesuffix("-xs")
    if base == "dora-rows":
        v = v / np.sqrt((v**2).sum(1))[:, None] * f["magnitude"][:, None]
    elif base == "dora-cols":
        v = v / np.sqrt((v**2).sum(0)) * f["magnitude"]
    elif base == "bora":
        rows = f["magnitude_r"][:, None] * v / np.sqrt((v**2).sum(1))[:, None]
        v = rows / np.sqrt((rows**2).sum(0)) * f["magnitude_c"]
    return v.reshape(weight.shape)


def factors_of(path: Path, layer: str) -> dict[str, Any]:
    start = key(layer, "")
    return {name.removeprefix(start): value for name, value in load_file(path).items() if name.startswith(start)}


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.7])
@pytest.mark.parametrize("kind", LORA_TYPES)
def test_every_type_follows_its_formula(small_toy: Path, tmp_path: Path, kind: str, strength: float) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy, kind)
    state = merged(small_toy, (path, strength))
    for layer, parameter in ((QKV, QKV_PARAMETER), (CONV, CONV_PARAMETER)):
        expected = exactly(kind, weight_of(small_toy, layer), factors_of(path, layer), 2 * strength)
        assert np.abs(expected - weight_of(small_toy, layer)).max() > 0.05
        np.testing.assert_allclose(state[parameter], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora-rows", "lora-xs"])
def test_a_rank_stabilised_adapter_divides_alpha_by_the_root_of_the_rank(
    small_toy: Path, tmp_path: Path, kind: str
) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy, kind, [QKV], config={"use_rslora": True, "alpha": 3})
    expected = exactly(kind, weight_of(small_toy, QKV), factors_of(path, QKV), 3 / 2 * 0.5)
    np.testing.assert_allclose(merged(small_toy, (path, 0.5))[QKV_PARAMETER], expected, rtol=0, atol=1e-5)


def test_the_singular_bases_meet_their_definition(small_toy: Path) -> None:
    weight = torch.from_numpy(weight_of(small_toy, QKV))
    left, right = map(torch.from_numpy, singular_bases(weight.numpy(), 5))
    values = torch.linalg.svdvals(weight)[:5]
    torch.testing.assert_close(left.T @ weight @ right, torch.diag(values), rtol=0, atol=1e-4)
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


def test_bases_that_the_file_holds_are_used(small_toy: Path, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy, "lora-xs", [QKV])
    weight = weight_of(small_toy, QKV)
    rng = np.random.default_rng(7)
    bases = {"U": rng.standard_normal((weight.shape[0], 4)), "V": rng.standard_normal((weight.shape[1], 4))}
    tensors = load_file(path) | {key(QKV, name): value.astype(np.float32) for name, value in bases.items()}
    save_file(tensors, path, {"lora_config": '{"adapter_type": "lora-xs", "alpha": 4}'})
    step = bases["U"] @ tensors[key(QKV, "M_xs")].astype(np.float64) @ bases["V"].T
    np.testing.assert_allclose(merged(small_toy, (path, 1.0))[QKV_PARAMETER], weight + step, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", LORA_TYPES)
def test_strength_0_leaves_the_weights_and_their_digest_alone(small_toy: Path, tmp_path: Path, kind: str) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy, kind)
    plain = Checkpoint.open(small_toy)
    adapted = plain.with_loras([LoraRequest(path, 0.0)])
    assert adapted.digest(Component.DIT) == plain.digest(Component.DIT)
    assert adapted.loras_of(Component.DIT) == ()
    state = adapted.state(Component.DIT)
    for name, tensor in plain.state(Component.DIT).items():
        assert torch.equal(state[name], tensor)


def test_what_no_layer_of_the_adapter_names_stays_a_view_of_the_file(small_toy: Path, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy)
    before, after = Checkpoint.open(small_toy).state(Component.DIT), merged(small_toy, (path, 1.0))
    changed = {name for name, tensor in before.items() if not np.array_equal(tensor.numpy(), after[name])}
    assert changed == {QKV_PARAMETER, CONV_PARAMETER}


def test_adapters_follow_one_another_and_bases_are_those_of_the_unadapted_weight(
    small_toy: Path, tmp_path: Path
) -> None:
    first = toy_adapter(tmp_path / "first.safetensors", small_toy, "dora-rows", [QKV], seed=1)
    second = toy_adapter(tmp_path / "second.safetensors", small_toy, "lora-xs", [QKV], rank=3, seed=2)
    weight = weight_of(small_toy, QKV)
    step = exactly("lora-xs", weight, factors_of(second, QKV), 2.0) - weight
    row_first = exactly("dora-rows", weight, factors_of(first, QKV), 2.0) + step
    row_second = exactly("dora-rows", (weight + step).astype(np.float32), factors_of(first, QKV), 2.0)
    assert np.abs(row_first - row_second).max() > 0.01
    for order, expected in (([first, second], row_first), ([second, first], row_second)):
        state = merged(small_toy, *((path, 1.0) for path in order))
        np.testing.assert_allclose(state[QKV_PARAMETER], expected, rtol=0, atol=1e-5)


def test_the_number_conditioner_is_adapted_too(small_toy: Path, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy, "bora", [SECONDS])
    state = merged(small_toy, (path, 0.5), component=Component.NUMBER_CONDITIONER)
    expected = exactly("bora", weight_of(small_toy, SECONDS), factors_of(path, SECONDS), 1.0)
    np.testing.assert_allclose(state[SECONDS_PARAMETER], expected, rtol=0, atol=1e-5)


def test_only_touched_components_change_their_digest(small_toy: Path, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy)
    other = toy_adapter(tmp_path / "b.safetensors", small_toy, seed=5)
    plain = Checkpoint.open(small_toy)

    def digests(*requests: LoraRequest) -> dict[Component, str]:
        opened = plain.with_loras(requests)
        return {component: opened.digest(component) for component in Component}

    base, one = digests(), digests(LoraRequest(path))
    assert {component for component in Component if base[component] != one[component]} == {Component.DIT}
    variants = [
        one,
        digests(LoraRequest(path, 0.5)),
        digests(LoraRequest(other)),
        digests(LoraRequest(path), LoraRequest(other)),
        digests(LoraRequest(other), LoraRequest(path)),
    ]
    assert len({found[Component.DIT] for found in variants}) == len(variants)
    (tmp_path / "renamed.safetensors").write_bytes(path.read_bytes())
    assert digests(LoraRequest(tmp_path / "renamed.safetensors")) == one


def test_the_base_weights_are_hashed_once_for_all_adapters(
    small_toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy)
    plain = Checkpoint.open(small_toy)
    plain.digest(Component.DIT)
    monkeypatch.setattr(Checkpoint, "_digest", None)
    assert plain.with_loras([LoraRequest(path)]).digest(Component.DIT) != plain.digest(Component.DIT)


def test_a_result_beyond_float32_is_refused(small_toy: Path, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy)
    with pytest.raises(LoraError, match=r"model\.model\..* is not finite after .*a\.safetensors"):
        merged(small_toy, (path, 3e38))


def test_the_same_file_twice_is_refused(small_toy: Path, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy)
    (tmp_path / "b.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="twice"):
        Checkpoint.open(small_toy).with_loras([LoraRequest(path), LoraRequest(path, 0.5)])
    with pytest.raises(UsageError, match=r"again as .*b\.safetensors"):
        Checkpoint.open(small_toy).with_loras([LoraRequest(path), LoraRequest(tmp_path / "b.safetensors")])


def test_merging_leaves_nothing_in_the_scratch_folder(small_toy: Path, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    state = Checkpoint.open(small_toy).with_loras([LoraRequest(path)]).state(Component.DIT, scratch=scratch)
    assert list(scratch.iterdir()) == []
    assert torch.isfinite(state[QKV_PARAMETER]).all()


def test_golden_adapters_state_what_they_are() -> None:
    checkpoint = Checkpoint.open(GOLDEN / "small" / "checkpoint")
    for kind in ("lora", "dora-rows"):
        path = GOLDEN / "small" / "lora" / f"{kind}.safetensors"
        (lora,) = checkpoint.with_loras([LoraRequest(path)]).loras
        assert (lora.file.type_name, lora.file.rank, lora.file.alpha) == (kind, 4, 8.0)
        assert len(lora.layers) == 4
