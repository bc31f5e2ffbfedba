"""Points judged by whole generations of a toy."""

import errno
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sa3_convert.bundle.manifest import Fidelity
from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli import app as cli
from sa3_convert.cli.console import sweep_table
from sa3_convert.components import Component, components_of
from sa3_convert.errors import UsageError, VerificationError
from sa3_convert.lab.common import Common
from sa3_convert.lab.generations.trajectory import GenerationCase
from sa3_convert.lab.sweep import whole
from sa3_convert.lab.sweep.page import page
from sa3_convert.lab.sweep.points import of_recipes
from sa3_convert.lab.sweep.result import Measured, Sweep, Whole
from sa3_convert.lab.sweep.whole import Suite, with_generations
from sa3_convert.recipe import load_recipe, own_recipes
from tests.played import silent

INT8 = load_recipe(own_recipes()["int8"])
CASE = GenerationCase(0, 1, 0.5)


def test_points_go_through_whole_generations_and_what_is_known_is_not_generated_again(
    toy: Path, cache: Path, toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    words = ["sweep", str(toy), "--component", "decoder", "--recipe", "int8", "--recipe", "fp16", "--threads", "1"]
    words += ["--cache", str(cache), "--full", "--case", CASE.name, "--out", str(tmp_path / "out")]
    assert cli.run([*words, "--dry-run"]) == 0
    assert "1 generations with each point" in capsys.readouterr().out
    assert cli.run(words) == 0

    def found() -> list[Whole | None]:
        text = (tmp_path / "out" / "sweep.json").read_text()
        return [point.generations for point in Sweep.model_validate(json.loads(text)).points]

    coarse, fine = found()
    assert coarse is not None
    assert fine is not None
    assert 30 < coarse.worst_db < 60 < fine.worst_db
    assert coarse.worst_case == CASE.name
    # The latents come from the same DiT; only what decodes them differs.
    assert coarse.latent_cosine == fine.latent_cosine
    assert coarse.spectra_db > fine.spectra_db
    assert coarse.chaos_db == fine.chaos_db
    assert coarse.others == "int8"
    assert f"{coarse.spectra_db:.2f}" in capsys.readouterr().out
    assert f"{coarse.spectra_db:.2f} dB" in (tmp_path / "out" / "index.html").read_text()
    assert not [entry for entry in (cache / "generations").iterdir() if entry.is_dir()]

    monkeypatch.setattr(whole, "convert", None)
    assert cli.run(words) == 0
    assert found() == [coarse, fine]


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (VerificationError("It came to nothing."), "It came to nothing.", 5),
        (OSError(errno.ENOSPC, "No space left"), "The disk is full", 3),
    ],
)
def test_a_point_that_fails_there_is_missing_and_the_others_are_there(
    toy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str, code: int
) -> None:
    points = of_recipes([INT8, load_recipe(own_recipes()["fp16"])], [Component.NUMBER_CONDITIONER])
    common = Common(toy, cache, threads=1)

    def fails(suite: Suite, point: Any, report: Any) -> Whole:
        if point is points[0]:
            raise error
        figures = {"worst_db": 1.0, "spectra_db": 1.0, "chaos_db": 1.0, "latent_cosine": 1.0}
        return Whole(worst_case="x", others="int8", recognised=141, **figures)

    monkeypatch.setattr(whole, "_kept_or_made", fails)
    fidelity = Fidelity(signal_to_noise_db=30, cosine=1.0, max_abs_error=0.0)
    measured = tuple(
        Measured(name=one.name, component=one.component, bytes=size, fidelity=fidelity)
        for one, size in zip(points, (1, 2), strict=True)
    )
    swept = Sweep(checkpoint="toy", variant="small-music", points=measured, mixed=False)
    found = with_generations(Suite(common, INT8, (CASE,)), points, swept, silent)
    assert [(point.name, point.bytes, point.exit_code) for point in found.missing] == [
        ("number_conditioner-int8", None, code)
    ]
    assert said in found.missing[0].problem
    assert [point.on_frontier for point in found.points] == [False, True]
    assert found.points[0].recipe is None
    assert found.points[1].generations is not None
    told = Console(record=True, width=120, file=io.StringIO())
    told.print(sweep_table(found))
    text = told.export_text()
    assert re.search(r"recognised .*141", text, re.DOTALL)
    assert "missing" in text
    assert "beaten" not in text
    html = page(found)
    assert '<th scope="col">recognised</th>' in html
    assert "<td>141</td>" in html


def test_another_tokenizer_is_another_generation(toy: Path, tmp_path: Path) -> None:
    point = of_recipes([INT8], [Component.NUMBER_CONDITIONER])[0]
    suite = Suite(Common(Path(shutil.copytree(toy, tmp_path / "toy")), tmp_path), INT8, (CASE,))
    before = suite.key(point)
    assert suite.key(point) == before
    file = next((tmp_path / "toy").rglob("tokenizer.json"))
    file.write_text(file.read_text() + "\n")
    assert suite.key(point) != before


def test_what_cannot_be_gone_through_is_refused(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["sweep", str(toy), "--recipe", "int8", "--out", str(tmp_path / "out")]
    assert cli.run([*words, "--case", CASE.name]) == 2
    assert "add --full" in capsys.readouterr().err
    with pytest.raises(UsageError, match="leave out --store"):
        Suite(Common(toy, tmp_path, store="file:///x"), INT8, (CASE,)).require()
    monkeypatch.setattr(whole, "components_of", lambda _: (Component.ENCODER, Component.DECODER))
    with pytest.raises(UsageError, match="generates nothing"):
        Suite(Common(toy, tmp_path), INT8, (CASE,)).require()


def test_workers_make_the_other_components_too(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = of_recipes([INT8], [Component.NUMBER_CONDITIONER])
    common = Common(toy, tmp_path, threads=1)
    sent: list[Any] = []

    def runner(tasks: Any, run: Any) -> Any:
        sent.extend(tasks)
        yield from ((task, 0.0) for task in tasks)

    def made_here(*_: Any) -> None:
        assert {task.component for task in sent} == set(components_of(common.open().layout))
        raise VerificationError("Enough.")

    monkeypatch.setattr(whole, "convert", made_here)
    fidelity = Fidelity(signal_to_noise_db=30, cosine=1.0, max_abs_error=0.0)
    measured = tuple(Measured(name=one.name, component=one.component, bytes=1, fidelity=fidelity) for one in points)
    swept = Sweep(checkpoint="toy", variant="small-music", points=measured, mixed=False)
    found = with_generations(Suite(common, INT8, (CASE,), runner), points, swept, silent)
    assert [point.problem for point in found.points] == ["Enough."]
