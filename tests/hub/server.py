"""A stand-in for the hub: the addresses that downloading and publishing use, and the faults that networks have."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_RESOLVE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_LARGE = (".safetensors", ".mnn", ".weight", ".wav")
_STAGES = {
    "create": re.compile(r"/api/repos/create"),
    "validate": re.compile(r"/api/validate-yaml"),
    "preupload": re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/preupload/[^/]+"),
    "batch": re.compile(r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "upload": re.compile(r"/upload/(?P<oid>[0-9a-f]{64})"),
    "commit": re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/commit/[^/]+"),
}
"""What is asked for while publishing, in its order."""
_MODEL = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")


@dataclass
class Hub:
    """What the server has and how it misbehaves."""

    files: dict[str, bytes]
    hub_id: str
    address: str = ""
    gated: bool = False
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    break_at: dict[str, int] = field(default_factory=dict)
    """File → bytes after which its transfer breaks."""
    recovers: bool = False
    """Whether the server works on after a break."""
    corrupt: set[str] = field(default_factory=set)
    raw: dict[str, Callable[[socket.socket], None]] = field(default_factory=dict)
    """File, or "list" → what answers for it on the bare connection, which is closed then."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path, Range."""
    tokens: list[str | None] = field(default_factory=list)
    broken: bool = False
    exists: bool = True
    private: bool = False
    token: str | None = None
    """What those who write have to show; None lets nobody write."""
    fail: dict[str, list[int]] = field(default_factory=dict)
    """Stage of publishing → statuses of its next answers; 0 cuts the connection."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files that were uploaded, by SHA-256."""
    commits: list[list[str]] = field(default_factory=list)
    """Names in each commit that was made."""
    spoil: Callable[[dict[str, bytes]], object] = lambda files: None
    """What becomes of the files of a commit."""

    def transfers(self, name: str) -> list[str | None]:
        """Return the Range of each transfer of a file."""
        gets = [(_RESOLVE.fullmatch(path), where) for method, path, where in self.requests if method == "GET"]
        return [where for match, where in gets if match is not None and match["file"] == name]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._write()

        def do_PUT(self) -> None:
            self._write()

        def _write(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(self.path.split("?")[0])
            hub.requests.append((self.command, path, None))
            stage, match = next((s, found) for s, form in _STAGES.items() if (found := form.fullmatch(path)))
            failure = hub.fail.get(stage) or [200]
            if stage != "upload" and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._refuse(401)
            elif (status := failure.pop(0)) == 0:
                self.close_connection = True
            elif status != 200:
                self._refuse(status)
            elif stage == "create" and hub.exists:
                self._told({"url": f"{hub.address}/{hub.hub_id}"}, 409)
            elif "id" in match.groupdict() and (match["id"] != hub.hub_id or not hub.exists):
                self._refuse(404, "RepoNotFound")
            elif stage == "upload":
                hub.stored[match["oid"]] = body
                self._refuse(200)
            else:
                self._told(getattr(self, f"_{stage}")(body))

        def _told(self, data: Any, status: int = 200) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _create(self, body: bytes) -> Any:
            asked = json.loads(body)
            assert f"{asked['organization']}/{asked['name']}" == hub.hub_id
            hub.exists, hub.private, hub.files = True, asked.get("visibility") == "private", {}
            return {"url": f"{hub.address}/{hub.hub_id}"}

        def _validate(self, body: bytes) -> Any:
            return {}

        def _preupload(self, body: bytes) -> Any:
            def mode(file: Any) -> Any:
                name = file["path"]
                oid = digest_of(name, hub.files[name]) if name in hub.files else None
                is_large = name.endswith(_LARGE)
                return {"path": name, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}

            return {"files": [mode(file) for file in json.loads(body)["files"]]}

        def _batch(self, body: bytes) -> Any:
            objects = [{"oid": one["oid"], "size": one["size"]} for one in json.loads(body)["objects"]]
            for one in objects:
                if one["oid"] not in hub.stored:
                    one["actions"] = {"upload": {"href": f"{hub.address}/upload/{one['oid']}"}}
            return {"transfer": "basic", "objects": objects}

        def _commit(self, body: bytes) -> Any:
            lines = [json.loads(line) for line in body.splitlines()]
            made = {}
            for line in lines[1:]:
                value = line["value"]
                is_large = line["key"] == "lfsFile"
                made[value["path"]] = hub.stored[value["oid"]] if is_large else base64.b64decode(value["content"])
            hub.commits.append(sorted(made))
            hub.files = hub.files | made
            hub.spoil(hub.files)
            oid = hashlib.sha1(body).hexdigest()
            is_request = "create_pr=1" in self.path
            hub.revisions["refs/pr/3" if is_request else "main"] = oid
            url = f"{hub.address}/{hub.hub_id}/discussions/3" if is_request else None
            return {"commitUrl": f"{hub.address}/{hub.hub_id}/commit/{oid}", "commitOid": oid, "pullRequestUrl": url}

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            path = unquote(self.path.split("?")[0])
            hub.requests.append((self.command, path, self.headers.get("Range")))
            hub.tokens.append(self.headers.get("Authorization"))
            match = _RESOLVE.fullmatch(path)
            if raw := hub.raw.get(match["file"] if match else "list"):
                self.close_connection = True
                with contextlib.suppress(OSError):
                    raw(self.connection)
            elif match := _MODEL.fullmatch(path):
                self._model(match["id"], match["revision"] or "main")
            elif match := _RESOLVE.fullmatch(path):
                self._file(match["id"], match["revision"], match["file"])
            else:
                self._refuse(404)

        def _refuse(self, status: int, code: str | None = None) -> None:
            self.send_response(status)
            if code is not None:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _model(self, hub_id: str, revision: str) -> None:
            if hub_id != hub.hub_id or not hub.exists:
                return self._refuse(404, "RepoNotFound")
            commit = revision if revision in hub.revisions.values() else hub.revisions.get(revision)
            if commit is None:
                return self._refuse(404, "RevisionNotFound")
            return self._told(listing_of(hub) | {"sha": commit})

        def _file(self, hub_id: str, revision: str, name: str) -> None:
            if hub_id != hub.hub_id:
                return self._refuse(404, "RepoNotFound")
            if hub.gated:
                return self._refuse(403, "GatedRepo")
            if revision not in hub.revisions.values():
                return self._refuse(404, "RevisionNotFound")
            if name not in hub.files:
                return self._refuse(404, "EntryNotFound")
            if hub.broken:
                return self._refuse(500)
            content = hub.files[name]
            start = self._start(len(content))
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", revision)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "GET":
                self._send(name, content, start)
            return None

        def _start(self, size: int) -> int:
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            return min(int(match[1]), size) if match else 0

        def _send(self, name: str, content: bytes, start: int) -> None:
            if name in hub.corrupt:
                content = bytes([content[0] ^ 1]) + content[1:]
            limit = hub.break_at.pop(name, None)
            if limit is None:
                self.wfile.write(content[start:])
                return
            self.wfile.write(content[start:limit])
            self.wfile.flush()
            hub.broken = not hub.recovers
            self.close_connection = True

    return Handler


def digest_of(name: str, content: bytes) -> str:
    """Return what the hub names a file by: the SHA-256 of large ones, git's blob hash of the others."""
    if name.endswith(_LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def listing_of(hub: Hub) -> dict[str, Any]:
    """Return what the hub says about its main branch."""
    entries = [_entry(name, content) for name, content in hub.files.items()]
    return {"id": hub.hub_id, "sha": hub.revisions["main"], "private": hub.private, "siblings": entries}


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """Return how the hub lists a file: `blobId` of a large one is that of its pointer."""
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": digest_of(name, content)}
    if len(entry["blobId"]) == 64:
        entry |= {"blobId": "b" * 40, "lfs": {"sha256": entry["blobId"], "size": len(content), "pointerSize": 134}}
    return entry


@contextmanager
def serve(folder: Path, hub_id: str, **settings: Any) -> Iterator[Hub]:
    """Serve the files of a folder as one repository."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub = Hub(files, hub_id, **settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
