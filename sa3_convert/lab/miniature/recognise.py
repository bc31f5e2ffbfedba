"""What is heard, measured from audio alone: pitch, wave, envelope, tempo, spectrum, motion, side, loudness, silence.

Of each part there is a measure with a limit that half of what tells neighbours apart would exceed; the prototypes that
spectra are compared with are measured on the sounds themselves.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final, get_args

import numpy as np
from numpy.typing import NDArray

from sa3_convert.checkpoint.variants import LATENT_SAMPLES, SAMPLE_RATE
from sa3_convert.lab.miniature.sounds import (
    LEVELS,
    NOTES,
    Floats,
    Hit,
    Level,
    Noise,
    Piece,
    Sound,
    frequency,
    motion,
    notes_of,
    render,
    starts,
)

PITCH: Final = 0.03
TEMPO: Final = 0.05
_SILENT: Final = 0.008
"""Root mean square of 6 ms below which nothing is heard, -42 dBFS."""
_RINGS_DB: Final = -20.0
"""How far a single hit has died away after `_RINGING` samples."""
_RINGING: Final = int(0.4 * SAMPLE_RATE)
_SIDE_DB: Final = 6.0
_ENVELOPE_DB: Final = 5.0
_EDGE: Final = 1500
"""Samples at both ends of a sound that are left out where they would blur a measure."""
_FAINTEST_DB: Final = -30.0
_WAVES: Final[dict[str, tuple[float, float]]] = {
    "sine": (_FAINTEST_DB, _FAINTEST_DB),
    "square": (_FAINTEST_DB, -9.5),
    "sawtooth": (-6.0, -9.5),
}
"""Second and third harmonic, in dB of the first."""
_CHORD_DB: Final = 15.0
_ALONE_DB: Final = 10.0
"""How far what is no harmonic of a single tone lies below it."""
_TONAL: Final = 0.2
"""Share of the energy in the strongest few Hz that no noise reaches."""
_HOP: Final = 256
_RISE_DB: Final = 9.0
_QUIET_ONSET_DB: Final = 20.0
_HIT: Final = int(0.06 * SAMPLE_RATE)
_EDGES_HZ: Final = (30, 90, 180, 360, 720, 1440, 2880, 5760, 11520, 22050)
_FRAME: Final = 2048
_FOLLOWS: Final = 0.9
_SWING: Final = (0.6, 1.4)


def unlike(piece: Piece, audio: Floats) -> list[str]:
    """Return what does not fit in audio [2, N] that is to be a piece, a few words each; nothing if it is recognised."""
    found = []
    for sound, (start, end) in zip(piece.sounds, piece.spans(), strict=True):
        found += _unlike(sound, np.asarray(audio[:, start : min(end, audio.shape[1])], np.float64))
    return found


def _unlike(sound: Sound, audio: NDArray[np.float64]) -> list[str]:
    powers = np.sqrt(np.mean(audio**2, axis=1))
    loudest = max(float(_frames(channel).max()) for channel in audio)
    if sound.kind == "silence":
        return [] if loudest < _SILENT else [f"{_db(loudest):.0f} dB instead of silence"]
    if loudest < _SILENT:
        return ["silence"]
    louder = audio[int(powers.argmax())]
    return [*_misplaced(sound, powers), *_level(sound, audio.shape[1], powers.max()), *_other(sound, louder)]


def _other(sound: Sound, mono: NDArray[np.float64]) -> list[str]:
    inner = mono[_EDGE:-_EDGE]
    match sound.kind:
        case "tone":
            return [*_pitch(sound, inner), *_envelope(sound, inner)]
        case "chord":
            return [*_notes(sound, inner), *_envelope(sound, inner)]
        case "noise":
            return [*_colour(sound, inner), *_envelope(sound, inner)]
        case "motion":
            return _moves(sound, mono)
    return _beats(sound, mono)


def _db(ratio: float) -> float:
    return float(20 * np.log10(max(ratio, 1e-9)))


def _misplaced(sound: Sound, powers: NDArray[np.float64]) -> list[str]:
    balance = _db(powers[0]) - _db(powers[1])
    side = "left" if balance > _SIDE_DB else "right" if balance < -_SIDE_DB else "middle"
    return [] if side == sound.side else [f"{side} ({balance:+.0f} dB) instead of {sound.side}"]


@functools.lru_cache(maxsize=4096)
def _expected(sound: Sound, samples: int) -> float:
    """Return the root mean square of a sound at its normal level, in the middle."""
    plain = Piece((replace(sound, side="middle", level="normal"),), samples / SAMPLE_RATE + 1e-9)
    return float(np.sqrt(np.mean(render(plain)[0, :samples] ** 2)))


def _level(sound: Sound, samples: int, power: float) -> list[str]:
    above = _db(power / _expected(sound, samples))
    nearest = min(get_args(Level), key=lambda level: abs(above - _db(LEVELS[level] / LEVELS["normal"])))
    return [] if nearest == sound.level else [f"{nearest} ({above:+.0f} dB) instead of {sound.level}"]


def _spectrum(mono: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return amplitudes of a window over all of it, finer than its bins, and the Hz of a bin."""
    size = max(1 << 16, 1 << int(np.ceil(np.log2(len(mono)))))
    return np.abs(np.fft.rfft(mono * np.hanning(len(mono)), size)), SAMPLE_RATE / size


