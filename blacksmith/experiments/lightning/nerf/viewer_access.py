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
def guarded(host: str) -> Iterator[None]:
    """A viewer that is started meanwhile refuses requests as `refusal` says, with status 403.

    Messages that are not viser's are mentioned in one line for each kind, instead of a traceback each.
    """
    serve, told = websockets.asyncio.server.serve, set()
    loggers = [logging.getLogger(name) for name in ("websockets.server", "asyncio")]

    def checking(*arguments: Any, process_request: Any, **options: Any) -> Any:
        def check(connection: ServerConnection, request: Request) -> Response | None:
            headers = request.headers
            reason = refusal(host, headers.get_all("Host"), headers.get_all("Origin"))
            if reason is not None:
                return connection.respond(http.HTTPStatus.FORBIDDEN, f"refused: {reason}\n")
            return process_request(connection, request)

        return serve(*arguments, process_request=check, **options)

    def shown(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        kind = type(error).__name__
        # A handshake fails if someone does not speak HTTP.
        if error is not None and kind not in told and record.getMessage() != "opening handshake failed":
            told.add(kind)
            what = f"{kind}: {first_line(error)}"[:120].encode("unicode_escape").decode()
            print(f"viewer: ignored a message that is not from its page ({what})", file=sys.stderr)
        return error is None

    websockets.asyncio.server.serve = checking  # viser has no argument for this
    for logger in loggers:
        logger.addFilter(shown)
    try:
        yield
    finally:
        websockets.asyncio.server.serve = serve
        for logger in loggers:
            logger.removeFilter(shown)
