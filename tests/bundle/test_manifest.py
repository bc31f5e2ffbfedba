"""What a bundle says of itself is checked before it is believed."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3_convert.bundle.manifest import (
    MANIFEST,
    SPLIT_KINDS,
    Artifact,
    ArtifactKind,
    CheckpointOrigin,
    FileEntry,
    LoraEntry,
    Manifest,
    as_text,
)
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.config import read_layout
from sa3_convert.components import ADAPTED, Component
from sa3_convert.errors import BundleError
from tests.conftest import GOLDEN

LAYOUT = read_layout(GOLDEN / "small" / "checkpoint")


def origin_of(digests: Mapping[str, str]) -> CheckpointOrigin:
    """Return a checkpoint whose components' tensors are told apart by any text."""
    hashes = {Component(name): sha256(text.encode()).hexdigest() for name, text in digests.items()}
    return CheckpointOrigin(source="x", digests=hashes)


def make_bundle(
    folder: Path,
    variant: str = "small-music",
    precision: str = "int8",
    salt: str = "",
    digests: Mapping[str, str] = {},
) -> Bundle:
    folder.mkdir(parents=True, exist_ok=True)
    artifacts = []
    for component in Component:
        name = f"{component.value}.mnn"
        (folder / name).write_bytes(f"{component.value} {precision} {salt}".encode())
        entry = FileEntry.of(folder, name)
        artifacts.append(Artifact(**dict(entry), kind="mnn", component=component, precision=precision))
    (folder / "tokenizer.json").write_text("{}")
    artifacts.append(Artifact(**dict(FileEntry.of(folder, "tokenizer.json")), kind="tokenizer"))
    (folder / "bottleneck_params.json").write_text("{}")
    artifacts.append(Artifact(**dict(FileEntry.of(folder, "bottleneck_params.json")), kind="bottleneck_params"))
    manifest = Manifest(
        schema_version=1,
        variant=variant,
        recipe=precision,
        checkpoint=origin_of(digests),
        tools={"MNN": "3.6.1"},
        layout=LAYOUT,
        artifacts=tuple(artifacts),
    )
    bundle = Bundle(folder, manifest)
    bundle.write()
    return bundle


def weights_apart(bundle: Bundle, weights: bytes) -> Bundle:
    """Return a bundle whose DiT has its weights in a file of their own."""
    name = f"{bundle.artifact(Component.DIT).path}.weight"
    (bundle.path / name).write_bytes(weights)
    update = {"companion": FileEntry.of(bundle.path, name)}
    given = [a.model_copy(update=update) if a.component is Component.DIT else a for a in bundle.manifest.artifacts]
    made = Bundle(bundle.path, bundle.manifest.model_copy(update={"artifacts": tuple(given)}))
    made.write()
    return made


def with_forms(bundle: Bundle) -> Manifest:
    """Return a manifest that also has slots, the DiT in parts, and a file of weights beside the DiT with slots."""

    def form(kind: ArtifactKind, component: Component, size: int, **more: Any) -> Artifact:
        path, sha256 = f"{component.value}-{kind}.mnn", "0" * 64
        if beside := more.pop("beside", None):
            more["companion"] = FileEntry(path=f"{path}.weight", sha256=sha256, bytes=beside)
        return Artifact(path=path, sha256=sha256, bytes=size, kind=kind, component=component, **more)

    forms = (
        *(form(kind, Component.DIT, size) for kind, size in zip(SPLIT_KINDS, (10, 20, 40), strict=True)),
        form("mnn-slots", Component.DIT, 100, rank=4, beside=1000),
        form("mnn-slots", Component.NUMBER_CONDITIONER, 200, rank=4),
    )
    return bundle.manifest.model_copy(update={"artifacts": (*bundle.manifest.artifacts, *forms)})


