"""One long-lived process per Keras backend, in which the tests of the trainers run their cases.

Keras cannot change its backend within a process and takes seconds to import, so the test process imports no
framework: it sends named cases (functions of `backend_cases.py`) to two workers and compares what comes back.
"""

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
    """Runs cases on one backend: `send` starts one, `receive` waits for its result."""

    def __init__(self, backend, directory):
        self.directory = directory
        self.results = {}
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
        request = {
            "case": case,
            "arguments": arguments,
            "path": str(self.directory / f"{len(self.results)}.npz"),
        }
        key = json.dumps([case, arguments], sort_keys=True)
        if key not in self.results:
            self.results[key] = None
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return key

    def receive(self, key):
        if self.results[key] is None:
            line = self.process.stdout.readline()
            if not line:
                pytest.fail(f"the worker died:\n{self.log.read_text()[-4000:]}")
            self.results[key] = json.loads(line)
        reply = self.results[key]
        if "error" in reply:
            raise CaseError(reply["error"] + "\n" + reply["traceback"])
        result = Result(reply["values"])
        result.path = reply["path"]
        with np.load(reply["path"]) as arrays:
            result |= dict(arrays)
        return result

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Backends:
    """Both workers; every case runs once, however many tests ask for it."""

    Error = CaseError

    def __init__(self, root):
        self._workers = {}
        for backend in BACKENDS:
            directory = root / backend
            directory.mkdir()
            self._workers[backend] = Worker(backend, directory)

    def on(self, backend, case, **arguments):
        """The case's result on one backend."""
        worker = self._workers[backend]
        return worker.receive(worker.send(case, arguments))

    def both(self, case, **arguments):
        """The case's results by backend; the two run at the same time."""
        keys = {name: worker.send(case, arguments) for name, worker in self._workers.items()}
        results, errors = {}, []
        for name, key in keys.items():
            try:
                results[name] = self._workers[name].receive(key)
            except CaseError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return results["jax"], results["torch"]

    def close(self):
        for worker in self._workers.values():
            worker.close()


@pytest.fixture(scope="session")
def backends(tmp_path_factory):
    """The two workers, started with the first test that needs them."""
    started = Backends(tmp_path_factory.mktemp("backends"))
    yield started
    started.close()


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend's name in turn."""
    return request.param
