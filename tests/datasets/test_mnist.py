"""MNIST: every source gives the same kind of splits, and what is broken is refused in one line."""

import functools
import gzip
import hashlib
import http.server
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from blacksmith import assets, files
from blacksmith.datasets import mnist
from blacksmith.datasets.mnist import idx, tfds_source
from blacksmith.errors import DataError

TRAIN, TEST = 40, 12


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Keeps the real cache, the real TFDS data and any proxy out of every test."""
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "*")


def _arrays():
    """Random images whose first pixels are a running number, so that every row is distinct."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (TRAIN + TEST, 28, 28), np.uint8)
    images[:, 0, 0] = np.arange(TRAIN + TEST)
    labels = (np.arange(TRAIN + TEST) % 10).astype(np.uint8)
    return images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]


def _image_bytes(images):
    return struct.pack(">4I", 0x803, *images.shape) + images.tobytes()


def _label_bytes(labels):
    return struct.pack(">2I", 0x801, len(labels)) + labels.tobytes()


def _write(directory, *, compressed=True, dotted=False):
    """Writes the four files and returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    train_images, train_labels, test_images, test_labels = _arrays()
    contents = (
        _image_bytes(train_images),
        _label_bytes(train_labels),
        _image_bytes(test_images),
        _label_bytes(test_labels),
    )
    for name, content in zip(idx.NAMES, contents):
        stem = name.replace("-idx", ".idx") if dotted else name
        if compressed:
            (directory / f"{stem}.gz").write_bytes(gzip.compress(content))
        else:
            (directory / stem).write_bytes(content)
    return directory


def _numbers(split):
    return split.images[:, 0, 0].tolist()


def _assert_one_line(error):
    assert isinstance(error, DataError)
    assert "\n" not in str(error)


# --- splits ---


def test_splits_have_the_documented_shapes_types_and_counts(tmp_path):
    data = mnist.load("idx", _write(tmp_path / "idx"), validation=8)
    assert [len(data.train), len(data.validation), len(data.test)] == [32, 8, 12]
    for split in (data.train, data.validation, data.test):
        assert split.images.shape == (len(split), 28, 28)
        assert split.images.dtype == np.uint8
        assert split.labels.shape == (len(split),)
        assert split.labels.dtype == np.int32
        assert split.images.flags.writeable
        assert split.images.flags.c_contiguous
    assert data.num_classes == 10


def test_splits_are_disjoint_and_together_are_everything(tmp_path):
    data = mnist.load("idx", _write(tmp_path / "idx"), validation=8)
    train, validation = _numbers(data.train), _numbers(data.validation)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == list(range(TRAIN))
    assert _numbers(data.test) == list(range(TRAIN, TRAIN + TEST))
    for split in (data.train, data.validation, data.test):
        expected = _arrays()[0 if split is not data.test else 2]
        offset = TRAIN if split is data.test else 0
        np.testing.assert_array_equal(split.images, expected[np.array(_numbers(split)) - offset])


def test_labels_stay_with_their_images(tmp_path):
    data = mnist.load("idx", _write(tmp_path / "idx"), validation=8, seed=3)
    for split in (data.train, data.validation, data.test):
        number = split.images[:, 0, 0].astype(int)
        np.testing.assert_array_equal(split.labels, number % 10)


def test_the_seed_decides_the_validation_set_and_nothing_else(tmp_path):
    directory = _write(tmp_path / "idx")
    first, again, other = (mnist.load("idx", directory, validation=8, seed=seed) for seed in (0, 0, 1))
    assert _numbers(first.train) == _numbers(again.train)
    assert _numbers(first.validation) == _numbers(again.validation)
    assert _numbers(first.validation) != _numbers(other.validation)
    assert _numbers(first.test) == _numbers(other.test)
    assert first.info == other.info


@pytest.mark.parametrize(("validation", "count"), [(0, 0), (1, 1), (39, 39), (0.0, 0), (0.25, 10), (0.1, 4)])
def test_validation_is_a_count_or_a_fraction(tmp_path, validation, count):
    data = mnist.load("idx", _write(tmp_path / "idx"), validation=validation)
    assert len(data.validation) == data.info["validation"] == count
    assert len(data.train) == data.info["train"] == TRAIN - count
    assert data.info["validation_is_test"] is False


def test_validation_test_trains_on_everything_and_declares_it(tmp_path):
    data = mnist.load("idx", _write(tmp_path / "idx"), validation="test")
    assert data.validation is data.test
    assert sorted(_numbers(data.train)) == list(range(TRAIN))
    assert data.info["validation_is_test"] is True
    assert data.info["validation"] == data.info["test"] == TEST
    assert "the test set as validation set" in mnist.describe(data.info)


@pytest.mark.parametrize("validation", [40, 5000, -1, 1.0, -0.1, float("nan"), "tset", True, None])
def test_a_validation_that_leaves_nothing_to_train_on_is_refused(tmp_path, validation):
    with pytest.raises(DataError, match=r"validation=.* allowed: ") as caught:
        mnist.load("idx", _write(tmp_path / "idx"), validation=validation)
    _assert_one_line(caught.value)


def test_info_is_complete_and_survives_json(tmp_path):
    directory = _write(tmp_path / "idx")
    info = mnist.load("idx", directory, validation=8).info
    assert json.loads(json.dumps(info)) == info
    sha256 = info.pop("sha256")
    assert len(bytes.fromhex(sha256)) == 32
    assert info == {
        "source": "idx",
        "name": "mnist",
        "path": str(directory),
        "train": 32,
        "validation": 8,
        "test": 12,
        "classes": 10,
        "validation_is_test": False,
    }


# --- idx ---


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_idx_files_are_the_same_data_under_either_name_and_compression(tmp_path, compressed, dotted):
    plain = mnist.load("idx", _write(tmp_path / "a"), validation=8)
    directory = _write(tmp_path / "b", compressed=compressed, dotted=dotted)
    data = mnist.load("idx", str(directory), validation=8)
    assert data.info["sha256"] == plain.info["sha256"]
    np.testing.assert_array_equal(data.train.images, plain.train.images)
    np.testing.assert_array_equal(data.test.labels, plain.test.labels)


def test_the_hash_changes_with_one_pixel_or_one_label(tmp_path):
    arrays = idx.load(_write(tmp_path / "idx"))
    seen = {arrays.sha256()}
    for field in arrays._fields[:4]:
        changed = getattr(arrays, field).copy()
        changed.reshape(-1)[-1] ^= 1
        seen.add(arrays._replace(**{field: changed}).sha256())
    assert len(seen) == 5


TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = idx.NAMES


def _at(content, position, value):
    return content[:position] + value + content[position + len(value) :]


BROKEN = {
    "images with the magic of labels": (
        TRAIN_IMAGES,
        lambda content: _at(content, 0, struct.pack(">I", 0x801)),
        "magic number 0x00000801, expected 0x00000803",
    ),
    "labels of floats": (
        TEST_LABELS,
        lambda content: _at(content, 0, struct.pack(">I", 0xD01)),
        "magic number 0x00000d01, expected 0x00000801",
    ),
    "truncated images": (TEST_IMAGES, lambda content: content[:-1], "truncated"),
    "truncated labels": (TRAIN_LABELS, lambda content: content[:-5], "truncated"),
    "truncated header": (TRAIN_IMAGES, lambda content: content[:10], "truncated, 10 bytes"),
    "an empty file": (TEST_LABELS, lambda content: b"", "truncated, 0 bytes"),
    "trailing bytes after images": (TRAIN_IMAGES, lambda content: content + b"\0", "trailing"),
    "trailing bytes after labels": (TEST_LABELS, lambda content: content + b"\0", "trailing"),
    "a count beyond any file": (
        TRAIN_IMAGES,
        lambda content: _at(content, 4, b"\xff\xff\xff\xff"),
        "truncated, .* 4294967295 items",
    ),
    "fewer labels than images": (
        TRAIN_LABELS,
        lambda content: _label_bytes(_arrays()[1][:-1]),
        "40 images, but train-labels-idx1-ubyte.* has 39 labels",
    ),
    "fewer images than labels": (
        TEST_IMAGES,
        lambda content: _image_bytes(_arrays()[2][1:]),
        "11 images, but t10k-labels-idx1-ubyte.* has 12 labels",
    ),
    "a label of 10": (
        TEST_LABELS,
        lambda content: _at(content, 8 + 3, b"\x0a"),
        "label 10 at position 3, expected 0 to 9",
    ),
    "a label of 255": (
        TRAIN_LABELS,
        lambda content: _at(content, len(content) - 1, b"\xff"),
        "label 255 at position 39",
    ),
    "images of another size": (
        TRAIN_IMAGES,
        lambda content: _image_bytes(np.zeros((TRAIN, 32, 32), np.uint8)),
        "images of 32x32 pixels, expected 28x28",
    ),
    "images of swapped size": (
        TEST_IMAGES,
        lambda content: _image_bytes(np.zeros((TEST, 56, 14), np.uint8)),
        "images of 56x14 pixels",
    ),
    "no images": (
        TRAIN_IMAGES,
        lambda content: _image_bytes(np.zeros((0, 28, 28), np.uint8)),
        "empty",
    ),
    "no labels": (TEST_LABELS, lambda content: _label_bytes(np.zeros(0, np.uint8)), "empty"),
}


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_idx_file_is_named_with_its_fault(tmp_path, case, compressed):
    name, break_it, message = BROKEN[case]
    directory = _write(tmp_path / "idx", compressed=compressed)
    if compressed:
        path = directory / f"{name}.gz"
        path.write_bytes(gzip.compress(break_it(gzip.decompress(path.read_bytes()))))
    else:
        path = directory / name
        path.write_bytes(break_it(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        mnist.load("idx", directory, validation=8)
    _assert_one_line(caught.value)
    assert str(path) in str(caught.value) or path.name in str(caught.value)


BROKEN_GZIP = {
    "not gzip at all": lambda content: gzip.decompress(content),
    "cut short": lambda content: content[: len(content) // 2],
    "without its checksum": lambda content: content[:-8],
    "with a flipped bit": lambda content: _at(content, len(content) // 2, b"\x00\xff\x00\xff"),
    "with a wrong checksum": lambda content: _at(content, len(content) - 8, b"\0\0\0\0"),
    "followed by junk": lambda content: content + b"junk",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("case", BROKEN_GZIP)
@pytest.mark.parametrize("name", [TRAIN_IMAGES, TEST_LABELS])
def test_a_broken_gzip_file_is_named(tmp_path, case, name):
    path = _write(tmp_path / "idx") / f"{name}.gz"
    path.write_bytes(BROKEN_GZIP[case](path.read_bytes()))
    with pytest.raises(DataError, match=r"broken gzip|truncated, 0 bytes") as caught:
        mnist.load("idx", path.parent, validation=8)
    _assert_one_line(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", idx.NAMES)
def test_a_missing_idx_file_is_named_with_the_command_that_gets_it(tmp_path, name):
    directory = _write(tmp_path / "idx")
    (directory / f"{name}.gz").unlink()
    with pytest.raises(DataError, match=f"no {name} .*python -m blacksmith.assets mnist") as caught:
        mnist.load("idx", directory, validation=8)
    _assert_one_line(caught.value)


def test_idx_without_a_path_reads_the_cache():
    _write(files.cache_dir() / "mnist")
    info = mnist.load("idx", validation=8).info
    assert info["path"] == str(files.cache_dir() / "mnist")


def test_idx_of_another_set_is_recorded_under_its_name_and_needs_a_path(tmp_path):
    directory = _write(tmp_path / "idx")
    assert mnist.load("idx", directory, name="kmnist", validation=8).info["name"] == "kmnist"
    with pytest.raises(DataError, match="needs the path of the idx files of 'kmnist'"):
        mnist.load("idx", name="kmnist")


@pytest.mark.skipif("BLACKSMITH_MNIST_DIR" not in os.environ, reason="needs the full MNIST")
def test_the_full_mnist_is_the_canonical_one():
    data = mnist.load("idx", os.environ["BLACKSMITH_MNIST_DIR"])
    assert [len(data.train), len(data.validation), len(data.test)] == [55000, 5000, 10000]
    assert data.info["sha256"] == ("25c98f992c005963b7428e1f38418b233c9b286cc403519287eb8063f0bcfe07")
    # The embedded digits are the first 500 of each label in the training set.
    full = idx.load(Path(os.environ["BLACKSMITH_MNIST_DIR"]))
    rows = np.concatenate([np.flatnonzero(full.train_labels == label)[:500] for label in range(10)])
    with np.load(Path(mnist.__file__).with_name("mnist5k.npz"), allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["images"], full.train_images[rows])
        np.testing.assert_array_equal(archive["labels"], full.train_labels[rows])


# --- mnist5k ---


def test_mnist5k_has_a_balanced_test_set_that_no_seed_changes():
    first, second = (mnist.load("mnist5k", seed=seed) for seed in (0, 1))
    assert np.bincount(first.test.labels).tolist() == [100] * 10
    np.testing.assert_array_equal(first.test.images, second.test.images)
    assert [len(first.train), len(first.validation), len(first.test)] == [3500, 500, 1000]
    everything = np.concatenate([first.train.labels, first.validation.labels])
    assert np.bincount(everything).tolist() == [400] * 10
    assert not np.array_equal(first.train.images, second.train.images)


def test_mnist5k_rows_are_shuffled_though_the_file_is_sorted():
    data = mnist.load("mnist5k")
    for split in (data.train, data.validation, data.test):
        for start in range(0, len(split), 100):
            # 100 draws from 10 labels miss more than two of them once in a million.
            assert len(np.unique(split.labels[start : start + 100])) >= 8


def test_mnist5k_splits_share_no_image():
    data = mnist.load("mnist5k")
    sets = [{image.tobytes() for image in split.images} for split in (data.train, data.validation, data.test)]
    assert len(set.union(*sets)) == 5000


def test_mnist5k_looks_like_digits():
    """A nearest-class-mean classifier gets at least 75% right; chance is 10%."""
    data = mnist.load("mnist5k")
    pixels = data.train.images.reshape(len(data.train), -1).astype(np.float32)
    means = np.stack([pixels[data.train.labels == label].mean(0) for label in range(10)])
    test = data.test.images.reshape(len(data.test), -1).astype(np.float32)
    distance = ((test[:, None] - means[None]) ** 2).sum(-1)
    assert (distance.argmin(1) == data.test.labels).mean() > 0.75


def test_mnist5k_file_is_small_and_the_one_that_the_documentation_describes():
    content = Path(mnist.__file__).with_name("mnist5k.npz").read_bytes()
    assert len(content) < 1_000_000
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert hashlib.sha256(content).hexdigest() in text
    assert mnist.load("mnist5k").info["sha256"] in text


@pytest.mark.parametrize("options", [{"path": "/somewhere"}, {"name": "kmnist"}])
def test_mnist5k_takes_no_path_and_no_other_name(options):
    with pytest.raises(DataError, match="takes no path and no other name"):
        mnist.load("mnist5k", **options)


def test_mnist5k_refuses_a_validation_set_of_everything():
    with pytest.raises(DataError, match="validation=4000 with 4,000 train images"):
        mnist.load("mnist5k", validation=4000)


def test_describe_says_that_mnist5k_is_a_subset_and_how_to_get_the_rest():
    line = mnist.describe(mnist.load("mnist5k").info)
    assert "\n" not in line
    for part in ("mnist5k", "3,500 train", "500 validation", "1,000 test", "5,000 digit subset"):
        assert part in line
    assert "python -m blacksmith.assets mnist" in line


# --- auto ---


def test_auto_takes_idx_in_the_cache_then_prepared_tfds_then_mnist5k(prepared, monkeypatch):
    assert mnist.load().info["source"] == "mnist5k"
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert mnist.load(validation=8).info["source"] == "tfds"
    _write(files.cache_dir() / "mnist")
    assert mnist.load(validation=8).info["source"] == "idx"


def test_auto_does_not_take_an_incomplete_cache_for_the_data():
    (_write(files.cache_dir() / "mnist") / f"{TEST_LABELS}.gz").unlink()
    assert mnist.load().info["source"] == "mnist5k"


def test_auto_with_a_path_takes_what_is_there(prepared, tmp_path):
    assert mnist.load("auto", _write(tmp_path / "idx"), validation=8).info["source"] == "idx"
    assert mnist.load("auto", prepared, validation=8).info["source"] == "tfds"


def test_auto_with_a_path_that_has_neither_is_an_error(tmp_path):
    with pytest.raises(DataError, match="neither MNIST idx files nor a prepared TFDS set 'mnist'"):
        mnist.load("auto", tmp_path)


def test_auto_with_a_broken_idx_file_is_an_error_not_another_source(tmp_path):
    (_write(files.cache_dir() / "mnist") / f"{TEST_LABELS}.gz").write_bytes(b"broken")
    with pytest.raises(DataError, match="broken gzip"):
        mnist.load()


def test_auto_never_gives_digits_for_another_name():
    with pytest.raises(DataError, match="'fashion_mnist' is not prepared"):
        mnist.load(name="fashion_mnist")


def test_an_unknown_source_lists_the_known_ones():
    with pytest.raises(DataError, match="unknown MNIST source 'ixd'; there are: auto, idx, tfds"):
        mnist.load("ixd")


def test_loading_imports_no_framework_and_no_tfds(tmp_path):
    program = (
        "import sys; from blacksmith.datasets import mnist; mnist.load(); "
        "print(sorted({'jax', 'torch', 'keras', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(mnist.__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"


# --- TFDS ---


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A directory with small idx files and the URL under which a local server shows it."""
    directory = _write(tmp_path_factory.mktemp("served"))
    handler = functools.partial(_Quiet, directory=str(directory))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield directory, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def data_dir(served, tmp_path_factory):
    """A TFDS data directory in which `mnist` was prepared from the local server."""
    pytest.importorskip("tensorflow_datasets")
    directory = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        tfds_source.prepare("mnist", directory, served[1])
    return directory


