"""What a hub, a network in between, the local cache or an earlier download may present to `checkpoint fetch`."""

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants

from sa3_convert.checkpoint.hub import fetch
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.cli.app import run
from sa3_convert.errors import HubError, InputError, UsageError
from sa3_convert.hub import client as hub_client
from tests.hub.server import COMMIT, Hub, digest_of, listing_of, serve

ID = "someone/tiny"
FILES = {
    "model_config.json": b'{"model_type": "diffusion_cond"}',
    "model.safetensors": bytes(range(256)) * 8,
    "t5gemma-b-b-ul2/config.json": b'{"encoder": {}}\n',
    "t5gemma-b-b-ul2/model.safetensors": b"weights of the text encoder " * 30,
    "t5gemma-b-b-ul2/tokenizer.json": b'{"model": {"vocab": ["a"]}}',
}
Raw = Callable[[socket.socket], None]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with tiny files, an empty cache, no waiting; what the files hold is not looked at."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub_client, "PAUSE", 0.0)
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 0.01)
    monkeypatch.setattr(Checkpoint, "open", lambda folder: None)
    source = tmp_path / "repository"
    for name, content in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    with serve(source, ID) as server:
        yield server


def answering(head: str, body: bytes = b"") -> Raw:
    """Return what sends one answer as it is and says that the connection ends; `%d` stands for the body's length.

    Unsaid, a client would sometimes use the connection again before it learns that it was closed.
    """
    start = f"{head.replace('%d', str(len(body)))}\nConnection: close\n\n".replace("\n", "\r\n")
    return lambda connection: connection.sendall(start.encode("latin-1", "replace") + body)


def ok(body: bytes) -> Raw:
    return answering("HTTP/1.1 200 OK\nContent-Length: %d", body)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(hub: Hub, target: Path, revision: str | None = None, **options: Any) -> str:
    """Return with which words a fetch is refused; nothing may be left under the final name."""
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        fetch(ID, target, revision, endpoint=hub.address, **options)
    assert time.monotonic() - began < 10
    assert not target.exists()
    return str(caught.value)


def arrives(hub: Hub, target: Path, revision: str | None = None, **options: Any) -> None:
    fetch(ID, target, revision, endpoint=hub.address, **options)
    found = contents(target)
    del found["source.json"]
    assert found == FILES


def cache_of(hub: Hub, root: Path) -> Path:
    """Fill the cache as the hub library does; return the folder of the blobs."""
    repository = root / "cache" / f"models--{ID.replace('/', '--')}"
    (repository / "blobs").mkdir(parents=True)
    for name, content in FILES.items():
        blob = repository / "blobs" / digest_of(name, content)
        blob.write_bytes(content)
        pointer = repository / "snapshots" / COMMIT / name
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    return repository / "blobs"


def test_a_damaged_blob_of_the_cache_is_downloaded_instead(hub: Hub, tmp_path: Path) -> None:
    blobs = cache_of(hub, tmp_path)
    damaged = blobs / digest_of("model.safetensors", FILES["model.safetensors"])
    damaged.write_bytes(b"\x01" + damaged.read_bytes()[1:])
    notes: list[str] = []
    arrives(hub, tmp_path / "out", note=notes.append)
    assert hub.transfers("model.safetensors") == [None]
    assert hub.transfers("t5gemma-b-b-ul2/tokenizer.json") == []
    assert "model.safetensors is damaged" in notes[0]


@pytest.mark.parametrize("name", FILES)
def test_without_a_network_a_damaged_blob_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    damaged = cache_of(hub, tmp_path) / digest_of(name, FILES[name])
    damaged.write_bytes(b"\x01" + damaged.read_bytes()[1:])
    with pytest.raises(HubError, match="is damaged"):
        fetch(ID, tmp_path / "out", COMMIT, endpoint="http://127.0.0.1:9")


def test_without_a_network_a_blob_that_no_hash_names_is_refused(hub: Hub, tmp_path: Path) -> None:
    blobs = cache_of(hub, tmp_path)
    pointer = blobs.parent / "snapshots" / COMMIT / "model.safetensors"
    pointer.unlink()
    pointer.write_bytes(FILES["model.safetensors"])
    with pytest.raises(HubError, match="cannot be checked without the hub"):
        fetch(ID, tmp_path / "out", COMMIT, endpoint="http://127.0.0.1:9")
    arrives(hub, tmp_path / "out", COMMIT)


def test_a_sound_blob_of_another_file_is_not_taken(hub: Hub, tmp_path: Path) -> None:
    blobs = cache_of(hub, tmp_path)
    pointer = blobs.parent / "snapshots" / COMMIT / "model.safetensors"
    pointer.unlink()
    other = "t5gemma-b-b-ul2/model.safetensors"
    pointer.symlink_to(blobs / digest_of(other, FILES[other]))
    arrives(hub, tmp_path / "out")


