"""Speak with the hub: answers have a limit, waiting has an end, and whatever goes wrong is said in our own words.

The hub library knows addresses, token, proxies and offline mode. Its calls trust the server, though: they read answers
of any size into memory, sleep for as long as they are told, write a body that never ends, and follow to any address.
So requests are made here, with the library's session. Nothing that a server sends is repeated in a message.
"""

import io
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import Empty, Queue
from typing import TYPE_CHECKING, BinaryIO, Final
from urllib.parse import quote, urlsplit

from sa3_convert.errors import HubError, UsageError
from sa3_convert.hub.files import HubFile, Listing
from sa3_convert.system.untrusted import SMALL

if TYPE_CHECKING:
    from httpx2 import Response

PATIENCE: Final = 60.0
"""Seconds in which an answer has to begin, and after which it must have been faster than `SLOWEST`."""
SLOWEST: Final = 1 << 10
"""Bytes per second."""
LONGEST_WAIT: Final = 120.0
"""Seconds that the hub may ask to wait before it is asked again."""
PAUSE: Final = 1.0
"""Seconds before the second try where the hub asks for nothing; doubled for each further one."""
TRIES: Final = 5
_WORTHWHILE: Final = 1 << 20
"""Bytes that make a try a new beginning."""
_REDIRECTS: Final = 5
_BUSY: Final = (408, 425, 429, 500, 502, 503, 504)
_KEPT: Final = "What is there is kept; run the same command again to go on."

Note = Callable[[str], None]
"""Told what the user should know while it goes on."""


class UnreachableError(HubError):
    """No answer came."""


class _AgainError(Exception):
    """A try that is worth another one."""

    def __init__(self, what: HubError, wait: float | None = None) -> None:
        super().__init__(str(what))
        self.what, self.wait = what, wait


