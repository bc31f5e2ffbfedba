"""Results in a store: whole or not there, held to their hashes, and never a file outside their folder."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from sa3_convert.components import Component
from sa3_convert.convert.cache import ENTRY, Notes, StageCache
from sa3_convert.errors import InputError, UsageError
from sa3_convert.lab.common import Common, Store

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(params=["memory://{}/kept", "file://{}/kept"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(request.param.format(tmp_path))


def made(folder: Path) -> Notes:
    (folder / "dit.mnn").write_bytes(b"model" * 1000)
    (folder / "dit.mnn.data").write_bytes(b"weights" * 1000)
    return Notes(detail="x")


@pytest.fixture
def ours(tmp_path: Path) -> StageCache:
    cache = StageCache(tmp_path / "ours")
    cache.make("mnn", "abc", made)
    return cache


@pytest.fixture
def theirs(tmp_path: Path) -> StageCache:
    return StageCache(tmp_path / "theirs")


def test_what_one_worker_made_another_finds(store: Store, ours: StageCache, theirs: StageCache) -> None:
    store.bring("mnn", "abc", theirs)
    assert theirs.find("mnn", "abc", Notes) is None
    store.take("mnn", "abc", ours)
    store.take("mnn", "abc", ours)
    store.bring("mnn", "abc", theirs)
    found = theirs.find("mnn", "abc", Notes)
    assert found is not None
    assert found.file("dit.mnn").read_bytes() == b"model" * 1000


@pytest.mark.parametrize("damaged", ["dit.mnn", "dit.mnn.data", ENTRY])
@pytest.mark.parametrize("content", [None, b"", b"other"])
def test_what_is_not_whole_is_not_there(
    tmp_path: Path, ours: StageCache, theirs: StageCache, damaged: str, content: bytes | None
) -> None:
    store = Store(f"file://{tmp_path}/kept")
    store.take("mnn", "abc", ours)
    file = tmp_path / "kept" / "mnn" / "abc" / damaged
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    store.bring("mnn", "abc", theirs)
    assert theirs.find("mnn", "abc", Notes) is None
    # What was brought in vain is in nobody's way.
    assert theirs.make("mnn", "abc", made).files.keys() == {"dit.mnn", "dit.mnn.data"}
    assert theirs.find("mnn", "abc", Notes) is not None


@pytest.mark.parametrize("content", [None, b"", b"other" * 1000])
def test_what_is_damaged_there_is_made_again_and_kept(tmp_path: Path, ours: StageCache, content: bytes | None) -> None:
    address = f"file://{tmp_path}/kept"
    Store(address).take("mnn", "abc", ours)
    file = tmp_path / "kept" / "mnn" / "abc" / "dit.mnn"
    file.unlink()
    if content is not None:
        file.write_bytes(content)

    def common(name: str) -> Common:
        return Common(tmp_path, tmp_path / name, store=address)

    common("second").found_or_made("mnn", "abc", Notes, lambda stages: stages.make("mnn", "abc", made))
    assert common("third").find("mnn", "abc", Notes) is not None


def test_what_a_worker_has_takes_the_place_of_half_of_it(tmp_path: Path, ours: StageCache, theirs: StageCache) -> None:
    store = Store(f"file://{tmp_path}/kept")
    store.take("mnn", "abc", ours)
    (tmp_path / "kept" / "mnn" / "abc" / "dit.mnn").write_bytes(b"half")
    store.take("mnn", "abc", ours)
    store.bring("mnn", "abc", theirs)
    assert theirs.find("mnn", "abc", Notes) is not None


def test_what_is_there_is_told_without_bringing_it(tmp_path: Path, ours: StageCache) -> None:
    common = Common(tmp_path, tmp_path / "theirs", store=f"file://{tmp_path}/kept")
    assert not common.has("mnn", "abc", Notes)
    Store(common.store).take("mnn", "abc", ours)
    assert common.has("mnn", "abc", Notes)
    assert not common.cache.exists()


def test_errors_that_only_a_driver_knows_are_told_of_the_store(
    tmp_path: Path, ours: StageCache, theirs: StageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoCredentialsError(Exception):
        pass

    def refuse(*_: object, **__: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    store = Store(f"file://{tmp_path}/kept")
    for name in ("exists", "makedirs", "open"):
        monkeypatch.setattr(store._files, name, refuse)
    store.bring("mnn", "abc", theirs)
    assert theirs.find("mnn", "abc", Notes) is None
    with pytest.raises(InputError, match="does not take the result of mnn: NoCredentialsError: Unable to locate"):
        store.take("mnn", "abc", ours)


def test_a_checkpoint_whose_files_others_have_replaced_is_opened_again(toy: Path, tmp_path: Path) -> None:
    common = Common(Path(shutil.copytree(toy, tmp_path / "toy")), tmp_path / "cache")
    before = common.open()
    digest = before.digest(Component.DECODER)
    assert common.open() is before
    weights = tmp_path / "toy" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "new")
    (tmp_path / "new").replace(weights)
    assert common.open().digest(Component.DECODER) != digest


@pytest.mark.parametrize("name", ["../../out", "/tmp/out", "a/b", "..", "", "a\\b", ENTRY])
def test_no_name_leads_out_of_a_result(tmp_path: Path, ours: StageCache, theirs: StageCache, name: str) -> None:
    store = Store(f"file://{tmp_path}/kept")
    store.take("mnn", "abc", ours)
    file = tmp_path / "kept" / "mnn" / "abc" / ENTRY
    entry = json.loads(file.read_text())
    entry["files"][name] = "0" * 64
    file.write_text(json.dumps(entry))
    (tmp_path / "kept" / "out").write_text("x")
    before = {path for path in tmp_path.rglob("*") if "theirs" not in path.parts}
    store.bring("mnn", "abc", theirs)
    assert theirs.find("mnn", "abc", Notes) is None
    assert {path for path in tmp_path.rglob("*") if "theirs" not in path.parts} == before


def test_an_address_is_the_same_wherever_a_worker_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(Store("kept/here").address) == tmp_path / "kept/here"
    assert Store("memory://kept/here").address == "memory://kept/here"


@pytest.mark.slow
def test_an_object_store(ours: StageCache, theirs: StageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs `pip install moto[server] s3fs`, which nothing else does."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    s3fs = pytest.importorskip("s3fs")
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem().mkdir("bucket")
        store = Store("s3://bucket/folder")
        test_what_one_worker_made_another_finds(store, ours, theirs)
        with s3fs.S3FileSystem().open("s3://bucket/folder/mnn/abc/dit.mnn", "wb") as stream:
            stream.write(b"other")
        fresh = StageCache(theirs.root.with_name("fresh"))
        store.bring("mnn", "abc", fresh)
        assert fresh.find("mnn", "abc", Notes) is None
    finally:
        server.stop()


def test_an_address_that_nothing_knows_is_refused() -> None:
    with pytest.raises(UsageError, match="--store nothing://here"):
        Store("nothing://here")