def _near(spectrum: NDArray[np.float64], hz_per_bin: float, hertz: float, around: float = PITCH) -> float:
    low, high = int(hertz * (1 - around) / hz_per_bin), int(hertz * (1 + around) / hz_per_bin) + 1
    return float(spectrum[low : high + 1].max(initial=0.0))


def _pitch(sound: Sound, mono: NDArray[np.float64]) -> list[str]:
    assert sound.note is not None
    spectrum, step = _spectrum(mono)
    low = int(40 / step)
    heard = (int(spectrum[low:].argmax()) + low) * step
    wanted = frequency(sound.note)
    if abs(heard / wanted - 1) > PITCH:
        return [f"{heard:.0f} Hz instead of {wanted:.0f}"]
    first = _near(spectrum, step, heard)
    others = spectrum.copy()
    others[:low] = 0
    for harmonic in range(1, int(SAMPLE_RATE / 2 / heard) + 1):
        middle = harmonic * heard / step
        others[int(middle * (1 - PITCH)) : int(middle * (1 + PITCH)) + 2] = 0
    if (beside := _db(float(others.max()) / first)) > -_ALONE_DB:
        return [f"another tone at {beside:.0f} dB"]
    harmonics = [max(_FAINTEST_DB, _db(_near(spectrum, step, k * heard) / first)) for k in (2, 3)]
    wave = min(_WAVES, key=lambda name: sum((a - b) ** 2 for a, b in zip(harmonics, _WAVES[name], strict=True)))
    return [] if wave == sound.form else [f"{wave} instead of {sound.form}"]


def _notes(sound: Sound, mono: NDArray[np.float64]) -> list[str]:
    spectrum, step = _spectrum(mono)
    strengths = {
        note: _near(spectrum, step, frequency(note), PITCH * 0.9) for note in range(NOTES[0] - 5, NOTES[-1] + 6)
    }
    strongest = sorted(strengths, key=lambda note: -strengths[note])
    wanted = set(notes_of(sound))
    heard = set(strongest[: len(wanted)])
    weakest = _db(min(strengths[note] for note in heard) / strengths[strongest[0]])
    if heard != wanted or weakest < -_CHORD_DB:
        return [f"notes {sorted(heard)} instead of {sorted(wanted)}"]
    return []


def _envelope(sound: Sound, mono: NDArray[np.float64]) -> list[str]:
    quarter = len(mono) // 4
    first, last = (float(np.sqrt(np.mean(part**2))) for part in (mono[:quarter], mono[-quarter:]))
    change = _db(last) - _db(first)
    heard = "swelling" if change > _ENVELOPE_DB else "plucked" if change < -_ENVELOPE_DB else "steady"
    return [] if heard == sound.envelope else [f"{heard} ({change:+.0f} dB) instead of {sound.envelope}"]


