from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sa3_convert.arrays import Session
from sa3_convert.components import Component
from sa3_convert.lab.bench import decoded_with_overlap
from sa3_convert.runtime.autoencode import Reach, decoded, encoded, patched
from tests.conftest import Golden, assert_close_to_peak
from tests.runtime.conftest import Parts, StandIn

Floats = NDArray[np.float32]
# 1 stands for the smallest that works; 7 is no multiple of SAME-S's pairs; 128 holds everything.
WINDOWS = [1, 7, 16, 128]


@pytest.fixture(scope="session")
def decoder(parts: Parts) -> Session:
    return parts.engine.load(Component.DECODER)


@pytest.fixture(scope="session")
def encoder(parts: Parts) -> Session:
    return parts.engine.load(Component.ENCODER)


def joined(parts: Parts, session: Session, latents: Floats, **options: Any) -> Floats:
    return np.concatenate(list(decoded(session, latents, parts.layout.autoencoder, **options)), axis=2)


@pytest.mark.parametrize("window", WINDOWS)
def test_decoding_in_windows_of_any_size_equals_the_golden_single_shot(
    golden: Golden, parts: Parts, decoder: Session, window: int
) -> None:
    for case in golden.of("chunked_decode"):
        audio = joined(parts, decoder, golden.tensors[case["latents"]], window=window)
        assert_close_to_peak(audio, golden.tensors[case["single_shot"]], 1e-5)


def test_the_reference_overlap_gives_its_own_golden_audio(golden: Golden, parts: Parts, decoder: Session) -> None:
    for case in golden.of("chunked_decode"):
        for chunked in case["chunks"]:
            audio = decoded_with_overlap(
                decoder,
                golden.tensors[case["latents"]],
                parts.layout.autoencoder,
                chunk=chunked["chunk_size"],
                overlap=chunked["overlap"],
            )
            assert_close_to_peak(audio, golden.tensors[chunked["audio"]], 1e-5)


def test_golden_latents_decode_to_golden_audio(golden: Golden, parts: Parts, decoder: Session) -> None:
    for case in golden.of("decoder"):
        latents = golden.tensors[case["latents"]]
        if latents.shape[2] % 2 == 0:
            assert_close_to_peak(joined(parts, decoder, latents), golden.tensors[case["audio"]], 1e-4)


def test_an_odd_number_of_latents_gives_golden_audio_up_to_the_reach_of_its_end(
    golden: Golden, parts: Parts, decoder: Session
) -> None:
    # The reference pads behind the projection of the latents, which a model of static shape leaves no room for.
    (case,) = (case for case in golden.of("decoder") if case["latent_length"] % 2)
    latents = golden.tensors[case["latents"]]
    audio = joined(parts, decoder, latents)
    assert audio.shape == (1, 2, latents.shape[2] * 4096)
    sure = (latents.shape[2] - Reach.of_decoder(parts.layout.autoencoder.decoder).right) * 4096
    assert_close_to_peak(audio[:, :, :sure], golden.tensors[case["audio"]][:, :, :sure], 1e-4)


@pytest.mark.parametrize("samples", [1, 4096, 5000, 40_001])
def test_the_beginning_alone_is_the_beginning_of_the_whole(
    golden: Golden, parts: Parts, decoder: Session, samples: int
) -> None:
    latents = golden.tensors[next(golden.of("chunked_decode"))["latents"]]
    part = joined(parts, decoder, latents, samples=samples, window=8)
    assert_close_to_peak(part, joined(parts, decoder, latents)[:, :, :samples], 1e-5)


def test_all_runs_of_a_long_decode_have_one_shape(small: Parts) -> None:
    session = StandIn("audio", lambda latents: np.zeros((1, 2, latents.shape[2] * 4096), np.float32))
    list(decoded(session, np.zeros((1, 32, 301), np.float32), small.layout.autoencoder, window=64))
    assert {feed["latents"].shape for feed in session.feeds} == {(1, 32, 64)}


def test_a_chunk_is_yielded_before_the_next_is_computed(small: Parts) -> None:
    session = StandIn("audio", lambda latents: np.zeros((1, 2, latents.shape[2] * 4096), np.float32))
    chunks = decoded(session, np.zeros((1, 32, 300), np.float32), small.layout.autoencoder, window=64)
    next(chunks)
    assert len(session.feeds) == 1


@pytest.mark.parametrize("samples", [0, -1, 4 * 4096 + 1])
def test_samples_that_the_latents_do_not_hold_are_refused(small: Parts, samples: int) -> None:
    session = StandIn("audio", lambda latents: latents)
    with pytest.raises(ValueError, match="samples"):
        next(decoded(session, np.zeros((1, 32, 4), np.float32), small.layout.autoencoder, samples=samples))


def test_golden_audio_encodes_to_golden_latents(golden: Golden, parts: Parts, encoder: Session) -> None:
    for case in golden.of("encoder"):
        latents = parts.bottleneck.encode(encoded(encoder, golden.tensors[case["audio"]], parts.layout.autoencoder))
        assert_close_to_peak(latents, golden.tensors[case["latent"]], 1e-4)


@given(samples=st.integers(1, 12 * 4096), window=st.sampled_from(WINDOWS))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_encoding_in_windows_equals_encoding_at_once(parts: Parts, encoder: Session, samples: int, window: int) -> None:
    audio = np.random.default_rng(samples).uniform(-1, 1, (1, 2, samples)).astype(np.float32)
    auto = parts.layout.autoencoder
    whole = encoded(encoder, audio, auto)
    assert whole.shape == (1, 32, -(-samples // 4096))
    assert_close_to_peak(encoded(encoder, audio, auto, window=window), whole, 1e-5)


def test_patches_are_those_of_the_reference(golden: Golden) -> None:
    for case in golden.of("encoder"):
        audio = golden.tensors[case["audio"]]
        expected = golden.tensors[case["patched_audio"]]
        padded = np.pad(audio, ((0, 0), (0, 0), (0, expected.shape[2] * 256 - audio.shape[2])))
        np.testing.assert_array_equal(patched(padded, 256), expected, strict=True)


@given(channels=st.integers(1, 3), patches=st.integers(1, 5), size=st.integers(1, 8))
def test_patching_keeps_every_sample(channels: int, patches: int, size: int) -> None:
    audio = np.arange(channels * patches * size, dtype=np.float32).reshape(1, channels, -1)
    folded = patched(audio, size)
    assert folded.shape == (1, channels * size, patches)
    unfold: Callable[[Floats], Floats] = lambda f: f.reshape(1, channels, size, patches).transpose(0, 1, 3, 2)  # noqa: E731
    np.testing.assert_array_equal(unfold(folded).reshape(audio.shape), audio)
