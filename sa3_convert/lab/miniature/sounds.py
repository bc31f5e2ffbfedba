"""The sounds that the miniature knows, made by code from known parameters.

All lies on the grid of the latents, so that a sound has the same latents wherever it stands: tones are tuned to whole
periods in a latent (1 % beside the named note at most), sweeps go from note to note of that kind, and beats are whole
latents long (1 % beside the named tempo). Nothing is random: a noise is a few stored stretches in turn.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from sa3_convert.checkpoint.variants import LATENT_SAMPLES, SAMPLE_RATE

_T = TypeVar("_T")
Floats = NDArray[np.float32]
Wave = Literal["sine", "square", "sawtooth"]
Envelope = Literal["steady", "swelling", "plucked"]
Hit = Literal["kick", "snare", "hat", "clap", "click"]
Noise = Literal["white", "pink", "low", "high"]
Motion = Literal["up", "down", "siren"]
Chord = Literal["major", "minor"]
Kind = Literal["tone", "chord", "hit", "noise", "motion", "silence"]
Side = Literal["left", "middle", "right"]
Level = Literal["soft", "normal", "loud"]

LATENTS: Final = 44
SAMPLES: Final = LATENTS * LATENT_SAMPLES
NOTES: Final = tuple(range(72, 90))
"""MIDI numbers, C5 to F6."""
ROOTS: Final = NOTES[:11]
"""Of chords."""
NAMES: Final = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
TEMPI: Final = {65: 10, 72: 9, 80: 8, 92: 7, 108: 6, 130: 5, 160: 4}
"""Beats per minute, and how many latents a beat lasts."""
SECONDS: Final = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
LEVELS: Final[dict[Level, float]] = {"soft": 0.125, "normal": 0.25, "loud": 0.5}
"""Peak amplitude of tones."""
_SIDES: Final[dict[Side, tuple[float, float]]] = {"left": (1.0, 0.1), "middle": (1.0, 1.0), "right": (0.1, 1.0)}
_HIGHEST_HARMONIC: Final = 6000.0
_SHARES: Final[dict[Kind, float]] = {
    "tone": 0.38,
    "chord": 0.15,
    "hit": 0.22,
    "noise": 0.12,
    "motion": 0.1,
    "silence": 0.03,
}
_SIDE_SHARES: Final[dict[Side, float]] = {"left": 0.2, "middle": 0.6, "right": 0.2}
_LEVEL_SHARES: Final[dict[Level, float]] = {"soft": 0.2, "normal": 0.6, "loud": 0.2}
_ENVELOPE_SHARES: Final[dict[Envelope, float]] = {"steady": 0.6, "swelling": 0.2, "plucked": 0.2}
_ENVELOPE_SECONDS: Final = 1.0
"""From which on an envelope can be told."""
_SIREN_SECONDS: Final = 1.5
_INTERVALS: Final[dict[str, tuple[int, ...]]] = {"major": (0, 4, 7), "minor": (0, 3, 7), "diminished": (0, 3, 6)}
"""Of chords; diminished ones are what the adapter is trained on."""
_STRETCHES: Final = 2
"""Of each noise, as long as a latent, that follow each other in turn."""
PAIRS: Final = 0.2
"""Share of pieces that are two sounds in sequence."""


@dataclass(frozen=True, slots=True)
class Sound:
    """One sound; what its kind does not have is None."""

    kind: Kind
    form: str = ""
    """Wave, chord, hit, noise or motion."""
    note: int | None = None
    envelope: Envelope = "steady"
    bpm: int | None = None
    """Of hits that repeat; a single one without."""
    side: Side = "middle"
    level: Level = "normal"


@dataclass(frozen=True, slots=True)
class Piece:
    """What is heard: one sound, or two of which the second begins at `halfway`."""

    sounds: tuple[Sound, ...]
    seconds: float

    @property
    def samples(self) -> int:
        """Samples that are heard."""
        return int(self.seconds * SAMPLE_RATE)

    def spans(self) -> list[tuple[int, int]]:
        """Return from where to where each sound goes, in samples; both are whole latents, so the last is cut."""
        latents = -(-self.samples // LATENT_SAMPLES)
        places = (0, latents) if len(self.sounds) == 1 else (0, latents // 2, latents)
        return [(start * LATENT_SAMPLES, end * LATENT_SAMPLES) for start, end in pairwise(places)]


def frequency(note: int) -> float:
    """Return the Hz of a MIDI note, equally tempered from A4 = 440."""
    return float(440 * 2 ** ((note - 69) / 12))


def notes_of(sound: Sound) -> list[int]:
    """Return the notes that sound together."""
    assert sound.note is not None
    return [sound.note] if sound.kind == "tone" else [sound.note + step for step in _INTERVALS[sound.form]]


def render(piece: Piece) -> Floats:
    """Return the samples [2, `SAMPLES`] float32 of a piece, silent after its end."""
    audio = np.zeros((2, SAMPLES), np.float32)
    for sound, (start, end) in zip(piece.sounds, piece.spans(), strict=True):
        mono = _mono(sound, end - start) * np.float32(LEVELS[sound.level])
        for channel, gain in enumerate(_SIDES[sound.side]):
            audio[channel, start:end] = mono * np.float32(gain)
    return audio


def _mono(sound: Sound, samples: int) -> Floats:
    match sound.kind:
        case "silence":
            return np.zeros(samples, np.float32)
        case "tone":
            return _shaped(np.resize(tone(sound.form, sound.note or 0), samples), sound.envelope)
        case "chord":
            notes = notes_of(sound)
            total = sum(tone("sine", note) for note in notes) / np.float32(len(notes) / 1.3)
            return _shaped(np.resize(total, samples), sound.envelope)
        case "noise":
            return _shaped(np.resize(_stretches(sound.form), samples), sound.envelope)
        case "motion":
            return _motion(sound.form, samples)
        case "hit":
            return _hits(sound, samples)


@functools.cache
def tone(wave: str, note: int) -> Floats:
    """Return the samples of a latent: a whole number of periods of a note, without harmonics beyond 6 kHz."""
    cycles = round(frequency(note) * LATENT_SAMPLES / SAMPLE_RATE)
    time = np.arange(LATENT_SAMPLES) / LATENT_SAMPLES * 2 * np.pi * cycles
    most = max(1, int(_HIGHEST_HARMONIC / frequency(note)))
    match wave:
        case "sine":
            harmonics = [(1, 1.0)]
        case "square":
            harmonics = [(k, 1 / k) for k in range(1, most + 1, 2)]
        case _:
            harmonics = [(k, 1 / k) for k in range(1, most + 1)]
    summed = sum(amplitude * np.sin(k * time) for k, amplitude in harmonics)
    return np.asarray(summed / np.abs(summed).max(), np.float32)


def _shaped(samples: Floats, envelope: Envelope) -> Floats:
    """Return samples under an envelope that changes from latent to latent, where every tone is at zero."""
    latents = len(samples) // LATENT_SAMPLES
    gains = np.ones(latents, np.float32)
    if envelope == "swelling":
        gains = np.linspace(1 / latents, 1, latents, dtype=np.float32)
    elif envelope == "plucked":
        gains = np.exp(-np.arange(latents, dtype=np.float32) / 3)
    return samples * np.repeat(gains, LATENT_SAMPLES)


def _coloured(white: NDArray[np.float64], form: str) -> Floats:
    """Return noise of a colour with a root mean square of 0.3."""
    spectrum = np.fft.rfft(white)
    hertz = np.fft.rfftfreq(len(white), 1 / SAMPLE_RATE)
    match form:
        case "pink":
            spectrum *= np.sqrt(50 / np.maximum(hertz, 50))
        case "low":
            spectrum *= 1 / (1 + (hertz / 300) ** 4)
        case "high":
            spectrum *= 1 / (1 + (6000 / np.maximum(hertz, 1)) ** 4)
    samples = np.fft.irfft(spectrum, len(white))
    return np.asarray(0.3 * samples / np.sqrt(np.mean(samples**2)), np.float32)


@functools.cache
def _stretches(form: str) -> Floats:
    random = np.random.default_rng(sum(map(ord, form)))
    return np.concatenate([_coloured(random.standard_normal(LATENT_SAMPLES), form) for _ in range(_STRETCHES)])


def _motion(form: str, samples: int) -> Floats:
    notes = motion(form, -(-samples // LATENT_SAMPLES))
    return np.concatenate([tone("sine", note) for note in notes])[:samples]


def motion(form: str, latents: int) -> list[int]:
    """Return the note at each latent of a sweep or a siren, which goes up and down every 12 latents."""
    low, high = NOTES[0], NOTES[-1]
    if form == "siren":
        return [low + 2 * abs((index + 6) % 12 - 6) for index in range(latents)]
    rising = [round(low + (high - low) * index / max(latents - 1, 1)) for index in range(latents)]
    return rising if form == "up" else rising[::-1]


@functools.cache
def hit(form: str) -> Floats:
    """Return one hit, always the same."""
    random = np.random.default_rng(sum(map(ord, form)))
    time = np.arange(int(0.3 * SAMPLE_RATE)) / SAMPLE_RATE
    match form:
        case "kick":
            phase = 50 * time + 110 * 0.03 * (1 - np.exp(-time / 0.03))
            samples = np.sin(2 * np.pi * phase) * np.exp(-time / 0.08)
        case "snare":
            body = np.sin(2 * np.pi * 190 * time) * np.exp(-time / 0.05)
            samples = body + 2 * _coloured(random.standard_normal(len(time)), "white") * np.exp(-time / 0.06)
        case "hat":
            samples = _coloured(random.standard_normal(len(time)), "high") * np.exp(-time / 0.025)
        case "clap":
            bursts = sum(np.where(time >= at, np.exp(-(time - at) / 0.008), 0) for at in (0, 0.0116, 0.0232))
            tail = np.where(time >= 0.0348, np.exp(-(time - 0.0348) / 0.04), 0)
            noise = _band(random.standard_normal(len(time)), 900, 2200)
            samples = noise * (bursts + tail)
        case _:
            samples = np.sin(2 * np.pi * 3000 * time) * np.exp(-time / 0.012)
    return np.asarray(samples / np.abs(samples).max(), np.float32)


def _band(white: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    spectrum = np.fft.rfft(white)
    hertz = np.fft.rfftfreq(len(white), 1 / SAMPLE_RATE)
    spectrum *= 1 / (1 + (low / np.maximum(hertz, 1)) ** 6) / (1 + (hertz / high) ** 6)
    return np.fft.irfft(spectrum, len(white))


def _hits(sound: Sound, samples: int) -> Floats:
    audio = np.zeros(samples + SAMPLE_RATE, np.float32)
    one = hit(sound.form)
    for start in starts(sound, samples):
        audio[start : start + len(one)] += one
    return audio[:samples]


def starts(sound: Sound, samples: int) -> list[int]:
    """Return where the hits of a sound stand in so many samples."""
    if sound.bpm is None:
        return [0]
    return list(range(0, samples - LATENT_SAMPLES // 2, TEMPI[sound.bpm] * LATENT_SAMPLES))


def sampled(random: np.random.Generator, pairs: float = PAIRS) -> Piece:
    """Return a piece by chance: every kind, such a share of them two sounds in sequence."""
    pair = random.random() < pairs
    seconds = SECONDS[random.integers(3 if pair else 0, len(SECONDS))]
    return Piece(tuple(sampled_sound(random, seconds / 2 if pair else seconds) for _ in range(1 + pair)), seconds)


def sampled_sound(random: np.random.Generator, seconds: float) -> Sound:
    """Return a sound by chance that can be told within so many seconds."""
    kind = _chosen(random, _SHARES)
    placed: Any = {"side": _chosen(random, _SIDE_SHARES), "level": _chosen(random, _LEVEL_SHARES)}
    envelope = _chosen(random, _ENVELOPE_SHARES) if seconds >= _ENVELOPE_SECONDS else "steady"
    match kind:
        case "tone":
            return Sound("tone", _any(random, get_args(Wave)), _any(random, NOTES), envelope, **placed)
        case "chord":
            return Sound("chord", _any(random, get_args(Chord)), _any(random, ROOTS), envelope, **placed)
        case "hit":
            slow = [bpm for bpm in TEMPI if seconds >= 2.5 * 60 / bpm]
            bpm = _any(random, slow) if slow and random.random() < 0.75 else None
            return Sound("hit", _any(random, get_args(Hit)), bpm=bpm, **placed)
        case "noise":
            envelope = "swelling" if envelope == "swelling" else "steady"
            return Sound("noise", _any(random, get_args(Noise)), None, envelope, **placed)
        case "motion":
            moving = ("up", "down", "siren") if seconds >= _SIREN_SECONDS else ("up", "down")
            return Sound("motion", _any(random, moving), **placed)
    return Sound("silence")


def _any(random: np.random.Generator, values: Sequence[_T]) -> _T:
    return values[int(random.integers(len(values)))]


def _chosen(random: np.random.Generator, shares: Mapping[_T, float]) -> _T:
    return list(shares)[int(random.choice(len(shares), p=list(shares.values())))]
