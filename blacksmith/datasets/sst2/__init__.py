"""SST-2, and sets of its form, as sentences with a label: 0 negative, 1 positive.

`read` takes them from a source named in one string; its `split` gives disjoint train, validation and test
examples with an `info` dictionary that says what was read, with a hash; `describe` makes one line of it.
Nothing is downloaded unless the source is a Hugging Face dataset id.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blacksmith.datasets.sst2 import files, hub
from blacksmith.datasets.sst2.examples import CLASSES, Examples, Table, checked, content_sha256
from blacksmith.datasets.sst2.splits import held_out
from blacksmith.errors import DataError
from blacksmith.run import order

__all__ = ["CLASSES", "DEFAULT_VALIDATION", "Examples", "Source", "Sst2", "describe", "read"]

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
      test: see `read`; the same for every seed and `validation`.
      info: JSON-serialisable: `source` (`sample`, `directory`, `file` or `hub`), `name`, `path` (str or
        None), `sha256` (of the source's training and test examples before they were split), the sizes
        `train`, `validation` and `test`, `parts_left_out` (examples that are only part of held-out ones, see
        `splits.held_out`), `class_counts` (of each split, by the names in `CLASSES`), `test_from` (the file
        or split that the test examples are) and `unused` (files or splits left out).
    """

    train: Examples
    validation: Examples
    test: Examples
    info: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Source:
    """What was read, before anything is held out.

    Attributes:
      train: the source's own training examples, or all of a file.
      test: the source's own test examples, or None of a file, which has none.
      place: where `train` is from, for messages.
      origin: the part of `Sst2.info` that is known already.
    """

    train: Examples
    test: Examples | None
    place: str
    origin: dict[str, Any]

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of all examples."""
        return content_sha256(self.train, *([] if self.test is None else [self.test]))

    def split(self, validation: int | float | None = None, seed: int = 0) -> Sst2:
        """Train, validation and test examples; `splits.held_out` says how examples are held out.

        A tenth of a file is its test set, the same tenth for every seed.

        Args:
          validation: how many training examples to hold out: a number from 1, or a fraction between 0 and 1;
            equal sentences can make it a few less. The default of 1,000 is 40 on the sample.
          seed: decides which examples are held out for validation.

        Raises:
          DataError: `validation` leaves nothing to train on, or examples of one class only.
        """
        if validation is None:
            validation = SAMPLE_VALIDATION if self.origin["source"] == "sample" else DEFAULT_VALIDATION
        rest, test, test_from = self.train, self.test, self.origin["test_from"]
        if test is None:
            # Not the run's seed: a checkpoint may be tested by a run with another.
            rest, test = held_out(rest, 0.1, order.generator(0, "test"), self.place)
            test_from = f"a tenth of {test_from}"
        train, validating = held_out(rest, validation, order.generator(seed, "validation"), self.place)
        if len(set(train.labels.tolist())) < len(CLASSES):
            raise DataError(
                f"{self.place}: all {len(train):,} training examples are {CLASSES[train.labels[0]]}; both "
                "classes are needed"
            )
        left_out = len(self.train) - len(train) - len(validating) - (len(test) if self.test is None else 0)
        return self._splits(train, validating, test, test_from=test_from, parts_left_out=left_out)

    def for_testing(self) -> Sst2:
        """Test examples alone, for a model that was not trained on this source: all of a file."""
        nothing, test = self.train.rows([]), self.train if self.test is None else self.test
        return self._splits(nothing, nothing, test, parts_left_out=0)

    def _splits(self, train: Examples, validation: Examples, test: Examples, **more: Any) -> Sst2:
        splits = {"train": train, "validation": validation, "test": test}
        info = {
            **self.origin,
            "sha256": self.sha256,
            **{name: len(split) for name, split in splits.items()},
            "class_counts": {name: split.class_counts() for name, split in splits.items()},
            **more,
        }
        return Sst2(train, validation, test, info)


def read(source: str = "sample", *, sentence_column: str = "sentence", label_column: str = "label") -> Source:
    """Reads sentences with two classes.

    Sources:
      sample: 320 sentences that come with the package, 240 for training and 80 for testing.
      a directory: `train` and one or more of `test`, `validation` and `dev`, each a tsv, csv, json, jsonl or
        parquet file. SST-2 as GLUE distributes it is such a directory.
      a file of one of these formats.
      a Hugging Face dataset id: `stanfordnlp/sst2`, or `nyu-mll/glue:sst2` with a configuration.

    The test set is the source's `test` if it has labels. If not, as in SST-2, it is the source's `validation`
    or `dev`. Examples for model selection are always held out of the training examples.

    Args:
      source: as above; a path that is there is preferred to an id, and `./sample` is a path.
      sentence_column: the column with the sentences.
      label_column: the column with the labels, 0 or 1.

    Raises:
      DataError: the source is unknown, missing or broken.
    """
    columns = (sentence_column, label_column)
    path = Path(os.path.expanduser(source)).absolute()
    if source == "sample":
        return _sample(columns)
    if os.path.isdir(path):
        return _directory(path, columns)
    if os.path.isfile(path):
        return _file(path, columns)
    if hub.is_id(source) and path.suffix not in files.SUFFIXES:
        return _hub(source, columns)
    raise DataError(
        f"{source!r}: no such file or directory; allowed: 'sample', a directory or a file of "
        f"{', '.join(suffix[1:] for suffix in files.SUFFIXES)}, or a Hugging Face dataset id such as "
        "stanfordnlp/sst2"
    )


def describe(info: Mapping[str, Any]) -> str:
    """One line for `Sst2.info`: what was read, how much, and what to know about it."""
    notes = []
    if info["source"] == "sample":
        place = "the sample in the package"
        notes.append("not SST-2 itself, which docs/data.md says how to get")
    else:
        place = f"{info['name']} from the hub" if info["path"] is None else info["path"]
    if info["parts_left_out"]:
        notes.append(f"{info['parts_left_out']:,} that are part of held-out ones were left out")
    if info["unused"]:
        notes.append(f"not used: {', '.join(info['unused'])}")
    training = f"{info['train']:,} train, {info['validation']:,} validation, " if info["train"] else ""
    return (
        f"data: {place}: {training}{info['test']:,} test sentences from {info['test_from']}, "
        f"sha256 {info['sha256'][:12]}" + "".join(f"; {note}" for note in notes)
    )


def _sample(columns: tuple[str, str]) -> Source:
    table = files.read(_SAMPLE, (*columns, "split"))
    examples, splits = checked(table, *columns), table.columns["split"]
    train, test = (
        examples.rows([row for row, split in enumerate(splits) if split == name])
        for name in ("train", "test")
    )
    return Source(train, test, table.place, _origin("sample", "sample", None, _SAMPLE.name))


def _directory(path: Path, columns: tuple[str, str]) -> Source:
    found = files.find(path)
    tables = {split: files.read(file, columns) for split, file in found.items()}
    test, unused = _choose_test(tables, str(path), columns[1])
    origin = _origin("directory", path.name, path, found[test].name, [found[split].name for split in unused])
    train, test_examples = (checked(tables[split], *columns) for split in ("train", test))
    return Source(train, test_examples, tables["train"].place, origin)


def _file(path: Path, columns: tuple[str, str]) -> Source:
    table = files.read(path, columns)
    examples = checked(table, *columns)
    return Source(examples, None, table.place, _origin("file", path.stem, path, "the file"))


def _hub(source: str, columns: tuple[str, str]) -> Source:
    tables = hub.load(source, columns)
    if "train" not in tables:
        raise DataError(f"{source}: no split train; there are: {', '.join(tables)}")
    test, unused = _choose_test(tables, source, columns[1])
    train, test_examples = (checked(tables[split], *columns) for split in ("train", test))
    return Source(train, test_examples, tables["train"].place, _origin("hub", source, None, test, unused))


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
