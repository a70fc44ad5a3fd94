"""Who may talk to the viewer: only pages that the viewer itself has served, and only in viser's language.

Without this any web page that a user visits could connect to the viewer: browsers let pages open websockets
to other hosts, and a name of an attacker's can be made to mean this machine (DNS rebinding).
"""

import contextlib
import http
import ipaddress
import logging
import socket
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import websockets.asyncio.server
from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from blacksmith.errors import first_line


def refusal(host: str, hosts: list[str], origins: list[str]) -> str | None:
    """Why a request is refused, or None.

    Args:
      host: the address or name that the viewer listens on.
      hosts: the request's `Host` headers. Its name must be an address, which cannot be rebound, or a name of
        this machine; the port may be that of a tunnel.
      origins: its `Origin` headers. A browser sends one with every websocket; it must be the same place.
    """
    try:
        (at,) = hosts
        name = urlsplit(f"//{at}").hostname or ""
    except ValueError:
        return "it must have one Host header"
    own = {host.lower(), "localhost", socket.gethostname().lower(), socket.getfqdn().lower()}
    if name not in own and not _is_address(name):
        return f"{name[:100]!r} is not a name of this machine; set nerf.View.host to it if it is"
    if len(origins) > 1 or any(urlsplit(origin).netloc.lower() != at.lower() for origin in origins):
        return "it comes from a page of another origin"
    return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def checked_requests(host: str) -> Iterator[None]:
    """Servers that viser starts meanwhile refuse requests as `refusal` says, with status 403."""
    serve = websockets.asyncio.server.serve

    def checking(*arguments: Any, process_request: Any, **options: Any) -> Any:
        def check(connection: ServerConnection, request: Request) -> Response | None:
            headers = request.headers
            reason = refusal(host, headers.get_all("Host"), headers.get_all("Origin"))
            if reason is not None:
                return connection.respond(http.HTTPStatus.FORBIDDEN, f"refused: {reason}\n")
            return process_request(connection, request)

        return serve(*arguments, process_request=check, **options)

    # viser has no argument for this.
    websockets.asyncio.server.serve = checking
    try:
        yield
    finally:
        websockets.asyncio.server.serve = serve


class _OneLine(logging.Filter):
    """Turns the traceback of a message that viser cannot read into a line, once per kind."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info or record.exc_info[1] is None:
            return True
        if record.getMessage() == "opening handshake failed":  # by someone who does not speak HTTP
            return False
        error = record.exc_info[1]
        kind = type(error).__name__
        if kind not in self._told:
            self._told.add(kind)
            what = f"{kind}: {first_line(error)}"[:120].encode("unicode_escape").decode()
            print(f"viewer: ignored a message that is not from its page ({what})", file=sys.stderr)
        return False


@contextlib.contextmanager
def quiet_about_junk() -> Iterator[None]:
    """Messages that are not viser's are mentioned in one line each kind, instead of a traceback each."""
    loggers, filter_ = [logging.getLogger(name) for name in ("websockets.server", "asyncio")], _OneLine()
    for logger in loggers:
        logger.addFilter(filter_)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(filter_)