def test_a_copy_from_the_cache_shares_nothing_with_it(hub: Hub, tmp_path: Path) -> None:
    blobs = cache_of(hub, tmp_path)
    for blob in blobs.iterdir():
        blob.chmod(0o400)
    arrives(hub, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.*"):
        assert path.stat().st_nlink == 1
        assert not path.is_symlink()
        assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
    assert {stat.S_IMODE(blob.stat().st_mode) for blob in blobs.iterdir()} == {0o400}


def test_a_finished_file_of_an_earlier_download_is_held_to_its_hash(hub: Hub, tmp_path: Path) -> None:
    left = tmp_path / ".out.download"
    left.mkdir()
    (left / "model.safetensors").write_bytes(FILES["model.safetensors"][:-1] + b"?")
    (left / "model_config.json").write_bytes(FILES["model_config.json"])
    arrives(hub, tmp_path / "out")
    assert hub.transfers("model_config.json") == []


def test_a_damaged_beginning_is_downloaded_anew_in_the_same_run(hub: Hub, tmp_path: Path) -> None:
    left = tmp_path / ".out.download"
    left.mkdir()
    (left / f"{digest_of('model.safetensors', FILES['model.safetensors'])}.partial").write_bytes(b"?" * 100)
    told: list[int] = []
    arrives(hub, tmp_path / "out", progress=lambda done, total: told.append(done))
    assert hub.transfers("model.safetensors") == ["bytes=100-", None]
    assert told == sorted(told)


def test_what_an_earlier_download_left_of_other_files_is_gone_before_more_is_brought(hub: Hub, tmp_path: Path) -> None:
    left = tmp_path / ".out.download"
    left.mkdir()
    (left / f"{'a' * 64}.partial").write_bytes(b"?" * 100)
    (left / "model-00001-of-00002.safetensors").write_bytes(b"?" * 100)
    hub.raw["model.safetensors"] = ok(b"wrong")
    refused(hub, tmp_path / "out")
    ours = f"{digest_of('model.safetensors', FILES['model.safetensors'])}.partial"
    assert {path.name for path in left.iterdir()} == {"model_config.json", ours}


def test_a_beginning_is_of_no_use_when_the_cache_has_the_whole(hub: Hub, tmp_path: Path) -> None:
    cache_of(hub, tmp_path)
    left = tmp_path / ".out.download"
    left.mkdir()
    (left / f"{digest_of('model.safetensors', FILES['model.safetensors'])}.partial").write_bytes(b"?" * 100)
    arrives(hub, tmp_path / "out")


def plant(left: Path, outside: Path, kind: str) -> None:
    """Put something into a download's folder that leads out of it, or is no file."""
    partial = f"{digest_of('model.safetensors', FILES['model.safetensors'])}.partial"
    left.mkdir(exist_ok=True)
    match kind:
        case "the folder itself":
            left.rmdir()
            left.symlink_to(outside, target_is_directory=True)
        case "a file":
            (left / "model.safetensors").symlink_to(outside / "mine")
        case "a beginning":
            (left / partial).symlink_to(outside / "mine")
        case "a second name":
            (left / partial).hardlink_to(outside / "mine")
        case "a folder of it":
            (left / "t5gemma-b-b-ul2").symlink_to(outside, target_is_directory=True)
        case "a pipe":
            os.mkfifo(left / partial)
        case "a folder for a file":
            (left / "model_config.json" / "x").mkdir(parents=True)
        case "the record":
            (left / "source.json").symlink_to(outside / "mine")
        case "something else":
            (left / "extra.json").write_text("{}")
            (left / "t5gemma-b-b-ul2").mkdir()
            (left / "t5gemma-b-b-ul2" / "model-9.safetensors").write_text("more")


PLANTED = [
    "the folder itself",
    "a file",
    "a beginning",
    "a second name",
    "a folder of it",
    "a pipe",
    "a folder for a file",
    "the record",
    "something else",
]


@pytest.mark.parametrize("kind", PLANTED)
def test_what_was_planted_where_a_download_grows_is_neither_followed_nor_kept(
    hub: Hub, tmp_path: Path, kind: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    plant(tmp_path / ".out.download", outside, kind)
    arrives(hub, tmp_path / "out")
    assert contents(outside) == {"mine": b"mine"}
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]


def test_a_second_download_to_the_same_folder_is_refused(hub: Hub, tmp_path: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def slow(connection: socket.socket) -> None:
        reached.set()
        go_on.wait(5)
        ok(FILES["model.safetensors"])(connection)

    hub.raw["model.safetensors"] = slow
    first = threading.Thread(target=lambda: fetch(ID, tmp_path / "out", endpoint=hub.address))
    first.start()
    assert reached.wait(5)
    with pytest.raises(UsageError, match="Another download"):
        fetch(ID, tmp_path / "out", endpoint=hub.address)
    go_on.set()
    first.join()
    assert contents(tmp_path / "out").keys() == {*FILES, "source.json"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><body>Please log in</body></html>",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b"[" * 100_000,
        b'{"sha": ' + b"9" * 5000 + b"}",
        b'{"sha": "../../../../../../tmp/evil/0123456789abcdef012", "siblings": []}',
        b'{"sha": "0123456789ABCDEF0123456789abcdef01234567", "siblings": []}',
        b'{"sha": "0123456789abcdef0123456789abcdef01234567\\n", "siblings": []}',
        b'{"sha": null, "siblings": []}',
        b'{"sha": "0123456789abcdef0123456789abcdef01234567", "siblings": null}',
        b'{"sha": "0123456789abcdef0123456789abcdef01234567", "siblings": [3]}',
        b'{"sha": "0123456789abcdef0123456789abcdef01234567", "siblings": [{"rfilename": NaN}]}',
    ],
)
def test_an_answer_that_is_no_list_of_files_is_refused_and_not_shown(hub: Hub, tmp_path: Path, body: bytes) -> None:
    hub.raw["list"] = ok(body)
    message = refused(hub, tmp_path / "out")
    assert "is not the hub's list of files" in message
    assert "log in<" not in message


@pytest.mark.parametrize("body", [b"<html>\x1b[2J</html>", b"", b"\xff", b"[" * 100_000, b'{"sha": "\x1b[2J"}'])
def test_the_command_line_leaves_with_3_and_shows_nothing_that_came(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], body: bytes
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    for what in ("list", "model_config.json"):
        hub.raw[what] = ok(body)
        assert run(["checkpoint", "fetch", ID, str(tmp_path / "out")]) == 3
        hub.raw.clear()
    shown = capfd.readouterr()
    assert not any(text in shown.err + shown.out for text in ("\x1b", "html"))


@pytest.mark.parametrize("wrong", [None, "", "W/abc", "A" * 64, "a" * 63, 5, ["a" * 64]])
def test_a_file_without_a_hash_is_refused(hub: Hub, tmp_path: Path, wrong: Any) -> None:
    answer = listing_of(hub)
    for entry in answer["siblings"]:
        if entry["rfilename"] == "model.safetensors":
            entry["lfs"]["sha256"] = wrong
    hub.raw["list"] = ok(json.dumps(answer).encode())
    assert "does not say which size and hash model.safetensors" in refused(hub, tmp_path / "out")


def test_a_file_that_is_listed_twice_is_refused(hub: Hub, tmp_path: Path) -> None:
    answer = listing_of(hub)
    answer["siblings"].append(answer["siblings"][0])
    hub.raw["list"] = ok(json.dumps(answer).encode())
    assert "names a file twice" in refused(hub, tmp_path / "out")


def test_the_answer_for_another_commit_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.raw["list"] = ok(json.dumps(listing_of(hub) | {"sha": "e" * 40}).encode())
    assert "another commit" in refused(hub, tmp_path / "out", COMMIT)


def test_an_answer_larger_than_any_list_is_not_read_to_its_end(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "SMALL", 1 << 16)
    hub.raw["list"] = ok(b" " * (1 << 20))
    assert "more than the 65536 bytes" in refused(hub, tmp_path / "out")


def test_a_body_that_is_longer_than_promised_fills_no_disk(hub: Hub, tmp_path: Path) -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b"x" * 65536)

    hub.raw["model.safetensors"] = endless
    assert "sends more than" in refused(hub, tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / ".out.download").rglob("*")) < 20_000


