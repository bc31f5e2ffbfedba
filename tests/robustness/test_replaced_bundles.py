"""A bundle that is replaced while it is used: what is heard is one bundle or the other, and says which."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_convert.bundle.manifest import MANIFEST
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.bundle import verify_bundle
from sa3_convert.cli.app import run
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, InputError
from sa3_convert.runtime.audio import read_metadata
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest

REQUEST = GenerateRequest("rain on a tin roof", seconds=0.5, steps=2)
TRIALS = 50


class Place:
    """Two bundles, and a name that leads to either of them in turn."""

    def __init__(self, folder: Path, first: Path, second: Path) -> None:
        self.live = folder / "live"
        self.sources = (folder / "first", folder / "second")
        for source, bundle in zip(self.sources, (first, second), strict=True):
            shutil.copytree(bundle, source)
            manifest = json.loads((source / MANIFEST).read_text())
            for artifact in manifest["artifacts"]:
                if artifact["kept_at"]:
                    artifact["kept_at"] = str((bundle / artifact["kept_at"]).resolve())
            (source / MANIFEST).write_text(json.dumps(manifest))
        self.spares = (folder / "spare-0", folder / "spare-1")

    def lay_out(self, way: str) -> None:
        if way == "link":
            self.live.symlink_to(self.sources[0])
        else:
            shutil.copytree(self.sources[0], self.live)
        shutil.copytree(self.sources[1], self.spares[1])

    def replace(self, way: str, turn: int, pause: Callable[[], None]) -> None:
        """Let the name lead to bundle `turn` % 2, in pieces with pauses between them."""
        to = turn % 2
        if way == "link":
            new = self.live.with_name("new")
            new.symlink_to(self.sources[to])
            new.replace(self.live)
        elif way == "folder":
            self.live.rename(self.spares[1 - to])
            self.spares[to].rename(self.live)
        else:
            # As `convert` does: each file under its final name when it is whole, the manifest last.
            for name in sorted((file.name for file in self.sources[to].iterdir()), key=lambda name: name == MANIFEST):
                new = self.live / f".{name}.new"
                shutil.copyfile(self.sources[to] / name, new)
                new.replace(self.live / name)
                pause()


def keep_replacing(folder: str, way: str, seed: int) -> None:
    """Replace until the parent process ends."""
    place = Place.__new__(Place)
    here = Path(folder)
    place.live, place.sources = here / "live", (here / "first", here / "second")
    place.spares = (here / "spare-0", here / "spare-1")
    rng = random.Random(seed)
    parent = os.getppid()
    turn = 0
    while os.getppid() == parent:
        turn += 1
        place.replace(way, turn, lambda: time.sleep(rng.choice((0, 0, 0.001, 0.02))))
        # Now and then there is time for a whole generation, and often for less than a model takes to load.
        time.sleep(rng.choice((0.0005, 0.002, 0.01, 0.05, 0.2, 1.0)))


@pytest.fixture
def place(tmp_path: Path, toy_int8: Bundle, toy_fp32: Bundle) -> Place:
    return Place(tmp_path, toy_int8.path, toy_fp32.path)


def heard(path: Path) -> tuple[str, bytes]:
    """Generate, and return what is said of the models beside what they made."""
    with Pipeline.from_bundle(path, threads=1) as pipeline:
        samples = pipeline.generate(REQUEST).audio
        assert pipeline.manifest is not None
        return pipeline.manifest.digest, np.asarray(samples).tobytes()


@pytest.fixture
def replacing(place: Place, way: str) -> Iterator[None]:
    place.lay_out(way)
    program = f"from {__name__} import keep_replacing; keep_replacing({str(place.live.parent)!r}, {way!r}, 0)"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        yield
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["folder", "link", "files"])
def test_replaced_bundles_are_never_mixed(place: Place, way: str, request: pytest.FixtureRequest) -> None:
    expected = dict(heard(source) for source in place.sources)
    assert len(expected) == 2
    request.getfixturevalue("replacing")
    found: Counter[str] = Counter()
    while found.total() < TRIALS or len(expected.keys() & found.keys()) < 2:
        try:
            said, samples = heard(place.live)
        except InputError:
            found["refused"] += 1
        else:
            found[said if samples == expected[said] else f"{said}, wrong"] += 1
        assert found.total() < 10 * TRIALS
    assert found.keys() <= {*expected, "refused"}


@pytest.mark.parametrize("way", ["folder", "link"])
def test_an_open_bundle_stays_the_one_that_was_opened(place: Place, way: str) -> None:
    place.lay_out(way)
    expected = heard(place.sources[0])
    with Pipeline.from_bundle(place.live, threads=1) as pipeline:
        place.replace(way, 1, lambda: None)
        samples = pipeline.generate(REQUEST).audio
        assert pipeline.manifest is not None
        assert (pipeline.manifest.digest, np.asarray(samples).tobytes()) == expected
    assert heard(place.live)[0] != expected[0]


def test_a_model_that_is_replaced_after_its_check_is_refused(place: Place) -> None:
    place.lay_out("files")
    with Pipeline.from_bundle(place.live, threads=1) as pipeline:
        pipeline.generate(REQUEST)
        place.replace("files", 1, lambda: None)
        with pytest.raises(BundleError, match=r"live/number_conditioner\.mnn was replaced or changed"):
            pipeline.generate(REQUEST)


def test_a_bundle_that_is_replaced_while_it_is_verified_is_refused(place: Place) -> None:
    place.lay_out("files")
    with pytest.raises(BundleError, match="was replaced or changed"):
        verify_bundle(
            Bundle.open(place.live),
            components=(Component.NUMBER_CONDITIONER, Component.DECODER),
            quick=True,
            threads=1,
            report=lambda _: place.replace("files", 1, lambda: None),
        )


def test_settings_tell_of_the_models_that_were_opened(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.lay_out("link")
    real = Pipeline.from_bundle

    def replaced(*arguments: Any, **options: Any) -> Pipeline:
        pipeline = real(*arguments, **options)
        place.replace("link", 1, lambda: None)
        return pipeline

    monkeypatch.setattr(Pipeline, "from_bundle", replaced)
    settings, audio = tmp_path / "x.json", tmp_path / "x.wav"
    short = ["--prompt", "x", "--seconds", "0.5", "--steps", "1", "--threads", "1"]
    assert run(["run", str(place.live), *short, "-o", str(audio), "--json", str(settings)]) == 0
    first = Bundle.open(place.sources[0]).manifest
    models = {a.component.value: a.sha256 for a in first.artifacts if a.component and a.kind == "mnn"}
    for told in (json.loads(settings.read_text()), read_metadata(audio)):
        assert (told["recipe"], told["models"]) == (first.recipe, models)


def test_models_that_are_loaded_do_not_mind(place: Place) -> None:
    place.lay_out("files")
    with Pipeline.from_bundle(place.live, threads=1, keep_loaded=True) as pipeline:
        before = pipeline.generate(REQUEST).audio
        place.replace("files", 1, lambda: None)
        np.testing.assert_array_equal(pipeline.generate(REQUEST).audio, before)


def test_a_file_that_is_put_back_is_not_the_one_that_was_checked(place: Place) -> None:
    place.lay_out("files")
    bundle = Bundle.open(place.live)
    file = bundle.checked(Component.DIT)
    shutil.copyfile(place.live / "dit.mnn", place.live / "copy")
    (place.live / "copy").replace(place.live / "dit.mnn")
    with pytest.raises(BundleError, match="replaced"):
        file.require_unchanged()
    with pytest.raises(BundleError, match="replaced"):
        bundle.check()
