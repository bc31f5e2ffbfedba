"""`--play`: audio files to the loudspeaker."""

from collections.abc import Iterable
from pathlib import Path


def silent_because() -> str | None:
    """Return why nothing can be heard here, None if it can; raise ImportError if what plays is not installed."""
    try:
        import sounddevice
    except OSError as error:
        return str(error)
    try:
        sounddevice.check_output_settings(channels=2)
    except (sounddevice.PortAudioError, ValueError) as error:
        return str(error)
    return None


def play_files(files: Iterable[Path]) -> None:
    """Play files one after the other."""
    import sounddevice
    import soundfile

    for path in files:
        with path.open("rb") as stream:
            samples, rate = soundfile.read(stream, dtype="float32")
        sounddevice.play(samples, rate, blocking=True)
