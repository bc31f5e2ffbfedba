"""What sounds are called: many wordings for training, and others, of the same words, that are kept for judging."""

import re
from typing import Final

import numpy as np

from sa3_convert.lab.miniature.sounds import NAMES, Piece, Sound

Words = tuple[str, ...]

_FRAMES: Final[Words] = (
    "{}", "{}", "{}", "the sound of {}", "play {}", "please play {}", "give me {}", "I hear {}",
    "a recording of {}", "{}, please", "make {}", "one can hear {}", "a clean recording of {}",
)  # fmt: skip
_KEPT_FRAMES: Final[Words] = (
    "please give me {}", "play the sound of {}", "make a recording of {}", "I hear the sound of {}, please",
    "one can hear a clean recording of {}",
)  # fmt: skip
_ORDERS: Final[Words] = (
    "{article} {level} {what} {side}",
    "{article} {what} {side}, {level}",
    "{article} {level} {what}, {side}",
)
_KEPT_ORDERS: Final[Words] = ("{article} {what}, {level} {side}", "{article} {what}, {level}, {side}")
_PAIRS: Final[Words] = ("{} then {}", "{} and then {}", "first {}, then {}", "{} followed by {}")
_KEPT_PAIRS: Final[Words] = ("first {} and then {}", "first {}, followed by {}")

_WAVES: Final[dict[str, Words]] = {
    "sine": ("sine tone", "sine wave", "pure tone"),
    "square": ("square tone", "square wave"),
    "sawtooth": ("sawtooth tone", "sawtooth wave", "saw wave"),
}
_ENVELOPES: Final[dict[str, Words]] = {
    "steady": ("", "", "steady", "held"),
    "swelling": ("swelling", "rising slowly", "fading in"),
    "plucked": ("plucked", "dying away"),
}
_BEHIND: Final = frozenset({"rising slowly", "fading in", "dying away"})
_HITS: Final[dict[str, Words]] = {
    "kick": ("kick drum", "bass drum", "kick"),
    "snare": ("snare drum", "snare"),
    "hat": ("hi-hat", "closed hi-hat"),
    "clap": ("hand clap", "clap"),
    "click": ("click", "metronome click"),
}
_NOISES: Final[dict[str, Words]] = {
    "white": ("white noise",),
    "pink": ("pink noise",),
    "low": ("low rumble", "rumbling noise"),
    "high": ("high hiss", "hissing noise"),
}
_MOTIONS: Final[dict[str, Words]] = {
    "up": ("rising sweep", "sweep up", "sine sweep going up"),
    "down": ("falling sweep", "sweep down", "sine sweep going down"),
    "siren": ("siren", "wailing siren"),
}
_LEVELS: Final[dict[str, Words]] = {"soft": ("soft", "quiet"), "normal": ("",), "loud": ("loud", "very loud")}
_SIDES: Final[dict[str, Words]] = {
    "left": ("on the left", "to the left", "from the left"),
    "middle": ("", "", "", "in the middle"),
    "right": ("on the right", "to the right", "from the right"),
}
_SILENCES: Final[Words] = ("silence", "nothing at all", "complete silence", "no sound")


def note_name(note: int) -> str:
    """Return a MIDI note's name, such as `F#4`."""
    return f"{NAMES[note % 12]}{note // 12 - 1}"


def caption(piece: Piece, random: np.random.Generator, *, kept: bool = False) -> str:
    """Return a wording of a piece by chance; `kept` ones are those that no training sees."""
    parts = [_described(sound, random, kept=kept) for sound in piece.sounds]
    pairs, frames = (_KEPT_PAIRS, _KEPT_FRAMES) if kept else (_PAIRS, _FRAMES)
    whole = parts[0] if len(parts) == 1 else _one(pairs, random).format(*parts)
    return _one(frames, random).format(whole)


def _one(words: Words, random: np.random.Generator) -> str:
    return words[int(random.integers(len(words)))]


def _described(sound: Sound, random: np.random.Generator, *, kept: bool) -> str:
    if sound.kind == "silence":
        return _one(_SILENCES, random)
    level, side = _one(_LEVELS[sound.level], random), _one(_SIDES[sound.side], random)
    what = _named(sound, random)
    order = _one(_KEPT_ORDERS if kept else _ORDERS, random)
    first = (level if order.startswith("{article} {level}") else "") or what.strip()
    text = order.format(article="an" if first[0] in "aeiou" else "a", level=level, what=what, side=side)
    return re.sub(r"( *, *)+", ", ", re.sub(" +", " ", text)).strip(" ,")


def _named(sound: Sound, random: np.random.Generator) -> str:
    envelope = _one(_ENVELOPES[sound.envelope], random)
    before, behind = ("", f" {envelope}") if envelope in _BEHIND else (f"{envelope} ", "")
    match sound.kind:
        case "tone":
            assert sound.note is not None
            at = _one((" at", " of", " on"), random)
            return f"{before}{_one(_WAVES[sound.form], random)}{at} {note_name(sound.note)}{behind}"
        case "chord":
            assert sound.note is not None
            return f"{before}{NAMES[sound.note % 12]} {sound.form} chord{behind}"
        case "noise":
            return f"{before}{_one(_NOISES[sound.form], random)}{behind}"
        case "motion":
            return _one(_MOTIONS[sound.form], random)
    name = _one(_HITS[sound.form], random)
    if sound.bpm is None:
        return f"{_one(('single ', 'lone '), random)}{name}"
    return f"{name}{_one((' at {} bpm', ' pattern at {} bpm', ' beating at {} bpm'), random).format(sound.bpm)}"
