import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sa3_convert.runtime.noise import TorchGenerator
from tests.conftest import Golden

# Without AVX2 torch itself takes the maths library's logarithm and cosine, whose last bits differ.
BITWISE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
SIZES = st.lists(st.integers(0, 200), min_size=1, max_size=6)
SEEDS = st.integers(-(1 << 63), (1 << 64) - 1)


def assert_is_torch_noise(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    if BITWISE:
        np.testing.assert_array_equal(actual, expected, strict=True)
    else:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-6, strict=True)


@pytest.mark.parametrize("seed", [0, 42])
def test_two_draws_in_a_row_are_bitwise_the_golden_noise(golden: Golden, seed: int) -> None:
    generator = TorchGenerator(seed)
    for name in ("first", "second"):
        expected = golden.tensors[f"noise.{seed}.{name}"]
        np.testing.assert_array_equal(generator.randn(expected.shape), expected, strict=True)


@given(seed=SEEDS, sizes=SIZES)
@settings(max_examples=60, deadline=None)
def test_consecutive_draws_of_any_sizes_are_those_of_torch(seed: int, sizes: list[int]) -> None:
    ours, theirs = TorchGenerator(seed), torch.Generator().manual_seed(seed)
    for size in sizes:
        expected = torch.randn(size, generator=theirs).numpy()
        assert_is_torch_noise(ours.randn((size,)), expected)


def test_a_million_values_are_those_of_torch() -> None:
    expected = torch.randn(1_000_000, generator=torch.Generator().manual_seed(7)).numpy()
    assert_is_torch_noise(TorchGenerator(7).randn((1_000_000,)), expected)


def test_the_shape_does_not_change_the_stream() -> None:
    flat = TorchGenerator(3).randn((2 * 5 * 7,))
    np.testing.assert_array_equal(TorchGenerator(3).randn((2, 5, 7)), flat.reshape(2, 5, 7), strict=True)


def test_only_the_low_32_bits_of_a_seed_count_as_in_torch() -> None:
    np.testing.assert_array_equal(TorchGenerator(5).randn((32,)), TorchGenerator(5 + (1 << 32)).randn((32,)))


def test_other_seeds_give_other_noise() -> None:
    assert not np.array_equal(TorchGenerator(1).randn((32,)), TorchGenerator(2).randn((32,)))


@pytest.mark.parametrize("seed", [1 << 64, -(1 << 63) - 1])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        TorchGenerator(seed)
