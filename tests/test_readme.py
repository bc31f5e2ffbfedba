"""The README is short, its links lead somewhere, and its commands are run as a newcomer runs them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile

from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.variants import MINIATURE
from sa3_convert.lab.miniature.recognise import unlike
from sa3_convert.lab.miniature.sounds import Piece, Sound
from tests.test_workflows import option_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.md")])


def blocks(text: str, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_it_is_read_in_five_minutes() -> None:
    assert len(README.split()) <= 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), f"{page.name}: {link}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_package_that_a_page_names_exists(page: Path) -> None:
    for name in re.findall(r"`([\w/.]+/[\w.]+\.(?:py|json|html|css|yaml))`", page.read_text(encoding="utf-8")):
        assert any((folder / name).is_file() for folder in (ROOT, ROOT / "sa3_convert", page.parent)), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_of_a_page_exists_with_its_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^ *(sa3-convert .*)$", text, re.MULTILINE):
        given, taken = option_names(shlex.split(line, comments=True))
        assert given <= taken, line


def test_the_picture_of_the_flow_is_a_drawing_with_a_description_for_light_and_dark() -> None:
    picture = (ROOT / "docs" / "flow.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(picture)
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert {"title", "desc"} <= names
    assert not names & {"script", "image", "foreignObject"}
    assert "prefers-color-scheme: dark" in picture


def test_the_two_commands_stand_first_and_are_targets_of_the_makefile() -> None:
    block = README.split("```")[1]
    commands = [line.split("#")[0].strip() for line in block.strip().splitlines()]
    assert commands == ["make convert", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        assert re.search(rf"^{command.removeprefix('make ')}:", makefile, re.MULTILINE)


def test_the_python_example_runs_as_it_stands(
    toy_int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example, _ = blocks((ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), "python")
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "small-music-int8").symlink_to(toy_int8.path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, "guide.md", "exec"), names)
    out = capsys.readouterr().out.splitlines()
    assert out[:-1] == [f"step {index} of 8" for index in range(1, 9)]
    assert out[-1].startswith("on mnn in ")
    streamed, rate = soundfile.read(tmp_path / "pad.wav")
    whole = names["piece"].audio.T
    assert (rate, streamed.shape) == (44100, whole.shape)
    np.testing.assert_allclose(streamed, whole, atol=2**-15)


HEARD = {
    "chord": Sound("chord", "major", 72, "plucked"),
    "drum": Sound("hit", "snare", bpm=130, side="left", level="loud"),
    "siren": Sound("motion", "siren", side="right"),
}
"""What the sounds at the end of the first command are to be."""


def demo(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sa3_convert.cli.convert_all", MINIATURE, "--recipe", "int8"]
    return subprocess.run(
        [*command, "--folder", str(folder)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first command leaves."""
    folder = tmp_path_factory.mktemp("readme") / "artifacts"
    done = demo(folder)
    assert done.returncode == 0, done.stderr
    assert "make convert CHECKPOINT=" in done.stdout
    return folder


def test_the_first_command_makes_a_verified_bundle_a_wav_and_the_tree_and_the_second_time_nothing(
    artifacts: Path,
) -> None:
    bundle, published = Bundle.open(artifacts / "miniature-int8"), Bundle.open(artifacts / "published")
    bundle.check(kinds=("mnn", "onnx"))
    assert published.path == artifacts / "published" / "miniature" / "int8"
    for component in bundle.components:
        assert published.checked(component).sha256 == bundle.checked(component).sha256
    for name, sound in HEARD.items():
        audio, rate = soundfile.read(artifacts / f"miniature-int8-{name}.wav", dtype="float32", always_2d=True)
        assert rate == 44100
        assert unlike(Piece((sound,), len(audio) / rate), audio.T) == []

    before = {path: path.stat().st_mtime_ns for path in artifacts.rglob("*") if path.is_file()}
    second = demo(artifacts)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("up to date; nothing was done") == 2
    after = {path: path.stat().st_mtime_ns for path in artifacts.rglob("*") if path.is_file()}
    assert {p for p in after if not p.name.startswith(".")} == {p for p in before if not p.name.startswith(".")}
    assert all(after[path] == before[path] for path in before)


def test_the_commands_after_the_first_run_as_they_stand(artifacts: Path, toy: Path) -> None:
    lines = [line for block in blocks(README)[1:] for line in block.splitlines()]
    words = [shlex.split(line) for line in lines]
    assert words.pop(0) == ["source", ".venv/bin/activate"]
    assert [line[0] for line in words] == ["sa3-convert"] * len(words)
    assert len(words) >= 6
    fetch = words.pop(0)
    given, taken = option_names(fetch)
    assert fetch[1:3] == ["checkpoint", "fetch"]
    assert given <= taken
    # The hub is not there for a test: a toy stands where the published checkpoint would.
    (artifacts.parent / fetch[-1]).symlink_to(toy)
    for line in words:
        done = subprocess.run(
            [sys.executable, "-m", "sa3_convert", *line[1:]],
            cwd=artifacts.parent,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, f"{shlex.join(line)}\n{done.stderr}"
    made = {path.name for path in artifacts.parent.iterdir()}
    assert {"pad.wav", "drift.json", "report"} <= made
    assert soundfile.info(artifacts.parent / "pad.wav").duration == 30