@pytest.fixture
def prepared(data_dir, tmp_path):
    """A copy of that directory for one test to change."""
    directory = tmp_path / "prepared"
    shutil.copytree(data_dir / "mnist", directory / "mnist")
    return directory


def _forbid_import():
    raise AssertionError("tensorflow_datasets must not be needed")


def test_a_prepared_tfds_set_holds_what_was_downloaded_in_another_order(prepared, tmp_path):
    data = mnist.load("tfds", prepared, validation=8)
    same = mnist.load("idx", _write(tmp_path / "idx"), validation=8)
    train, train_labels, test, test_labels = _arrays()
    rows = _numbers(data.train) + _numbers(data.validation)
    assert sorted(rows) == list(range(TRAIN))
    np.testing.assert_array_equal(data.train.images, train[_numbers(data.train)])
    np.testing.assert_array_equal(data.train.labels, train_labels[_numbers(data.train)])
    tested = np.array(_numbers(data.test)) - TRAIN
    np.testing.assert_array_equal(data.test.images, test[tested])
    np.testing.assert_array_equal(data.test.labels, test_labels[tested])
    assert data.info["path"] == str(prepared / "mnist" / "3.0.1")
    assert data.info["sha256"] != same.info["sha256"]
    assert data.info["classes"] == 10


