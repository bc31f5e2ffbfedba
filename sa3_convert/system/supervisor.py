"""A command runs in a child process; its parent waits, passes signals on, and explains a child that died of one.

Native libraries trust what they read: a damaged model, tokenizer or audio file can end the process or never come back.
So the child says in a page of memory that both share what it has in hand (`working_on`) and where it writes
(`writing_into`). The parent holds it to a time limit, names the file that ended it, and removes what it left.

Where the system cannot fork (Windows) the command runs in the one process that there is, and nobody explains its death.

A signal that asks the command to stop (Ctrl-C, TERM, HUP) is raised in the child as `KeyboardInterrupt`, once, so that
everything cleans up behind itself and nothing interrupts the cleaning; a second one ends the child at once.
"""

import _thread
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from sa3_convert.system.shared_page import Page

STOPPING: Final = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)
"""Signals that ask a command to end; one that is ignored from the start, as by `nohup`, stays so."""

_FAULTS = tuple(
    getattr(signal, name)
    for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS", "SIGKILL")
    if hasattr(signal, name)
)
_CLEAN = "nothing half-written was left behind."
_INTERRUPTED = {
    128 + number: f"{word}; {_CLEAN}"
    for number, word in zip(STOPPING, ("Interrupted", *["Terminated"] * 3), strict=False)
}
_ONE_EVENT_SECONDS = 0.5
"""Signals this close together are one: a terminal sends Ctrl-C to parent and child, `timeout` to each twice."""
_LONGEST_WAIT = 3600.0
_SOON_SECONDS = 0.05
"""Until it is tried again to raise what could not be raised."""
_PR_SET_PDEATHSIG = 1
KILLED: Final = 9
"""SIGKILL, which Windows has no name for."""
_INPUT, _OUT_OF_MEMORY, _NATIVE = 3, 4, 4
_GET_ANOTHER = "Get the file again, or convert again, and check where it comes from."

_Mask = set[int] | set[signal.Signals]

_received = 0
"""The signal that was raised in this process, or 0."""
_over = False
"""The command has returned: there is nothing left to interrupt."""
_page: Page | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    complaint: str | None = None
    """What is to be said about it, if it could not say it itself."""


def supervise(command: Callable[[], int], *, debug: bool = False) -> Ended:
    """Run a command in a child process and wait for its end; in the child this never returns.

    Must be called before anything starts a thread. Where processes cannot be forked the command runs in this one.

    Args:
        command: returns the exit code.
        debug: let the child dump core and show where Python was when it died.

    """
    _flush()
    if not hasattr(os, "fork"):
        return _here(command)
    page, parent = Page(), os.getpid()
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        child = os.fork()
    except OSError:  # no more processes or memory: still no reason not to try
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return _here(command)
    if not child:
        os.close(reader)
        page.wakes = writer
        global _page
        _page = page
        die_with_parent()
        if os.getppid() != parent:  # it was killed before that
            os._exit(128 + KILLED)
        _set_crash_reports(debug)
        leave(_to_the_end(command, before))
    return _Watch(child, page, reader, writer, before).to_the_end()


def interrupted_early() -> Ended:
    """Return how a command ends whose interrupt came before signals were taken notice of, when nothing had begun."""
    code = 128 + signal.SIGINT
    return Ended(code, _INTERRUPTED[code])


def received() -> int:
    """Return the number of the signal that is ending this command, or 0."""
    return _received


def leave(code: int) -> NoReturn:
    """End this process with a command's exit code."""
    if code in _INTERRUPTED:
        # An interrupt that strikes inside Python code which a C extension runs marks the interpreter for good: at its
        # end it would die of the signal instead of leaving with this code. Everything is cleaned up by now.
        _flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def working_on(path: Path | str, *, seconds: float | None = None, room: int | None = None) -> Iterator[None]:
    """Say that a native library has a file from outside in hand while the block runs.

    If the process dies in it, or soon after, its parent names the file; if it takes too long, the parent ends it.
    Without a parent, as under the Python API, this does nothing. Blocks may nest and overlap in threads.

    Args:
        path: what is read or run.
        seconds: longest time that the block may take.
        room: bytes that the process may take beyond what it has; beyond it an allocation fails (on Linux). Not for
            blocks that overlap.

    """
    page = _page
    if page is None:
        yield
        return
    token = page.take(str(path), seconds)
    try:
        with contextlib.nullcontext() if room is None else _within(room):
            yield
    finally:
        page.put_back(token)


