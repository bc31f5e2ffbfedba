"""Bundles that are named by their id on the hub: what is fetched, what is refused, and that nothing else is asked."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from sa3_convert.bundle.hub import bring_bundle
from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli import app as cli
from sa3_convert.errors import BundleError, HubError, UsageError
from sa3_convert.hub import client as hub_client
from sa3_convert.hub.files import HubId
from sa3_convert.publish.export import export_bundles
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from tests.hub.server import COMMIT, Hub, digest_of, serve

ID = "someone/models"
INNER = Path(f"{ID}/music/int8")
SHORT = GenerateRequest("warm analog pad", seconds=0.3, seed=3, steps=2)
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own, nobody logged in, and no folder that an id could be."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub_client, "PAUSE", 0.0)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tree(toy_int8: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "tree"
    export_bundles([toy_int8], folder, "hub")
    return folder


@pytest.fixture
def hub(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(tree, ID) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        yield server


def brought(hub: Hub) -> list[str]:
    return sorted({path.split(f"/{COMMIT}/")[1] for _, path, _ in hub.requests if f"/{COMMIT}/" in path})


def edit_manifest(hub: Hub, name: str, old: str, new: str) -> None:
    text = hub.files[name].decode()
    assert old in text
    hub.files[name] = text.replace(old, new).encode()


@pytest.mark.parametrize("name", [ID, f"{ID}/music/int8", f"{ID}/music@main", f"{ID}/music/int8@{COMMIT}"])
def test_an_id_makes_the_samples_of_the_bundle(hub: Hub, toy_int8: Bundle, name: str) -> None:
    made = []
    for bundle in (toy_int8.path, name):
        with Pipeline.from_pretrained(bundle) as pipeline:
            made.append(pipeline.generate(SHORT).audio)
    np.testing.assert_array_equal(*made)


def test_the_models_of_strangers_make_them_too_and_of_several_only_the_right_ones_come(
    hub: Hub, toy_int8: Bundle, tree: Path
) -> None:
    hub.files = {n: c for n, c in hub.files.items() if n.endswith((".mnn", ".weight")) or n.startswith("shared/")}
    del hub.files["shared/tokenizer.table"]
    wanted = sorted(hub.files)
    hub.files["shared/text_encoder.mnn"] = hub.files["shared/text_encoder_int8.mnn"] + bytes(100)
    hub.files["shared/decoder_medium_fused_wn.mnn"] = b"x"
    hub.files["shared/bottleneck_params_medium.json"] = b"{}"
    hub.files["music/fp16/encoder_fp16.mnn"] = b"x"
    hub.files["notes/huge.bin"] = b"x"
    with Pipeline.from_pretrained(f"{ID}/music/int8") as pipeline, Pipeline.from_bundle(toy_int8.path) as own:
        np.testing.assert_array_equal(pipeline.generate(SHORT).audio, own.generate(SHORT).audio)
    assert brought(hub) == wanted


def test_only_what_is_needed_comes_and_a_second_time_nothing(hub: Hub) -> None:
    folder = bring_bundle(INNER, ())
    assert brought(hub) == ["music/int8/manifest.json"]
    bring_bundle(INNER, ("mnn",))
    names = sorted(p.relative_to(folder.parents[1]).as_posix() for p in Bundle.open(folder).all_files())
    assert brought(hub) == names
    assert not any("SUMS" in name or "golden" in name for name in names)
    hub.requests.clear()
    bring_bundle(INNER)
    assert brought(hub) == []


def test_the_cache_is_laid_out_as_the_hubs_own_library_does(hub: Hub, hub_cache: Path) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    folder = bring_bundle(INNER)
    found = try_to_load_from_cache(ID, "music/int8/manifest.json", cache_dir=hub_cache)
    assert found == str(folder / "manifest.json")
    (repository,) = scan_cache_dir(hub_cache).repos
    assert (repository.repo_id, [r.commit_hash for r in repository.revisions]) == (ID, [COMMIT])
    assert {len(path.name) for path in (hub_cache / "models--someone--models" / "blobs").iterdir()} == {40, 64}


def test_the_commit_and_the_sizes_are_told_before_anything_large_comes(hub: Hub) -> None:
    told: list[str] = []
    bring_bundle(Path(ID), note=lambda line: told.append(f"{line} after {brought(hub)}"), progress=lambda *_: None)
    assert told[0].startswith(f"{ID}/music/int8@{COMMIT}: 10 files, ")
    assert told[1].endswith(" MiB of someone/models are to be downloaded. after ['music/int8/manifest.json']")


def test_a_path_asks_nobody(toy_int8: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    assert bring_bundle(toy_int8.path) == toy_int8.path
    Path("someone").mkdir()
    # What may lie in a folder that is here is a path, not an id.
    with pytest.raises(BundleError, match=r"someone/models is no bundle"):
        Pipeline.from_pretrained(ID)
    Path(ID).symlink_to(toy_int8.path)
    assert bring_bundle(Path(ID)) == Path(ID)


@pytest.mark.parametrize(
    "name", ["/a/b", "../a/b", "a", "a/../b", "a/b@../c", "a/b@", "a/.b", "a b/c", "a//b@c d", "a/b@c/../d"]
)
def test_what_has_not_the_form_of_an_id_is_a_path(name: str) -> None:
    assert HubId.meant_by(Path(name)) is None


def test_what_is_said_to_be_here_is_a_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    for name in ("./a/b", "../a/b"):
        assert cli.run(["table", name]) == 3
    assert capsys.readouterr().err.count("is no bundle") == 2


def test_run_tells_the_commit_and_keeps_it(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wav, figures = tmp_path / "x.wav", tmp_path / "x.json"
    command = ["run", str(INNER), "--prompt", "pad", "--seconds", "0.3", "--steps", "1", "-o", str(wav)]
    assert cli.run([*command, "--json", str(figures)]) == 0
    pinned = f"{ID}/music/int8@{COMMIT}"
    assert f"{pinned}: 10 files" in capsys.readouterr().err
    assert json.loads(figures.read_text())["hub"] == pinned
    assert pinned.encode() in wav.read_bytes()
    first = wav.read_bytes()
    # Again without a network, and at the pinned name.
    hub.raw["list"] = lambda _: pytest.fail("the hub was asked")
    assert cli.run([*command, "--offline"]) == 0
    command[1] = pinned
    assert cli.run([*command, "--offline"]) == 0
    assert wav.read_bytes() == first


def test_every_command_that_takes_a_bundle_takes_an_id(hub: Hub, tmp_path: Path) -> None:
    figures, short = tmp_path / "figures.json", ["--seconds", "0.3", "--steps", "1"]
    for words in (
        ["table", ID],
        ["inspect", ID, "--json", str(figures)],
        ["bench", ID, "--engine", "mnn", *short, "--repeats", "1", "--no-peak-memory", "--json", str(figures)],
    ):
        figures.unlink(missing_ok=True)
        assert cli.run(words) == 0
        assert words[0] == "table" or json.loads(figures.read_text())["hub"] == f"{ID}/music/int8@{COMMIT}"


def test_verify_takes_an_id_and_a_checkpoint(hub: Hub, toy: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    words = ["verify", ID, "--checkpoint", str(toy), "--component", "number_conditioner", "--quick"]
    assert cli.run([*words, "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["hub"] == f"{ID}/music/int8@{COMMIT}"


def test_of_several_bundles_the_error_lists_them_with_sizes(hub: Hub) -> None:
    hub.files |= {n.replace("music/", "sfx/"): c for n, c in hub.files.items() if n.startswith("music/")}
    edit_manifest(hub, "sfx/int8/manifest.json", "music/", "sfx/")
    with pytest.raises(BundleError, match=rf"2 bundles. Name one: {ID}/music/int8@{COMMIT} \(\d+\.\d MiB\), .*/sfx/"):
        bring_bundle(Path(ID))
    assert bring_bundle(Path(f"{ID}/sfx")).parts[-2:] == ("sfx", "int8")


def test_a_repository_without_a_bundle_is_told(hub: Hub) -> None:
    hub.files = {"README.md": b"nothing"}
    with pytest.raises(BundleError, match=f"{ID}@{COMMIT} holds no bundle"):
        bring_bundle(Path(ID))


def test_a_checkpoint_on_the_hub_is_told_with_commands(hub: Hub) -> None:
    hub.files = {"model_config.json": b"{}", "model.safetensors": b"x"}
    with pytest.raises(BundleError, match=rf"is a checkpoint.*\n  sa3-convert checkpoint fetch {ID} models"):
        bring_bundle(Path(ID))


def test_a_download_that_broke_off_goes_on_where_it_stopped(hub: Hub, toy_int8: Bundle) -> None:
    name = "music/int8/dit_music_int8.mnn"
    hub.break_at[name] = 5000
    with pytest.raises(HubError, match="run the same command again to go on"):
        bring_bundle(INNER)
    hub.broken = False
    hub.requests.clear()
    Bundle.open(bring_bundle(INNER)).check()
    assert hub.transfers(name) == ["bytes=5000-"]


def test_a_damaged_file_of_the_cache_is_fetched_again_and_refused_offline(hub: Hub, hub_cache: Path) -> None:
    folder = bring_bundle(INNER)
    blob = Path(os.path.realpath(folder / "dit_music_int8.mnn"))
    content = blob.read_bytes()
    blob.write_bytes(b"x" + content[1:])
    with pytest.raises(HubError, match=r"dit_music_int8.mnn is damaged"):
        bring_bundle(INNER, offline=True)
    bring_bundle(INNER)
    assert blob.read_bytes() == content


def test_a_file_that_arrives_damaged_gets_no_name(hub: Hub, hub_cache: Path) -> None:
    hub.corrupt.add("music/int8/dit_music_int8.mnn")
    with pytest.raises(HubError, match="arrived damaged"):
        bring_bundle(INNER)
    digest = digest_of("x.mnn", hub.files["music/int8/dit_music_int8.mnn"])
    assert not (hub_cache / "models--someone--models" / "blobs" / digest).exists()


@pytest.mark.parametrize("edit", [lambda content: content + b"x", lambda content: b"x" + content[1:]])
def test_a_manifest_that_contradicts_the_hub_is_refused_before_models_come(hub: Hub, edit: object) -> None:
    name = "music/int8/dit_music_int8.mnn"
    hub.files[name] = edit(hub.files[name])  # type: ignore[operator]
    with pytest.raises(BundleError, match=f"{name} of .* is not the file that its manifest describes"):
        bring_bundle(INNER)
    assert brought(hub) == ["music/int8/manifest.json"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"path": "shared/tokenizer.json"', '"path": "../../tokenizer.json"', "leaves the bundle"),
        ('"path": "shared/tokenizer.json"', '"path": "/etc/passwd"', "leaves the bundle"),
        ('"path": "shared/tokenizer.json"', '"path": "shared/other.json"', "a file is missing: shared/other.json"),
        ('"schema": 1', '"schema": 2', "is damaged"),
    ],
)
def test_a_hostile_manifest_is_refused(hub: Hub, hub_cache: Path, old: str, new: str, message: str) -> None:
    edit_manifest(hub, "music/int8/manifest.json", old, new)
    with pytest.raises((BundleError, HubError), match=message):
        bring_bundle(INNER)
    assert {path.name for path in hub_cache.parent.iterdir()} <= {"cache", "here"}


def test_a_base_above_the_repository_is_refused(hub: Hub) -> None:
    hub.files = {name.removeprefix("music/int8/"): content for name, content in hub.files.items()}
    with pytest.raises(BundleError, match="leads out of it"):
        bring_bundle(Path(ID))


def test_a_hostile_listing_writes_nothing_elsewhere(hub: Hub, hub_cache: Path, tmp_path: Path) -> None:
    for name in ("../../../up.mnn", "/tmp/absolute.mnn", "music/int8/../../x.mnn", "music/int8/a\nb.mnn", "C:\\x.mnn"):
        hub.files[name] = b"x"
    Bundle.open(bring_bundle(INNER)).check()
    hub.files.pop("music/int8/manifest.json")
    bring_bundle(Path(f"{ID}/music/int8@{COMMIT}"))
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "here"}
    links = [path for path in hub_cache.rglob("*") if path.is_symlink()]
    assert {path.resolve().parent for path in links} == {hub_cache / "models--someone--models" / "blobs"}


def test_a_listing_with_a_million_files_or_a_file_without_end_is_refused(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sa3_convert.bundle.hub as bundles

    monkeypatch.setattr(bundles, "SMALL", 10)
    with pytest.raises(BundleError, match="too large to be a manifest"):
        bring_bundle(INNER)
    monkeypatch.setattr(hub_client, "SMALL", 1 << 12)
    hub.files |= {f"{i}.bin": b"" for i in range(100)}
    with pytest.raises(HubError, match="more than the 4096 bytes"):
        bring_bundle(INNER)


def test_too_little_disk_is_told_before_models_come(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100_000}))
    with pytest.raises(UsageError, match="GiB left"):
        bring_bundle(INNER)
    assert brought(hub) == ["music/int8/manifest.json"]


def test_a_branch_that_moves_is_followed_and_a_pinned_commit_stays(hub: Hub) -> None:
    first = bring_bundle(INNER)
    hub.revisions["main"] = "f" * 40
    hub.revisions["old"] = COMMIT
    second = bring_bundle(INNER)
    assert (first.parents[1].name, second.parents[1].name) == (COMMIT, "f" * 40)
    assert bring_bundle(INNER, offline=True) == second
    assert bring_bundle(Path(f"{INNER}@{COMMIT}"), offline=True) == first


def test_refusals_have_their_sentences(hub: Hub) -> None:
    with pytest.raises(HubError, match=r"There is no folder someone/else here. The hub has no someone/else"):
        bring_bundle(Path("someone/else"))
    with pytest.raises(HubError, match="no such revision"):
        bring_bundle(Path(f"{ID}@nope"))
    with pytest.raises(HubError, match="is not in the local cache"):
        bring_bundle(INNER, offline=True)
    hub.gated = True
    with pytest.raises(HubError, match=r"is gated.*hf auth login"):
        bring_bundle(INNER)
    with pytest.raises(HubError, match=r"Check the network.*--offline"):
        bring_bundle(INNER, endpoint=NOWHERE)


def test_a_cache_that_cannot_be_written_is_of_use_offline(hub: Hub, hub_cache: Path) -> None:
    folder = bring_bundle(INNER)
    copy = hub_cache.with_name("copy")
    shutil.copytree(hub_cache, copy, symlinks=True)
    for path in [copy, *copy.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(copy.rglob("*"))
    hub_cache.rename(hub_cache.with_name("away"))
    copy.rename(hub_cache)
    assert bring_bundle(INNER, offline=True) == folder
    assert sorted(p.relative_to(hub_cache) for p in hub_cache.rglob("*")) == [p.relative_to(copy) for p in before]


def test_without_the_hubs_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError) as raised:
        bring_bundle(INNER)
    assert raised.value.name == "huggingface_hub"


def test_a_link_out_of_a_snapshot_leads_to_its_blobs_alone(hub: Hub, hub_cache: Path, tmp_path: Path) -> None:
    folder = bring_bundle(INNER)
    outside = tmp_path / "here" / "mine.mnn"
    model = folder / "dit_music_int8.mnn"
    shutil.copy(model, outside)
    model.unlink()
    model.symlink_to(outside)
    with pytest.raises(BundleError, match="leads out"):
        Bundle.open(folder).check()
