"""Figures of audio: spectrograms of both sides, and how far they are apart beside what chance does."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sa3_convert.verify.report.theme import new_figure, styled, svg_of

Floats = NDArray[np.float32]
Sides = Mapping[str, Floats]
"""`reference`, `target` and `chaos`, [channels, samples] each."""

_WINDOW = 4096
_COLUMNS = 140
_BANDS = 72
_LOWEST_HZ = 40.0
_RANGE_DB = 80.0
_SCALES_DB = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0)


def levels(audio: Floats, sample_rate: int) -> NDArray[np.float64]:
    """Return levels in dB, [bands, columns]; bands rise by equal ratios from 40 Hz to half the sample rate.

    Args:
        audio: [channels, samples].
        sample_rate: in Hz.

    """
    padded = np.pad(audio.astype(np.float64), ((0, 0), (_WINDOW // 2, _WINDOW)))
    starts = np.linspace(0, max(audio.shape[1] - 1, 0), _COLUMNS).astype(int)
    frames = padded[:, starts[:, None] + np.arange(_WINDOW)] * np.hanning(_WINDOW)
    power = (np.abs(np.fft.rfft(frames, axis=-1)) ** 2).mean(axis=0)
    edges = _band_edges(sample_rate)
    summed = np.concatenate([[np.zeros(_COLUMNS)], np.cumsum(power, axis=1).T])
    # A low band is narrower than a bin: it takes at least the bin that it lies in.
    low = np.floor(edges[:-1]).astype(int)
    high = np.maximum(np.floor(edges[1:]).astype(int), low + 1)
    bands = (summed[high] - summed[low]) / (high - low)[:, None]
    decibels: NDArray[np.float64] = 10 * np.log10(np.maximum(bands, 1e-12))
    return decibels


def _band_edges(sample_rate: int) -> NDArray[np.float64]:
    """Return the bands' edges, in bins."""
    return np.geomspace(_LOWEST_HZ, sample_rate / 2, _BANDS + 1) * _WINDOW / sample_rate


def spectrogram_figure(sides: Sides, sample_rate: int, name: str, label: str) -> str:
    """Return reference and target side by side, and below them what each of target and nudged reference changes."""
    shown = {side: levels(audio, sample_rate) for side, audio in sides.items()}
    peak = float(shown["reference"].max())
    floored = {side: np.maximum(values, peak - _RANGE_DB) for side, values in shown.items()}
    changes = [floored[side] - floored["reference"] for side in ("target", "chaos")]
    panels = [
        [("reference", floored["reference"] - peak), ("this bundle", floored["target"] - peak)],
        [("change: this bundle", changes[0]), ("change: nudged", changes[1])],
    ]
    # One scale for both changes: they are there to be compared.
    most = float(np.percentile(np.abs(changes), 99.5))
    scale = next((step for step in _SCALES_DB if step >= most), _SCALES_DB[-1])
    seconds = sides["reference"].shape[1] / sample_rate
    figure = new_figure(300)
    with styled():
        grid = figure.subplots(2, 2, sharex=True, sharey=True)
        for row, (maps, bounds, unit) in enumerate(
            (("magma", (-_RANGE_DB, 0.0), "level in dB"), ("berlin", (-scale, scale), "change in dB"))
        ):
            for column, (title, values) in enumerate(panels[row]):
                axes = grid[row, column]
                image = axes.imshow(
                    values,
                    origin="lower",
                    aspect="auto",
                    cmap=maps,
                    vmin=bounds[0],
                    vmax=bounds[1],
                    extent=(0, seconds, 0, _BANDS),
                    interpolation="none",
                )
                axes.set_title(title)
                axes.set_yticks([_row_of(hertz, sample_rate) for hertz in (100, 1000, 10000)], ["100", "1k", "10k"])
                axes.tick_params(length=0)
                for spine in axes.spines.values():
                    spine.set_visible(False)
                if row == 1:
                    axes.set_xlabel("seconds")
                if column == 0:
                    axes.set_ylabel("Hz")
            bar = figure.colorbar(image, ax=grid[row, :], aspect=12, pad=0.02, label=unit)
            bar.outline.set_visible(False)
            bar.ax.tick_params(length=0)
    return svg_of(figure, name, label)


def _row_of(hertz: float, sample_rate: int) -> float:
    return float(_BANDS * np.log(hertz / _LOWEST_HZ) / np.log(sample_rate / 2 / _LOWEST_HZ))
