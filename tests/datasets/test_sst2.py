"""SST-2: every format gives the same examples, in disjoint splits; what is broken is refused in one line."""

import csv
import glob
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from blacksmith.datasets import sst2
from blacksmith.datasets.sst2 import hub, library
from blacksmith.datasets.sst2.examples import Examples, content_sha256
from blacksmith.errors import DataError

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
    """Keeps every test from the network."""

    def refuse(url, timeout=None):
        return f"{url}: out of bounds"

    monkeypatch.setattr(hub.assets, "why_unreachable", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def _write(path, rows, sentence="sentence", label="label"):
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
        with library.opened():
            datasets.Dataset.from_list(records).to_parquet(path)
    return path


def _load(source="sample", validation=None, seed=0, **columns):
    return sst2.read(source, **columns).split(validation, seed)


def _rows(examples):
    return list(zip(examples.sentences, examples.labels.tolist()))


def _many(count, start=0):
    return [(f"sentence {number}", number % 2) for number in range(start, start + count)]


def _refused(match, source, **settings):
    with pytest.raises(DataError, match=match) as caught:
        _load(str(source), **settings)
    assert "\n" not in str(caught.value)


# --- formats ---


@pytest.mark.parametrize("suffix", ["tsv", "csv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_examples_and_the_same_hash(tmp_path, suffix):
    _write(tmp_path / f"train.{suffix}", TRAIN)
    _write(tmp_path / f"dev.{suffix}", TEST)
    data = _load(str(tmp_path), validation=2)
    assert sorted(_rows(data.train) + _rows(data.validation)) == sorted(TRAIN)
    assert _rows(data.test) == TEST
    assert data.train.labels.dtype == np.int32
    text = json.dumps([[[text for text, _ in rows], [label for _, label in rows]] for rows in (TRAIN, TEST)])
    assert data.info["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_depends_on_sentences_labels_order_and_on_what_is_test():
    def digest(train, test):
        parts = [
            Examples(tuple(s for s, _ in rows), np.array([y for _, y in rows]), np.arange(1, len(rows) + 1))
            for rows in (train, test)
        ]
        return content_sha256(*parts)

    flipped = [(text, 1 - label) for text, label in TRAIN]
    variants = [(TRAIN, TEST), (TRAIN[::-1], TEST), (flipped, TEST), (TEST, TRAIN), (TRAIN + TEST, [])]
    assert len({digest(*variant) for variant in variants}) == len(variants)


def test_glue_s_directory_is_read_and_its_unlabelled_test_file_is_not_used(tmp_path):
    _write(tmp_path / "train.tsv", TRAIN)
    _write(tmp_path / "dev.tsv", TEST)
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tno one knows\n")
    (tmp_path / "original").mkdir()
    (tmp_path / "README.md").write_text("sst-2")
    data = _load(str(tmp_path), validation=2)
    assert _rows(data.test) == TEST
    assert data.info == {
        "source": "directory",
        "name": tmp_path.name,
        "path": str(tmp_path),
        "test_from": "dev.tsv",
        "unused": ["test.tsv"],
        "sha256": data.info["sha256"],
        "train": 6,
        "validation": 2,
        "test": 3,
        "parts_left_out": 0,
        "class_counts": {
            "train": data.train.class_counts(),
            "validation": data.validation.class_counts(),
            "test": {"negative": 1, "positive": 2},
        },
    }
    counts = [data.info["class_counts"][split] for split in ("train", "validation")]
    assert {name: sum(count[name] for count in counts) for name in sst2.CLASSES} == {
        "negative": 4,
        "positive": 4,
    }
    assert json.loads(json.dumps(data.info)) == data.info
    assert sst2.describe(data.info) == (
        f"data: {tmp_path}: 6 train, 2 validation, 3 test sentences from dev.tsv, "
        f"sha256 {data.info['sha256'][:12]}; not used: test.tsv"
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
def test_the_test_set_is_a_labelled_test_file_else_validation_or_dev(tmp_path, others, test_from, unused):
    _write(tmp_path / "train.csv", TRAIN)
    for name, rows in others.items():
        _write(tmp_path / f"{name}.csv", rows)
    data = _load(str(tmp_path), validation=2)
    assert _rows(data.test) == TEST
    assert (data.info["test_from"], data.info["unused"]) == (test_from, unused)


def test_columns_can_have_other_names_and_white_space_is_stripped(tmp_path):
    path = _write(
        tmp_path / "reviews.csv", [("  good \t", 1), ("bad\n", 0), ("fine", 1), ("poor", 0)], "text", "y"
    )
    data = _load(str(path), sentence_column="text", label_column="y", validation=1)
    everything = _rows(data.train) + _rows(data.validation) + _rows(data.test)
    assert sorted(everything) == [("bad", 0), ("fine", 1), ("good", 1), ("poor", 0)]


@pytest.mark.parametrize("labels", [[1, 0], [1.0, 0.0], ["1", "0"], ["1.0", " 0 "]])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_labels_may_be_whole_numbers_or_their_text(tmp_path, labels, suffix):
    rows = [(f"sentence {row}", labels[row % 2]) for row in range(6)]
    _write(tmp_path / f"train.{suffix}", rows)
    _write(tmp_path / f"dev.{suffix}", rows)
    assert _load(str(tmp_path), validation=1).test.labels.tolist() == [1, 0, 1, 0, 1, 0]


def test_a_path_with_special_characters_is_taken_as_it_is(tmp_path):
    directory = tmp_path / ".hidden [1] *" / "a?b"
    _write(directory / "train.tsv", TRAIN)
    _write(directory / "dev.tsv", TEST)
    _write(tmp_path / ".hidden [1] *" / "aXb" / "train.tsv", _many(50))
    assert len(_load(str(directory), validation=2).train) == 6


def test_reading_leaves_no_file_behind_and_the_library_as_it_was(tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.enable_progress_bars()
    datasets.logging.set_verbosity_warning()
    try:
        _load(str(_write(tmp_path / "in" / "some.csv", _many(20))), validation=2)
        _refused("cannot be read as json", _broken(tmp_path / "in" / "some.json", b"{"))
        assert not datasets.are_progress_bars_disabled()
        assert datasets.logging.get_verbosity() == datasets.logging.WARNING
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.disable_progress_bars()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "some.csv", "some.json", "tmp"]


def test_importing_imports_neither_the_library_nor_a_framework():
    code = (
        "import sys; from blacksmith.datasets import sst2; "
        "print([name for name in ('datasets', 'torch', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr


# --- splits ---


def test_the_splits_are_disjoint_complete_and_in_stored_order(tmp_path):
    _write(tmp_path / "train.tsv", _many(100))
    _write(tmp_path / "dev.tsv", _many(10, start=100))
    data = _load(str(tmp_path), validation=0.25, seed=3)
    assert (len(data.train), len(data.validation), len(data.test)) == (75, 25, 10)
    assert sorted(_rows(data.train) + _rows(data.validation)) == sorted(_many(100))
    for split in (data.train, data.validation):
        numbers = [int(sentence.split()[1]) for sentence in split.sentences]
        assert numbers == sorted(numbers)
        assert split.labels.tolist() == [number % 2 for number in numbers]


def test_the_seed_decides_what_is_held_out_and_nothing_else(tmp_path):
    _write(tmp_path / "train.tsv", _many(100))
    _write(tmp_path / "dev.tsv", _many(10, start=100))
    first, again, other = (_load(str(tmp_path), validation=20, seed=seed) for seed in (0, 0, 1))
    assert first.validation.sentences == again.validation.sentences
    assert first.validation.sentences != other.validation.sentences
    assert _rows(first.test) == _rows(other.test)
    assert first.info["sha256"] == other.info["sha256"]


@pytest.mark.parametrize("seed", range(5))
def test_equal_sentences_stay_on_one_side(tmp_path, seed):
    rows = [(f"sentence {number % 30}", number % 2) for number in range(90)] + _many(10, start=30)
    rows[60:90] = [(f" {sentence} ", label) for sentence, label in rows[60:90]]
    _write(tmp_path / "train.csv", rows)
    _write(tmp_path / "dev.csv", TEST)
    data = _load(str(tmp_path), validation=31, seed=seed)
    assert not set(data.train.sentences) & set(data.validation.sentences)
    assert len(data.train) + len(data.validation) == 100
    assert 29 <= len(data.validation) <= 31


def _is_part(part, whole):
    return f" {' '.join(part.split())} " in f" {' '.join(whole.split())} "


@pytest.mark.parametrize("seed", range(4))
def test_whole_sentences_are_held_out_and_what_is_only_part_of_them_is_left_out(tmp_path, seed):
    """As in SST-2: sentences with their phrases, some of which are in several sentences."""
    random = np.random.default_rng(seed)
    sentences = {" ".join(random.choice(list("abcdefgh"), random.integers(4, 9))) for _ in range(40)}
    phrases = set()
    for sentence in sorted(sentences):
        words = sentence.split()
        for _ in range(6):
            begin, end = sorted(random.choice(len(words) + 1, 2, replace=False))
            phrases.add(" ".join(words[begin:end]))
    everything = sorted(sentences | phrases)
    random.shuffle(everything)
    rows = [(f" {text.replace(' ', '  ', 1)}", number % 2) for number, text in enumerate(everything)]
    _write(tmp_path / "train.csv", rows)
    _write(tmp_path / "dev.csv", TEST)
    data = _load(str(tmp_path), validation=10, seed=seed)
    out = [" ".join(sentence.split()) for sentence in data.validation.sentences]
    kept = {" ".join(sentence.split()) for sentence in data.train.sentences}
    others = {
        text: [whole for whole in everything if whole != text and _is_part(text, whole)]
        for text in everything
    }
    assert len(out) == 10
    assert not any(others[sentence] for sentence in out)
    for text in everything:
        around = [whole for whole in others[text] if not others[whole]]
        left_out = text in out or (around and all(whole in out for whole in around))
        assert (text in kept) == (not left_out)
    gone = len(rows) - len(data.train) - len(data.validation)
    assert data.info["parts_left_out"] == gone > 0
    assert f"; {gone} that are part of held-out ones were left out" in sst2.describe(data.info)


def test_words_are_whole_when_a_sentence_is_part_of_another(tmp_path):
    _write(tmp_path / "train.tsv", [("a good film", 1), ("a good filmmaker", 1), ("bad", 0), ("not good", 0)])
    _write(tmp_path / "dev.tsv", TEST)
    data = _load(str(tmp_path), validation=1)
    assert len(data.train) + len(data.validation) == 4


def test_of_other_data_all_is_tested(tmp_path):
    path = _write(tmp_path / "own.tsv", TRAIN)
    data = sst2.read(str(path)).for_testing()
    assert _rows(data.test) == TRAIN
    assert (len(data.train), len(data.validation), data.info["train"]) == (0, 0, 0)
    assert data.info["sha256"] == _load(str(path), validation=1).info["sha256"]
    assert sst2.describe(data.info).startswith(f"data: {path}: 8 test sentences from the file, sha256")
    _write(tmp_path / "set" / "train.tsv", TRAIN)
    _write(tmp_path / "set" / "dev.tsv", TEST)
    assert _rows(sst2.read(str(tmp_path / "set")).for_testing().test) == TEST


@pytest.mark.parametrize("name", ["reviews.tsv", "train.csv", "reviews.jsonl", "reviews.parquet"])
def test_a_tenth_of_a_single_file_is_its_test_set_whatever_the_seed(tmp_path, name):
    path = _write(tmp_path / name, _many(100))
    first, other = (_load(str(path), validation=count, seed=seed) for count, seed in ((20, 0), (30, 1)))
    assert [len(split) for split in (first.train, first.validation, first.test)] == [70, 20, 10]
    assert _rows(first.test) == _rows(other.test)
    assert sorted(_rows(first.train) + _rows(first.validation) + _rows(first.test)) == sorted(_many(100))
    assert (first.info["source"], first.info["test_from"]) == ("file", "a tenth of the file")


# --- the sample ---


def test_the_sample_is_balanced_varied_and_without_repetition():
    data = _load()
    assert [len(split) for split in (data.train, data.validation, data.test)] == [200, 40, 80]
    assert data.test.class_counts() == {"negative": 40, "positive": 40}
    sentences = data.train.sentences + data.validation.sentences + data.test.sentences
    assert len({sentence.lower() for sentence in sentences}) == 320
    labels = np.concatenate([data.train.labels, data.validation.labels, data.test.labels])
    assert labels.sum() == 160
    lengths = [len(sentence.split()) for sentence in sentences]
    assert min(lengths) >= 3
    assert max(lengths) <= 30
    assert (data.info["source"], data.info["path"]) == ("sample", None)
    assert "not SST-2 itself" in sst2.describe(data.info)


def test_the_words_of_the_sample_carry_over_from_train_to_test():
    """Naive Bayes over words: far better than chance, and still with something left to do."""
    data = _load()

    def words(sentence):
        return set(re.findall(r"\w+", sentence))

    counts = {}
    for sentence, label in _rows(data.train):
        for word in words(sentence):
            counts.setdefault(word, [0.5, 0.5])[label] += 1
    right = [
        (sum(np.log(counts[word][1] / counts[word][0]) for word in words(sentence) & counts.keys()) > 0)
        == label
        for sentence, label in _rows(data.test)
    ]
    assert 0.75 <= np.mean(right) <= 0.95


def test_the_sample_s_validation_can_be_chosen():
    assert len(_load(validation=24).validation) == 24
    _refused("no column 'text'; there are: sentence, label, split", "sample", sentence_column="text")


# --- the hub ---


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A dataset in the library's cache, as a download leaves it; gives its id."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = {"train": TRAIN, "validation": TEST, "test": [("?", -1)]}
    paths = {split: _write(tmp_path / f"{split}.parquet", rows) for split, rows in splits.items()}
    with library.opened():
        Parquet(
            cache_dir=str(tmp_path / "cache"),
            dataset_name="sst2",
            config_id="default",
            hash="0" * 40,
            data_files={split: glob.escape(str(path)) for split, path in paths.items()},
        ).download_and_prepare()
    (tmp_path / "cache" / "sst2").rename(tmp_path / "cache" / "someone___sst2")
    return "someone/sst2"


def test_a_cached_hub_dataset_is_read_without_the_hub(cached):
    data = _load(cached, validation=2)
    assert sorted(_rows(data.train) + _rows(data.validation)) == sorted(TRAIN)
    assert _rows(data.test) == TEST
    assert [data.info[key] for key in ("source", "name", "path", "test_from", "unused")] == [
        "hub",
        "someone/sst2",
        None,
        "validation",
        ["test"],
    ]
    assert "someone/sst2 from the hub" in sst2.describe(data.info)
    assert datasets.config.HF_HUB_OFFLINE is False


def test_an_unreachable_hub_is_refused_with_what_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    _refused("not in the cache and cannot be downloaded .*out of bounds.*'sample'", "stanfordnlp/sst2")


def test_the_library_does_not_try_a_hub_that_cannot_be_reached(monkeypatch):
    offline = []

    def load_dataset(*arguments):
        offline.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    _refused("not in the cache", "stanfordnlp/sst2")
    assert (offline, datasets.config.HF_HUB_OFFLINE) == ([True], False)


def test_hf_hub_offline_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.assets, "why_unreachable", lambda url: pytest.fail("asked for the hub"))
    _refused("HF_HUB_OFFLINE is set", "stanfordnlp/sst2")


def test_the_id_and_its_configuration_reach_the_library_and_its_errors_become_one_line(monkeypatch):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        raise RuntimeError("no such thing\n\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub.assets, "why_unreachable", lambda url: None)
    _refused(r"nyu-mll/glue:sst2: cannot be loaded .*\(no such thing and more\)", "nyu-mll/glue:sst2")
    assert asked == [("nyu-mll/glue", "sst2")]


# --- what is refused ---


@pytest.mark.parametrize(
    "source", ["smaple", "./missing", "a/b/c", "data/reviews.tsv", "owner/name:a:b", "~/no"]
)
def test_what_is_neither_a_path_nor_an_id_is_refused_with_what_is_allowed(source):
    _refused("no such file or directory; allowed: 'sample', a directory or a file of tsv", source)


def _broken(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


HEADER = b"sentence\tlabel\n"
BROKEN = {
    "empty": ("some.tsv", b"", "some.tsv: the file is empty"),
    "empty json": ("some.json", b"", "some.json: the file is empty"),
    "header only": ("some.tsv", HEADER, "some.tsv: the file has no rows"),
    "no rows in json": ("some.json", b"[]", "some.json: the file has no rows"),
    "wrong columns": (
        "some.tsv",
        b"text\ty\nhi\t1\n",
        "no column 'sentence'; there are: text, y; .*sentence_column",
    ),
    "no label column": ("some.tsv", b"sentence\ty\nhi\t1\n", "no column 'label'.*label_column"),
    "commas in a tsv": ("some.tsv", b"sentence,label\nhi,1\n", "there are: sentence,label"),
    "label 2": ("some.tsv", HEADER + b"hi\t1\nho\t2\n", "some.tsv, row 2: label '2'; allowed: 0"),
    "label -1": ("some.tsv", HEADER + b"hi\t-1\n", "row 1: label '-1'"),
    "label by name": ("some.tsv", HEADER + b"hi\tpositive\n", "row 1: label 'positive'"),
    "label 0.5": ("some.jsonl", b'{"sentence": "hi", "label": 0.5}\n', "row 1: label 0.5"),
    "label true": ("some.jsonl", b'{"sentence": "hi", "label": true}\n', "row 1: label True"),
    "no label": ("some.tsv", HEADER + b"hi\t1\nho\t\n", "row 2: no label"),
    "too few fields": ("some.tsv", HEADER + b"hi\t1\nho\n", "row 2: no label"),
    "too many fields": ("some.tsv", HEADER + b"hi\t1\nho\t1\t1\n", "cannot be read as tsv .*saw 3"),
    "always too many": ("some.csv", b"sentence,label\nhi,1,1\n", "more fields than the header"),
    "null label": ("some.jsonl", b'{"sentence": "a", "label": 1}\n{"sentence": "b"}\n', "row 2: no label"),
    "null sentence": ("some.jsonl", b'{"sentence": null, "label": 1}\n', "row 1: no sentence"),
    "number as sentence": ("some.jsonl", b'{"sentence": 5, "label": 1}\n', "row 1: sentence 5 is not text"),
    "empty sentence": ("some.tsv", HEADER + b"hi\t1\n\t0\n", "row 2: no sentence"),
    "blank sentence": ("some.tsv", HEADER + b"hi\t1\n  \t0\n", "row 2: the sentence is empty"),
    "not utf-8": ("some.tsv", HEADER + b"caf\xe9\t1\n", "cannot be read as tsv .*utf-8"),
    "json not utf-8": (
        "some.jsonl",
        b'{"sentence": "caf\xe9", "label": 1}\n',
        "cannot be read as jsonl .*utf-8",
    ),
    "broken json": ("some.json", b'[{"sentence": "hi"', "cannot be read as json "),
    "broken jsonl": ("some.jsonl", b'{"sentence": "hi", "label": 1}\nnonsense\n', "cannot be read as jsonl"),
    "open quote": ("some.csv", b'sentence,label\n"hi, 1\n', "cannot be read as csv"),
    "broken parquet": ("some.parquet", b"PAR1nonsense", "cannot be read as parquet"),
    "one row": ("some.tsv", HEADER + b"hi\t1\n", "too few sentences"),
    "other format": ("some.xlsx", b"PK", r"unknown format; allowed: \.tsv, "),
}


@pytest.mark.parametrize(("name", "content", "match"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused(tmp_path, name, content, match):
    _refused(match, _broken(tmp_path / name, content), validation=1)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], "no training file; .* no file at all"),
        (["dev.tsv", "notes.txt"], "no training file; .* there are: dev.tsv, notes.txt"),
        (["train.tsv", "train.csv", "dev.tsv"], "train.csv and train.tsv are both there"),
        (["train.tsv", "dev.tsv", "validation.tsv"], "validation and dev are both there"),
        (["train.tsv"], "nothing to test with; .*'label'"),
    ],
)
def test_a_directory_that_is_not_clear_is_refused(tmp_path, files, match):
    for name in files:
        _write(tmp_path / name, TRAIN) if name != "notes.txt" else (tmp_path / name).touch()
    _refused(match, tmp_path, validation=1)


def test_an_unlabelled_test_file_alone_is_nothing_to_test_with(tmp_path):
    _write(tmp_path / "train.tsv", TRAIN)
    _write(tmp_path / "test.tsv", [("?", -1)])
    _refused("nothing to test with", tmp_path, validation=1)


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    table = pyarrow.table(
        {"sentence": pyarrow.array([], pyarrow.string()), "label": pyarrow.array([], "int8")}
    )
    pyarrow.parquet.write_table(table, tmp_path / "some.parquet")
    _refused("the file has no rows", tmp_path / "some.parquet")


@pytest.mark.parametrize("validation", [0, -1, 8, 1000, True, 0.0, 1.0, 2.5, float("nan")])
def test_an_impossible_validation_is_refused(tmp_path, validation):
    _write(tmp_path / "train.tsv", TRAIN)
    _write(tmp_path / "dev.tsv", TEST)
    _refused(
        f"train.tsv: validation={validation!r} with 8 training examples that are part of no other; "
        "allowed: a whole number from 1 to 7, or a fraction",
        tmp_path,
        validation=validation,
    )


def test_a_single_class_is_refused(tmp_path):
    _write(tmp_path / "train.tsv", [(text, 1) for text, _ in TRAIN])
    _write(tmp_path / "dev.tsv", TEST)
    _refused("train.tsv: all 6 training examples are positive; both classes", tmp_path, validation=2)


def test_repeated_sentences_that_cannot_be_divided_are_refused(tmp_path):
    _write(tmp_path / "train.tsv", [("good", 1), ("bad", 0)] * 3)
    _write(tmp_path / "dev.tsv", TEST)
    _refused("2 rows cannot be held out", tmp_path, validation=2)


# --- the real thing ---


@pytest.mark.skipif(not GLUE, reason="BLACKSMITH_SST2 names no directory with GLUE's SST-2")
def test_glue_s_sst2_is_read_whole():
    data = _load(GLUE)
    assert [len(split) for split in (data.validation, data.test)] == [1_000, 872]
    assert len(data.train) + 1_000 + data.info["parts_left_out"] == 67_349
    lines = (Path(GLUE) / "train.tsv").read_text("utf-8").split("\n")[1:-1]
    rows = [(text.strip(), int(label)) for text, label in (line.split("\t") for line in lines)]
    assert set(_rows(data.train) + _rows(data.validation)) <= set(rows)
    words = [len(sentence.split()) for sentence in data.validation.sentences]
    assert np.mean(words) == pytest.approx(19.5, abs=1)  # the dev set has 19.5
    kept = "\n".join(f" {' '.join(sentence.split())} " for sentence in data.train.sentences)
    assert not any(f" {' '.join(sentence.split())} " in kept for sentence in data.validation.sentences)
