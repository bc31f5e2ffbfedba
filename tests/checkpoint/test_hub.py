import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from sa3_convert.checkpoint.hub import Fetched, fetch
from sa3_convert.checkpoint.reader import Checkpoint, Source
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.checkpoint.variants import MINIATURE, VARIANTS
from sa3_convert.errors import CheckpointError, HubError, UsageError
from sa3_convert.hub import client as hub_client
from tests.hub.server import COMMIT, Hub, digest_of, serve

ID = "someone/toy"
NEEDED = [
    "model.safetensors",
    "model_config.json",
    "t5gemma-b-b-ul2/config.json",
    "t5gemma-b-b-ul2/model.safetensors",
    "t5gemma-b-b-ul2/tokenizer.json",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own, and nobody logged in."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub_client, "PAUSE", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def hub(small_toy: Path) -> Iterator[Hub]:
    with serve(small_toy, ID) as server:
        yield server


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def fill_cache(cache: Path, source: Path, hub_id: str, commit: str, names: list[str]) -> None:
    """Lay files out as the hub library does."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    for name in names:
        blob = repository / "blobs" / digest_of(name, (source / name).read_bytes())
        pointer = repository / "snapshots" / commit / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes((source / name).read_bytes())
        pointer.symlink_to(blob)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def test_a_checkpoint_arrives_whole_with_its_origin_beside_it(hub: Hub, small_toy: Path, tmp_path: Path) -> None:
    fetched = fetch(ID, tmp_path / "out", endpoint=hub.address)
    assert files(tmp_path / "out") == sorted([*NEEDED, "source.json"])
    for name in NEEDED:
        assert (tmp_path / "out" / name).read_bytes() == (small_toy / name).read_bytes()
    source = json.loads((tmp_path / "out" / "source.json").read_text())
    assert (source["hub_id"], source["revision"]) == (ID, COMMIT)
    found = Checkpoint.open(tmp_path / "out")
    assert found.source == Source(revision=COMMIT)
    (tmp_path / "out" / "source.json").write_text('{"revision": "main | <b>"}')
    with pytest.raises(CheckpointError, match=r"source\.json"):
        _ = found.source
    (tmp_path / "out" / "source.json").unlink()
    assert found.source == Source()
    assert sorted(source["files"]) == NEEDED
    assert fetched == Fetched(ID, COMMIT, sum((small_toy / name).stat().st_size for name in NEEDED))
    assert Checkpoint.open(tmp_path / "out").variant_name == "small-music"


def test_nothing_else_is_left_beside_the_folder(hub: Hub, tmp_path: Path) -> None:
    fetch(ID, tmp_path / "deep" / "out", endpoint=hub.address)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_only_what_is_needed_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    hub.files["huge.ckpt"] = b"x"
    fetch(ID, tmp_path / "out", endpoint=hub.address)
    asked = {path.split(f"/{COMMIT}/")[1] for method, path, _ in hub.requests if f"/{COMMIT}/" in path}
    assert sorted(asked) == NEEDED


def test_an_autoencoder_alone_has_no_text_encoder_to_fetch(tmp_path: Path) -> None:
    synthesize(tmp_path / "same-s", "same-s")
    with serve(tmp_path / "same-s", "someone/ae") as server:
        fetch("someone/ae", tmp_path / "out", endpoint=server.address)
    assert files(tmp_path / "out") == ["model.safetensors", "model_config.json", "source.json"]


def test_a_published_variant_is_fetched_at_its_pinned_commit(small_toy: Path, tmp_path: Path) -> None:
    variant = VARIANTS["small-music"]
    with serve(small_toy, variant.hub_id, revisions={"main": COMMIT, "pin": variant.revision}) as server:
        fetched = fetch(variant.hub_id, tmp_path / "out", endpoint=server.address)
    assert fetched.revision == variant.revision
    assert {path.split("/")[-1] for _, path, _ in server.requests if "/api/" in path} == {variant.revision}


def test_a_branch_is_resolved_to_its_commit(hub: Hub, tmp_path: Path) -> None:
    hub.revisions["v2"] = "f" * 40
    assert fetch(ID, tmp_path / "out", "v2", endpoint=hub.address).revision == "f" * 40


def test_progress_grows_to_the_total(hub: Hub, small_toy: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    fetch(ID, tmp_path / "out", progress=lambda done, total: told.append((done, total)), endpoint=hub.address)
    assert told == sorted(told)
    total = sum((small_toy / name).stat().st_size for name in NEEDED if name != "model_config.json")
    assert told[-1] == (total, total)


@pytest.mark.parametrize("name", ["model.safetensors", "t5gemma-b-b-ul2/model.safetensors"])
def test_a_broken_transfer_goes_on_where_it_stopped(hub: Hub, small_toy: Path, tmp_path: Path, name: str) -> None:
    hub.break_at[name] = 300_000
    with pytest.raises(HubError, match="run the same command again to go on"):
        fetch(ID, tmp_path / "out", endpoint=hub.address)
    assert not (tmp_path / "out").exists()
    hub.broken = False
    hub.requests.clear()
    fetch(ID, tmp_path / "out", endpoint=hub.address)
    assert hub.transfers(name) == ["bytes=300000-"]
    assert hub.transfers("model_config.json") == []
    assert (tmp_path / "out" / name).read_bytes() == (small_toy / name).read_bytes()


def test_a_break_that_mends_itself_costs_only_what_is_left(hub: Hub, tmp_path: Path) -> None:
    hub.recovers = True
    hub.break_at["model.safetensors"] = 300_000
    fetch(ID, tmp_path / "out", endpoint=hub.address)
    assert hub.transfers("model.safetensors") == [None, "bytes=300000-"]
    assert Checkpoint.open(tmp_path / "out").variant_name == "small-music"


def test_what_another_commit_left_is_not_mixed_in(hub: Hub, tmp_path: Path) -> None:
    hub.break_at["model.safetensors"] = 300_000
    with pytest.raises(HubError):
        fetch(ID, tmp_path / "out", endpoint=hub.address)
    hub.broken = False
    hub.revisions["new"] = "e" * 40
    hub.files["model.safetensors"] = hub.files["model.safetensors"][:-1] + b"x"
    hub.requests.clear()
    fetch(ID, tmp_path / "out", "new", endpoint=hub.address)
    assert hub.transfers("model.safetensors") == [None]
    assert files(tmp_path / "out") == sorted([*NEEDED, "source.json"])


def test_a_partial_file_longer_than_the_whole_is_begun_anew(hub: Hub, small_toy: Path, tmp_path: Path) -> None:
    hub.break_at["model.safetensors"] = 300_000
    with pytest.raises(HubError):
        fetch(ID, tmp_path / "out", endpoint=hub.address)
    hub.broken = False
    (partial,) = (tmp_path / ".out.download").glob("*.partial")
    partial.write_bytes(b"x" * (len(hub.files["model.safetensors"]) + 1))
    fetch(ID, tmp_path / "out", endpoint=hub.address)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (small_toy / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "t5gemma-b-b-ul2/tokenizer.json"])
def test_a_file_that_arrives_damaged_is_thrown_away(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.corrupt.add(name)
    with pytest.raises(HubError, match=f"{name} of {ID} arrived damaged"):
        fetch(ID, tmp_path / "out", endpoint=hub.address)
    assert not (tmp_path / "out").exists()
    hub.corrupt.clear()
    fetch(ID, tmp_path / "out", endpoint=hub.address)
    assert Checkpoint.open(tmp_path / "out").variant_name == "small-music"


def test_a_repository_of_something_else_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = hub.files["t5gemma-b-b-ul2/model.safetensors"]
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        fetch(ID, tmp_path / "out", endpoint=hub.address)
    assert not (tmp_path / "out").exists()


def test_a_filled_cache_needs_no_network(small_toy: Path, cache: Path, tmp_path: Path) -> None:
    fill_cache(cache, small_toy, ID, COMMIT, NEEDED)
    fetched = fetch(ID, tmp_path / "out", COMMIT, endpoint="http://127.0.0.1:9")
    assert fetched.revision == COMMIT
    assert files(tmp_path / "out") == sorted([*NEEDED, "source.json"])
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_symlink()]


def test_what_the_cache_lacks_is_downloaded(hub: Hub, small_toy: Path, cache: Path, tmp_path: Path) -> None:
    fill_cache(cache, small_toy, ID, COMMIT, ["model.safetensors", "model_config.json"])
    fetch(ID, tmp_path / "out", endpoint=hub.address)
    assert hub.transfers("model.safetensors") == []
    assert hub.transfers("t5gemma-b-b-ul2/model.safetensors") == [None]


def test_a_gated_repository_says_how_to_get_in(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    with pytest.raises(HubError, match=rf"gated. Accept its licence at https://huggingface.co/{ID}.*log in"):
        fetch(ID, tmp_path / "out", endpoint=hub.address)


def test_an_unknown_repository_is_told(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="The hub has no someone/else"):
        fetch("someone/else", tmp_path / "out", endpoint=hub.address)


def test_an_unknown_revision_is_told(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="no such revision"):
        fetch(ID, tmp_path / "out", "nope", endpoint=hub.address)


def test_an_unknown_commit_is_told(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="no such revision"):
        fetch(ID, tmp_path / "out", "a" * 40, endpoint=hub.address)


def test_a_missing_file_is_told(hub: Hub, tmp_path: Path) -> None:
    del hub.files["t5gemma-b-b-ul2/tokenizer.json"]
    with pytest.raises(HubError, match="a file is missing"):
        fetch(ID, tmp_path / "out", endpoint=hub.address)


def test_no_network_is_told(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="Check the network"):
        fetch(ID, tmp_path / "out", endpoint="http://127.0.0.1:9")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_beforehand(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match="GiB left"):
        fetch(ID, tmp_path / "out", endpoint=hub.address)
    assert hub.transfers("model.safetensors") == []


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        fetch(ID, tmp_path)


def test_what_comes_with_the_package_is_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="comes with this package"):
        fetch(MINIATURE, tmp_path / "there")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["toy", "a/b/c", "../x", "http://x/y", "a/b@c", ""])
def test_a_malformed_id_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no hub id"):
        fetch(text, tmp_path / "out")


def test_the_address_of_the_hub_is_taken_from_the_environment(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sa3_convert.checkpoint.hub import fetch;"
        "fetch(sys.argv[1], Path(sys.argv[2]))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code, ID, str(tmp_path / "out")], env=environment, check=True, timeout=60)
    assert files(tmp_path / "out") == sorted([*NEEDED, "source.json"])


def test_importing_the_room_pulls_in_neither_the_hub_library_nor_torch() -> None:
    code = (
        "import sys, sa3_convert.checkpoint.hub, sa3_convert.checkpoint.synthetic;"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'MNN', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(' '.join(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stderr.strip() == ""
