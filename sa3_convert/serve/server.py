"""The server: everything that is served, behind the guard, until it is asked to end."""

import contextlib
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import uvicorn

from sa3_convert.errors import UsageError
from sa3_convert.serve.http import Guard, interface
from sa3_convert.serve.jobs import Jobs
from sa3_convert.serve.worker import Served
from sa3_convert.system.files import alone_in
from sa3_convert.system.machine import available_memory

_PATIENCE = 3
"""Seconds that connections get to end by themselves."""


class _Server(uvicorn.Server):
    """Lets go of its jobs before it waits for those who listen to them."""

    def __init__(self, config: uvicorn.Config, jobs: Jobs, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._jobs, self._say = jobs, say

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Cancel what is under way, then end."""
        cancelled = await self._jobs.close()
        self._say(f"The server ends; {cancelled} generations were cancelled." if cancelled else "The server ends.")
        await super().shutdown(sockets)


def serve(
    served: Mapping[str, Served],
    folder: Path,
    *,
    host: str,
    port: int,
    token: str | None,
    queue: int,
    keep_mib: int | None,
    say: Callable[[str], None],
) -> None:
    """Serve bundles until a signal ends it; `say` is told where.

    Raises:
        BundleError: one of them cannot be used.
        UsageError: nothing can listen there.

    """
    keep = keep_mib << 20 if keep_mib else (available_memory() or 1 << 34) * 3 // 4
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone_in(folder))
        except BlockingIOError:
            raise UsageError(f"Another server writes into {folder}. End it, or name another folder with -o.") from None
        jobs = Jobs(served, folder, queue=queue, keep_bytes=keep)
        listening = stack.enter_context(_listening(host, port))
        shown = f"[{host}]" if ":" in host else host
        say(f"Open http://{shown}:{listening.getsockname()[1]}/ ({', '.join(served)}). Ctrl-C ends it.")
        server(jobs, host, token, say).run([listening])


def server(jobs: Jobs, host: str, token: str | None, say: Callable[[str], None]) -> uvicorn.Server:
    """Return the server over jobs, to be run with a socket that listens."""
    config = uvicorn.Config(
        Guard(interface(jobs), host=host, token=token),
        log_level="critical",
        access_log=False,  # addresses may hold what was typed
        timeout_graceful_shutdown=_PATIENCE,
        server_header=False,
    )
    return _Server(config, jobs, say)


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(f"Nothing can listen on {host} port {port}: {error.strerror or error}.") from None
