"""A page of memory in which a supervised command says what it has in hand; see `supervisor`."""

import contextlib
import mmap
import os
import struct
import threading
import time
from pathlib import Path
from typing import NamedTuple


class PageRead(NamedTuple):
    """What the parent finds in the page."""

    deadline: float
    in_hand: bool
    names: list[str]
    folders: list[Path]


class Page:
    """Memory that parent and child share: what the child has in hand, until when, and where it writes."""

    # deadline (monotonic seconds, 0 = none), whether something is in hand now, bytes of the names and of the folders
    _HEAD = struct.Struct("d?II")
    _NAMES, _FOLDERS, _SIZE = 64, 16 << 10, 128 << 10

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self._SIZE)
        self._lock = threading.Lock()
        self._in_hand: dict[object, tuple[str, float]] = {}
        self._names = b""
        self._folders = b""
        self.wakes = -1
        """The child's end of the pipe on which the parent waits."""

    def take(self, name: str, seconds: float | None) -> object:
        """Note what is in hand from now on, and until when at most; return what `put_back` takes."""
        token = object()
        with self._lock:
            self._in_hand[token] = (name, 0.0 if seconds is None else time.monotonic() + seconds)
            self._write()
        if seconds is not None:
            with contextlib.suppress(OSError):
                os.write(self.wakes, b"\0")
        return token

    def put_back(self, token: object) -> None:
        """Note that it is no longer in hand."""
        with self._lock:
            self._in_hand.pop(token, None)
            self._write()

    def add_folder(self, folder: str) -> None:
        """Note a folder where something half-written may lie."""
        with self._lock:
            entry = os.fsencode(folder) + b"\0"
            known = entry in self._folders.split(b"\0")
            if not known and len(self._folders) + len(entry) <= self._SIZE - self._FOLDERS:
                start = self._FOLDERS + len(self._folders)
                self._memory[start : start + len(entry)] = entry
                self._folders += entry
                self._write()

    def _write(self) -> None:
        if self._in_hand:
            names = b"\0".join(dict.fromkeys(os.fsencode(name) for name, _ in self._in_hand.values()))
            names = names[: self._FOLDERS - self._NAMES]
            if names != self._names:
                self._memory[self._NAMES : self._NAMES + len(names)] = names
                self._names = names
        # Names stay when nothing is in hand: a library that was led to spoil its memory dies later.
        deadline = min((limit for _, limit in self._in_hand.values() if limit), default=0.0)
        head = self._HEAD.pack(deadline, bool(self._in_hand), len(self._names), len(self._folders))
        self._memory[: len(head)] = head

    def read(self) -> PageRead:
        """Return what stands in the page: in the parent, what the child wrote last."""
        before, after = b"", self._memory[:]
        # What is copied while the child writes may be of two states, and half a deadline is a time long past. The child
        # writes for an instant: what two copies agree in stood there.
        while before != after:
            before, after = after, self._memory[:]
        deadline, in_hand, names, folders = self._HEAD.unpack(after[: self._HEAD.size])
        texts = [
            [os.fsdecode(part) for part in after[start : start + size].split(b"\0") if part]
            for start, size in ((self._NAMES, names), (self._FOLDERS, folders))
        ]
        return PageRead(deadline, in_hand, texts[0], [Path(text) for text in texts[1]])
