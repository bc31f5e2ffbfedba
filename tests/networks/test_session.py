"""The torch engine: exact float32, halves, what stays where it is, and what is not computed again."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sa3_convert.arrays import constant, host
from sa3_convert.check.compare import verify_sessions
from sa3_convert.check.inputs import samples_for
from sa3_convert.checkpoint.dimensions import DitLayout
from sa3_convert.components import Component
from sa3_convert.errors import BackendError
from sa3_convert.networks import session as torch_session
from sa3_convert.networks.dit import Block, RotaryPositions
from sa3_convert.networks.fast import Remembered, accelerate
from sa3_convert.networks.session import DeviceNoise, TorchSession
from sa3_convert.runtime.noise import TorchGenerator
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.runtime.sampling import SAMPLERS, sigmas
from tests.runtime.conftest import Parts, open_parts


@pytest.fixture(scope="module")
def small() -> Parts:
    return open_parts("small")


def decibels(exact: Tensor, found: Tensor) -> float:
    return float(20 * torch.log10(exact.norm() / (exact - found).norm()))


@pytest.mark.parametrize("family", ["small", "medium"])
@pytest.mark.parametrize("component", [c for c in Component if c is not Component.TEXT_ENCODER])
def test_products_of_halves_keep_the_fidelity(family: str, component: Component) -> None:
    parts = open_parts(family, threads=1)
    halves = replace(parts.engine, precision="normal")
    samples = samples_for(component, parts.layout, quick=True)
    found = verify_sessions(
        lambda: parts.engine.load(component), lambda: halves.load(component), component, parts.layout, samples
    )
    assert 55 < found.worst.signal_to_noise_db < 100


def test_a_block_of_true_width_keeps_it_too(small: Parts) -> None:
    assert small.layout.dit is not None
    layout: DitLayout = replace(small.layout.dit, embed_dim=1024, head_dim=64, ff_dim=4096, depth=1)
    torch.manual_seed(0)
    block, rope = Block(layout, "key_mask"), RotaryPositions(layout)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    nn.init.constant_(rope.inv_freq, 0.1)
    tokens = 40 + layout.num_memory_tokens
    inputs: tuple[Any, ...] = (
        torch.randn(1, tokens, 1024),
        torch.randn(1, 20, 1024),
        torch.randn(1, 1, 6 * 1024),
        torch.randn(1, 40, layout.local_add_cond_dim),
        rope(40),
        torch.zeros(1, 1, 1, tokens),
    )
    with torch.inference_mode():
        exact = block(*inputs)
        accelerate(block, half=True)
        assert 55 < decibels(exact, block(*inputs)) < 100


def test_the_text_encoder_stays_float32(small: Parts) -> None:
    session = replace(small.engine, precision="normal").load(Component.TEXT_ENCODER)
    assert isinstance(session, TorchSession)
    assert {p.dtype for p in session._network.parameters()} == {torch.float32}


def test_tf32_is_off_in_a_run_and_as_it_was_afterwards(small: Parts) -> None:
    def allowed() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    def allow(cudnn: bool, matmul: bool) -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul

    session = small.engine.load(Component.NUMBER_CONDITIONER)
    assert isinstance(session, TorchSession)
    seen = []
    session._network.register_forward_hook(lambda *_: seen.append(allowed()))
    before = allowed()
    try:
        allow(True, True)
        session.run({"seconds": np.array([3], np.float32)})
        assert (seen, allowed()) == ([(False, False)], (True, True))
    finally:
        allow(*before)


@pytest.mark.parametrize("shape", [(1, 4, 8), (1, 3, 7), (1, 2, 3)])
def test_noise_that_is_drawn_ahead_is_the_stream_that_every_engine_has(shape: tuple[int, ...]) -> None:
    ahead, stream = DeviceNoise(11, "cpu", 3), TorchGenerator(11)
    for _ in range(5):
        np.testing.assert_array_equal(host(ahead(shape)), stream.randn(shape))
    with pytest.raises(ValueError, match="drawn ahead"):
        ahead((1, 99))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_gives_the_same_numbers_wherever_its_arrays_are(sampler: Any) -> None:
    def velocity(x: Any, t: np.float32) -> Any:
        return x * x - t

    def steps(noise: Callable[[Sequence[int]], Any]) -> list[Any]:
        return list(SAMPLERS[sampler](velocity, noise((1, 4, 8)), sigmas(4), noise))

    on_host, on_device = steps(TorchGenerator(3).randn), steps(DeviceNoise(3, "cpu", 5))
    for one, other in zip(on_host, on_device, strict=True):
        assert isinstance(other.x, Tensor)
        np.testing.assert_allclose(other.latents, one.latents, rtol=1e-6)
        np.testing.assert_allclose(other.denoised, one.denoised, rtol=1e-6)


def test_arrays_stay_where_they_are(small: Parts) -> None:
    session = small.engine.load(Component.NUMBER_CONDITIONER)
    array = np.array([3], np.float32)
    (given,) = session.run({"seconds": array}).values()
    (stays,) = session.run({"seconds": torch.from_numpy(array)}).values()  # type: ignore[dict-item]
    assert isinstance(given, np.ndarray)
    assert isinstance(stays, Tensor)
    np.testing.assert_array_equal(given, stays.numpy())


def test_what_follows_from_the_conditioning_is_computed_once_in_a_generation(
    small: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[nn.Module] = []
    linear = nn.Linear.forward

    def counting(self: nn.Linear, x: Tensor) -> Tensor:
        calls.append(self)
        return linear(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    loaded: list[Any] = []
    load = type(small.engine).load
    monkeypatch.setattr(type(small.engine), "load", lambda self, c: loaded.append(load(self, c)) or loaded[-1])
    pipeline = Pipeline(small.layout, small.engine, small.prompts, small.bottleneck)
    pipeline.generate(GenerateRequest("pad", seconds=1, steps=5), allow=("silence",))
    names = {id(module): name for session in loaded for name, module in session._network.named_modules()}
    counts = Counter(names[id(module)] for module in calls)
    dit = {name: count for name, count in counts.items() if name.startswith(("transformer.", "to_"))}
    once = {name for name in dit if any(word in name for word in ("to_kv", "_local_", "to_cond_", "to_global_"))}
    assert small.layout.dit is not None
    # Two linears before the blocks twice, and three in each of them.
    assert len(once) == 2 + 2 + 3 * small.layout.dit.depth
    assert {dit[name] for name in once} == {1}
    assert {dit[name] for name in dit.keys() - once} == {5}


class Tiny(nn.Module):
    """An input that changes, and conditioning that a linear sees alone."""

    def __init__(self) -> None:
        super().__init__()
        self.to_kv = nn.Linear(3, 3)

    def forward(self, x: Tensor, cross_attn_cond: Tensor) -> Tensor:
        output: Tensor = torch.sin(x) + self.to_kv(cross_attn_cond)
        return output


@pytest.fixture
def tiny() -> tuple[Tiny, TorchSession]:
    torch.manual_seed(0)
    network = Tiny().requires_grad_(False)
    plain = Tiny().requires_grad_(False)
    plain.load_state_dict(network.state_dict())
    return plain, TorchSession(network, ("x", "cross_attn_cond"), "out", "cpu")


@pytest.mark.parametrize("replays", [False, True])
def test_a_run_that_is_replayed_is_the_run(
    tiny: tuple[Tiny, TorchSession], replays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, session = tiny
    graphs = []

    def captured(network: nn.Module, static: Sequence[Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What a CUDA graph does: the same operations on the same places."""
        output = network(*static)
        graphs.append(output.shape)

        def replay() -> None:
            output.copy_(network(*static))

        return replay, output

    monkeypatch.setattr(torch_session, "captured", captured)
    session._replays = replays
    rng = np.random.default_rng(0)
    conditions = [constant(rng.standard_normal((1, 3)).astype(np.float32)) for _ in range(4)]
    kept = []
    # One generation after the other, then two conditions in turn, another length, and the first ones again.
    for number, rows in [(n, 2) for n in (0, 0, 0, 1, 1, 1, 2, 3, 2, 3, 2, 3)] + [(0, 4)] * 3 + [(1, 2)] * 3:
        x = rng.standard_normal((rows, 3)).astype(np.float32)
        expected = plain(torch.from_numpy(x), torch.from_numpy(conditions[number].copy())).numpy()
        kept.append((session.run({"x": x, "cross_attn_cond": conditions[number]})["out"], expected))
    for found, expected in kept:
        np.testing.assert_array_equal(found, expected)
    assert len(graphs) == (3 if replays else 0)


