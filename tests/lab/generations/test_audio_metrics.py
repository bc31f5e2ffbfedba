"""Figures of audio, on signals whose figures are known."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.errors import VerificationError
from sa3_convert.lab.generations import end_to_end
from sa3_convert.lab.generations.end_to_end import WINDOWS, AudioFidelity, spectral_distance
from sa3_convert.runtime.levels import SILENCE_LUFS, loudness

RATE = 44100


def compare_audio(reference: NDArray[np.float32], target: NDArray[np.float32]) -> AudioFidelity:
    return end_to_end.compare_audio(reference, target, RATE)


def tone(frequency: float, seconds: float = 0.5, level: float = 0.5) -> NDArray[np.float32]:
    t = np.arange(int(seconds * RATE)) / RATE
    return np.tile(level * np.sin(2 * math.pi * frequency * t), (2, 1)).astype(np.float32)


def noise(seed: int = 0, seconds: float = 0.5) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((2, int(seconds * RATE))).astype(np.float32)


def test_audio_is_like_itself_in_every_figure() -> None:
    result = compare_audio(noise(), noise())
    assert result.spectral_distance_db == (0, 0, 0)
    assert (result.envelope_correlation, result.loudness_db, result.width) == (pytest.approx(1), 0, 0)


def test_half_the_amplitude_is_six_decibels_in_spectrum_and_loudness() -> None:
    result = compare_audio(noise(), noise() / 2)
    assert result.loudness_db == pytest.approx(-20 * math.log10(2), abs=1e-6)
    # A few bins of noise lie near the floor; all others are 6.02 dB apart.
    assert result.mean_spectral_distance_db == pytest.approx(20 * math.log10(2), abs=0.01)
    assert result.envelope_correlation == pytest.approx(1)


def test_the_same_level_at_another_pitch_is_far_in_spectrum_only() -> None:
    result = compare_audio(tone(440), tone(540))
    assert result.mean_spectral_distance_db > 3
    assert result.loudness_db == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize(
    ("levels", "lufs"),
    [
        # A full-scale sine of 997 Hz in one channel is -3.01 by the standard's definition, in both 3 dB more.
        ((1.0, 0.0), -3.01),
        ((1.0, 1.0), 0.0),
        ((0.1, 0.1), -20.0),
        ((0.0, 0.0), SILENCE_LUFS),
        ((1e-5, 1e-5), SILENCE_LUFS),
    ],
)
def test_loudness_is_the_standards(levels: tuple[float, float], lufs: float) -> None:
    t = np.arange(3 * RATE) / RATE
    audio = np.outer(levels, np.sin(2 * math.pi * 997 * t))
    assert loudness(audio, RATE) == pytest.approx(lufs, abs=0.02)


def test_pauses_do_not_count_for_loudness() -> None:
    played = np.tile(np.sin(np.arange(4 * RATE) * 0.1), (2, 1))
    paused = np.concatenate([played, np.zeros_like(played)], axis=1)
    assert loudness(paused, RATE) == pytest.approx(loudness(played, RATE), abs=0.2)


@pytest.mark.parametrize("samples", [1, 7, int(0.4 * RATE) - 1, int(0.4 * RATE), int(0.4 * RATE) + 1])
def test_audio_shorter_than_a_loudness_block_has_one(samples: int) -> None:
    loud = noise(3, 1).astype(np.float64)[:, :samples]
    assert loudness(loud, RATE) - loudness(loud / 4, RATE) == pytest.approx(20 * math.log10(4), abs=1e-6)


def test_other_noise_of_the_same_kind_is_some_decibels_away() -> None:
    # The difference of two independent log-exponential variables has a standard deviation of √2 · 5.57 dB.
    result = compare_audio(noise(0, 2), noise(1, 2))
    assert result.mean_spectral_distance_db == pytest.approx(math.sqrt(2) * 5.57, rel=0.03)


def test_each_window_size_is_measured() -> None:
    assert len(compare_audio(noise(), noise(1)).spectral_distance_db) == len(WINDOWS)


def test_bins_below_the_floor_do_not_count() -> None:
    quiet = tone(440).astype(np.float64)
    hiss = 1e-7 * np.random.default_rng(0).standard_normal(quiet.shape)
    assert spectral_distance(quiet, quiet + hiss, 2048) < 0.01


def test_an_envelope_turned_around_correlates_negatively() -> None:
    ramp = np.linspace(0, 1, RATE // 2, dtype=np.float32) * noise()[:, : RATE // 2]
    assert compare_audio(ramp, ramp[:, ::-1].copy()).envelope_correlation < -0.9


def test_a_constant_envelope_correlates_with_itself_alone() -> None:
    silence = np.zeros((2, 4096), np.float32)
    assert compare_audio(silence, silence).envelope_correlation == 1
    assert compare_audio(silence, noise()[:, :4096]).envelope_correlation == 0


def test_width_is_the_side_signals_share() -> None:
    mono, wide = noise(), noise()
    mono[1] = mono[0]
    wide[1] = -wide[0]
    assert compare_audio(mono, wide).width == pytest.approx(1)
    assert compare_audio(wide, mono).width == pytest.approx(-1)


def test_audio_shorter_than_a_window_is_padded() -> None:
    assert math.isfinite(compare_audio(noise()[:, :7], noise(1)[:, :7]).mean_spectral_distance_db)


def test_silence_against_sound_is_finite() -> None:
    result = compare_audio(np.zeros((2, 9000), np.float32), noise()[:, :9000])
    assert math.isfinite(result.mean_spectral_distance_db)
    assert 50 < result.loudness_db < 100


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (np.zeros((2, 99), np.float32), "shape"),
        (np.zeros((1, 100), np.float32), "shape"),
        (np.full((2, 100), np.nan, np.float32), "NaN"),
        (np.full((2, 100), np.inf, np.float32), "NaN"),
    ],
)
def test_what_cannot_be_compared_is_refused(target: NDArray[np.float32], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        compare_audio(np.zeros((2, 100), np.float32), target)


def test_no_audio_is_refused() -> None:
    with pytest.raises(VerificationError, match="shape"):
        compare_audio(np.zeros((2, 0), np.float32), np.zeros((2, 0), np.float32))