def test_the_second_load_reads_the_array_cache_without_tfds(prepared, monkeypatch):
    first = mnist.load("tfds", prepared, validation=8)
    monkeypatch.setattr(tfds_source, "_import_tfds", _forbid_import)
    second = mnist.load("tfds", prepared, validation=8)
    np.testing.assert_array_equal(first.train.images, second.train.images)
    np.testing.assert_array_equal(first.test.labels, second.test.labels)
    assert first.info == second.info


@pytest.mark.parametrize("damage", [b"", b"not an archive", None])
def test_a_damaged_array_cache_is_made_anew(prepared, damage):
    first = mnist.load("tfds", prepared, validation=8)
    (cached,) = (files.cache_dir() / "tfds").iterdir()
    content = cached.read_bytes()
    middle = len(content) // 2
    cached.write_bytes(_at(content, middle, b"damage") if damage is None else damage)
    assert mnist.load("tfds", prepared, validation=8).info == first.info
    assert cached.read_bytes() == content


def test_a_set_prepared_anew_is_not_read_from_the_old_cache(prepared):
    mnist.load("tfds", prepared, validation=8)
    for path in (prepared / "mnist" / "3.0.1").iterdir():
        os.utime(path, ns=(1, 1))
    mnist.load("tfds", prepared, validation=8)
    assert len(list((files.cache_dir() / "tfds").iterdir())) == 2