def test_models_with_slots_or_in_parts_take_the_place_of_the_plain_ones(tmp_path: Path) -> None:
    manifest = with_forms(make_bundle(tmp_path))
    plain, parts, slots = manifest.models("mnn"), manifest.models("mnn", split=True), manifest.models("mnn", slots=True)
    assert {c: [a.kind for a in own] for c, own in plain.items()} == {one: ["mnn"] for one in Component}
    assert [a.kind for a in parts[Component.DIT]] == [*SPLIT_KINDS]
    assert {c for c, own in slots.items() if own != plain[c]} == set(ADAPTED)
    assert {c for c, own in parts.items() if own != plain[c]} == {Component.DIT}


def test_what_is_opened_is_counted_once_with_the_files_beside(tmp_path: Path) -> None:
    manifest = with_forms(make_bundle(tmp_path))
    sizes = {c: own[0].bytes for c, own in manifest.models("mnn").items()}
    whole = sum(sizes.values())
    assert manifest.opened_bytes("mnn") == whole
    assert manifest.opened_bytes("mnn", adapters=True) == whole + 1100 + 200
    assert manifest.opened_bytes("mnn", split=True) == whole - sizes[Component.DIT] + 70
    assert manifest.opened_bytes("onnx", adapters=True) == 0


def test_only_a_tokenizer_has_a_table(tmp_path: Path) -> None:
    entry = FileEntry(path="a.table", sha256="0" * 64, bytes=1)
    given = {"path": "a", "sha256": "0" * 64, "bytes": 1, "table": entry}
    assert Artifact(**given, kind="tokenizer").files[1] == entry
    with pytest.raises(ValueError, match="a recipe has no table"):
        Artifact(**given, kind="recipe")
    with pytest.raises(ValueError, match="no table of"):
        Artifact(**given | {"table": entry.model_copy(update={"bytes": 1 << 30})}, kind="tokenizer")


def lora_entry(name: str = "warm.safetensors", content: str = "a", **changes: object) -> LoraEntry:
    """An adapter that changes the DiT."""
    settings = {"strength": 0.5, "type": "lora", "rank": 4, "alpha": 8.0, "layers": {Component.DIT: 3}} | changes
    return LoraEntry.model_validate({"name": as_text(name.replace("/", "-")), "sha256": content * 64} | settings)


def with_loras(bundle: Bundle, *loras: LoraEntry) -> Bundle:
    """The same bundle with a manifest that names adapters."""
    changed = Bundle(bundle.path, bundle.manifest.model_copy(update={"loras": loras}))
    changed.write()
    return changed


def test_a_bundle_with_loras_is_not_called_what_the_plain_one_is(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path)
    assert plain.manifest.label == "small-music"
    adapted = with_loras(plain, lora_entry(), lora_entry("bright.safetensors", "b", strength=-1))
    label = "small-music + warm.safetensors:0.5 (aaaaaaaaaaaa) + bright.safetensors:-1 (bbbbbbbbbbbb)"
    assert adapted.manifest.label == label
    same_names = [lora_entry(content="b"), lora_entry(strength=0.25), lora_entry("other.safetensors")]
    labels = {with_loras(plain, lora).manifest.label for lora in (lora_entry(), *same_names)}
    assert len(labels) == 4


def test_names_of_loras_are_shown_without_control_characters(tmp_path: Path) -> None:
    label = with_loras(make_bundle(tmp_path), lora_entry("\x1b[2Ja\nb\u202e" + 200 * "é")).manifest.label
    assert label.isprintable()
    assert "\\x1b[2Ja\\nb\\u202eé" in label
    assert len(label) < 120


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    written = make_bundle(tmp_path)
    assert Bundle.open(tmp_path).manifest == written.manifest


