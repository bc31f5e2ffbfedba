"""Manifests that others made: read, told or refused, and nothing is written but where it was asked for."""

import json
import os
import shutil
from collections import Counter
from io import StringIO
from pathlib import Path

import pytest

from sa3_convert.bundle.manifest import MANIFEST
from sa3_convert.bundle.reader import Bundle
from sa3_convert.bundle.table import markdown_table
from sa3_convert.cli.app import run
from sa3_convert.cli.console import EscapingConsole, bundle_table
from sa3_convert.errors import BundleError, InputError, Sa3Error
from sa3_convert.publish.export import export_bundles
from tests.bundle.test_manifest import make_bundle
from tests.robustness.contained import Surroundings, mutations


def test_hostile_manifests_are_refused_or_exported_into_the_folder_alone(tmp_path: Path) -> None:
    around = Surroundings(tmp_path / "around")
    bundle = make_bundle(tmp_path / "bundle")
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    found: Counter[str] = Counter()
    refused: list[str] = []
    for number, (place, text) in enumerate(mutations(manifest, 1200, 0)):
        (bundle.path / MANIFEST).write_text(text)
        try:
            opened = Bundle.open(bundle.path)
            assert markdown_table([opened]).replace("\n", "").isprintable()
            EscapingConsole(file=StringIO()).print(bundle_table(opened))
        except BundleError as error:
            refused.append(str(error))
            continue
        try:
            export_bundles([opened], around.allowed / str(number), "hub" if number % 2 else "flat")
            found["exported"] += 1
        except InputError:
            found["not exported"] += 1
        assert around.changed() == [], (place, number)
    assert len(refused) > 600
    assert all(MANIFEST in message and len(message) < 1500 for message in refused)
    assert found["exported"] > 50


SHORT = ("--prompt", "x", "--seconds", "0.3", "--steps", "1", "--threads", "1")


@pytest.mark.slow
def test_hostile_manifests_end_every_command_with_a_sentence(
    toy_int8: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    around = Surroundings(tmp_path / "around")
    # Beside the bundle, so that references are found where they were kept.
    folder = toy_int8.path.with_name(f"{toy_int8.path.name}-hostile")
    shutil.copytree(toy_int8.path, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    found: Counter[tuple[str, int]] = Counter()
    for number, (place, text) in enumerate(mutations(manifest, 1000, 1)):
        (folder / MANIFEST).write_text(text)
        out = around.allowed / str(number)
        commands = {
            "table": ["table", str(folder)],
            "export": ["bundle", "export", str(folder), "--to", str(out / "site")],
            "run": ["run", str(folder), *SHORT, "-o", f"{out}/x.wav"],
        }
        if number % 10 == 0:
            commands["verify"] = ["verify", str(folder), "--quick", "--threads", "1", "--report", str(out / "report")]
        for name, arguments in commands.items():
            code = run(arguments)
            shown = "".join(capfd.readouterr())
            assert code in {"run": (0, 2, 3, 7, 8), "verify": (0, 3, 5, 7)}.get(name, (0, 3)), (place, arguments, shown)
            assert shown.replace("\n", "").isprintable(), shown
            found[name, code] += 1
        assert around.changed() == [], (place, number)
        shutil.rmtree(out, ignore_errors=True)
    assert found["run", 0] > 50


LAYOUTS = {
    "no rate": ({"sample_rate": 0}, "sample_rate is 0"),
    "ratio below zero": ({"autoencoder": {"downsampling_ratio": -1}}, "downsampling_ratio is -1"),
    "another width": ({"autoencoder": {"latent_dim": 33}}, "latent_dim"),
    "no text encoder": ({"text_encoder": None}, "there together or not at all"),
    "no autoencoder": ({"autoencoder": None}, "layout.autoencoder"),
    "a number of 400 digits": ({"sample_size": 10**399}, "64 bits"),
    "a text of 10^12 tokens": ({"text_encoder": {"max_length": 10**12}}, "max_length is 1000000000000"),
    "truth for a number": ({"sample_rate": True}, "layout.sample_rate"),
    "text for a number": ({"sample_rate": "44100"}, "layout.sample_rate"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_that_cannot_be_are_refused_by_name(tmp_path: Path, case: str) -> None:
    change, message = LAYOUTS[case]
    make_bundle(tmp_path)
    data = json.loads((tmp_path / MANIFEST).read_text())
    for key, value in change.items():
        if isinstance(value, dict):
            data["layout"][key].update(value)
        else:
            data["layout"][key] = value
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message) as refused:
        Bundle.open(tmp_path)
    assert MANIFEST in str(refused.value)


@pytest.mark.parametrize("variant", ["../../x", "", ".", "a/b", "\x1b[2J", "x" * 65, "small music"])
def test_variants_that_are_no_names_are_refused(tmp_path: Path, variant: str) -> None:
    make_bundle(tmp_path)
    data = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(data | {"variant": variant}))
    with pytest.raises(BundleError, match=r"manifest\.json is damaged: variant"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "a/b", "..", "", "\x1b[2J"])
def test_loras_are_named_after_files(tmp_path: Path, name: str) -> None:
    make_bundle(tmp_path)
    data = json.loads((tmp_path / MANIFEST).read_text())
    lora = {"name": "My LoRA (v2).safetensors", "sha256": "0" * 64, "strength": 1, "type": "lora", "rank": 4}
    data["loras"] = [lora | {"alpha": 4, "layers": {"dit": 3}}]
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    assert Bundle.open(tmp_path).manifest.loras[0].name == lora["name"]
    data["loras"][0]["name"] = name
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"loras\[0\]\.name"):
        Bundle.open(tmp_path)


def test_files_are_not_read_through_links_out_of_the_bundle(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "dit.mnn").rename(tmp_path / "dit.mnn")
    (tmp_path / "bundle" / "dit.mnn").symlink_to(tmp_path / "dit.mnn")
    with pytest.raises(BundleError, match="leads out of"):
        bundle.check()
    (tmp_path / "bundle" / MANIFEST).rename(tmp_path / MANIFEST)
    (tmp_path / "bundle" / MANIFEST).symlink_to(tmp_path / MANIFEST)
    with pytest.raises(BundleError, match="leads out of"):
        Bundle.open(tmp_path / "bundle")


@pytest.mark.parametrize("name", [MANIFEST, "dit.mnn", "tokenizer.json"])
def test_pipes_and_folders_in_place_of_files_are_refused_at_once(tmp_path: Path, name: str) -> None:
    bundle = make_bundle(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(Sa3Error):
        Bundle.open(tmp_path) if name == MANIFEST else bundle.check()
