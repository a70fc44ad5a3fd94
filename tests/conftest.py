"""Fixtures that many tests share: isolation from the user's files, the launcher, what a run left."""

import functools
import http.server
import os
import socket
import subprocess
import sys
import threading

import pytest

from blacksmith import registry

# Before any test imports PyTorch: on shared cores its threads mostly wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items):
    """Long files first, so that no process is left with one of them at the end."""
    long = ("test_resume", "test_docs", "test_parity", "test_export", "test_mnist", "test_llama", "test_nerf")
    items.sort(key=lambda item: next((i for i, name in enumerate(long) if item.path.stem == name), len(long)))


@pytest.fixture(scope="session", autouse=True)
def isolated(tmp_path_factory):
    """Gives all tests, and the processes that they start, an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLACKSMITH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("KERAS_BACKEND", raising=False)
        # Many processes run the same small programs, so they share what JAX has compiled; pytest-xdist gives
        # each of its workers a directory below one that they share.
        base = tmp_path_factory.getbasetemp()
        shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(shared / "jax"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield


@pytest.fixture
def own_registry(monkeypatch):
    """Makes the registry forget what a test adds."""
    experiments = dict(registry._experiments())
    monkeypatch.setattr(registry, "_experiments", lambda: experiments)


@pytest.fixture(scope="session")
def launch():
    """Runs the launcher with the given arguments in its own process."""

    def run(*arguments, **options):
        command = [sys.executable, "-m", "blacksmith.launch", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)

    return run


@pytest.fixture(scope="session")
def tree():
    """Every path below a directory with its bytes, None for directories; a run's lock is left out."""

    def read(directory):
        paths = [path for path in directory.rglob("*") if path.name != ".lock"]
        return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in paths}

    return read


@pytest.fixture(scope="session")
def stream():
    """The lines of a run's `metrics.jsonl` without times and rates, which differ between equal runs."""
    from blacksmith.run import metrics

    def read(directory):
        lines = metrics.read(directory / "metrics.jsonl")
        return [{k: v for k, v in line.items() if not metrics.is_timed(k)} for line in lines]

    return read


@pytest.fixture(scope="module")
def one_thread():
    """One thread for PyTorch: where tests share few cores, its threads would wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="session")
def serve():
    """Serves a directory over HTTP on this machine and returns its URL."""
    servers = []

    def start(directory):
        handler = functools.partial(_Quiet, directory=str(directory))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        patch.setenv("no_proxy", "*")
        yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def no_name_server(monkeypatch):
    """Makes every name lookup fail, as on a machine without a network."""

    def fail(*arguments, **options):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
