"""SST-2, and sets of its form, as sentences with a label: 0 negative, 1 positive.

`load` takes them from a source named in one string and returns disjoint train, validation and test examples
with an `info` dictionary that says what was read, with a hash; `describe` makes one line of it. Nothing is
downloaded unless the source is a Hugging Face dataset id.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blacksmith import order
from blacksmith.datasets.sst2 import files, hub
from blacksmith.datasets.sst2.examples import CLASSES, Examples, Table, checked, content_sha256
from blacksmith.errors import DataError

__all__ = ["CLASSES", "DEFAULT_VALIDATION", "Examples", "Sst2", "describe", "load"]

DEFAULT_VALIDATION = 1000
"""Training examples held out where nothing is said; on the sample, with 240 of them, `SAMPLE_VALIDATION`."""

SAMPLE_VALIDATION = 40

_SAMPLE = Path(__file__).with_name("sample.tsv")


@dataclass(frozen=True, eq=False)
class Sst2:
    """The three splits and what they were made from.

    Attributes:
      train: in the order of the source.
      validation: held out of the source's training examples, in the same order.
      test: see `load`; the same for every seed and `validation`.
      info: JSON-serialisable: `source` (`sample`, `directory`, `file` or `hub`), `name`, `path` (str or
        None), `sha256` (of the source's training and test examples before they were split), the sizes
        `train`, `validation` and `test`, `class_counts` (of each split, by the names in `CLASSES`),
        `test_from` (the file or split that the test examples are) and `unused` (files or splits left out).
    """

    train: Examples
    validation: Examples
    test: Examples
    info: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Official:
    """A source's own training and test examples, and what `Sst2.info` says about the source."""

    train: Examples
    test: Examples
    place: str
    info: dict[str, Any]


def load(
    source: str = "sample",
    *,
    sentence_column: str = "sentence",
    label_column: str = "label",
    validation: int | float | None = None,
    seed: int = 0,
) -> Sst2:
    """Loads sentences with two classes and splits them.

    Sources:
      sample: 320 sentences that come with the package, 240 for training and 80 for testing.
      a directory: `train` and one or more of `test`, `validation` and `dev`, each a tsv, csv, json, jsonl or
        parquet file. SST-2 as GLUE distributes it is such a directory.
      a file of one of these formats: a tenth of it is the test set, the same tenth for every seed.
      a Hugging Face dataset id: `stanfordnlp/sst2`, or `nyu-mll/glue:sst2` with a configuration.

    The test set is the source's `test` if it has labels. If not, as in SST-2, it is the source's `validation`
    or `dev`. Examples for model selection are always held out of the training examples; those with the same
    sentence stay together, so that no sentence is in both.

    Args:
      source: as above; a path that is there is preferred to an id, and `./sample` is a path.
      sentence_column: the column with the sentences.
      label_column: the column with the labels, 0 or 1.
      validation: how many training examples to hold out: a number from 1, or a fraction between 0 and 1;
        repeated sentences can make it a few less. The default of 1,000 is 40 on the sample.
      seed: decides which examples are held out.

    Raises:
      DataError: the source is unknown, missing or broken, or `validation` leaves nothing to train on.
    """
    columns = (sentence_column, label_column)
    path = Path(os.path.expanduser(source)).absolute()
    if source == "sample":
        official = _sample(columns)
        if validation is None:
            validation = SAMPLE_VALIDATION
    elif os.path.isdir(path):
        official = _directory(path, columns)
    elif os.path.isfile(path):
        official = _file(path, columns)
    elif hub.is_id(source) and path.suffix not in files.SUFFIXES:
        official = _hub(source, columns)
    else:
        raise DataError(
            f"{source!r}: no such file or directory; allowed: 'sample', a directory or a file of "
            f"{', '.join(suffix[1:] for suffix in files.SUFFIXES)}, or a Hugging Face dataset id such as "
            "stanfordnlp/sst2"
        )
    count = _held_out(
        DEFAULT_VALIDATION if validation is None else validation, len(official.train), official.place
    )
    train, held_out = _divided(official.train, count, order.generator(seed, "validation"), official.place)
    if len(set(train.labels.tolist())) < len(CLASSES):
        raise DataError(
            f"{official.place}: all {len(train):,} training examples are {CLASSES[train.labels[0]]}; both "
            "classes are needed"
        )
    splits = {"train": train, "validation": held_out, "test": official.test}
    info = {
        **official.info,
        "sha256": content_sha256(official.train, official.test),
        **{name: len(split) for name, split in splits.items()},
        "class_counts": {name: split.class_counts() for name, split in splits.items()},
    }
    return Sst2(train, held_out, official.test, info)


def describe(info: Mapping[str, Any]) -> str:
    """One line for `Sst2.info`: what was read, how much, and what to know about it."""
    if info["source"] == "sample":
        place = "the sample in the package"
        note = "; not SST-2 itself, which docs/data.md says how to get"
    else:
        place = f"{info['name']} from the hub" if info["path"] is None else info["path"]
        note = f"; not used: {', '.join(info['unused'])}" if info["unused"] else ""
    return (
        f"data: {place}: {info['train']:,} train, {info['validation']:,} validation, {info['test']:,} test "
        f"sentences from {info['test_from']}, sha256 {info['sha256'][:12]}{note}"
    )


def _sample(columns: tuple[str, str]) -> _Official:
    table = files.read(_SAMPLE, (*columns, "split"))
    examples, splits = checked(table, *columns), table.columns["split"]
    train, test = (
        examples.rows([row for row, split in enumerate(splits) if split == name])
        for name in ("train", "test")
    )
    return _Official(train, test, table.place, _origin("sample", "sample", None, _SAMPLE.name))


def _directory(path: Path, columns: tuple[str, str]) -> _Official:
    found = files.find(path)
    tables = {split: files.read(file, columns) for split, file in found.items()}
    test, unused = _choose_test(tables, str(path), columns[1])
    origin = _origin("directory", path.name, path, found[test].name, [found[split].name for split in unused])
    train, test_examples = (checked(tables[split], *columns) for split in ("train", test))
    return _Official(train, test_examples, tables["train"].place, origin)


def _file(path: Path, columns: tuple[str, str]) -> _Official:
    table = files.read(path, columns)
    examples = checked(table, *columns)
    # Not the run's seed: a checkpoint may be tested by a run with another.
    count = _held_out(0.1, len(examples), table.place)
    train, test = _divided(examples, count, order.generator(0, "test"), table.place)
    return _Official(train, test, table.place, _origin("file", path.stem, path, "a tenth of the file"))


def _hub(source: str, columns: tuple[str, str]) -> _Official:
    tables = hub.load(source, columns)
    if "train" not in tables:
        raise DataError(f"{source}: no split train; there are: {', '.join(tables)}")
    test, unused = _choose_test(tables, source, columns[1])
    train, test_examples = (checked(tables[split], *columns) for split in ("train", test))
    return _Official(train, test_examples, tables["train"].place, _origin("hub", source, None, test, unused))


def _origin(
    source: str, name: str, path: Path | None, test_from: str, unused: list[str] | None = None
) -> dict[str, Any]:
    return {
        "source": source,
        "name": name,
        "path": None if path is None else str(path),
        "test_from": test_from,
        "unused": unused or [],
    }


def _choose_test(tables: Mapping[str, Table], place: str, label_column: str) -> tuple[str, list[str]]:
    """The name of the split that is the test set, and the names of those that are not used.

    Raises:
      DataError: there is none, or it could be either of two.
    """
    if "test" in tables and tables["test"].has_labels(label_column):
        test = "test"
    else:
        names = [name for name in ("validation", "dev") if name in tables]
        if len(names) > 1:
            raise DataError(f"{place}: validation and dev are both there; remove the one not to test with")
        if not names:
            raise DataError(
                f"{place}: nothing to test with; needed is test, validation or dev with a column "
                f"{label_column!r} beside train, and there are: {', '.join(tables)}"
            )
        test = names[0]
    return test, [name for name in tables if name not in ("train", test)]


def _held_out(validation: int | float, size: int, place: str) -> int:
    """How many of `size` examples to hold out.

    Raises:
      DataError: it is not a number or a fraction that leaves something on both sides.
    """
    if size < 2:
        raise DataError(f"{place}: too few rows ({size}) to hold any out of them")
    count = validation
    if isinstance(validation, float) and 0 < validation < 1:
        count = max(1, round(validation * size))
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count < size:
        raise DataError(
            f"{place}: validation={validation!r} with {size:,} training examples; allowed: a whole number "
            f"from 1 to {size - 1:,}, or a fraction between 0 and 1"
        )
    return count


def _divided(
    examples: Examples, count: int, generator: np.random.Generator, place: str
) -> tuple[Examples, Examples]:
    """All but `count` examples, and these, drawn at random; equal sentences stay on one side.

    Raises:
      DataError: equal sentences leave nothing for one side.
    """
    same: dict[str, list[int]] = {}
    for row, sentence in enumerate(examples.sentences):
        same.setdefault(sentence, []).append(row)
    groups = list(same.values())
    held_out: set[int] = set()
    for index in generator.permutation(len(groups)):
        if len(held_out) + len(groups[index]) <= count:
            held_out.update(groups[index])
    if not held_out:
        raise DataError(
            f"{place}: {count:,} rows cannot be held out, since every sentence is there more often and equal "
            "ones stay together; hold out more"
        )
    kept = [row for row in range(len(examples)) if row not in held_out]
    return examples.rows(kept), examples.rows(sorted(held_out))
