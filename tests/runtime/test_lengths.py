import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.errors import UsageError
from sa3_convert.runtime.conditioning import check_regions, inpaint_mask, lengths, max_seconds
from tests.conftest import Golden, load_golden
from tests.runtime.conftest import Parts

SECONDS = st.floats(0.001, 120)


@pytest.fixture(scope="module")
def layout(small: Parts) -> CheckpointLayout:
    return small.layout


def test_golden_generations_have_the_reference_lengths(golden: Golden, parts: Parts) -> None:
    for case in golden.of("generate"):
        sizes = lengths(parts.layout, case["duration"])
        assert sizes.latents == golden.tensors[case["latents"]].shape[2]
        assert sizes.samples == golden.tensors[case["audio"]].shape[2]


def test_every_padding_gives_the_lengths_of_the_reference(layout: CheckpointLayout) -> None:
    """`tests/golden/sampling`: Stability-AI/stable-audio-3 at 636f906fc0ee54b3f06edf974dc7d3aa99d6841b."""
    for case in load_golden("sampling").of("lengths"):
        sizes = lengths(layout, case["seconds"], case["padding"])
        assert (sizes.latents, sizes.valid, sizes.wanted) == (case["latents"], case["valid"], case["effective"]), case


@given(seconds=SECONDS)
@settings(max_examples=200)
def test_every_duration_fits_its_lengths(layout: CheckpointLayout, seconds: float) -> None:
    sizes = lengths(layout, seconds)
    ratio = layout.autoencoder.downsampling_ratio
    assert sizes.samples == int(seconds * 44100)
    assert sizes.latents % 2 == 0
    assert sizes.samples <= sizes.latents * ratio
    assert math.ceil(sizes.samples / ratio) <= sizes.valid <= sizes.latents
    assert sizes.latents * ratio <= layout.sample_size


@given(shorter=SECONDS, longer=SECONDS)
def test_a_longer_duration_never_has_fewer_latents(layout: CheckpointLayout, shorter: float, longer: float) -> None:
    shorter, longer = sorted((shorter, longer))
    assert lengths(layout, shorter).latents <= lengths(layout, longer).latents


@pytest.mark.parametrize(("seconds", "latents", "valid"), [(10, 174, 172), (30, 388, 387), (120, 1292, 1292)])
def test_common_durations(layout: CheckpointLayout, seconds: float, latents: int, valid: int) -> None:
    sizes = lengths(layout, seconds)
    assert (sizes.latents, sizes.valid) == (latents, valid)


@given(seconds=SECONDS)
def test_the_padding_mask_is_ones_then_zeros(layout: CheckpointLayout, seconds: float) -> None:
    sizes = lengths(layout, seconds)
    mask = sizes.padding_mask()
    assert mask.shape == (1, sizes.latents)
    assert mask.dtype == np.float32
    assert mask[0, : sizes.valid].all()
    assert not mask[0, sizes.valid :].any()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_duration_that_is_no_positive_number_is_refused(layout: CheckpointLayout, seconds: float) -> None:
    with pytest.raises(UsageError, match="positive"):
        lengths(layout, seconds)


def test_a_duration_beyond_the_model_names_the_limit(layout: CheckpointLayout) -> None:
    assert lengths(layout, max_seconds(layout)).samples == layout.sample_size
    with pytest.raises(UsageError, match=r"limit of 120\.0 seconds"):
        lengths(layout, max_seconds(layout) + 0.001)


def test_a_duration_below_one_sample_is_refused(layout: CheckpointLayout) -> None:
    with pytest.raises(UsageError, match="one sample"):
        lengths(layout, 1e-6)


def test_a_sample_size_that_is_no_whole_number_of_latents_caps_below_it(layout: CheckpointLayout) -> None:
    odd = dataclasses.replace(layout, sample_size=50 * 4096 + 100)
    assert lengths(odd, 4).latents == 50


@given(
    seconds=st.floats(1, 20),
    bounds=st.lists(st.floats(0, 1), min_size=2, max_size=6, unique=True).filter(lambda b: len(b) % 2 == 0),
)
@settings(max_examples=200)
def test_an_inpaint_mask_keeps_exactly_the_latents_outside_of_regions_and_within_the_duration(
    layout: CheckpointLayout, seconds: float, bounds: list[float]
) -> None:
    edges = sorted(bound * seconds for bound in bounds)
    regions = list(zip(edges[::2], edges[1::2], strict=True))
    sizes = lengths(layout, seconds)
    per_sample = np.ones(sizes.latents * 4096, bool)
    for start, end in regions:
        per_sample[int(start * 44100) : int(end * 44100)] = False
    per_sample[sizes.samples :] = False
    expected = per_sample[::4096].astype(np.float32)
    if any(per_sample_region_is_missed(start, end) for start, end in regions):
        with pytest.raises(UsageError, match="too short"):
            inpaint_mask(layout, sizes, regions)
    else:
        np.testing.assert_array_equal(inpaint_mask(layout, sizes, regions)[0, 0], expected, strict=True)


def per_sample_region_is_missed(start: float, end: float) -> bool:
    first, last = int(start * 44100), int(end * 44100)
    return not any(sample % 4096 == 0 for sample in range(first, min(last, first + 4096)))


def test_regions_that_touch_are_fine() -> None:
    check_regions([(1, 2), (0, 1)], 2)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([(2.0, 1.0)], "2:1 ends before it starts"),
        ([(1.0, 1.0)], "ends before"),
        ([(-1.0, 1.0)], "outside"),
        ([(1.0, 11.0)], "1:11 lies outside of the 10 seconds"),
        ([(0.0, 2.0), (1.0, 3.0)], "1:3 overlaps 0:2"),
        ([(0.0, 5.0), (1.0, 2.0)], "overlaps"),
        ([(0.0, float("nan"))], "not finite"),
    ],
)
def test_a_region_that_cannot_be_is_named(regions: list[tuple[float, float]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_regions(regions, 10)