def profile(mono: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the level of each octave in dB of all, none below -40."""
    energy = np.abs(np.fft.rfft(mono * np.hanning(len(mono)))) ** 2
    hertz = np.fft.rfftfreq(len(mono), 1 / SAMPLE_RATE)
    bands = np.array([energy[(hertz >= a) & (hertz < b)].sum() for a, b in pairwise(_EDGES_HZ)])
    levels: NDArray[np.float64] = np.maximum(10 * np.log10(bands / max(bands.sum(), 1e-20) + 1e-12), -40)
    return levels


@functools.cache
def _prototypes(kind: str) -> Mapping[str, NDArray[np.float64]]:
    forms: Sequence[str] = get_args(Noise) if kind == "noise" else get_args(Hit)
    made = {form: render(Piece((Sound(kind, form),), 1.0))[0].astype(np.float64) for form in forms}  # type: ignore[arg-type]
    return {form: profile(audio[: SAMPLE_RATE if kind == "noise" else _HIT]) for form, audio in made.items()}


def _nearest(kind: str, heard: NDArray[np.float64]) -> str:
    known = _prototypes(kind)
    return min(known, key=lambda form: float(np.abs(known[form] - heard).sum()))


def _colour(sound: Sound, mono: NDArray[np.float64]) -> list[str]:
    spectrum, step = _spectrum(mono)
    energy = spectrum**2
    few = max(3, int(3 / step))
    if np.convolve(energy, np.ones(few), "same").max() > _TONAL * energy.sum():
        return ["a tone instead of noise"]
    form = _nearest("noise", profile(mono))
    return [] if form == sound.form else [f"{form} noise instead of {sound.form}"]


def _frames(mono: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the root mean square of every 6 ms."""
    frames = len(mono) // _HOP
    powers: NDArray[np.float64] = np.sqrt(np.mean(mono[: frames * _HOP].reshape(frames, _HOP) ** 2, axis=1))
    return powers


def onsets(mono: NDArray[np.float64]) -> list[int]:
    """Return where the level rises at once, in samples."""
    levels = 10 * np.log10(_frames(mono) ** 2 + 1e-9)
    quiet = np.concatenate((np.full(8, -90.0), levels))
    found: list[int] = []
    for frame, level in enumerate(levels):
        before = quiet[frame + 4 : frame + 8].min()
        loud = level > levels.max() - _QUIET_ONSET_DB
        late = not found or frame * _HOP - found[-1] > 0.15 * SAMPLE_RATE
        if loud and late and level - before > _RISE_DB:
            found.append(frame * _HOP)
    return found


def _beats(sound: Sound, mono: NDArray[np.float64]) -> list[str]:
    heard, wanted = onsets(mono), starts(sound, len(mono))
    if not heard:
        return ["no onset"]
    loud = [mono[start : start + _HIT] for start in heard if start + _HIT <= len(mono)]
    form = _nearest("hit", profile(np.mean([np.pad(part, (0, _HIT - len(part))) for part in loud], axis=0)))
    wrong = [] if form == sound.form else [f"{form} instead of {sound.form}"]
    if sound.bpm is None:
        if len(heard) > 1:
            return [*wrong, f"{len(heard)} onsets instead of one"]
        frames = _frames(mono)
        rings = len(mono) > _RINGING + _HIT and _db(frames[_RINGING // _HOP :].max() / frames.max()) > _RINGS_DB
        return [*wrong, "a sound that goes on"] if rings else wrong
    if abs(len(heard) - len(wanted)) > 1 or len(heard) < 2:
        return [*wrong, f"{len(heard)} onsets instead of {len(wanted)}"]
    tempo = 60 * SAMPLE_RATE / float(np.median(np.diff(heard)))
    return wrong if abs(tempo / sound.bpm - 1) <= TEMPO else [*wrong, f"{tempo:.0f} bpm instead of {sound.bpm}"]


def _moves(sound: Sound, mono: NDArray[np.float64]) -> list[str]:
    places = np.arange(_FRAME // 2, len(mono) - _FRAME, _FRAME // 2)
    frames = np.stack([mono[place : place + _FRAME] for place in places])
    track = np.abs(np.fft.rfft(frames * np.hanning(_FRAME), 4 * _FRAME, axis=1)).argmax(axis=1)
    heard = np.log(np.maximum(track, 1) * SAMPLE_RATE / (4 * _FRAME))
    notes = motion(sound.form, -(-len(mono) // LATENT_SAMPLES))
    wanted = np.log([frequency(notes[(place + _FRAME // 2) // LATENT_SAMPLES]) for place in places])
    alike = float(np.corrcoef(heard, wanted)[0, 1]) if heard.std() > 0 else 0.0
    swing = float(heard.std() / wanted.std())
    if alike < _FOLLOWS or not _SWING[0] <= swing <= _SWING[1]:
        return [f"pitch follows {sound.form} by {alike:.2f}, swinging {swing:.2f} as far"]
    return []
