"""`verify` and `bisect` on the command line: figures on stdout and as JSON, exit codes by verdict."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import sa3_convert.cli.app as cli
from sa3_convert.bundle.manifest import MANIFEST
from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import Component, contract


def test_verify_prints_and_saves_every_component(
    toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["verify", str(toy_int8.path), "--quick", "--json", str(tmp_path / "figures.json")]) == 0
    data = json.loads((tmp_path / "figures.json").read_text())
    assert data["passed"]
    assert [c["component"] for c in data["components"]] == [c.value for c in Component]
    assert "text_encoder" in capsys.readouterr().out


def test_verify_refuses_a_damaged_bundle_with_exit_3(toy_int8: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(toy_int8.path, folder)
    data = bytearray((folder / "decoder.mnn").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "decoder.mnn").write_bytes(data)
    assert cli.run(["verify", str(folder), "--quick"]) == 3


def test_a_recipe_that_was_edited_inside_the_bundle_is_refused_with_exit_3(
    toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(toy_int8.path, folder)
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("floor_db: 32.0", "floor_db: 9.0"))
    manifest = json.loads((folder / MANIFEST).read_text())
    for artifact in manifest["artifacts"]:
        if artifact["kept_at"]:
            artifact["kept_at"] = str((toy_int8.path / artifact["kept_at"]).resolve())
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert cli.run(["verify", str(folder), "--quick", "--component", "decoder"]) == 3
    assert "recipe.yaml" in capsys.readouterr().err


def test_bisect_says_what_it_found(toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bisect", str(toy_int8.path), "--component", "number_conditioner", "--json", str(tmp_path / "b.json")]
    assert cli.run(arguments) == 0
    data = json.loads((tmp_path / "b.json").read_text())
    assert data["verdict"].startswith("No operator makes more error")
    assert data["operators"]
    assert "No operator" in capsys.readouterr().out


def test_bisect_takes_inputs_from_a_file(toy_int8: Bundle, tmp_path: Path) -> None:
    ports = contract(Component.DECODER, toy_int8.layout).inputs
    random = np.random.default_rng(0)
    np.savez(tmp_path / "in.npz", **{p.name: random.standard_normal(p.concrete(8), dtype=np.float32) for p in ports})
    command = ["bisect", str(toy_int8.path), "--component", "decoder", "--input"]
    assert cli.run([*command, str(tmp_path / "in.npz")]) == 0
    assert cli.run([*command, str(tmp_path / "nothing.npz")]) == 3
