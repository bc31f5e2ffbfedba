"""What is heard is measured: the generator's own sounds are recognised, and no other piece is taken for them."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from sa3_convert.lab.miniature.recognise import unlike
from sa3_convert.lab.miniature.sounds import SAMPLES, Piece, Sound, render, sampled

TONE = Sound("tone", "square", 81)


def pieces(count: int, seed: int) -> list[Piece]:
    random = np.random.default_rng(seed)
    return [sampled(random) for _ in range(count)]


def test_the_generators_own_sounds_are_recognised() -> None:
    found = [unlike(piece, render(piece)) for piece in pieces(300, 1)]
    assert sum(bool(wrong) for wrong in found) <= 3, [wrong for wrong in found if wrong]


def test_no_other_piece_is_taken_for_one() -> None:
    known = pieces(300, 2)
    taken = []
    for wanted, other in pairwise(known):
        if wanted.sounds != other.sounds:
            played = Piece(other.sounds, wanted.seconds)
            taken += [] if unlike(wanted, render(played)) else [(wanted, played)]
    assert taken == []


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (replace(TONE, note=82), "Hz"),
        (replace(TONE, form="sawtooth"), "sawtooth"),
        (replace(TONE, envelope="plucked"), "plucked"),
        (replace(TONE, side="left"), "left"),
        (replace(TONE, level="soft"), "soft"),
        (Sound("silence"), "silence"),
        (Sound("chord", "major", 81), "Hz"),
    ],
)
def test_each_part_is_heard_by_itself(changed: Sound, word: str) -> None:
    wrong = unlike(Piece((TONE,), 2.0), render(Piece((changed,), 2.0)))
    assert any(word in said for said in wrong), wrong


def test_pitch_may_be_three_percent_beside_and_no_more() -> None:
    time = np.arange(SAMPLES) / 44100
    wanted = Piece((Sound("tone", "sine", 81),), 2.0)
    for hertz, near in ((880 * 1.025, True), (880 * 0.975, True), (880 * 1.035, False), (880 * 0.965, False)):
        audio = np.tile(0.25 * np.sin(2 * np.pi * hertz * time), (2, 1)).astype(np.float32)
        assert (unlike(wanted, audio[:, : wanted.samples]) == []) is near


def test_tempo_may_be_five_percent_beside_and_no_more() -> None:
    hits = Sound("hit", "click", bpm=108)
    wanted = Piece((hits,), 4.0)
    whole = render(Piece((replace(hits, bpm=None),), 0.5))[:, :8192]
    for bpm, near in ((108 * 1.04, True), (108 * 0.96, True), (108 * 1.07, False), (108 * 0.93, False)):
        audio = np.zeros((2, SAMPLES), np.float32)
        for start in np.arange(0, wanted.samples, 60 / bpm * 44100).astype(int):
            room = min(whole.shape[1], SAMPLES - start)
            audio[:, start : start + room] = whole[:, :room]
        assert (unlike(wanted, audio[:, : wanted.samples]) == []) is near


def test_the_order_of_a_pair_counts() -> None:
    first, second = Sound("hit", "kick"), Sound("tone", "sine", 76)
    played = render(Piece((second, first), 2.0))
    assert unlike(Piece((first, second), 2.0), played)
    assert unlike(Piece((second, first), 2.0), played) == []