def test_a_cache_that_cannot_be_written_does_not_stop_the_load(prepared, caplog):
    files.cache_dir().mkdir(parents=True)
    (files.cache_dir() / "tfds").write_text("in the way")
    assert len(mnist.load("tfds", prepared, validation=8).test) == TEST
    assert "the next load is slow" in caplog.text


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_the_sets_of_the_same_layout_are_prepared_too(served, tmp_path, name):
    pytest.importorskip("tensorflow_datasets")
    path = tfds_source.prepare(name, tmp_path / "tfds", served[1])
    assert path.parent == tmp_path / "tfds" / name
    data = mnist.load("tfds", name=name, validation=8)
    assert data.info["name"] == name
    assert data.info["path"] == str(path)
    assert sorted(_numbers(data.test)) == list(range(TRAIN, TRAIN + TEST))


def test_tfds_has_a_documented_checksum_for_every_download_and_ours_agree():
    pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.image_classification import mnist as stock

    known = checksums.get_all_url_infos()
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for stock_builder in tfds_source.PREPARABLE.values():
        url = getattr(stock, stock_builder).URL
        assert all(known[f"{url}{name}.gz"].checksum in text for name in idx.NAMES)
    for file in assets.ASSETS["mnist"].files:
        assert file.content_sha256 in text
        info = known[f"{stock.MNIST.URL}{file.name}"]
        assert (file.sha256, file.size) == (info.checksum, int(info.size))


