"""Seeded hostile answers, damaged caches and downloads: what is accepted is what the hub names, byte for byte."""

import copy
import gzip
import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from sa3_convert.checkpoint.hub import fetch
from sa3_convert.errors import Sa3Error
from sa3_convert.hub import client as hub_client
from tests.checkpoint.test_hub_hostile import FILES, ID, PLANTED, Raw, answering, cache_of, contents, hub, ok, plant
from tests.damage import damaged
from tests.hub.server import COMMIT, Hub, listing_of

__all__ = ["hub"]

_VALUES: list[Any] = [
    *(None, True, 0, -1, 10**30, 1.5, "", "../../x", "/etc/passwd", "\x1b[2J", "a\0b", "\ud800", "x" * 5000),
    *([], {}, [[]], "e" * 40, "f" * 64, "W/x", "model.safetensors"),
]
_CODES = ["GatedRepo", "RepoNotFound", "RevisionNotFound", "EntryNotFound", "\x80", ""]
_PLACES = [
    "file:///etc/passwd",
    "//evil.invalid/",
    "http://[",
    "/x" * 3000,
    "",
    "\xff",
    "?",
    "gopher://x",
    "https://:0/",
]
_WAITS = ["0", "1000000000", "-1", "1e9", "Mon, 99 Xyz 9999 99:99:99 GMT", "\xb2", "9" * 500]


def mutated_list(random_: random.Random, answer: Any) -> bytes:
    """Return a list of files in which a value is another one, is gone, or is there twice."""
    answer = copy.deepcopy(answer)
    node = answer
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = random_.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and random_.random() < 0.8:
            node = node[key]
            continue
        break
    match random_.randrange(4):
        case 0:
            del node[key]
        case 1 if isinstance(node, list):
            node.append(node[key])
        case _:
            node[key] = random_.choice(_VALUES)
    return json.dumps(answer).encode()


def hostile(random_: random.Random, body: bytes) -> Raw:
    """Return one answer of a server that is broken or malicious."""
    match random_.randrange(10):
        case 0:
            return ok(damaged(random_, body))
        case 1:
            words = f"X-Error-Code: {random_.choice(_CODES)}\nRetry-After: {random_.choice(_WAITS)}"
            head = f"HTTP/1.1 {random_.randrange(100, 600)} X\n{words}\nContent-Length: %d"
            return answering(head, b"<html>no</html>")
        case 2:
            head = f"HTTP/1.1 {random_.choice([301, 302, 303, 307, 308])} X\nContent-Length: 0"
            return answering(f"{head}\nLocation: {random_.choice(_PLACES)}")
        case 3:
            return answering("HTTP/1.1 200 OK\nContent-Encoding: gzip\nContent-Length: %d", gzip.compress(body))
        case 4:
            length = random_.choice(["-1", "9" * 30, "1e3", str(len(body) + 7), "0", "x"])
            return answering(f"HTTP/1.1 200 OK\nContent-Length: {length}", body)
        case 5:
            return answering("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"%x\r\n" % random_.randrange(10**6) + body)
        case 6:
            start = random_.randrange(1, 500)
            return answering(
                f"HTTP/1.1 206 Partial\nContent-Range: bytes {start}-{len(body)}/*\nContent-Length: %d", body
            )
        case 7:
            whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            return lambda connection: connection.sendall(damaged(random_, whole))
        case 8:
            return ok(random_.choice([b"", b"<html></html>", b"\xff\xfe", b"[" * 10_000, b"null", b'{"sha": 1}']))
        case _:
            return answering("HTTP/1.1 200 OK\nContent-Length: %d", body[:-1] + b"\n")


def spoil(random_: random.Random, hub: Hub, root: Path, outside: Path) -> bool:
    """Break something; tell whether the hub itself cannot be reached."""
    kind = random_.randrange(8)
    if kind in (0, 1, 7):
        hub.raw["list"] = ok(mutated_list(random_, listing_of(hub)))
    if kind == 2:
        hub.raw["list"] = hostile(random_, json.dumps(listing_of(hub)).encode())
    if kind in (3, 7):
        name = random_.choice(list(FILES))
        hub.raw[name] = hostile(random_, FILES[name])
    if kind in (4, 5):
        blobs = cache_of(hub, root)
        blob = random_.choice(sorted(blobs.iterdir()))
        if random_.random() < 0.3:
            pointer = random_.choice([p for p in (blobs.parent / "snapshots").rglob("*") if p.is_symlink()])
            pointer.unlink()
            # Without the hub nothing tells which of the cache's sound blobs a name stood for.
            elsewhere = [outside / "mine", Path("/dev/zero"), pointer]
            pointer.symlink_to(random_.choice([blob, *elsewhere] if kind == 4 else elsewhere))
        else:
            blob.write_bytes(damaged(random_, blob.read_bytes()))
    if kind in (6, 7):
        left = root / ".out.download"
        left.mkdir()
        (left / "t5gemma-b-b-ul2").mkdir()
        for name, content in FILES.items():
            if random_.random() < 0.5:
                (left / name).write_bytes(damaged(random_, content))
        if random_.random() < 0.5:
            shutil.rmtree(left)
            plant(left, outside, random_.choice(PLANTED))
    return kind == 5


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mode, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("seeds", [range(100), pytest.param(range(100, 2100), marks=pytest.mark.slow)])
def test_only_what_the_hub_names_is_accepted_and_nothing_is_written_elsewhere(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: range
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "root" / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(hub_client, "PATIENCE", 0.5)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_bytes(b"mine")
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        random_ = random.Random(seed)
        root = tmp_path / "root"
        root.mkdir()
        hub.raw.clear()
        unreachable = spoil(random_, hub, root, outside)
        endpoint = "http://127.0.0.1:9" if unreachable else hub.address
        before = state_of(outside)
        began = time.monotonic()
        try:
            fetch(ID, root / "out", random_.choice([None, COMMIT]), endpoint=endpoint)
            error = None
        except Sa3Error as refused:
            error = refused
        outcomes["accepted" if error is None else f"exit {error.exit_code}"] += 1
        if error is None:
            found = contents(root / "out")
            assert json.loads(found.pop("source.json"))["hub_id"] == ID
            assert found == FILES, seed
        else:
            assert not (root / "out").exists(), seed
        assert time.monotonic() - began < 10, seed
        assert {path.name for path in root.iterdir()} <= {"out", ".out.download", "cache"}, seed
        assert state_of(outside) == before, seed
        assert {path.name for path in tmp_path.iterdir()} <= {"root", "outside", "repository"}, seed
        shutil.rmtree(root)
    assert outcomes.keys() <= {"accepted", "exit 2", "exit 3"}
    assert min(outcomes["accepted"], outcomes["exit 3"]) > len(seeds) / 5, outcomes
