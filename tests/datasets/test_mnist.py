"""MNIST: disjoint and reproducible splits, and one-line errors for broken files."""

import dataclasses
import gzip
import hashlib
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from blacksmith import files
from blacksmith.datasets import mnist
from blacksmith.datasets.mnist import idx
from blacksmith.errors import DataError

pytestmark = pytest.mark.usefixtures("own_directories")
ROOT = Path(__file__).parents[2]
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = idx.NAMES


@pytest.fixture
def directory(small_mnist, tmp_path):
    """The small set as idx files."""
    return small_mnist.write(tmp_path / "idx")


def _refused(message, *arguments, **options):
    with pytest.raises(DataError, match=message) as caught:
        mnist.load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- splits ---


def test_splits_have_the_documented_shapes_and_types(directory):
    data = mnist.load("idx", directory, validation=8)
    assert [len(data.train), len(data.validation), len(data.test)] == [32, 8, 12]
    for split in (data.train, data.validation, data.test):
        assert (split.images.shape, split.images.dtype) == ((len(split), 28, 28), np.uint8)
        assert (split.labels.shape, split.labels.dtype) == ((len(split),), np.int32)
        assert split.images.flags.writeable
        assert split.images.flags.c_contiguous
    assert data.info.classes == 10


def test_splits_are_disjoint_and_complete(small_mnist, directory):
    data = mnist.load("idx", directory, validation=8, seed=3)
    held_in = small_mnist.numbers(data.train) + small_mnist.numbers(data.validation)
    assert sorted(held_in) == list(range(40))
    assert small_mnist.numbers(data.test) == list(range(40, 52))
    images = np.concatenate([small_mnist.train_images, small_mnist.test_images])
    for split in (data.train, data.validation, data.test):
        numbers = np.array(small_mnist.numbers(split))
        np.testing.assert_array_equal(split.images, images[numbers])
        np.testing.assert_array_equal(split.labels, numbers % 10)


def test_the_seed_changes_only_the_validation_set(small_mnist, directory):
    first, again, other = (mnist.load("idx", directory, validation=8, seed=seed) for seed in (0, 0, 1))
    numbers = small_mnist.numbers
    assert numbers(first.train) == numbers(again.train)
    assert numbers(first.validation) == numbers(again.validation)
    assert numbers(first.validation) != numbers(other.validation)
    assert numbers(first.test) == numbers(other.test)
    assert first.info == other.info


@pytest.mark.parametrize("count", [0, 39])
def test_validation_is_a_count(directory, count):
    data = mnist.load("idx", directory, validation=count)
    assert len(data.validation) == data.info.validation == count
    assert len(data.train) == data.info.train == 40 - count
    assert data.info.validation_is_test is False


def test_validation_on_the_test_set_is_declared(small_mnist, directory):
    data = mnist.load("idx", directory, validation="test")
    assert data.validation is data.test
    assert sorted(small_mnist.numbers(data.train)) == list(range(40))
    assert data.info.validation_is_test is True
    assert data.info.validation == data.info.test == 12
    assert "validation on the test set" in data.info.describe()


@pytest.mark.parametrize("validation", [40, 5000, -1])
def test_an_invalid_validation_is_refused(directory, validation):
    _refused(r"validation=.* allowed: ", "idx", directory, validation=validation)


def test_info_has_the_recorded_fields(directory):
    info = dataclasses.asdict(mnist.load("idx", directory, validation=8).info)
    assert len(bytes.fromhex(info["sha256"])) == 32
    assert list(info.items()) == [
        ("source", "idx"),
        ("name", "mnist"),
        ("path", str(directory)),
        ("sha256", info["sha256"]),
        ("train", 32),
        ("validation", 8),
        ("test", 12),
        ("classes", 10),
        ("validation_is_test", False),
    ]


# --- idx ---


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_either_name_and_compression_gives_the_same_data(small_mnist, tmp_path, compressed, dotted):
    small_mnist.write(tmp_path / "idx", compressed=compressed, dotted=dotted)
    arrays = idx.load(tmp_path / "idx")
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(arrays, field), getattr(small_mnist, field))


def test_the_hash_depends_on_every_pixel_and_label(directory):
    arrays = idx.load(directory)
    seen = {arrays.sha256()}
    for field in arrays._fields[:4]:
        changed = getattr(arrays, field).copy()
        changed.reshape(-1)[-1] ^= 1
        seen.add(arrays._replace(**{field: changed}).sha256())
    assert len(seen) == 5


def _at(content, position, value):
    return content[:position] + value + content[position + len(value) :]


def _counts(content, *counts):
    """The file with different counts in its header."""
    return _at(content, 4, struct.pack(f">{len(counts)}I", *counts))


