from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter

from sa3_convert.checkpoint.dimensions import Shift
from sa3_convert.components import Component
from sa3_convert.runtime.noise import TorchGenerator
from sa3_convert.runtime.sampling import SAMPLERS, guided, sigmas
from tests.conftest import Golden, assert_close_to_peak, load_golden
from tests.runtime.conftest import Parts

Floats = NDArray[np.float32]
SEED = st.integers(0, 1000)
SCALE = st.floats(-4, 10, width=32)


def velocities(seed: int) -> tuple[Floats, Floats, Floats]:
    values = np.random.default_rng(seed).standard_normal((3, 1, 4, 6)).astype(np.float32)
    return values[0], values[1], values[2]


def blend(seed: int, cfg_scale: float, apg_scale: float, mask: Floats, t: float = 0.5) -> tuple[Floats, Floats]:
    """Return the guided and the conditioned denoised estimate."""
    x, conditioned, unconditioned = velocities(seed)
    time = np.float32(t)
    velocity = guided(
        lambda x, t: conditioned,
        lambda x, t: unconditioned,
        cfg_scale=cfg_scale,
        apg_scale=apg_scale,
        padding_mask=mask,
    )
    return x - time * velocity(x, time), x - time * conditioned


def test_the_padding_mask_is_put_beside_the_latents_once(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[Any] = []
    monkeypatch.setattr("sa3_convert.runtime.sampling.placed_like", lambda array, x: placed.append(x) or array)
    x, conditioned, unconditioned = velocities(0)
    velocity = guided(
        lambda x, t: conditioned, lambda x, t: unconditioned, cfg_scale=4.0, apg_scale=1.0, padding_mask=HALF
    )
    for t in (1.0, 0.5):
        velocity(x, np.float32(t))
    assert len(placed) == 1


ALL = np.ones((1, 6), np.float32)
HALF = np.array([[1, 1, 1, 0, 0, 0]], np.float32)


def test_the_golden_guided_velocities_come_out(golden: Golden, parts: Parts) -> None:
    session = parts.engine.load(Component.DIT)
    dits = list(golden.of("dit"))
    for case in golden.of("guidance"):
        dit = dits[case["dit_case"]]
        feeds = {name: golden.tensors[dit[name]] for name in ("cross_attn_cond", "global_embed", "local_add_cond")}
        x, t = golden.tensors[dit["x"]], golden.tensors[dit["t"]]
        mask = golden.tensors[dit["padding_mask"]].astype(np.float32)
        negative = golden.tensors[case["negative_cross_attn_cond"]] if "negative_cross_attn_cond" in case else None

        def velocity(x: Floats, time: np.float32, cross: Floats, feeds=feeds, t=t, mask=mask) -> Floats:  # type: ignore[no-untyped-def]
            assert time == t[0]
            return session.run({**feeds, "x": x, "t": t, "cross_attn_cond": cross, "padding_mask": mask})["out"]

        cross = feeds["cross_attn_cond"]
        other = np.zeros_like(cross) if negative is None else negative
        blended = guided(
            lambda x, t, cross=cross, velocity=velocity: velocity(x, t, cross),
            lambda x, t, cross=other, velocity=velocity: velocity(x, t, cross),
            cfg_scale=case["cfg_scale"],
            apg_scale=case["apg_scale"],
            padding_mask=mask,
        )
        assert_close_to_peak(blended(x, t[0]), golden.tensors[case["output"]], 2e-5)


@given(seed=SEED, apg_scale=st.floats(0, 1, width=32))
def test_scale_one_is_the_conditioned_velocity(seed: int, apg_scale: float) -> None:
    guided_estimate, conditioned = blend(seed, 1.0, apg_scale, ALL)
    np.testing.assert_allclose(guided_estimate, conditioned, atol=1e-6)


@given(seed=SEED)
def test_scale_zero_without_projection_is_the_unconditioned_velocity(seed: int) -> None:
    x, _, unconditioned = velocities(seed)
    estimate, _ = blend(seed, 0.0, 0.0, ALL)
    np.testing.assert_allclose(estimate, x - np.float32(0.5) * unconditioned, atol=1e-5)


@given(seed=SEED, cfg_scale=SCALE)
@settings(deadline=None)
def test_with_full_projection_what_is_added_is_orthogonal_to_the_conditioned_estimate(
    seed: int, cfg_scale: float
) -> None:
    estimate, conditioned = blend(seed, cfg_scale, 1.0, HALF)
    added = (estimate - conditioned).astype(np.float64) * HALF
    assert abs(np.sum(added * conditioned)) < 1e-5 * (1 + abs(cfg_scale)) * np.square(conditioned).sum()


@given(seed=SEED, cfg_scale=SCALE)
def test_padded_positions_follow_the_conditioned_estimate_under_full_projection(seed: int, cfg_scale: float) -> None:
    estimate, conditioned = blend(seed, cfg_scale, 1.0, HALF)
    np.testing.assert_allclose(estimate[..., 3:], conditioned[..., 3:], atol=1e-6)


def test_what_stands_at_padded_positions_does_not_change_the_projection() -> None:
    x, conditioned, unconditioned = velocities(1)
    results = []
    for spoil in (0, 1e3):
        changed = unconditioned + np.float32(spoil) * (1 - HALF)[:, np.newaxis]
        velocity = guided(
            lambda x, t: conditioned,
            lambda x, t, changed=changed: changed * HALF[:, np.newaxis],
            cfg_scale=3,
            apg_scale=1,
            padding_mask=HALF,
        )
        results.append(velocity(x, np.float32(0.5))[..., :3])
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)


