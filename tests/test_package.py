"""setup.cfg installs every package and every data file."""

import configparser
from pathlib import Path

from blacksmith import config
from blacksmith.config import gin_files

ROOT = Path(__file__).resolve().parent.parent


def test_every_package_and_every_gin_file_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    there = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "blacksmith").rglob("__init__.py")
    }
    gin = {
        ".".join(("blacksmith", *path.parent.relative_to(ROOT).parts))
        for path in (ROOT / "gin").rglob("*.gin")
    }
    assert listed == there | gin
    assert gin <= setup["options.package_data"].keys()


def test_every_data_file_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    installed = {
        file
        for package, patterns in setup["options.package_data"].items()
        for pattern in patterns.split(",")
        for file in ROOT.joinpath(*package.split(".")).glob(pattern.strip())
    }
    files = {file for file in (ROOT / "blacksmith").rglob("*") if file.is_file()}
    assert {file for file in files if file.suffix not in (".py", ".pyc", ".md")} <= installed


def test_gin_files_are_found_in_checkouts_and_installed_packages(tmp_path, monkeypatch):
    assert config.gin_directory() == ROOT / "gin"
    (tmp_path / "blacksmith" / "gin").mkdir(parents=True)
    monkeypatch.setattr(gin_files, "_PACKAGE", tmp_path / "blacksmith")
    assert config.gin_directory() == tmp_path / "blacksmith" / "gin"