class HubClient:
    """One repository of a hub."""

    def __init__(self, hub_id: str, endpoint: str | None, note: Note) -> None:
        from huggingface_hub import constants

        self._hub_id, self._note = hub_id, note
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        try:
            address = urlsplit(self._endpoint)
            sound = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise UsageError("HF_ENDPOINT is not the address of a hub; give https://host, or unset it.")
        self._schemes = {"https", address.scheme}

    def listing(self, revision: str) -> Listing:
        """Return the files of a commit, a branch or a tag, with the hub's hashes."""
        answer = io.BytesIO()
        where = f"{quote(self._hub_id)}/revision/{quote(revision, safe='', errors='replace')}"
        self._bring(f"{self._endpoint}/api/models/{where}?blobs=true", answer, None)
        return Listing.parse(self._hub_id, answer.getvalue())

    def download(self, file: HubFile, commit: str, into: BinaryIO, grown: Callable[[int], None]) -> None:
        """Append what is missing of a file, at most as many bytes as it has; whether they are right is not checked."""
        self._bring(
            f"{self._endpoint}/{quote(self._hub_id)}/resolve/{commit}/{quote(file.name)}", into, file.size, grown
        )

    def _bring(self, url: str, into: BinaryIO, size: int | None, grown: Callable[[int], None] = lambda _: None) -> None:
        """Write an answer of a known size, going on where it broke off, or a small one of unknown size."""
        tries = 0
        while size is None or into.tell() < size:
            before = into.tell()
            try:
                self._once(url, into, size, grown)
            except _AgainError as again:
                tries = 1 if into.tell() - before >= _WORTHWHILE else tries + 1
                if tries >= TRIES:
                    raise again.what from None
                self._wait(again, tries)
            else:
                return

    def _wait(self, again: _AgainError, tries: int) -> None:
        if again.wait is None:
            pause = PAUSE * 2 ** (tries - 1)
            self._note(f"The hub gave no whole answer; asking again in {pause:.0f} s …")
            time.sleep(pause)
            return
        if again.wait > LONGEST_WAIT:
            long = f"{again.wait:.0f} s" if again.wait < 1e6 else "very long"
            raise HubError(f"The hub asks to wait {long} before {self._hub_id} is asked for again. {_KEPT}")
        self._note(f"The hub asks to wait {again.wait:.0f} s …")
        time.sleep(again.wait)

    def _once(self, url: str, into: BinaryIO, size: int | None, grown: Callable[[int], None]) -> None:
        start = into.tell() if size is not None else 0
        pieces = self._answer(url, start)
        answer = next(pieces)
        assert not isinstance(answer, bytes)
        self._require_sound(answer, start, size)
        if answer.status_code == 200:
            start = 0
        into.seek(start)
        into.truncate()
        limit = SMALL if size is None else size
        for piece in pieces:
            assert isinstance(piece, bytes)
            if into.tell() + len(piece) > limit:
                raise HubError(f"The hub sends more than the {limit} bytes that there should be. Try again later.")
            into.write(piece)
            grown(into.tell())
        if size is not None and into.tell() < size:
            raise _AgainError(UnreachableError(f"Downloading {self._hub_id} failed: the hub broke off. {_KEPT}"))

    def _answer(self, url: str, start: int) -> "Iterator[Response | bytes]":
        """Yield the head of an answer, then its bytes; what the network does becomes our own errors."""
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        try:
            yield from _watched(lambda: self._request(url, start))
        except OfflineModeIsEnabled:
            raise UnreachableError(
                f"{self._hub_id} is not wholly in the local cache and HF_HUB_OFFLINE is set. Unset it to download."
            ) from None
        except (HTTPError, OSError, ValueError) as error:
            name = type(error).__name__
            if isinstance(error, ValueError) or name == "LocalProtocolError":
                # Their words quote what was to be sent, the token among it.
                raise HubError(
                    f"No request for {self._hub_id} can be made ({name}). Are HF_TOKEN (or what `hf auth login` kept) "
                    "and the addresses of proxies whole?"
                ) from None
            reason = (str(error).strip().splitlines() or [name])[0].rstrip(".")
            what = f"Downloading {self._hub_id} failed: {reason}. Check the network. {_KEPT}"
            raise _AgainError(UnreachableError(what)) from None

    def _request(self, url: str, start: int) -> "Iterator[Response | bytes]":
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers

        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        session = get_session()
        request = session.build_request("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        for _ in range(_REDIRECTS + 1):
            response = session.send(request, stream=True, follow_redirects=False)
            try:
                if not response.has_redirect_location:
                    yield response
                    yield from response.iter_raw()
                    return
            finally:
                response.close()
            following = response.next_request
            if following is None or following.url.scheme not in self._schemes:
                raise HubError(f"The hub leads from {self._hub_id} to an address that is not https. Not followed.")
            request = following
        raise HubError(f"The hub leads from one address of {self._hub_id} to the next without an end.")

    def _require_sound(self, answer: "Response", start: int, size: int | None) -> None:
        """Refuse an answer that is not the content that was asked for."""
        status, headers = answer.status_code, answer.headers
        if status not in (200, 206):
            raise self._refusal(status, headers)
        if status == 206:
            fits = headers.get("Content-Range", "").startswith(f"bytes {start}-")
        else:
            # What is there of a file is not given up for whatever a network in between may have sent.
            length = headers.get("Content-Length")
            fits = size is None or length == str(size) or (length is None and not start)
        if not fits or headers.get("Content-Encoding", "identity") != "identity":
            what = f"The hub answers something else than what was asked for of {self._hub_id}. {_KEPT}"
            raise _AgainError(HubError(what))

    def _refusal(self, status: int, headers: Mapping[str, str]) -> Exception:
        hub_id, code = self._hub_id, headers.get("X-Error-Code")
        if code == "GatedRepo":
            return HubError(
                f"{hub_id} is gated. Accept its licence at https://huggingface.co/{hub_id}, then log in with "
                "`hf auth login` (or set HF_TOKEN) and run the same command again."
            )
        if code == "RevisionNotFound":
            return HubError(f"{hub_id} has no such revision. Leave it out, or give a commit, branch or tag of it.")
        if code == "EntryNotFound":
            return HubError(f"{hub_id} lacks a file that the hub's list names. Give another revision.")
        if status in (401, 404):
            return HubError(
                f"The hub has no {hub_id}, or it is private and you are not logged in. "
                "Check the id, or log in with `hf auth login`."
            )
        refused = HubError(f"The hub refused {hub_id} (status {status}). {_KEPT}")
        return _AgainError(refused, _seconds_to_wait(headers)) if status in _BUSY else refused


def _seconds_to_wait(headers: Mapping[str, str]) -> float | None:
    """Return what `Retry-After` (seconds or a date) or the hub's own `RateLimit` asks for; None when nothing does."""
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
        return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError, IndexError):
        match = re.search(r"\br=0;t=(\d{1,9})\b", headers.get("RateLimit", ""))
        return float(match[1]) if match else None


def _watched(source: "Callable[[], Iterator[Response | bytes]]") -> "Iterator[Response | bytes]":
    """Yield what another thread takes from `source`, and give up when too little comes for too long.

    Timeouts of a socket begin anew with every byte, also within a head that never ends; looking up a name has none.
    """
    queue: Queue[Response | bytes | BaseException | None] = Queue(4)
    abandoned = threading.Event()

    def pump() -> None:
        items = source()
        try:
            for item in items:
                queue.put(item)
                if abandoned.is_set():
                    items.close()  # type: ignore[attr-defined]  # a generator's
                    return
            queue.put(None)
        except BaseException as error:  # it is raised where the items are wanted
            queue.put(error)

    threading.Thread(target=pump, daemon=True).start()
    deadline, received = time.monotonic() + PATIENCE, 0.0
    try:
        while True:
            try:
                item = queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                if received < PATIENCE * SLOWEST:
                    raise TimeoutError(f"Less than {SLOWEST} bytes per second came for {PATIENCE:.0f} s") from None
                deadline, received = time.monotonic() + PATIENCE, 0.0
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            received += len(item) if isinstance(item, bytes) else PATIENCE * SLOWEST
            yield item
    finally:
        abandoned.set()
        while not queue.empty():
            queue.get()