def test_a_conditioned_estimate_of_zero_has_nothing_parallel_to_it() -> None:
    zero = np.zeros((1, 2, 6), np.float32)
    velocity = guided(lambda x, t: x / t, lambda x, t: zero, cfg_scale=2, apg_scale=1, padding_mask=ALL)
    assert np.isfinite(velocity(np.ones((1, 2, 6), np.float32), np.float32(1))).all()


SAMPLING = load_golden("sampling")
"""Stability-AI/stable-audio-3 at 636f906fc0ee54b3f06edf974dc7d3aa99d6841b."""


@pytest.mark.parametrize("case", SAMPLING.of("trajectory"), ids=lambda case: case["output"])
def test_each_sampler_with_each_setting_goes_the_way_of_the_reference(case: dict[str, Any]) -> None:
    condition, evaluations = SAMPLING.tensors["cond"], []
    noise = TorchGenerator(case["seed"]).randn

    def velocity(x: Floats, t: np.float32, condition: Floats) -> Floats:
        evaluations.append(t)
        return np.tanh(x) * (np.float32(0.5) + t) - np.float32(0.1) * x + condition

    given = dict(case["guidance"])
    blended = guided(
        lambda x, t: velocity(x, t, condition),
        lambda x, t: velocity(x, t, np.zeros_like(condition)),
        cfg_scale=case["cfg_scale"],
        apg_scale=given.get("apg_scale", 1.0),
        padding_mask=(np.arange(condition.shape[2]) < case["valid"]).astype(np.float32)[np.newaxis],
        cfg_interval=tuple(given.get("cfg_interval", (0, 1))),
        cfg_rescale=given.get("scale_phi", 0),
        cfg_norm_threshold=given.get("cfg_norm_threshold", 0),
    )
    schedule = sigmas(case["steps"], 1.0, TypeAdapter[Shift](Shift).validate_python(case["shift"]), case["length"])
    *_, last = SAMPLERS[case["sampler"]](blended, noise(condition.shape), schedule, noise)
    assert len(evaluations) == case["evaluations"]
    # Errors of single operations grow by the guidance, 4, and the steps, 6.
    assert_close_to_peak(last.latents, SAMPLING.tensors[case["output"]], 5e-6)


def test_the_trajectories_have_every_sampler_with_every_setting() -> None:
    settings = {(case["sampler"], *case["guidance"]) for case in SAMPLING.of("trajectory")}
    for sampler in SAMPLERS:
        assert settings >= {(sampler, name) for name in ("cfg_interval", "scale_phi", "cfg_norm_threshold")}


def test_channels_that_are_all_alike_are_rescaled_to_numbers() -> None:
    flat = np.ones((1, 4, 6), np.float32)
    velocity = guided(lambda x, t: flat, lambda x, t: -flat, cfg_scale=2, apg_scale=0, padding_mask=ALL, cfg_rescale=1)
    assert np.isfinite(velocity(flat, np.float32(0.5))).all()


@pytest.mark.parametrize("setting", [{}, {"apg_scale": 0}, {"cfg_norm_threshold": 2.0}, {"cfg_rescale": 0.7}], ids=str)
def test_guidance_is_computed_where_the_latents_are(setting: dict[str, float]) -> None:
    def guide(x: Any, conditioned: Any, unconditioned: Any) -> Any:
        how: dict[str, Any] = {"cfg_scale": 4, "apg_scale": 0.8, "padding_mask": HALF} | setting
        return guided(lambda x, t: conditioned, lambda x, t: unconditioned, **how)(x, np.float32(0.6))

    arrays = velocities(7)
    found = guide(*map(torch.from_numpy, arrays))
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.float32
    assert_close_to_peak(found.numpy(), guide(*arrays), 1e-6)