def test_conditioning_that_can_be_written_is_never_remembered(tiny: tuple[Tiny, TorchSession]) -> None:
    plain, session = tiny
    x, condition = np.ones((2, 3), np.float32), np.ones((1, 3), np.float32)
    for _ in range(3):
        condition += 1
        expected = plain(torch.from_numpy(x), torch.from_numpy(condition.copy())).numpy()
        np.testing.assert_array_equal(session.run({"x": x, "cross_attn_cond": condition})["out"], expected)


def test_modules_that_see_other_things_are_not_remembered(small: Parts) -> None:
    session = small.engine.load(Component.DECODER)
    assert isinstance(session, TorchSession)
    assert isinstance(session._remembered, Remembered)
    assert not any("forward" in vars(module) for module in session._network.modules())


def test_a_device_without_memory_is_exit_7_with_numbers(
    tiny: tuple[Tiny, TorchSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, session = tiny

    def fail(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total …")

    monkeypatch.setattr(session._network, "forward", fail)
    monkeypatch.setattr(torch_session, "gpu_state", lambda: "driver 600; GPU 0 has 12 of 8192 MiB free")
    with pytest.raises(BackendError, match=r"needs 2\.50 GiB more on the device; driver 600; GPU 0 has 12 of 8192 MiB"):
        session.run({"x": np.ones((1, 3), np.float32), "cross_attn_cond": np.ones((1, 3), np.float32)})
