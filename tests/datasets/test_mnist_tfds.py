"""TFDS sets: prepared and read without TensorFlow, cached as arrays, refused if they do not fit."""

import gzip
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from blacksmith import assets, files
from blacksmith.datasets import mnist
from blacksmith.datasets.mnist import idx, tfds_source
from blacksmith.errors import DataError

tfds = pytest.importorskip("tensorflow_datasets")
stock = pytest.importorskip("tensorflow_datasets.image_classification.mnist")

pytestmark = pytest.mark.usefixtures("own_directories")


def _refused(message, *arguments, **options):
    with pytest.raises(DataError, match=message) as caught:
        mnist.load("tfds", *arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def served(small_mnist, serve, tmp_path_factory):
    """A directory with the small idx files, and its URL."""
    directory = small_mnist.write(tmp_path_factory.mktemp("served"))
    return directory, serve(directory)


@pytest.fixture(scope="module")
def data_dir(served, tmp_path_factory):
    """A TFDS data directory in which `mnist` was prepared from the local server."""
    directory = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock.MNIST, "URL", served[1])
        tfds_source.prepare("mnist", directory)
    return directory


@pytest.fixture
def prepared(data_dir, tmp_path):
    """A copy of `data_dir` for a test to modify."""
    return shutil.copytree(data_dir, tmp_path / "prepared")


def test_a_prepared_set_is_the_download_in_another_order(small_mnist, prepared):
    data = mnist.load("tfds", prepared, validation=8)
    numbers = small_mnist.numbers(data.train) + small_mnist.numbers(data.validation)
    assert sorted(numbers) == list(range(40))
    images = np.concatenate([small_mnist.train_images, small_mnist.test_images])
    for split in (data.train, data.test):
        rows = np.array(small_mnist.numbers(split))
        np.testing.assert_array_equal(split.images, images[rows])
        np.testing.assert_array_equal(split.labels, rows % 10)
    assert small_mnist.numbers(data.test) != list(range(40, 52))
    assert data.info.path == str(prepared / "mnist" / "3.0.1")
    assert data.info.classes == 10


def test_auto_prefers_idx_files_then_tfds_then_mnist5k(small_mnist, prepared, monkeypatch):
    assert mnist.load().info.source == "mnist5k"
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert mnist.load(validation=8).info.source == "tfds"
    small_mnist.write(files.cache_dir() / "mnist")
    assert mnist.load(validation=8).info.source == "idx"


def test_auto_with_a_path_reads_what_is_there(small_mnist, prepared, tmp_path):
    assert mnist.load("auto", small_mnist.write(tmp_path / "idx"), validation=8).info.source == "idx"
    assert mnist.load("auto", prepared, validation=8).info.source == "tfds"


# --- the array cache ---


def test_the_second_load_does_not_need_tfds(prepared, monkeypatch):
    first = mnist.load("tfds", prepared, validation=8)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    second = mnist.load("tfds", prepared, validation=8)
    np.testing.assert_array_equal(first.train.images, second.train.images)
    np.testing.assert_array_equal(first.test.labels, second.test.labels)
    assert first.info == second.info


def test_a_changed_set_ignores_the_old_cache(prepared):
    mnist.load("tfds", prepared, validation=8)
    for path in (prepared / "mnist" / "3.0.1").iterdir():
        os.utime(path, ns=(1, 1))
    mnist.load("tfds", prepared, validation=8)
    assert len(list((files.cache_dir() / "tfds").iterdir())) == 2


def test_an_unwritable_cache_only_makes_the_next_load_slow(prepared):
    files.cache_dir().mkdir(parents=True)
    (files.cache_dir() / "tfds").write_text("in the way")
    assert len(mnist.load("tfds", prepared, validation=8).test) == 12


# --- sets prepared elsewhere ---


def _to_tfrecord(directory):
    """Rewrites a prepared set in TFDS's default format, as TensorFlow would have written it."""
    builder = tfds.builder_from_directory(directory)
    for split in ("train", "test"):
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        records = builder.as_data_source(split=split, deserialize_method=raw)
        frames = [struct.pack("<Q", len(record)) + bytes(4) + record + bytes(4) for record in records]
        (old,) = directory.glob(f"*-{split}.array_record-*")
        old.with_name(old.name.replace("array_record", "tfrecord")).write_bytes(b"".join(frames))
        old.unlink()
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


def test_tfrecord_files_give_the_same_data(prepared):
    expected = mnist.load("tfds", prepared, validation=8)
    _to_tfrecord(prepared / "mnist" / "3.0.1")
    data = mnist.load("tfds", prepared, validation=8)
    assert data.info == expected.info
    np.testing.assert_array_equal(data.train.images, expected.train.images)