def die_with_parent() -> None:
    """Have Linux end this process when the one that started it is killed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, KILLED)


def writing_into(folder: Path) -> None:
    """Say that half-written files of this process may lie in a folder; its parent removes them if this one cannot."""
    if _page is not None:
        _page.add_folder(str(folder))


class _Watch:
    """The parent's side."""

    def __init__(self, child: int, page: Page, reader: int, writer: int, mask: _Mask) -> None:
        self._child = child
        self._page = page
        self._reader = reader
        self._stopped_by = 0
        self._stopped_at = 0.0
        for number in _heeded():
            signal.signal(number, _only_wakes)
        signal.signal(signal.SIGCHLD, _only_wakes)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def to_the_end(self) -> Ended:
        """Wait until the child has ended, and say how."""
        import select

        poller = select.poll()
        poller.register(self._reader, select.POLLIN)
        # The child may have ended before this process listened for it, so it is looked at before each wait.
        while not (found := os.waitpid(self._child, os.WNOHANG))[0]:
            deadline = self._page.read().deadline
            # What spoils the child's memory may spoil the page.
            limited = 0 < deadline < math.inf and not self._stopped_by
            left = min(deadline - time.monotonic(), _LONGEST_WAIT) if limited else None
            if left is not None and left <= 0:
                names = " or ".join(self._page.read().names)
                return self._killed(_INPUT, f"{names} took far longer than any such file does. {_GET_ANOTHER}")
            poller.poll(None if left is None else left * 1000 + 1)
            if self._asked_again():
                return self._killed(128 + self._stopped_by, f"Ended at once; {_CLEAN}")
        return self._explained(found[1])

    def _killed(self, code: int, complaint: str) -> Ended:
        os.kill(self._child, KILLED)
        _, status = os.waitpid(self._child, 0)
        if os.WIFEXITED(status):  # in the meantime, by itself
            return self._explained(status)
        self._sweep()
        return Ended(code, complaint)

    def _asked_again(self) -> bool:
        """Pass on what was asked of this process; tell whether the child was asked to stop before."""
        try:
            numbers = os.read(self._reader, 1 << 12)
        except BlockingIOError:
            return False
        for number in numbers:
            if number not in STOPPING:
                continue
            now = time.monotonic()
            if not self._stopped_by:
                self._stopped_by, self._stopped_at = number, now
                os.kill(self._child, number)
            elif now - self._stopped_at > _ONE_EVENT_SECONDS:
                return True
        return False

    def _explained(self, status: int) -> Ended:
        if os.WIFEXITED(status):
            code = os.WEXITSTATUS(status)
            if complaint := _INTERRUPTED.get(code):
                self._sweep()  # an interrupt may strike where something is just being removed
            return Ended(code, complaint)
        self._sweep()
        number = os.WTERMSIG(status)
        if number not in _FAULTS:
            # Sent by someone, and left to the system: this process ends in the same way.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return Ended(128 + number)
        page = self._page.read()
        name, files = signal.Signals(number).name, " or ".join(page.names)
        if self._stopped_by:  # a library that cannot be interrupted
            return Ended(128 + self._stopped_by, _INTERRUPTED[128 + self._stopped_by])
        if number == KILLED:
            what = f" while it worked with {files}" if page.in_hand else ""
            return Ended(
                _OUT_OF_MEMORY,
                f"The command was killed{what}; {_CLEAN} Most likely memory ran out: convert fewer components at a "
                "time (--component), ask for less at once, or use a larger machine.",
            )
        if not files:
            return Ended(
                _NATIVE,
                f"A native library ended the command with {name}; {_CLEAN} Please report it with the output of the "
                "same command with --debug in front: sa3-convert --debug …",
            )
        when = "in use" if page.in_hand else "the last file that was in use"
        return Ended(
            _INPUT,
            f"{files} was {when} when {name} ended the command: it is damaged or was made to do this; {_CLEAN} "
            f"{_GET_ANOTHER}",
        )

    def _sweep(self) -> None:
        if folders := self._page.read().folders:
            from sa3_convert.system.files import sweep

            for folder in folders:
                with contextlib.suppress(OSError):
                    sweep(folder)


def _heeded() -> list[signal.Signals]:
    return [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]


def _only_wakes(number: int, frame: FrameType | None) -> None:
    """Do nothing: the number of the signal comes through the pipe."""


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise what Ctrl-C raises; under a parent once, because that ends this process if it is asked again."""
    global _received
    if _over or (_received and _page is not None):
        return
    if _imports(frame):
        # Native modules that are being imported take an exception in what they import for a fault, and abort.
        _stop_soon(number)
        return
    _received = number
    raise KeyboardInterrupt


def _stop_soon(number: int) -> None:
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda _, frame: _stop(number, frame))
        signal.setitimer(signal.ITIMER_REAL, _SOON_SECONDS)
    else:
        threading.Timer(_SOON_SECONDS, _thread.interrupt_main, (number,)).start()


def _not_lost(unraisable: "sys.UnraisableHookArgs") -> None:
    """Raise again what struck in a finaliser or a callback, from where nothing gets out."""
    global _received
    if unraisable.exc_type is KeyboardInterrupt and _received:
        number, _received = _received, 0
        _stop_soon(number)
    else:
        sys.__unraisablehook__(unraisable)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _within(room: int) -> Iterator[None]:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        taken = int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
    except OSError:
        yield
        return
    allowed = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([taken + room, *allowed]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _to_the_end(command: Callable[[], int], mask: _Mask | None = None) -> int:
    """Run the command with signals that ask it to stop raised in it; nothing is raised any more when this returns."""
    global _over
    code = 0
    try:
        for number in _heeded():
            signal.signal(number, _stop)
        sys.unraisablehook = _not_lost
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            code = command()
        finally:
            _over = True
    except KeyboardInterrupt:
        code = 128 + _received
    return code


def _here(command: Callable[[], int]) -> Ended:
    code = _to_the_end(command)
    return Ended(code, _INTERRUPTED.get(code))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or not there at all
            stream.flush()


def _set_crash_reports(debug: bool) -> None:
    """Keep a crash to one paragraph, which is the parent's: no core dump of the size of the models, no C stack."""
    import faulthandler
    import resource

    if debug:
        faulthandler.enable()
    else:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
