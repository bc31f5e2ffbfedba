"""A Python that starts with this on its path is, for the modules of this package alone, one of Windows' kind.

What only POSIX has cannot be imported or named; there is no `/proc`; folders cannot be opened; and what is open or
mapped in this process cannot be renamed, replaced or removed. Libraries keep the system that they were built for.
"""

import builtins
import errno
import os
import select
import signal
import sys
import sysconfig
import types
import warnings
from typing import Any

MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
NAMES: dict[types.ModuleType, set[str]] = {
    os: {
        *("O_CLOEXEC", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "O_PATH", "O_TMPFILE"),
        *("WEXITSTATUS", "WIFEXITED", "WIFSIGNALED", "WNOHANG", "WTERMSIG", "chown", "copy_file_range", "fchmod"),
        *("fork", "forkpty", "geteuid", "getloadavg", "getpgid", "getuid", "killpg", "mkfifo", "nice", "openpty"),
        *("posix_fadvise", "pread", "pwrite", "sched_getaffinity", "sendfile", "set_blocking", "setsid", "statvfs"),
        *("sysconf", "uname", "wait"),
    },
    signal: {
        *("SIGALRM", "SIGBUS", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGSYS", "SIGTRAP", "SIGUSR1", "SIGXFSZ"),
        *("SIG_BLOCK", "SIG_SETMASK", "alarm", "pthread_kill", "pthread_sigmask", "setitimer"),
    },
    select: {"epoll", "poll"},
}
STANDARD = sysconfig.get_path("stdlib")
OURS = "sa3_convert"


def _is_ours(names: dict[str, Any] | None) -> bool:
    return (names or {}).get("__package__", None) is not None and str(names["__package__"]).split(".")[0] == OURS  # type: ignore[index]


def _asked_by_us() -> bool:
    """Whether the last caller that is no part of Python itself is ours."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(("<", STANDARD)) or "site-packages" in file:
            return _is_ours(frame.f_globals)
        frame = frame.f_back
    return False


def _poor(module: types.ModuleType, absent: set[str]) -> None:
    class Poor(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            if name in absent and _is_ours(sys._getframe(1).f_globals):
                raise AttributeError(f"{module.__name__} has no {name} here")
            return super().__getattribute__(name)

    module.__class__ = Poor


def _in_use() -> set[str]:
    used = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            used.add(os.readlink(f"/proc/self/fd/{number}").removesuffix(" (deleted)"))
        except OSError:
            continue
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        used |= {line.split(maxsplit=5)[5].rstrip("\n").removesuffix(" (deleted)") for line in maps if "/" in line}
    return used


_watching = True


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    global _watching
    if event not in ("open", "os.rename", "os.remove", "os.rmdir") or not _watching or not _asked_by_us():
        return
    _watching = False
    try:
        if event == "open":
            path = arguments[0]
            if isinstance(path, str) and path.startswith(("/proc", "/sys")):
                raise FileNotFoundError(errno.ENOENT, "There is no such thing here", path)
            if _is_ours(sys._getframe(1).f_globals) and os.path.isdir(path):
                raise PermissionError(errno.EACCES, "A folder cannot be opened here", path)
            return
        used = _in_use()
        folder = arguments[-1] if event != "os.rename" and arguments[-1] != -1 else None
        for path in arguments[: 2 if event == "os.rename" else 1]:
            within = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else "."
            real = os.path.realpath(os.path.join(within, os.fsdecode(path)))
            for name in used:
                # Removing a tree holds its folders open; on Windows it is done by name.
                if (name == real or name.startswith(f"{real}/")) and not os.path.isdir(name):
                    raise PermissionError(errno.EACCES, f"It is in use here ({event})", name)
    finally:
        _watching = True


def _install() -> None:
    imported, stat = builtins.__import__, os.stat

    def import_here(name: str, globals: Any = None, *more: Any, **options: Any) -> Any:  # noqa: A002
        if name.split(".")[0] in MODULES and _is_ours(globals):
            raise ImportError(f"there is no {name} here", name=name)
        return imported(name, globals, *more, **options)

    def stat_here(path: Any, *more: Any, **options: Any) -> os.stat_result:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("/proc") and _asked_by_us():  # type: ignore[arg-type]
            raise FileNotFoundError(errno.ENOENT, "There is no such thing here", str(path))
        return stat(path, *more, **options)

    builtins.__import__ = import_here
    os.stat = stat_here
    sys.addaudithook(_watch)
    for module, absent in NAMES.items():
        _poor(module, absent)
    warnings.filterwarnings("error", category=EncodingWarning, module=OURS)


_install()