def _to_tfrecord(directory):
    """Rewrites a prepared set in TFDS's default format, as TensorFlow would have written it."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    for split in ("train", "test"):
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        source = builder.as_data_source(split=split, deserialize_method=raw)
        frames = [
            struct.pack("<Q", len(record)) + bytes(4) + record + bytes(4)
            for record in (source[index] for index in range(len(source)))
        ]
        (old,) = directory.glob(f"*-{split}.array_record-*")
        old.with_name(old.name.replace("array_record", "tfrecord")).write_bytes(b"".join(frames))
        old.unlink()
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


def test_a_set_prepared_by_tensorflow_as_tfrecord_is_read_alike(prepared):
    expected = mnist.load("tfds", prepared, validation=8)
    _to_tfrecord(prepared / "mnist" / "3.0.1")
    data = mnist.load("tfds", prepared, validation=8)
    assert data.info == expected.info
    np.testing.assert_array_equal(data.train.images, expected.train.images)


@pytest.mark.parametrize("kept", [0.5, 1 / 40])
def test_a_truncated_tfrecord_is_refused(prepared, kept):
    directory = prepared / "mnist" / "3.0.1"
    _to_tfrecord(directory)
    (shard,) = directory.glob("*-train.tfrecord-*")
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match=r"truncated|records where 40 are announced") as caught:
        mnist.load("tfds", prepared, validation=8)
    _assert_one_line(caught.value)


def _edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


UNFIT = {
    "another image size": ("features.json", '"28"', '"32"', "expected a uint8 28x28x1 image"),
    "another feature": ("features.json", '"image": {', '"picture": {', "feature `image` is None"),
    "too many classes": ("features.json", '"10"', '"1000"', "1000 classes, at most 256"),
    "labels out of range": ("features.json", '"10"', '"5"', "labels outside 0 to 4"),
    "no test split": ("dataset_info.json", '"test"', '"dev"', r"splits \['dev', 'train'\]"),
    "broken json": ("dataset_info.json", "{", "", "dataset_info.json: broken"),
    "other counts": ("dataset_info.json", '"40"', '"41"', "split train cannot be read"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_tfds_set_that_does_not_fit_is_refused(prepared, case):
    name, old, new, message = UNFIT[case]
    _edit(prepared / "mnist" / "3.0.1" / name, old, new)
    with pytest.raises(DataError, match=message) as caught:
        mnist.load("tfds", prepared, validation=8)
    _assert_one_line(caught.value)


def test_the_newest_prepared_version_is_taken_by_number(tmp_path):
    for version in ("3.0.1", "3.0.10", "3.0.9", "incomplete.x_4.0.0", "latest"):
        directory = tmp_path / "emnist" / "balanced" / version
        directory.mkdir(parents=True)
        (directory / "dataset_info.json").write_text("{}")
        (directory / "features.json").write_text("{}")
    (tmp_path / "emnist" / "balanced" / "9.0.0").mkdir()
    found = tfds_source.find_prepared("emnist/balanced", tmp_path)
    assert found == tmp_path / "emnist" / "balanced" / "3.0.10"


@pytest.mark.parametrize("name", ["../mnist", "mnist/../x", "/mnist", "MNIST", "a/b/c", ""])
def test_a_name_that_is_no_tfds_name_is_refused(name):
    with pytest.raises(DataError, match="is not of the form"):
        mnist.load("tfds", name=name)


def test_an_unprepared_set_that_cannot_be_prepared_here_is_refused(tmp_path):
    message = "'emnist/balanced' is not prepared in .*: mnist, fashion_mnist, kmnist"
    with pytest.raises(DataError, match=message):
        mnist.load("tfds", name="emnist/balanced")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_without_name_resolution_tfds_fails_before_its_own_retries(tmp_path, monkeypatch, name):
    pytest.importorskip("tensorflow_datasets")

    def no_resolution(*arguments, **options):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_resolution)
    with pytest.raises(DataError, match=r"cannot be downloaded \(.*name resolution") as caught:
        mnist.load("tfds", tmp_path / "tfds", name=name)
    _assert_one_line(caught.value)
    assert not (tmp_path / "tfds").exists()


def test_a_failed_download_leaves_no_prepared_set(served, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(DataError, match=r"'mnist' cannot be prepared in .*404") as caught:
        tfds_source.prepare("mnist", tmp_path / "tfds", served[1] + "nowhere/")
    _assert_one_line(caught.value)
    assert tfds_source.find_prepared("mnist", tmp_path / "tfds") is None


def test_a_broken_download_is_refused_by_the_idx_checks(served, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    directory = _write(served[0] / "broken")
    (directory / f"{TEST_LABELS}.gz").write_bytes(gzip.compress(b"junk"))
    with pytest.raises(DataError, match="truncated, 4 bytes") as caught:
        tfds_source.prepare("mnist", tmp_path / "tfds", served[1] + "broken/")
    _assert_one_line(caught.value)
    assert tfds_source.find_prepared("mnist", tmp_path / "tfds") is None


def test_a_missing_tfds_package_is_named_with_the_command(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"tensorflow_datasets.*pip install '\.\[tfds\]'"):
        mnist.load("tfds", prepared, validation=8)
