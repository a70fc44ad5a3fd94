"""Holding examples out, so that nothing of them is trained on.

SST-2 trains on the phrases of its sentences, down to single words. An example held out at random would nearly
always be trained on as well: as a phrase of a longer example, or by its own phrases. So whole sentences are
held out, and what is part of them alone is left out of the training.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from blacksmith.datasets.sst2.examples import Examples
from blacksmith.errors import DataError


def held_out(
    examples: Examples, validation: int | float, generator: np.random.Generator, place: str
) -> tuple[Examples, Examples]:
    """What there is to train on, and what is held out of it: both in the order of `examples`.

    Held out are examples that are part of no other one, word by word, drawn at random; equal sentences stay
    together. An example that is part of held-out ones and of no others is in neither.

    Args:
      examples: of which some are held out.
      validation: how many: a number from 1, or a fraction between 0 and 1 of those that are part of no other.
        Equal sentences can make it a few less.
      generator: decides which.
      place: where the examples are from, for messages.

    Raises:
      DataError: `validation` leaves nothing on one side.
    """
    rows: dict[str, list[int]] = {}
    for row, sentence in enumerate(examples.sentences):
        rows.setdefault(" ".join(sentence.split()), []).append(row)
    sentences = list(rows)
    around = wholes(sentences)
    whole = [number for number, others in enumerate(around) if not others]
    count = _count(validation, sum(len(rows[sentences[number]]) for number in whole), place)
    out: set[int] = set()
    chosen = 0
    for number in generator.permutation(whole).tolist():
        size = len(rows[sentences[number]])
        if chosen + size <= count:
            out.add(number)
            chosen += size
    if not out:
        raise DataError(
            f"{place}: {count:,} rows cannot be held out, since every sentence is there more often and equal "
            "ones stay together; hold out more"
        )
    gone = out | {number for number, others in enumerate(around) if others and out.issuperset(others)}
    kept = [row for number, sentence in enumerate(sentences) if number not in gone for row in rows[sentence]]
    held = [row for number in out for row in rows[sentences[number]]]
    return examples.rows(sorted(kept)), examples.rows(sorted(held))


def wholes(sentences: Sequence[str]) -> list[list[int]]:
    """For each of different sentences, those that it is a part of and that are part of no other themselves.

    A part is a run of words. Words are divided by single spaces.
    """
    padded = [f" {sentence} " for sentence in sentences]
    words = [sentence.split() for sentence in sentences]
    pairs = [[f"{first} {second}" for first, second in itertools.pairwise(some)] for some in words]
    alone = {some[0] for some in words if len(some) == 1}
    having: dict[str, list[int]] = {}  # by pair of adjacent words, or a word that is an example
    for number, some in enumerate(words):
        for key in {*pairs[number], *alone.intersection(some)}:
            having.setdefault(key, []).append(number)
    around = []
    for number, part in enumerate(padded):
        rarest = min((having[key] for key in pairs[number] or words[number]), key=len)
        around.append([i for i in rarest if i != number and part in padded[i]])
    return [[i for i in others if not around[i]] for others in around]


def _count(validation: int | float, size: int, place: str) -> int:
    """How many of `size` examples to hold out.

    Raises:
      DataError: it is not a number or a fraction that leaves something on both sides.
    """
    if size < 2:
        raise DataError(f"{place}: too few sentences ({size}) to hold any out of them")
    count = validation
    if isinstance(validation, float) and 0 < validation < 1:
        count = max(1, round(validation * size))
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count < size:
        raise DataError(
            f"{place}: validation={validation!r} with {size:,} training examples that are part of no other; "
            f"allowed: a whole number from 1 to {size - 1:,}, or a fraction between 0 and 1"
        )
    return count
