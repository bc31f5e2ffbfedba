"""`make arm`: toy bundles are made here, run on emulated ARM64, and held to what they are on x86."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from tests.arm.measure import SETTINGS, Figure
from tests.arm.root import CPUS, REPOSITORY, emulated_python

RECIPES = ("int8", "fp16", "balanced", "small", "portable", "card", "int4", "fp32", "medium")
SMOKE_SETTINGS = ("high", "normal", "low", "low, split")
ALLOWED_DB = {"high": 0.5, "normal": 0.5, "memory low": 3.0}
"""What may be lost against x86. Eight-bit activations, of memory low, are rounded otherwise by each kernel."""
HALF_ALLOWED_DB = 1.0
"""What may be lost against the emulation of half arithmetic: kernels add halves, the emulation adds floats."""
ENOUGH_DB = 90.0
"""Float32 on ARM, whose exponential is an approximation, reaches 99 where x86 reaches 109 to 126."""


def main(
    folder: Annotated[Path, typer.Option(help="Where all is kept.")] = REPOSITORY / "artifacts/arm",
    smoke: Annotated[bool, typer.Option("--smoke", help="Only int8, on one processor, at fewer settings.")] = False,
) -> None:
    """Print every figure that falls short, and all of them into figures.jsonl; fail if there is one."""
    folder = folder.absolute()
    pythons = {cpu: emulated_python(folder, cpu) for cpu in (CPUS[:1] if smoke else CPUS)}
    bundles = [_toy_bundle(folder, recipe) for recipe in (RECIPES[:1] if smoke else RECIPES)]
    settings = [s for s in SETTINGS if not smoke or s in SMOKE_SETTINGS]
    # Made anew on x86, which runs first.
    shutil.rmtree(folder / "reference", ignore_errors=True)
    figures = {
        name: _figures(python, folder, bundles, settings)
        for name, python in {"x86": Path(sys.executable), **pythons}.items()
    }
    kept = folder / "figures.jsonl"
    kept.write_text("".join(json.dumps({"cpu": c} | f.__dict__) + "\n" for c, fs in figures.items() for f in fs))
    for cpu, python in pythons.items() if not smoke else ():
        typer.echo(f"\n{cpu}: doctor, and whether `convert` goes on after it")
        _run(python, folder, "-m", "sa3_convert", "doctor")
        _run(python, folder, "-c", _ASK)
    short = [line for cpu in pythons for line in shortfalls(figures["x86"], figures[cpu], cpu)]
    for line in short:
        typer.echo(line)
    typer.echo(f"{len(figures) - 1} ARM64 processors, {len(bundles)} bundles, {len(short)} shortfalls: {kept}")
    raise typer.Exit(1 if short else 0)


_ASK = """
from sa3_convert.components import Component
from sa3_convert.lab.doctor.results import check_conversion
note = check_conversion(tuple(Component))
assert note is None, note
"""


def shortfalls(x86: Iterable[Figure], arm: Iterable[Figure], cpu: str) -> list[str]:
    """Return a sentence for each figure on ARM that is worse than that on x86, or the emulation of halves, allows."""
    known = {(figure.bundle, figure.component, figure.setting): figure.db for figure in x86}
    lines = []
    for figure in arm:
        if figure.emulated_db is None:
            # Models that are not right in halves are given normal at low.
            setting = figure.setting if figure.setting in ALLOWED_DB else "normal"
            allowed, wanted = ALLOWED_DB[setting], known[figure.bundle, figure.component, setting]
        else:
            exact = known[figure.bundle, figure.component, "high"]
            allowed, wanted = HALF_ALLOWED_DB, together(exact, figure.emulated_db)
        if figure.db < min(wanted, ENOUGH_DB) - allowed:
            what = f"{figure.bundle} {figure.component} at {figure.setting} on {cpu}"
            lines.append(f"{what}: {figure.db:.1f} dB, where {wanted:.1f} less {allowed:g} are asked")
    return lines


def together(*ratios_db: float) -> float:
    """Return the ratio in dB that independent errors leave together."""
    return -10 * math.log10(sum(10 ** (-db / 10) for db in ratios_db))


def _toy_bundle(folder: Path, recipe: str) -> Path:
    variant = "medium" if recipe == "medium" else "small-music"
    checkpoint, bundle = folder / f"toy-{variant}", folder / f"toy-{variant}-{recipe}"
    here, command = Path(sys.executable), ("-m", "sa3_convert")
    if not checkpoint.exists():
        toy = ("--variant", variant, "--size", "toy")
        _run(here, folder, *command, "checkpoint", "synthesize", str(checkpoint), *toy)
    options = ("--with-split-dit", "--threads", "1")
    _run(here, folder, *command, "convert", str(checkpoint), "--recipe", recipe, "--out", str(bundle), *options)
    return bundle


def _figures(python: Path, folder: Path, bundles: Sequence[Path], settings: Sequence[str]) -> list[Figure]:
    typer.echo(f"\nmeasuring {len(bundles)} bundles with {python}")
    options = ["--references", str(folder / "reference"), *(word for s in settings for word in ("--setting", s))]
    text = _run(python, folder, "-m", "tests.arm.measure", *options, *map(str, bundles), stdout=subprocess.PIPE)
    return [Figure(**json.loads(line)) for line in text.splitlines()]


def _run(python: Path, folder: Path, *words: str, stdout: int | None = None) -> str:
    # Beside what is known of this machine: QEMU's processor is another.
    kept = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(REPOSITORY)}
    environment = os.environ | kept
    done = subprocess.run([python, *words], stdout=stdout, env=environment, check=True, text=True)
    return done.stdout or ""


if __name__ == "__main__":
    typer.run(main)
