"""Peaks and loudness of decoded audio."""

from typing import Any

import numpy as np
import pytest

from sa3_convert.errors import UsageError
from sa3_convert.runtime.events import AudioChunk
from sa3_convert.runtime.levels import CEILING, PeakName, level, limited, loudness, true_peak_db
from sa3_convert.runtime.request import GenerateRequest
from tests.runtime.conftest import Parts
from tests.runtime.fakes import FakeEngine, decode, pipeline

RATE = 44100


def noise(samples: int, scale: float, seed: int = 7) -> Any:
    return (np.random.RandomState(seed).standard_normal((2, samples)) * scale).astype(np.float32)


def levelled(audio: Any, peak: PeakName, lufs: float | None = None, step: int = 1000) -> tuple[Any, list[str]]:
    notes: list[str] = []
    how = level(peak, lufs, RATE, notes.append)
    chunks = [how.add(audio[:, at : at + step]) for at in range(0, audio.shape[1], step)]
    return np.concatenate([*chunks, how.finish()], axis=1), notes


def test_the_limiter_is_the_references() -> None:
    audio = noise(1000, 0.9)
    audio[:, 600:] *= np.float32(0.1)
    # What the limiter of the reference's releases for devices gives there.
    at = [0, 63, 64, 400, 599, 650, 800, 999]
    left = [0.50733709, 0.51004148, -0.11506762, -0.01616218, -0.07311583, -0.00056185, 0.00351789, -0.05397394]
    right = [0.26556027, -0.32890981, -0.12137421, 0.14751500, 0.08826546, -0.01910437, 0.02967097, -0.01676959]
    np.testing.assert_allclose(limited(audio)[:, at], [left, right], atol=1e-7)


@pytest.mark.parametrize("samples", [1, 63, 64, 65, 700, 44100])
def test_the_limiter_leaves_what_is_below_its_ceiling_and_lets_nothing_beyond_it(samples: int) -> None:
    quiet = noise(samples, 0.1)
    np.testing.assert_array_equal(limited(quiet), quiet)
    assert np.abs(limited(noise(samples, 3.0))).max() <= CEILING + 1e-6


@pytest.mark.parametrize("step", [1, 100, 4096])
@pytest.mark.parametrize("samples", [1, 64, 700, 1500])
def test_a_limited_stream_is_the_limited_whole(samples: int, step: int) -> None:
    audio = noise(samples, 1.2)
    np.testing.assert_array_equal(levelled(audio, "limit", step=step)[0], limited(audio))


def test_attenuating_keeps_the_ratios_and_clipping_the_rest() -> None:
    audio = noise(5000, 0.5)
    peak = np.abs(audio).max()
    assert peak > 1
    np.testing.assert_array_equal(levelled(audio, "attenuate")[0], audio / peak)
    np.testing.assert_array_equal(levelled(audio, "clip")[0], np.clip(audio, -1, 1))
    quiet = audio / np.float32(4)
    np.testing.assert_array_equal(levelled(quiet, "attenuate")[0], quiet)


@pytest.mark.parametrize("peak", ["limit", "attenuate", "clip"])
def test_a_loudness_is_reached_where_peaks_allow_and_told_with_the_true_peak(peak: PeakName) -> None:
    tone = 0.05 * np.sin(2 * np.pi * 997 * np.arange(2 * RATE) / RATE)
    audio = np.stack([tone, tone]).astype(np.float32)
    made, (note,) = levelled(audio, peak, -14.0)
    assert abs(loudness(made.astype(np.float64), RATE) + 14) < 0.05
    assert note == f"-14.0 LUFS; true peak {true_peak_db(made, RATE):+.1f} dBTP."
    made, (note,) = levelled(noise(2 * RATE, 0.1), "attenuate", -1.0)
    assert np.abs(made).max() <= 1
    assert "LUFS; for -1 its peaks would lie beyond full scale; true peak " in note
    _, (note,) = levelled(noise(2 * RATE, 0.1), "clip", -1.0)
    assert note.endswith(" dBTP, which a lossy file or a converter may clip.")


def test_silence_has_no_loudness_to_be_brought_to() -> None:
    made, _ = levelled(np.zeros((2, RATE), np.float32), "limit", -14.0)
    assert not made.any()


def test_a_true_peak_lies_between_the_samples() -> None:
    tone = np.sin(2 * np.pi * np.arange(4096) / 4 + np.pi / 4)
    assert abs(true_peak_db(np.stack([tone, tone]).astype(np.float32)[:, :4096], RATE)) < 1.0
    assert true_peak_db(np.stack([tone, tone]).astype(np.float32), RATE) > 20 * np.log10(np.abs(tone).max()) + 2


@pytest.mark.parametrize("settings", [{"peak": "clip"}, {"peak": "limit"}, {"peak": "attenuate"}, {"loudness": -20.0}])
def test_a_generation_is_levelled_and_otherwise_the_same(small: Parts, settings: dict[str, Any]) -> None:
    def loud(latents: Any) -> Any:
        return 20 * decode(latents)

    request = GenerateRequest("pad", seconds=2, steps=1, **settings)
    made = pipeline(small, FakeEngine(decoder=loud), window=16)
    events = list(made.stream(request, allow=["clipping"]))
    chunks = [event for event in events if isinstance(event, AudioChunk)]
    assert [chunk.start for chunk in chunks] == [0, *np.cumsum([c.samples.shape[1] for c in chunks])[:-1]]
    audio = np.concatenate([chunk.samples for chunk in chunks], axis=1)
    assert audio.shape == (2, 2 * RATE)
    assert np.abs(audio).max() <= (CEILING + 1e-6 if settings.get("peak", "limit") == "limit" else 1)


@pytest.mark.parametrize(
    ("settings", "message"), [({"peak": "loud"}, "peak is 'loud'; give limit"), ({"loudness": 3.0}, "loudness is 3")]
)
def test_levels_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GenerateRequest("pad", **settings)


@pytest.mark.parametrize("samples", [64 * 50, 64 * 50 + 20, 64 * 50 + 50])
@pytest.mark.parametrize("lufs", [None, 0.0])
def test_a_loop_is_limited_all_round_so_that_its_seam_has_no_step(samples: int, lufs: float | None) -> None:
    audio = np.full((2, samples), 0.9, np.float32)
    audio[:, -100:-80] = 3.0
    how = level("limit", lufs, RATE, lambda _: None, loop=True)
    assert not how.add(audio).size
    made = how.finish()
    assert np.abs(made).max() <= CEILING + 1e-6
    steps = np.abs(np.diff(made, axis=1, append=made[:, :1]))
    # A smoothed gain changes by a quarter of the reduction, 0.7, from a block to the next; the shortest has 20 samples.
    assert steps[0, -1] <= 0.7 / 4 / 20 + 0.002
    # Without going round the gain jumps there.
    assert abs(limited(audio)[0, 0] - limited(audio)[0, -1]) > 0.2
