"""Sounds are what their parameters say, on the grid of the latents; captions have words that training knows."""

import re

import numpy as np
import pytest

from sa3_convert.checkpoint.variants import LATENT_SAMPLES, SAMPLE_RATE
from sa3_convert.lab.miniature.captions import caption
from sa3_convert.lab.miniature.sounds import (
    NOTES,
    SAMPLES,
    TEMPI,
    Piece,
    Sound,
    frequency,
    render,
    sampled,
    starts,
    tone,
)


@pytest.mark.parametrize("note", NOTES)
def test_a_tone_is_whole_periods_of_its_note_in_a_latent(note: int) -> None:
    spectrum = np.abs(np.fft.rfft(tone("sine", note)))
    heard = int(spectrum.argmax()) * SAMPLE_RATE / LATENT_SAMPLES
    assert heard == pytest.approx(frequency(note), rel=0.011)
    assert np.sort(spectrum)[-2] < 1e-3 * spectrum.max()


@pytest.mark.parametrize("bpm", TEMPI)
def test_beats_have_their_tempo(bpm: int) -> None:
    gaps = np.diff(starts(Sound("hit", "kick", bpm=bpm), SAMPLES))
    assert 60 * SAMPLE_RATE / gaps == pytest.approx(np.full(len(gaps), bpm), rel=0.01)


def test_a_piece_is_stereo_within_full_scale_and_silent_after_its_end() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        piece = sampled(random)
        audio = render(piece)
        assert audio.shape == (2, SAMPLES)
        assert audio.dtype == np.float32
        assert np.abs(audio).max() <= 1.1
        assert not audio[:, -(-piece.samples // LATENT_SAMPLES) * LATENT_SAMPLES :].any()


def test_a_sound_is_the_same_wherever_it_stands() -> None:
    for sound in (Sound("tone", "square", 80), Sound("hit", "snare", bpm=130), Sound("noise", "pink")):
        pair = Piece((Sound("silence"), sound), 4.0)
        _, (start, end) = pair.spans()
        assert np.array_equal(render(pair)[:, start:end], render(Piece((sound,), 4.0))[:, : end - start])


def words(captions: set[str]) -> set[str]:
    return {word for text in captions for word in re.findall(r"[\w#-]+", text)}


def test_wordings_that_are_kept_for_judging_are_new_and_of_known_words() -> None:
    random = np.random.default_rng(3)
    pieces = [sampled(random) for _ in range(4000)]
    trained = {caption(piece, random) for piece in pieces}
    judged = {caption(piece, random, kept=True) for piece in pieces}
    assert trained.isdisjoint(judged)
    assert words(judged) <= words(trained)


def test_a_caption_says_what_its_piece_has() -> None:
    piece = Piece(
        (Sound("tone", "square", 78, "plucked", side="left", level="loud"), Sound("hit", "kick", bpm=92)), 4.0
    )
    random = np.random.default_rng(4)
    for kept in (False, True):
        text = caption(piece, random, kept=kept)
        for said in ("square", "F#5", "left", "loud", "92 bpm"):
            assert said in text, text
        assert text.index("square") < text.index("92 bpm")
