"""What is made of a finished WAV when somebody asks for it; pieces that wait do not wait for that."""

from pathlib import Path

from sa3_convert.arrays import Floats
from sa3_convert.system.files import atomic_path


def flac_of(path: Path) -> Path:
    """Return the FLAC beside a WAV, made when it is first asked for, with its settings inside."""
    from sa3_convert.runtime.audio import audio_writer, read_metadata

    made = path.with_suffix(".flac")
    if not made.exists():
        samples, rate = _samples(path)
        with audio_writer(made, rate, metadata=read_metadata(path)) as writer:
            writer.write(samples)
    return made


def spectrogram_of(path: Path) -> Path:
    """Return the picture beside a WAV, made when it is first asked for."""
    from matplotlib.figure import Figure

    from sa3_convert.lab.report.figures import draw_levels, levels

    made = path.with_suffix(".png")
    if not made.exists():
        samples, rate = _samples(path)
        shown = levels(samples, rate)
        figure = Figure(figsize=(6, 1.6), layout="tight")
        axes = figure.add_subplot()
        top = float(shown.max())
        draw_levels(axes, shown, "magma", (top - 80, top), samples.shape[1] / rate, rate)
        axes.tick_params(labelcolor="#888888", labelsize=8)
        with atomic_path(made) as temporary:
            figure.savefig(temporary, format="png", dpi=150, transparent=True)
    return made


def loudness_of(path: Path) -> float:
    """Return the integrated loudness of a WAV in LUFS."""
    from sa3_convert.runtime.levels import loudness

    samples, rate = _samples(path)
    return loudness(samples.astype("float64"), rate)


def _samples(path: Path) -> tuple[Floats, int]:
    """Return the samples [2, N] of a WAV that was made here, and their rate in Hz."""
    import soundfile

    with path.open("rb") as stream:
        samples, rate = soundfile.read(stream, dtype="float32", always_2d=True)
    return samples.T, rate