@pytest.mark.parametrize("kept", [0.5, 1 / 40])
def test_a_truncated_tfrecord_file_is_refused(prepared, kept):
    directory = prepared / "mnist" / "3.0.1"
    _to_tfrecord(directory)
    (shard,) = directory.glob("*-train.tfrecord-*")
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * kept)])
    _refused("is truncated|but 40 are declared", prepared, validation=8)


UNFIT = {
    "feature name": ("features.json", '"image": {', '"picture": {', "cannot be read .*image"),
    "labels out of range": ("features.json", '"10"', '"5"', "less than 5 classes"),
    "no test split": ("dataset_info.json", '"test"', '"dev"', "[Uu]nknown split.*test"),
    "broken json": ("dataset_info.json", "{", "", "3.0.1: cannot be read"),
    "wrong count": (
        "dataset_info.json",
        '"40"',
        '"41"',
        "index 40 out of bound|but 41 are declared",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_set_that_does_not_fit_is_refused(prepared, case):
    name, old, new, message = UNFIT[case]
    path = prepared / "mnist" / "3.0.1" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    _refused(message, prepared, validation=8)


def test_a_set_that_names_code_of_its_own_is_refused(prepared, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_the_set.py").write_text("raise SystemExit('was imported')")
    path = next(prepared.rglob("features.json"))
    content = path.read_text()
    name = re.search(r"tensorflow_datasets\.[\w.]*Image\b", content)[0]
    path.write_text(content.replace(name, "of_the_set.Image"))
    _refused("names the class 'of_the_set.Image', which is not one of TFDS", prepared)


def test_the_newest_prepared_version_is_chosen_by_number(tmp_path):
    for version in ("3.0.1", "3.0.10", "3.0.9", "incomplete.x_4.0.0", "latest"):
        directory = tmp_path / "emnist" / "balanced" / version
        directory.mkdir(parents=True)
        (directory / "dataset_info.json").touch()
    (tmp_path / "emnist" / "balanced" / "9.0.0").mkdir()
    found = tfds_source.find_prepared("emnist/balanced", tmp_path)
    assert found == tmp_path / "emnist" / "balanced" / "3.0.10"


def test_a_set_that_cannot_be_prepared_here_is_refused():
    _refused("'emnist/balanced' is not prepared in .*: mnist, fashion_mnist, kmnist", name="emnist/balanced")


def test_a_missing_package_is_named_with_the_command(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    _refused(r"needs tensorflow_datasets; run pip install '\.\[tfds\]'", prepared, validation=8)
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert mnist.load().info.source == "mnist5k"


# --- preparing ---


@pytest.mark.parametrize(("name", "builder"), [("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_the_sets_of_the_same_layout_are_prepared(small_mnist, served, monkeypatch, name, builder):
    monkeypatch.setattr(getattr(stock, builder), "URL", served[1])
    data = mnist.load("tfds", name=name, validation=8)
    assert data.info.name == name
    assert Path(data.info.path).parent == tfds_source.default_data_dir() / name
    assert sorted(small_mnist.numbers(data.test)) == list(range(40, 52))


def test_the_checksums_of_tfds_agree_with_ours_and_the_docs():
    from tensorflow_datasets.core.download import checksums

    known = checksums.get_all_url_infos()
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for builder in tfds_source.PREPARABLE.values():
        url = getattr(stock, builder).URL
        assert all(known[f"{url}{name}.gz"].checksum in text for name in idx.NAMES)
    for file in assets.ASSETS["mnist"].files:
        info = known[f"{stock.MNIST.URL}{file.name}"]
        assert (file.sha256, file.size) == (info.checksum, int(info.size))


@pytest.mark.parametrize("name", tfds_source.PREPARABLE)
def test_without_a_network_tfds_is_not_tried(no_name_server, tmp_path, name):
    _refused(r"cannot be downloaded \(.*name resolution", tmp_path / "tfds", name=name)
    assert not (tmp_path / "tfds").exists()


def test_a_failed_download_leaves_no_prepared_set(served, tmp_path, monkeypatch):
    monkeypatch.setattr(stock.MNIST, "URL", served[1] + "nowhere/")
    _refused("'mnist' cannot be prepared in .*404", tmp_path / "tfds")
    assert tfds_source.find_prepared("mnist", tmp_path / "tfds") is None


def test_a_broken_download_is_refused(small_mnist, served, tmp_path, monkeypatch):
    directory = small_mnist.write(served[0] / "broken")
    (directory / f"{idx.NAMES[3]}.gz").write_bytes(gzip.compress(b"junk"))
    monkeypatch.setattr(stock.MNIST, "URL", served[1] + "broken/")
    _refused("not a complete idx file: it has 24 bytes", tmp_path / "tfds")
    assert tfds_source.find_prepared("mnist", tmp_path / "tfds") is None