def test_the_manifest_has_the_keys_that_scripts_rely_on(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    data = json.loads((tmp_path / MANIFEST).read_text())
    assert data["schema"] == 1
    assert {"variant", "recipe", "checkpoint", "tools", "artifacts"} <= data.keys()
    assert {"path", "kind", "component", "precision", "sha256", "bytes", "storage", "fidelity"} <= data["artifacts"][
        0
    ].keys()


def test_a_whole_bundle_passes_its_check(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    bundle.check()
    assert bundle.components == tuple(Component)


@pytest.mark.parametrize("name", ["dit.mnn", "tokenizer.json"])
def test_one_flipped_bit_is_found_and_named(tmp_path: Path, name: str) -> None:
    bundle = make_bundle(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BundleError, match=name):
        bundle.check()


def test_without_contents_only_presence_and_size_count(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    data = bytearray((tmp_path / "dit.mnn").read_bytes())
    data[-1] ^= 1
    (tmp_path / "dit.mnn").write_bytes(data)
    bundle.check(contents=False)
    (tmp_path / "dit.mnn").write_bytes(data[:-1])
    with pytest.raises(BundleError, match=r"dit\.mnn"):
        bundle.check(contents=False)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    (tmp_path / "encoder.mnn").unlink()
    with pytest.raises(BundleError, match=r"encoder\.mnn is missing"):
        bundle.check()


def test_swapped_components_are_found(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    (tmp_path / "dit.mnn").rename(tmp_path / "x")
    (tmp_path / "decoder.mnn").rename(tmp_path / "dit.mnn")
    (tmp_path / "x").rename(tmp_path / "decoder.mnn")
    with pytest.raises(BundleError):
        bundle.check()


def test_only_the_components_that_are_asked_for_are_checked(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    (tmp_path / "encoder.mnn").unlink()
    bundle.check((Component.DIT, Component.DECODER))


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no bundle"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("path", ["../outside.mnn", "/etc/passwd", "a/../../b"])
def test_paths_that_leave_the_bundle_are_refused(tmp_path: Path, path: str) -> None:
    make_bundle(tmp_path)
    data = json.loads((tmp_path / MANIFEST).read_text())
    data["artifacts"][0]["path"] = path
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(tmp_path)


def test_two_artifacts_of_one_kind_are_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    data = json.loads((tmp_path / MANIFEST).read_text())
    data["artifacts"].append(data["artifacts"][0])
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="same component and kind"):
        Bundle.open(tmp_path)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    data = json.loads((tmp_path / MANIFEST).read_text())
    data["schema"] = 2
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="schema"):
        Bundle.open(tmp_path)


@given(cut=st.integers(min_value=0, max_value=2000), flip=st.integers(min_value=0, max_value=2000))
def test_a_damaged_manifest_is_a_clear_error_or_still_valid(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    make_bundle(folder)
    data = bytearray((folder / MANIFEST).read_bytes())
    data[flip % len(data)] ^= 0x55
    (folder / MANIFEST).write_bytes(bytes(data[: len(data) - cut]))
    try:
        bundle = Bundle.open(folder)
        bundle.check()
    except BundleError as error:
        message = str(error)
    else:
        # What the damage hit is not read (a tool's version, say); the files are still the right ones.
        assert bundle.components == tuple(Component)
        return
    assert str(folder) in message


@pytest.mark.parametrize(("half_db", "lowest"), [(None, "normal"), (39.9, "normal"), (40.0, "low"), (300.0, "low")])
def test_a_model_needs_the_precision_at_which_it_was_shown_right(
    tmp_path: Path, half_db: float | None, lowest: str
) -> None:
    make_bundle(tmp_path)
    path = tmp_path / MANIFEST
    data = json.loads(path.read_text())
    # What follows from the figure is not believed but made again; older manifests have neither.
    del data["artifacts"][0]["half_db"]
    data["artifacts"][0]["lowest_precision"] = "low"
    if half_db is not None:
        data["artifacts"][0]["half_db"] = half_db
    path.write_text(json.dumps(data))
    manifest = Bundle.open(tmp_path).manifest
    assert manifest.artifacts[0].lowest_precision == lowest
    assert json.loads(manifest.to_json())["artifacts"][0]["lowest_precision"] == lowest
    assert manifest.artifacts[-1].lowest_precision is None
