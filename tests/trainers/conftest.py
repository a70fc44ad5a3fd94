"""One long-lived process per Keras backend, in which the tests of the trainers run their cases.

Keras cannot change its backend within a process and takes seconds to import, so the test process imports no
framework: it sends named cases (functions of `backend_cases.py`) to two workers and compares what comes back.
"""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BACKENDS = ("jax", "torch")


class CaseError(Exception):
    """A case raised; the message is ``Type: message`` as the worker saw it."""


class Result(dict):
    """What a case returned, arrays as NumPy; `path` is the ``.npz`` file with the arrays."""

    path: str

    def under(self, prefix):
        """The arrays whose names start with `prefix`, without it."""
        return {name.removeprefix(prefix): v for name, v in self.items() if name.startswith(prefix)}


class Worker:
    """One backend's process: `send` starts a case, `receive` waits for its result; every case runs once."""

    def __init__(self, backend, directory):
        self.directory = directory
        self.replies = {}
        self.pending = collections.deque()
        self.log = directory / "log.txt"
        environment = os.environ | {
            "KERAS_BACKEND": backend,
            "KERAS_HOME": str(directory),
            "KERAS_TORCH_DEVICE": "cpu",
            "JAX_PLATFORMS": "cpu",
            # The cases repeat a few programs: each is compiled once.
            "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("run_case.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            cwd=directory,
            env=environment,
        )

    def send(self, case, arguments):
        key = json.dumps([case, arguments], sort_keys=True)
        if key not in self.replies:
            path = str(self.directory / f"{len(self.replies)}.npz")
            request = {"case": case, "arguments": arguments, "path": path}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            self.replies[key] = None
            self.pending.append(key)
        return key

    def receive(self, key):
        while self.replies[key] is None:
            line = self.process.stdout.readline()
            if not line:
                pytest.fail(f"the worker died:\n{self.log.read_text()[-4000:]}")
            self.replies[self.pending.popleft()] = json.loads(line)
        reply = self.replies[key]
        if "error" in reply:
            raise CaseError(reply["error"] + "\n" + reply["traceback"])
        result = Result(reply["values"])
        result.path = reply["path"]
        with np.load(reply["path"]) as arrays:
            result |= dict(arrays)
        return result

    def stop(self):
        self.process.kill()
        self.process.communicate()


class Backends:
    """Both workers."""

    Error = CaseError

    def __init__(self, root):
        self.workers = {}
        for name in BACKENDS:
            directory = root / name
            directory.mkdir()
            self.workers[name] = Worker(name, directory)

    def on(self, name, case, /, **arguments):
        """The case's result on one backend."""
        worker = self.workers[name]
        return worker.receive(worker.send(case, arguments))

    def both(self, case, /, **arguments):
        """The case's results on JAX and on PyTorch, which run at the same time."""
        for worker in self.workers.values():
            worker.send(case, arguments)
        return tuple(self.on(name, case, **arguments) for name in BACKENDS)

    def stop(self):
        for worker in self.workers.values():
            worker.stop()


class Backend:
    """One of the two, for tests that run on each."""

    Error = CaseError

    def __init__(self, name, backends):
        self.name = name
        self._backends = backends

    def run(self, case, /, **arguments):
        """The case's result here. The other backend starts it as well: its own test will ask for the same."""
        if "load" not in arguments:
            for worker in self._backends.workers.values():
                worker.send(case, arguments)
        return self._backends.on(self.name, case, **arguments)


@pytest.fixture(scope="session")
def backends(tmp_path_factory):
    """The two workers, started with the first test that needs them."""
    started = Backends(tmp_path_factory.mktemp("backends"))
    yield started
    started.stop()


@pytest.fixture(params=BACKENDS)
def backend(request, backends):
    """Each backend in turn."""
    return Backend(request.param, backends)
