"""An unreachable host is detected within the timeout, even if name resolution hangs."""

import socket
import threading

import pytest

from blacksmith.network import why_unreachable


def test_an_answering_host_is_reachable(serve, tmp_path):
    assert why_unreachable(serve(tmp_path)) is None


def test_an_unresolvable_name_is_the_reason(no_name_server):
    expected = "data.example: Temporary failure in name resolution"
    assert why_unreachable("https://data.example/") == expected


def test_a_closed_port_is_the_reason(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert why_unreachable(f"http://127.0.0.1:{port}/") == "127.0.0.1: Connection refused"


def test_a_silent_name_server_does_not_block(monkeypatch):
    answer = threading.Event()

    def silent(*arguments, **options):
        answer.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "late")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", silent)
    try:
        reason = why_unreachable("https://data.example/", timeout=0.1)
    finally:
        answer.set()
    assert reason == "data.example: no answer within 0.1 s"


def test_the_proxy_is_used_unless_the_host_is_exempt(monkeypatch, serve, tmp_path):
    url = serve(tmp_path)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("http_proxy", url)
    assert why_unreachable("http://name.invalid/") is None
    monkeypatch.setenv("no_proxy", "name.invalid")
    assert "name.invalid" in why_unreachable("http://name.invalid/", timeout=1.0)


@pytest.mark.parametrize("url", ["http://", "http://127.0.0.1:port/", "http://[half/"])
def test_a_malformed_url_is_the_reason(url):
    assert why_unreachable(url).startswith(f"{url}: ")
