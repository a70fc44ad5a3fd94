"""Detects within seconds that a host cannot be reached. Download libraries retry for minutes."""

import queue
import socket
import threading
import urllib.request
from urllib.parse import urlsplit


def why_unreachable(url: str, timeout: float = 3.0) -> str | None:
    """Tries to connect to the host of an http(s) URL, or to its proxy, for at most `timeout` seconds.

    Returns None if that succeeded, otherwise the host and what went wrong, on one line.
    """
    try:
        host, port = _endpoint(url)
    except ValueError as error:
        return f"{url}: {error}"
    outcome: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout).close()
        except (OSError, UnicodeError) as error:
            outcome.put(f"{host}: {getattr(error, 'strerror', None) or error}")
        else:
            outcome.put(None)

    # Name resolution has no timeout and can take half a minute, hence a thread that is abandoned if it hangs.
    threading.Thread(target=connect, daemon=True).start()
    try:
        return outcome.get(timeout=timeout)
    except queue.Empty:
        return f"{host}: no answer within {timeout:g} s"


def _endpoint(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError("the URL has no host")
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