BROKEN = {
    "magic of labels": (TRAIN_IMAGES, lambda c: _at(c, 0, b"\0\0\x08\x01"), "2049, 40, 28, 28"),
    "labels of floats": (TEST_LABELS, lambda c: _at(c, 0, b"\0\0\x0d\x01"), "3329, 12"),
    "truncated images": (TEST_IMAGES, lambda c: c[:-1], "only 9,407 bytes after it"),
    "truncated labels": (TRAIN_LABELS, lambda c: c[:-5], "only 35 bytes after it"),
    "truncated header": (TRAIN_IMAGES, lambda c: c[:10], "not a complete idx file"),
    "empty file": (TEST_LABELS, lambda c: b"", "not a complete idx file"),
    "bytes after images": (TRAIN_IMAGES, lambda c: c + b"\0", "more than 31,360 bytes after it"),
    "bytes after labels": (TEST_LABELS, lambda c: c + b"\0", "more than 12 bytes after it"),
    "count beyond the file": (TRAIN_IMAGES, lambda c: _counts(c, 2**32 - 1), "4294967295, 28, 28"),
    "fewer labels": (TRAIN_LABELS, lambda c: _counts(c, 39)[:-1], "40 images, but .* has 39 labels"),
    "fewer images": (TEST_IMAGES, lambda c: _counts(c, 11)[:-784], "11 images, but .* has 12 labels"),
    "label of 10": (TEST_LABELS, lambda c: _at(c, 11, b"\x0a"), "a label 10, expected 0 to 9"),
    "label of 255": (TRAIN_LABELS, lambda c: c[:-1] + b"\xff", "a label 255"),
    "different size": (TRAIN_IMAGES, lambda c: _counts(c, 40, 32, 32), "'samples', 28, 28"),
    "swapped size": (TEST_IMAGES, lambda c: _counts(c, 12, 56, 14), "2051, 12, 56, 14"),
    "no images": (TRAIN_IMAGES, lambda c: _counts(c, 0)[:16], "not a complete idx file"),
    "no labels": (TEST_LABELS, lambda c: _counts(c, 0)[:8], "not a complete idx file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_idx_file_is_refused_by_name(small_mnist, tmp_path, case):
    name, break_it, message = BROKEN[case]
    path = small_mnist.write(tmp_path / "idx", compressed=False) / name
    path.write_bytes(break_it(path.read_bytes()))
    assert name in _refused(message, "idx", path.parent, validation=8)


BROKEN_GZIP = {
    "not gzip": lambda content: gzip.decompress(content),
    "cut short": lambda content: content[: len(content) // 2],
    "no checksum": lambda content: content[:-8],
    "flipped bits": lambda content: _at(content, len(content) // 2, b"\x00\xff\x00\xff"),
    "wrong checksum": lambda content: _at(content, len(content) - 8, b"\0\0\0\0"),
    "junk after it": lambda content: content + b"junk",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("case", BROKEN_GZIP)
def test_a_broken_gzip_file_is_refused_by_name(directory, case):
    path = directory / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(BROKEN_GZIP[case](path.read_bytes()))
    assert str(path) in _refused("cannot be read|complete idx file", "idx", directory, validation=8)


@pytest.mark.parametrize("samples", [40, 2**31])
def test_a_gzip_bomb_is_read_no_further_than_its_header_says(directory, samples):
    """256 MiB of zeros in 256 KiB, after a header of 40 images, or of more than such a file can hold."""
    path = directory / f"{TRAIN_IMAGES}.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(struct.pack(">4I", 0x803, samples, 28, 28))
        for _ in range(256):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        _refused(f"{TRAIN_IMAGES}.gz: not a complete idx file", "idx", directory, validation=8)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", idx.NAMES)
def test_a_missing_file_is_named_with_the_command(directory, name):
    (directory / f"{name}.gz").unlink()
    _refused(f"no {name} .*python -m blacksmith.assets mnist", "idx", directory, validation=8)


def test_idx_without_a_path_reads_the_cache(small_mnist):
    small_mnist.write(files.cache_dir() / "mnist")
    assert mnist.load("idx", validation=8).info.path == str(files.cache_dir() / "mnist")


@pytest.mark.skipif("BLACKSMITH_MNIST_DIR" not in os.environ, reason="needs the full MNIST")
def test_the_full_mnist_is_the_canonical_one():
    data = mnist.load("idx", os.environ["BLACKSMITH_MNIST_DIR"])
    assert [len(data.train), len(data.validation), len(data.test)] == [55000, 5000, 10000]
    assert data.info.sha256 == "25c98f992c005963b7428e1f38418b233c9b286cc403519287eb8063f0bcfe07"
    # The bundled digits are the first 500 of each label in the training set.
    full = idx.load(Path(os.environ["BLACKSMITH_MNIST_DIR"]))
    rows = np.concatenate([np.flatnonzero(full.train_labels == label)[:500] for label in range(10)])
    with np.load(Path(mnist.__file__).with_name("mnist5k.npz"), allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["images"], full.train_images[rows])
        np.testing.assert_array_equal(archive["labels"], full.train_labels[rows])


# --- mnist5k ---


def test_mnist5k_has_a_balanced_test_set_for_every_seed():
    first, second = (mnist.load("mnist5k", seed=seed) for seed in (0, 1))
    assert np.bincount(first.test.labels).tolist() == [100] * 10
    np.testing.assert_array_equal(first.test.images, second.test.images)
    assert [len(first.train), len(first.validation), len(first.test)] == [3500, 500, 1000]
    everything = np.concatenate([first.train.labels, first.validation.labels])
    assert np.bincount(everything).tolist() == [400] * 10
    assert not np.array_equal(first.train.images, second.train.images)


def test_mnist5k_is_shuffled_though_its_file_is_sorted():
    data = mnist.load("mnist5k")
    for split in (data.train, data.validation, data.test):
        for start in range(0, len(split), 100):
            # 100 draws from 10 labels miss more than two of them once in a million.
            assert len(np.unique(split.labels[start : start + 100])) >= 8


def test_mnist5k_splits_share_no_image():
    data = mnist.load("mnist5k")
    sets = [{image.tobytes() for image in split.images} for split in (data.train, data.validation, data.test)]
    assert len(set.union(*sets)) == 5000


def test_mnist5k_labels_belong_to_their_images():
    """A nearest-class-mean classifier gets at least 75% right; chance is 10%."""
    data = mnist.load("mnist5k")
    pixels = data.train.images.reshape(len(data.train), -1).astype(np.float32)
    means = np.stack([pixels[data.train.labels == label].mean(0) for label in range(10)])
    test = data.test.images.reshape(len(data.test), -1).astype(np.float32)
    distance = ((test[:, None] - means[None]) ** 2).sum(-1)
    assert (distance.argmin(1) == data.test.labels).mean() > 0.75


def test_mnist5k_is_the_documented_file():
    content = Path(mnist.__file__).with_name("mnist5k.npz").read_bytes()
    text = (ROOT / "docs" / "data.md").read_text()
    assert hashlib.sha256(content).hexdigest() in text
    assert mnist.load("mnist5k").info.sha256 in text


def test_mnist5k_takes_no_path():
    _refused("mnist5k is bundled; remove the path", "mnist5k", path="/somewhere")


@pytest.mark.parametrize("source", ["auto", "idx", "mnist5k"])
def test_only_tfds_takes_a_name(source):
    _refused("'kmnist' needs source 'tfds'", source, name="kmnist")


def test_mnist5k_refuses_to_hold_out_everything():
    _refused("validation=4000 of 4,000 train images", "mnist5k", validation=4000)


def test_mnist5k_describes_how_to_get_the_full_set():
    line = mnist.load("mnist5k").info.describe()
    assert "\n" not in line
    for part in ("3,500 train", "500 validation", "1,000 test", "python -m blacksmith.assets mnist"):
        assert part in line


# --- auto ---


def test_auto_refuses_an_incomplete_cache(small_mnist):
    (small_mnist.write(files.cache_dir() / "mnist") / f"{TEST_LABELS}.gz").unlink()
    _refused(f"no {TEST_LABELS} .*python -m blacksmith.assets mnist")


def test_auto_with_a_path_without_data_is_an_error(tmp_path):
    _refused("neither MNIST's idx files nor a prepared TFDS set 'mnist'", "auto", tmp_path)


def test_auto_does_not_replace_a_broken_file(small_mnist):
    path = small_mnist.write(files.cache_dir() / "mnist") / f"{TEST_LABELS}.gz"
    path.write_bytes(b"broken")
    _refused("cannot be read")


def test_an_unknown_source_lists_the_known_ones():
    _refused("no MNIST source 'ixd'; allowed: auto, idx, tfds", "ixd")


def test_loading_imports_neither_frameworks_nor_tfds():
    program = (
        "import sys; from blacksmith.datasets import mnist; mnist.load(); "
        "print(sorted({'jax', 'torch', 'keras', 'tensorflow_datasets', 'pooch'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("source", ["auto", "idx", "tfds"])
def test_a_path_that_cannot_be_looked_at_is_refused(tmp_path, source):
    with pytest.raises(DataError, match=r"a+: cannot be read \(File name too long\)"):
        mnist.load(source, tmp_path / ("a" * 5000))
