import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sa3_convert.runtime.loop import Loop, closed, crossfaded

Floats = NDArray[np.float32]
RATE = 44100


def noise(samples: int, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(0, 0.2, (1, 2, samples)).astype(np.float32)


def music(samples: int, beat: float = 0.5) -> Floats:
    """Return a chord that does not fit into the loop, drifting from one level to another, with soft beats."""
    t = np.arange(samples) / RATE
    chord = sum(0.15 * np.sin(2 * np.pi * f * t + f) for f in (110.3, 164.9, 277.1)) + 0.3 * np.cos(0.7 * t)
    hiss = np.convolve(np.random.default_rng(0).standard_normal(samples), np.hanning(32) / 16, "same")
    beats = 0.2 * np.exp(-12 * ((t + beat / 2) % beat)) * hiss
    return np.stack([chord + beats, chord - beats])[np.newaxis].astype(np.float32)


def steps(audio: Floats) -> Floats:
    """Return the largest step of any channel from each sample to the next, the last one's to the first."""
    found: Floats = np.abs(np.roll(audio[0], -1, axis=1) - audio[0]).max(axis=0)
    return found


def spectral_flux(audio: Floats, window: int = 512) -> tuple[float, NDArray[np.float64]]:
    """Return by how much the spectrum grows into the window around the seam, and into all others."""
    count = audio.shape[2] // window
    at = count // 2
    turned = np.roll(audio[0].mean(axis=0), at * window + window // 2)[: count * window]
    spectrum = np.abs(np.fft.rfft(turned.reshape(count, window) * np.hanning(window)))
    flux = np.maximum(np.diff(spectrum, axis=0), 0).sum(axis=1)
    return float(flux[at - 1]), np.delete(flux, at - 1)


def joined(audio: Floats, samples: int, fade: int) -> Floats:
    (whole,) = closed(
        iter([audio[..., : samples // 3].copy(), audio[..., samples // 3 : samples + fade]]), samples, fade
    )
    return whole


@pytest.mark.parametrize(
    ("bpm", "bars", "beats", "samples", "fade"),
    [(120, 4, 4, 352800, 22050), (174, 8, 4, 486621, 15207), (90.5, 1, 3, 87713, 29238), (61, 3, 1, 130131, 43377)],
)
def test_a_loop_has_exactly_its_samples_and_fades_over_a_beat(
    bpm: float, bars: int, beats: int, samples: int, fade: int
) -> None:
    loop = Loop(bpm, bars, beats)
    assert loop.samples(RATE) == round(bars * beats * 60 / bpm * RATE) == samples
    assert loop.fade(RATE) == fade


@given(bpm=st.floats(20, 400), bars=st.integers(1, 64), beats=st.integers(1, 16))
def test_what_is_faded_is_always_generated_and_never_longer_than_the_loop(bpm: float, bars: int, beats: int) -> None:
    loop = Loop(bpm, bars, beats)
    assert 1 <= loop.fade(RATE) <= loop.samples(RATE)
    assert loop.samples(RATE) + loop.fade(RATE) <= int(loop.generated_seconds * RATE)


def test_the_last_sample_leads_into_the_first_and_after_the_fade_nothing_is_changed() -> None:
    loop = Loop(120, 1, 4)
    samples, fade = loop.samples(RATE), loop.fade(RATE)
    audio = music(samples + fade)
    whole = joined(audio, samples, fade)
    assert whole.shape == (1, 2, samples)
    assert whole.dtype == np.float32
    # The first sample is the one that followed the last.
    np.testing.assert_array_equal(whole[..., 0], audio[..., samples])
    np.testing.assert_array_equal(whole[..., fade:], audio[..., fade:samples])


def test_the_join_is_no_click_where_a_cut_is_one() -> None:
    loop = Loop(118.7, 2, 4)
    samples, fade = loop.samples(RATE), loop.fade(RATE)
    audio = music(samples + fade, 60 / loop.bpm)
    whole, cut = joined(audio, samples, fade), audio[..., :samples]
    assert steps(cut)[-1] > 3 * steps(cut)[:-1].max()
    assert steps(whole)[-1] <= np.percentile(steps(whole), 99)
    seam, others = spectral_flux(cut)
    assert seam > others.max()
    seam, others = spectral_flux(whole)
    assert seam <= np.percentile(others, 95)


@pytest.mark.parametrize("related", [0.0, 0.5, 1.0])
def test_a_crossfade_keeps_the_power_however_related_the_pieces_are(related: float) -> None:
    first, other = noise(400_000, 1), noise(400_000, 2)
    second = np.float32(related) * first + np.float32(np.sqrt(1 - related**2)) * other
    faded = crossfaded(first, second)
    blocks = np.sqrt(np.square(faded, dtype=np.float64).reshape(2, 20, -1).mean(axis=(0, 2)))
    np.testing.assert_allclose(blocks, 0.2, rtol=0.01)


def test_equal_pieces_are_left_as_they_are() -> None:
    piece = music(10_000)
    np.testing.assert_allclose(crossfaded(piece, piece), piece, atol=1e-7)


def test_silence_on_one_or_both_sides_is_faded_to_numbers() -> None:
    silence, piece = np.zeros((1, 2, 100), np.float32), noise(100, 3)
    assert not crossfaded(silence, silence).any()
    assert np.isfinite(crossfaded(silence, piece)).all()
    assert np.abs(crossfaded(piece, -piece)).max() <= np.abs(piece).max()


def test_without_a_fade_chunks_come_as_they_are_made() -> None:
    made = []

    def chunks():  # type: ignore[no-untyped-def]
        for i in range(3):
            made.append(i)
            yield noise(10, i)

    first = next(closed(chunks(), 30, 0))
    assert made == [0]
    np.testing.assert_array_equal(first, noise(10, 0))
