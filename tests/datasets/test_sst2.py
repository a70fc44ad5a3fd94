"""SST-2: all formats give the same examples in disjoint splits, and broken data is refused in one line."""

import csv
import dataclasses
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from blacksmith import network
from blacksmith.datasets import sst2
from blacksmith.datasets.sst2 import Examples, Source, reader
from blacksmith.datasets.sst2.splits import whole_sentences_around
from blacksmith.errors import DataError
from blacksmith.run.order import generator

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

TRAIN = [
    ('a "quiet" film', 1),
    ('"unbalanced and long', 0),
    ("1987", 1),
    ("null", 0),
    ("NA", 1),
    ("true", 0),
    ("déjà vu, again, and again", 0),
    ("it 's good -- really", 1),
]
TEST = [("fine", 1), ("not fine", 0), ("so \\ so", 1)]
GLUE = os.environ.get("BLACKSMITH_SST2")


@pytest.fixture(autouse=True)
def unreachable(monkeypatch):
    """Keeps every test off the network."""
    monkeypatch.setattr(network, "why_unreachable", lambda url: f"{url}: out of bounds")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def write(path, rows, sentence="sentence", label="label"):
    """Writes rows of (sentence, label) in the format of the path's suffix and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{sentence: text, label: value} for text, value in rows]
    if path.suffix == ".tsv":
        lines = [f"{sentence}\t{label}", *(f"{text}\t{value}" for text, value in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([(sentence, label), *rows])
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def write_directory(directory, train=TRAIN, suffix="tsv"):
    """Writes a directory of training examples and of `TEST`, and returns its path."""
    write(directory / f"train.{suffix}", train)
    write(directory / f"dev.{suffix}", TEST)
    return directory


def load(source="sample", validation=None, seed=0, **columns):
    return sst2.read(str(source), **columns).split(validation, seed)


def rows_of(*splits):
    """(sentence, label) of all examples of some splits."""
    return [pair for split in splits for pair in zip(split.sentences, split.labels.tolist())]


def numbered(count, start=0):
    return [(f"sentence {number}", number % 2) for number in range(start, start + count)]


def refused(match, source, **settings):
    with pytest.raises(DataError, match=match) as caught:
        load(source, **settings)
    assert "\n" not in str(caught.value)


# --- formats ---


@pytest.mark.parametrize("suffix", ["tsv", "csv", "json", "jsonl", "parquet"])
def test_all_formats_give_equal_examples_and_hash(tmp_path, suffix):
    data = load(write_directory(tmp_path, suffix=suffix), validation=2)
    assert sorted(rows_of(data.train, data.validation)) == sorted(TRAIN)
    assert rows_of(data.test) == TEST
    assert data.train.labels.dtype == np.int32
    # The sha256 of [[sentences, labels], [sentences, labels]] as JSON.
    assert data.info.sha256 == "5d05f2312519b1bd8fbc69389afb7a342ac9d8d00071ac8957e92d7263ea70de"


def test_the_hash_covers_sentences_labels_order_and_parts():
    def digest(*parts):
        parts = (Examples(tuple(s for s, _ in rows), np.array([y for _, y in rows]), None) for rows in parts)
        return Source("file", "", "", "", [], *parts).sha256

    flipped = [(text, 1 - label) for text, label in TRAIN]
    variants = [(TRAIN, TEST), (TRAIN[::-1], TEST), (flipped, TEST), (TEST, TRAIN), (TRAIN + TEST, [])]
    assert len({digest(*variant) for variant in variants}) == len(variants)


def test_glue_directory_is_read_without_its_unlabeled_test_file(tmp_path):
    write_directory(tmp_path)
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tno one knows\n")
    (tmp_path / "original").mkdir()
    (tmp_path / "README.md").write_text("sst-2")
    data = load(tmp_path, validation=2)
    assert rows_of(data.test) == TEST
    info = dataclasses.asdict(data.info)
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    assert list(info.items()) == [
        ("source", "directory"),
        ("name", tmp_path.name),
        ("path", str(tmp_path)),
        ("test_from", "dev.tsv"),
        ("unused", ["test.tsv"]),
        ("sha256", info["sha256"]),
        ("train", 6),
        ("validation", 2),
        ("test", 3),
        ("class_counts", {name: split.class_counts() for name, split in splits.items()}),
        ("test_in_train", 0),
        ("parts_left_out", 0),
    ]
    assert info["class_counts"]["test"] == {"negative": 1, "positive": 2}
    assert json.loads(json.dumps(info)) == info
    assert data.info.describe() == (
        f"data: {tmp_path}: 6 train, 2 validation, 3 test sentences from dev.tsv, "
        f"sha256 {data.info.sha256[:12]}; not used: test.tsv"
    )


@pytest.mark.parametrize(
    ("others", "test_from", "unused"),
    [
        ({"test": TEST}, "test.csv", []),
        ({"validation": TEST}, "validation.csv", []),
        ({"test": TEST, "validation": TRAIN}, "test.csv", ["validation.csv"]),
        ({"test": [("?", -1), ("??", -1)], "validation": TEST}, "validation.csv", ["test.csv"]),
        ({"test-00000-of-00001": TEST}, "test-00000-of-00001.csv", []),
    ],
)
def test_the_test_set_is_a_labeled_test_else_validation(tmp_path, others, test_from, unused):
    write(tmp_path / "train.csv", TRAIN)
    for name, rows in others.items():
        write(tmp_path / f"{name}.csv", rows)
    data = load(tmp_path, validation=2)
    assert rows_of(data.test) == TEST
    assert (data.info.test_from, data.info.unused) == (test_from, unused)


def test_columns_can_be_named_and_white_space_is_stripped(tmp_path):
    rows = [("  good \t", 1), ("bad\n", 0), ("fine", 1), ("poor", 0)]
    path = write(tmp_path / "reviews.csv", rows, "text", "y")
    data = load(path, sentence_column="text", label_column="y", validation=1)
    found = sorted(rows_of(data.train, data.validation, data.test))
    assert found == [("bad", 0), ("fine", 1), ("good", 1), ("poor", 0)]


@pytest.mark.parametrize("labels", [[1, 0], [1.0, 0.0], ["1", "0"], ["1.0", " 0 "]])
def test_labels_may_be_numbers_or_text(tmp_path, labels):
    for suffix in ("csv", "jsonl", "parquet"):
        path = write(tmp_path / f"some.{suffix}", [(f"sentence {row}", labels[row % 2]) for row in range(6)])
        assert sst2.read(str(path)).train.labels.tolist() == [1, 0, 1, 0, 1, 0]


def test_a_path_with_special_characters_is_taken_literally(tmp_path):
    directory = write_directory(tmp_path / ".hidden [1] *" / "a?b")
    write(tmp_path / ".hidden [1] *" / "aXb" / "train.tsv", numbered(50))
    assert len(load(directory, validation=2).train) == 6


def test_reading_leaves_no_files_and_library_settings_alone(tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.enable_progress_bars()
    datasets.logging.set_verbosity_warning()
    try:
        load(write(tmp_path / "in" / "some.csv", numbered(20)), validation=2)
        (tmp_path / "in" / "some.json").write_text("{")
        refused("cannot be read as json", tmp_path / "in" / "some.json")
        assert not datasets.are_progress_bars_disabled()
        assert datasets.logging.get_verbosity() == datasets.logging.WARNING
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.disable_progress_bars()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "some.csv", "some.json", "tmp"]


def test_importing_sst2_imports_no_heavy_library():
    code = (
        "import sys; from blacksmith.datasets import sst2; "
        "print([name for name in ('datasets', 'torch', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr


# --- splits ---


def test_splits_are_disjoint_complete_and_in_source_order(tmp_path):
    data = load(write_directory(tmp_path, numbered(100)), validation=0.25, seed=3)
    assert (len(data.train), len(data.validation), len(data.test)) == (75, 25, len(TEST))
    assert sorted(rows_of(data.train, data.validation)) == sorted(numbered(100))
    for split in (data.train, data.validation):
        numbers = [int(sentence.split()[1]) for sentence in split.sentences]
        assert numbers == sorted(numbers)
        assert split.labels.tolist() == [number % 2 for number in numbers]
        assert split.numbers.tolist() == [number + 1 for number in numbers]


def test_the_seed_decides_only_the_validation_set(tmp_path):
    path = write(tmp_path / "reviews.jsonl", numbered(100))
    first, again, other = (load(path, validation=20, seed=seed) for seed in (0, 0, 1))
    assert first.validation.sentences == again.validation.sentences
    assert first.validation.sentences != other.validation.sentences
    assert rows_of(first.test) == rows_of(other.test)
    assert [len(split) for split in (first.train, first.validation, first.test)] == [70, 20, 10]
    assert first.info.sha256 == other.info.sha256
    assert (first.info.source, first.info.test_from) == ("file", "a tenth of the file")


@pytest.mark.parametrize("seed", range(3))
def test_equal_sentences_stay_together(tmp_path, seed):
    rows = [(f"sentence {number % 30}", number % 2) for number in range(90)] + numbered(10, start=30)
    rows[60:90] = [(f" {sentence} ", label) for sentence, label in rows[60:90]]
    data = load(write_directory(tmp_path, rows, suffix="csv"), validation=31, seed=seed)
    assert not set(data.train.sentences) & set(data.validation.sentences)
    assert len(data.train) + len(data.validation) == 100
    assert 29 <= len(data.validation) <= 31


def hold_out_naively(rows, count, random):
    """(kept, held out) of distinct rows by the rule of `Pool`, comparing every sentence with every other."""
    texts = [" ".join(sentence.split()) for sentence, _ in rows]
    inside = [[j for j, b in enumerate(texts) if a != b and f" {a} " in f" {b} "] for a in texts]
    whole = [i for i, others in enumerate(inside) if not others]
    count = max(1, round(count * len(whole))) if isinstance(count, float) else count
    out = set(random.permutation(whole)[:count].tolist())
    kept = [
        i
        for i, others in enumerate(inside)
        if i not in out and (i in whole or any(j in whole and j not in out for j in others))
    ]
    return [rows[i] for i in kept], [rows[i] for i in sorted(out)]


@pytest.mark.parametrize("seed", range(4))
def test_whole_sentences_are_held_out_as_by_brute_force(tmp_path, seed):
    """As in SST-2: sentences with their phrases, some of which are in several sentences."""
    random = np.random.default_rng(seed)
    everything = {" ".join(random.choice(list("abcdefgh"), random.integers(4, 9))) for _ in range(40)}
    for sentence in sorted(everything):
        words = sentence.split()
        for _ in range(6):
            begin, end = sorted(random.choice(len(words) + 1, 2, replace=False))
            everything.add(" ".join(words[begin:end]))
    rows = [(text.replace(" ", "  ", 1), number % 2) for number, text in enumerate(sorted(everything))]
    random.shuffle(rows)
    rows = [(text, int(label)) for text, label in rows]

    data = load(write_directory(tmp_path / "set", rows), validation=10, seed=seed)
    kept, held = hold_out_naively(rows, 10, generator(seed, "validation"))
    assert (rows_of(data.train), rows_of(data.validation)) == (kept, held)
    left_out = len(rows) - len(kept) - len(held)
    assert data.info.parts_left_out == left_out > 0
    assert f"; {left_out} phrases of held-out sentences were left out" in data.info.describe()

    # A single file: first its test set, then from the rest the validation set.
    data = load(write(tmp_path / "some.tsv", rows), validation=0.2, seed=seed)
    rest, tested = hold_out_naively(rows, 0.1, generator(0, "test"))
    kept, held = hold_out_naively(rest, 0.2, generator(seed, "validation"))
    assert (rows_of(data.train), rows_of(data.validation), rows_of(data.test)) == (kept, held, tested)
    assert data.info.parts_left_out == len(rows) - len(kept) - len(held) - len(tested)


def test_sentences_contain_only_whole_words():
    # "a b c" is in the second sentence, as are both of its pairs, but only "xa b c" is there as words.
    assert whole_sentences_around(["a b c", "xa b c a b", "b", "a b c d"]) == [[3], [], [1, 3], []]


def test_for_testing_gives_all_of_a_file(tmp_path):
    path = write(tmp_path / "own.tsv", TRAIN)
    data = sst2.read(str(path)).for_testing()
    assert rows_of(data.test) == TRAIN
    assert (len(data.train), len(data.validation), data.info.train) == (0, 0, 0)
    assert data.info.sha256 == load(path, validation=1).info.sha256
    assert data.info.describe().startswith(f"data: {path}: 8 test sentences from the file, sha256")
    assert rows_of(sst2.read(str(write_directory(tmp_path / "set"))).for_testing().test) == TEST


# --- the sample ---


def test_the_sample_is_balanced_and_without_repetition():
    data = load()
    assert [len(split) for split in (data.train, data.validation, data.test)] == [200, 40, 80]
    assert data.test.class_counts() == {"negative": 40, "positive": 40}
    rows = rows_of(data.train, data.validation, data.test)
    assert len({sentence.lower() for sentence, _ in rows}) == 320
    assert sum(label for _, label in rows) == 160
    # As in docs/data.md and in checkpoints.
    assert data.info.sha256 == "e52f07ec7033bac68191a2fdcbe0d1928f62824184ce17424cb0918ec6826fb2"
    assert (data.info.source, data.info.path) == ("sample", None)
    assert "not SST-2 itself" in data.info.describe()


def test_words_of_the_sample_carry_over_from_train_to_test():
    """Naive Bayes over words: far better than chance, and not perfect."""
    data = load()

    def words(sentence):
        return set(re.findall(r"\w+", sentence))

    counts = {}
    for sentence, label in rows_of(data.train):
        for word in words(sentence):
            counts.setdefault(word, [0.5, 0.5])[label] += 1
    correct = [
        (sum(np.log(counts[word][1] / counts[word][0]) for word in words(sentence) & counts.keys()) > 0)
        == label
        for sentence, label in rows_of(data.test)
    ]
    assert 0.75 <= np.mean(correct) <= 0.95


# --- the hub ---


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The id of a dataset in the library's cache, as left by a download."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = {"train": TRAIN, "validation": TEST, "test": [("?", -1)]}
    paths = {split: write(tmp_path / f"{split}.parquet", rows) for split, rows in splits.items()}
    Parquet(
        cache_dir=str(tmp_path / "cache"),
        dataset_name="sst2",
        config_id="default",
        hash="0" * 40,
        data_files={split: glob.escape(str(path)) for split, path in paths.items()},
    ).download_and_prepare()
    (tmp_path / "cache" / "sst2").rename(tmp_path / "cache" / "someone___sst2")
    return "someone/sst2"


def test_a_cached_hub_dataset_is_read_without_a_network(cached):
    data = load(cached, validation=2)
    assert sorted(rows_of(data.train, data.validation)) == sorted(TRAIN)
    assert rows_of(data.test) == TEST
    info = data.info
    assert (info.source, info.name, info.path) == ("hub", "someone/sst2", None)
    assert (info.test_from, info.unused) == ("validation", ["test"])
    assert "someone/sst2 from the Hugging Face hub" in info.describe()
    assert datasets.config.HF_HUB_OFFLINE is False


def test_an_unreachable_hub_is_refused_and_not_tried(tmp_path, monkeypatch):
    offline, load_dataset = [], datasets.load_dataset

    def observed(*arguments):
        offline.append(datasets.config.HF_HUB_OFFLINE)
        return load_dataset(*arguments)

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", observed)
    refused("hub is unreachable: .*out of bounds.*'sample'", "stanfordnlp/sst2")
    assert (offline, datasets.config.HF_HUB_OFFLINE) == ([True], False)


def test_hf_hub_offline_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(network, "why_unreachable", lambda url: pytest.fail("tried to connect"))
    refused("HF_HUB_OFFLINE is set", "stanfordnlp/sst2")


def test_errors_of_the_hub_become_one_line(monkeypatch):
    calls = []

    def load_dataset(*arguments):
        calls.append(arguments)
        raise RuntimeError("no such thing\n\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(network, "why_unreachable", lambda url: None)
    refused(r"nyu-mll/glue:sst2: .*cannot be loaded .*\(no such thing\)", "nyu-mll/glue:sst2")
    assert calls == [("nyu-mll/glue", "sst2")]


# --- what is refused ---


@pytest.mark.parametrize("source", ["smaple", "./missing", "a/b/c", "data/reviews.tsv", "owner/name:a:b"])
def test_an_unknown_source_is_refused(source):
    refused("no such file or directory; allowed: 'sample', ", source)


HEADER = b"sentence\tlabel\n"
BROKEN = {
    "empty": ("some.tsv", b"", "some.tsv: no rows"),
    "header only": ("some.tsv", HEADER, "some.tsv: no rows"),
    "no rows in json": ("some.json", b"[]", "some.json: no rows"),
    "no sentence column": (
        "some.tsv",
        b"text\ty\nhi\t1\n",
        "some.tsv: no column 'sentence'; there are: text, y; .*sentence_column",
    ),
    "no label column": ("some.tsv", b"sentence\ty\nhi\t1\n", "no column 'label'.*label_column"),
    "label 2": (
        "some.tsv",
        HEADER + b"hi\t1\nho\t2\n",
        "some.tsv, row 2: sentence = 'ho', label = '2'; needed: text, and 0",
    ),
    "label 0.5": ("some.jsonl", b'{"sentence": "hi", "label": 0.5}\n', "row 1: .*label = 0.5"),
    "label true": ("some.jsonl", b'{"sentence": "hi", "label": true}\n', "row 1: .*label = True"),
    "label NaN": ("some.jsonl", b'{"sentence": "hi", "label": NaN}\n', "row 1: .*label = nan"),
    "half a character": ("some.jsonl", b'{"sentence": "\\ud800", "label": 1}\n', "surrogate pair .* row 0"),
    "many columns": ("some.csv", b"sentence,label" + b",a" * 1000 + b"\n", "more than 1,000 columns"),
    "many columns of a quoted header": (
        "some.csv",
        b'\n"sentence\n",label' + b",a" * 1000 + b"\n",
        "more than 1,000 columns",
    ),
    "many keys": (
        "some.jsonl",
        b"".join(b'{"sentence": "hi", "label": 1, "k%d": 0}\n' % i for i in range(1000)),
        "more than 1,000 columns",
    ),
    "a column twice": ("some.csv", b"sentence,label,label\nhi,1,0\n", "the header has 'label' twice"),
    "a key twice": ("some.jsonl", b'{"sentence": "hi", "label": 1, "label": 0}\n', "a key twice"),
    "too few fields": ("some.tsv", HEADER + b"hi\t1\nho\n", "row 2: .*label = ''"),
    "too many fields": ("some.tsv", HEADER + b"hi\t1\nho\t1\t1\n", "cannot be read as tsv .*saw 3"),
    "always too many": ("some.csv", b"sentence,label\nhi,1,1\n", "more fields than the header"),
    "null label": (
        "some.jsonl",
        b'{"sentence": "a", "label": 1}\n{"sentence": "b"}\n',
        "row 2: .*label = None",
    ),
    "null sentence": ("some.jsonl", b'{"sentence": null, "label": 1}\n', "row 1: sentence = None"),
    "number as sentence": ("some.jsonl", b'{"sentence": 5, "label": 1}\n', "sentence = 5, .* needed: text"),
    "blank sentence": ("some.tsv", HEADER + b"hi\t1\n  \t0\n", "row 2: sentence = '  '"),
    "not utf-8": ("some.tsv", HEADER + b"caf\xe9\t1\n", "cannot be read as tsv .*utf-8"),
    "deep json": (
        "some.jsonl",
        b'{"sentence": "hi", "label": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "maximum recursion depth",
    ),
    "broken json": ("some.json", b'[{"sentence": "hi"', "cannot be read as json "),
    "broken jsonl": ("some.jsonl", b'{"sentence": "hi", "label": 1}\nnonsense\n', "cannot be read as jsonl"),
    "open quote": ("some.csv", b'sentence,label\n"hi, 1\n', "cannot be read as csv"),
    "broken parquet": ("some.parquet", b"PAR1nonsense", "cannot be read as parquet"),
    "one row": ("some.tsv", HEADER + b"hi\t1\n", "cannot hold out 0.1 of 1 "),
    "other format": ("some.xlsx", b"PK", r"unknown format; allowed: \.tsv, "),
}


@pytest.mark.parametrize(("name", "content", "match"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    refused(match, tmp_path / name, validation=1)


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    columns = {"sentence": pyarrow.array([], pyarrow.string()), "label": pyarrow.array([], "int8")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "some.parquet")
    refused("no rows", tmp_path / "some.parquet")


def test_test_sentences_that_are_trained_on_are_counted(tmp_path):
    write(tmp_path / "train.tsv", numbered(8))
    write(tmp_path / "dev.tsv", numbered(12))
    info = load(tmp_path, validation=2).info
    assert info.test_in_train == 6
    assert "6 of the test sentences are also in the training data" in info.describe()


@pytest.mark.parametrize(
    ("texts", "rows", "match"),
    [
        (["a film"], 6_000_000, "more than 5,000,000 rows"),
        (["a" * 10**6], 2_000, "more than 1,073,741,824 bytes"),
    ],
)
def test_a_parquet_file_that_expands_is_refused(tmp_path, texts, rows, match):
    repeated = pyarrow.DictionaryArray.from_arrays(np.zeros(rows, np.int32), texts)
    columns = {"sentence": repeated, "label": np.zeros(rows, np.int8)}
    path = tmp_path / "some.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd")
    assert path.stat().st_size < 100_000
    refused(match, path)


def test_a_file_with_too_many_bytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_MOST_BYTES", 100)
    refused("more than 100 bytes", write(tmp_path / "some.tsv", numbered(20)))


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], "needs train.* none"),
        (["dev.tsv"], "needs train.* dev"),
        (["train.tsv", "train.csv", "dev.tsv"], "train.tsv and train.csv"),
        (["train.tsv", "dev.tsv", "validation.tsv"], "one test set.* dev, train, validation"),
        (["train.tsv"], "one test set.*'label'"),
    ],
)
def test_an_ambiguous_or_incomplete_directory_is_refused(tmp_path, files, match):
    for name in files:
        write(tmp_path / name, TRAIN)
    refused(match, tmp_path, validation=1)


def test_an_unlabeled_test_file_is_no_test_data(tmp_path):
    write(tmp_path / "train.tsv", TRAIN)
    write(tmp_path / "test.tsv", [("?", -1)])
    refused("one test set", tmp_path, validation=1)


def test_files_with_different_columns_are_refused(tmp_path):
    write_directory(tmp_path)
    write(tmp_path / "dev.tsv", TEST, sentence="content")
    refused("dev.tsv: no column 'sentence'; there are: content, label", tmp_path, validation=1)


@pytest.mark.parametrize("validation", [0, -1, 8, 1.0, 2.5])
def test_an_impossible_validation_is_refused(tmp_path, validation):
    match = f"cannot hold out {validation!r} of 8 .*some must be left"
    refused(match, write_directory(tmp_path), validation=validation)


def test_a_single_class_is_refused(tmp_path):
    directory = write_directory(tmp_path, [(text, 1) for text, _ in TRAIN])
    refused("all 6 training examples are positive; needed: both", directory, validation=2)


def test_repeated_sentences_that_cannot_be_split_are_refused(tmp_path):
    directory = write_directory(tmp_path, [("good", 1), ("bad", 0)] * 3)
    refused("cannot hold out 2 of 6 ", directory, validation=2)


# --- the real thing ---


@pytest.mark.skipif(not GLUE, reason="BLACKSMITH_SST2 names no directory with GLUE's SST-2")
def test_the_whole_of_sst2_is_read():
    data = load(GLUE)
    assert data.info.sha256 == "df2c1a008c88a1395af39fcb5b640a83fd2ff175e7443547f6eadb6754ea1ad4"
    assert [len(split) for split in (data.validation, data.test)] == [1_000, 872]
    assert len(data.train) + 1_000 + data.info.parts_left_out == 67_349
    lines = (Path(GLUE) / "train.tsv").read_text("utf-8").split("\n")[1:-1]
    rows = [(text.strip(), int(label)) for text, label in (line.split("\t") for line in lines)]
    assert set(rows_of(data.train, data.validation)) <= set(rows)
    words = [len(sentence.split()) for sentence in data.validation.sentences]
    assert np.mean(words) == pytest.approx(19.5, abs=1)  # the dev set has 19.5
    kept = "\n".join(f" {' '.join(sentence.split())} " for sentence in data.train.sentences)
    assert not any(f" {' '.join(sentence.split())} " in kept for sentence in data.validation.sentences)