@pytest.mark.parametrize("what", ["list", "model.safetensors"])
@pytest.mark.parametrize("part", ["head", "body", "chunk"])
def test_an_answer_that_drips_is_given_up(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, part: str
) -> None:
    monkeypatch.setattr(hub_client, "TRIES", 1)
    monkeypatch.setattr(hub_client, "PATIENCE", 0.5)
    over = threading.Event()

    def dripping(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        if part != "head":
            connection.sendall(b"x\r\n" + (b"Transfer-Encoding: chunked\r\n\r\n1;" if part == "chunk" else b"\r\n"))
        while not over.wait(0.05):
            connection.sendall(b"x")

    hub.raw[what] = dripping
    try:
        assert "Less than" in refused(hub, tmp_path / "out")
    finally:
        over.set()


def test_a_server_that_says_nothing_is_given_up(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.raw["list"] = lambda connection: time.sleep(0.5)
    assert "timed out" in refused(hub, tmp_path / "out")


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("wait", ["1000000000", "9" * 400, "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_a_long_wait_is_told_instead_of_slept(hub: Hub, tmp_path: Path, status: int, wait: str) -> None:
    hub.raw["list"] = answering(f"HTTP/1.1 {status} Wait\nRetry-After: {wait}\nContent-Length: 0")
    assert "The hub asks to wait" in refused(hub, tmp_path / "out")


def test_a_short_wait_is_shown_and_kept(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 120.0)
    monkeypatch.setattr(hub_client.time, "sleep", slept.append)

    def busy(connection: socket.socket) -> None:
        del hub.raw["list"]
        answering('HTTP/1.1 429 Wait\nRateLimit: "api";r=0;t=55\nContent-Length: 0')(connection)

    hub.raw["list"] = busy
    notes: list[str] = []
    arrives(hub, tmp_path / "out", note=notes.append)
    assert (slept, notes) == ([55.0], ["The hub asks to wait 55 s …"])


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[", "//", "data:,x"])
def test_a_redirect_elsewhere_is_not_followed(hub: Hub, tmp_path: Path, to: str) -> None:
    hub.raw["model_config.json"] = answering(f"HTTP/1.1 302 Found\nLocation: {to}\nContent-Length: 0")
    refused(hub, tmp_path / "out")


def test_redirects_without_an_end_are_given_up(hub: Hub, tmp_path: Path) -> None:
    hub.raw["list"] = answering("HTTP/1.1 302 Found\nLocation: /again\nContent-Length: 0")
    assert "without an end" in refused(hub, tmp_path / "out")
    assert len(hub.requests) == 6


def test_the_token_stays_with_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve(tmp_path / "repository", ID) as other:
        to = f"{other.address}/{ID}/resolve/{COMMIT}/model.safetensors"
        hub.raw["model.safetensors"] = answering(f"HTTP/1.1 302 Found\nLocation: {to}\nContent-Length: 0")
        arrives(hub, tmp_path / "out")
        assert set(hub.tokens) == {"Bearer hf_secret"}
        assert other.tokens == [None]


def test_a_login_page_in_between_does_not_cost_what_is_there(hub: Hub, tmp_path: Path) -> None:
    hub.break_at["model.safetensors"] = 1000
    refused(hub, tmp_path / "out")
    hub.broken = False
    hub.raw["model.safetensors"] = ok(b"<html>log in</html>")
    assert "something else than what was asked for" in refused(hub, tmp_path / "out")
    hub.raw.clear()
    hub.requests.clear()
    arrives(hub, tmp_path / "out")
    assert hub.transfers("model.safetensors") == ["bytes=1000-"]


def test_an_address_without_https_is_not_followed_from_one_with_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        return httpx2.Response(302, headers={"Location": f"{hub.address}/list"})

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: httpx2.Client(transport=httpx2.MockTransport(answer)))
    with pytest.raises(HubError, match="to an address that is not https"):
        fetch(ID, tmp_path / "out", endpoint="https://hub.invalid")
    assert len(asked) == 1


def test_what_cannot_be_sent_is_told_at_once_and_not_quoted(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client.time, "sleep", lambda _: pytest.fail("waited"))
    for token in ("hf_sec\0ret", "hf_sec\u20acret"):
        (tmp_path / "token").write_text(token)
        message = refused(hub, tmp_path / "out")
        assert "No request for someone/tiny can be made" in message
        assert "hf_sec" not in message


@pytest.mark.parametrize("within", ["", "t5gemma-b-b-ul2/"])
def test_weights_in_several_files_are_fetched_by_their_index(hub: Hub, tmp_path: Path, within: str) -> None:
    del hub.files[f"{within}model.safetensors"]
    shards = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 50 for n in (1, 2)}
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    hub.files |= {f"{within}{name}": content for name, content in shards.items()}
    hub.files[f"{within}model.safetensors.index.json"] = json.dumps(index).encode()
    fetch(ID, tmp_path / "out", endpoint=hub.address)
    found = contents(tmp_path / "out")
    del found["source.json"]
    assert found == hub.files


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/x.safetensors", "a/b.safetensors", ".safetensors", "x.bin", "a\n.safetensors", 3, [], None],
)
def test_an_index_that_names_something_else_is_refused(hub: Hub, tmp_path: Path, name: Any) -> None:
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": name}}).encode()
    assert "model.safetensors.index.json" in refused(hub, tmp_path / "out")


@pytest.mark.parametrize("address", ["file:///", "nowhere", "http://", "http://[", "http://x:y", ""])
def test_an_address_that_is_no_hubs_is_a_mistake_of_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        fetch(ID, tmp_path / "out")
