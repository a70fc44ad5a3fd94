"""Which examples each step sees, as a pure function of (seed, epoch, cursor), and named child seeds."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def child_seed(seed: int, *names: str | int) -> np.random.SeedSequence:
    """An independent seed for one named use, for example ``child_seed(0, "weights")``."""
    keys = [int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:4], "little") for name in names]
    return np.random.SeedSequence(entropy=seed, spawn_key=tuple(keys))


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for one named use; its stream is fixed (PCG64)."""
    return np.random.Generator(np.random.PCG64(child_seed(seed, *names)))


def seed_int(seed: int, *names: str | int) -> int:
    """A child seed as one unsigned 64-bit number, for a framework's own generator."""
    return int(child_seed(seed, *names).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Block:
    """The samples of some consecutive steps."""

    indices: np.ndarray  # int32 [steps, batch], rows of the training set; padding repeats row 0
    # float32 [steps, batch], 1 / (real samples in the batch), and 0 for padding: a loss is the weighted sum
    # of per-sample losses, so that it stays right when ranks take columns of it.
    weights: np.ndarray
    epoch: int  # of the first step, from 0
    cursor: int  # the first step's number within its epoch


class _Epochs:
    """Epochs of `steps_per_epoch` steps each."""

    steps_per_epoch: int

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, cursor) of the batch that step number `step`, from 0, sees."""
        return divmod(step, self.steps_per_epoch)

    def epoch(self, step: int) -> float:
        """Passes over the training set after `step` steps."""
        epoch, cursor = self.position(step)
        return epoch + cursor / self.steps_per_epoch


class Order(_Epochs):
    """The stream of batches over a training set of `size` samples; `Order.size` is what an epoch visits.

    Each epoch visits every sample once, in a permutation drawn from (seed, epoch). The last batch of an
    epoch is padded when `batch` does not divide `size`, or left out with `drop_last`.

    Raises:
      ValueError: `size` or `batch` is not positive, or no whole batch is there to keep.
    """

    def __init__(self, size: int, batch: int, seed: int, *, drop_last: bool = False) -> None:
        if size < 1 or batch < 1:
            raise ValueError(f"an order needs samples and a batch, not size={size}, batch={batch}")
        self._rows = size
        if drop_last:
            size -= size % batch
            if not size:
                raise ValueError(f"drop_last leaves nothing of an epoch smaller than the batch of {batch}")
        self.size = size
        self.batch = batch
        self.seed = seed
        self.steps_per_epoch = -(-size // batch)
        self._epoch = -1
        self._indices = np.empty((0, batch), np.int32)
        self._weights = np.zeros((self.steps_per_epoch, batch), np.float32)
        flat = self._weights.reshape(-1)
        flat[:size] = np.float32(1) / np.float32(batch)
        ragged = size - (self.steps_per_epoch - 1) * batch
        self._weights[-1, :ragged] = np.float32(1) / np.float32(ragged)

    def examples_before(self, step: int) -> int:
        """How many samples the steps before `step` have seen, padding not counted."""
        epoch, cursor = self.position(step)
        return epoch * self.size + min(cursor * self.batch, self.size)

    def block(self, step: int, steps: int) -> Block:
        """The batches of up to `steps` steps from `step` on, cut at the end of the epoch."""
        epoch, cursor = self.position(step)
        if epoch != self._epoch:
            rows = np.zeros(self.steps_per_epoch * self.batch, np.int32)
            rows[: self.size] = generator(self.seed, "order", epoch).permutation(self._rows)[: self.size]
            self._indices = rows.reshape(self.steps_per_epoch, self.batch)
            self._epoch = epoch
        end = min(cursor + steps, self.steps_per_epoch)
        return Block(self._indices[cursor:end], self._weights[cursor:end], epoch, cursor)

    def rows(self, step: int) -> np.ndarray:
        """The training examples of step number `step`, without padding: int64 [batch]."""
        block = self.block(step, 1)
        return block.indices[0, block.weights[0] > 0].astype(np.int64)


class LengthOrder(_Epochs):
    """A stream of batches of about the same length: each epoch visits every example once.

    An epoch's order is drawn from (seed, epoch). Pools of `pool` batches are sorted by `lengths`, the tokens
    of each example, and cut into batches, whose order is drawn again. The last batch may be smaller.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch: int, pool: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self.batch, self._pool, self._seed = batch, pool, seed
        self.steps_per_epoch = -(-len(self._lengths) // batch)
        self._epoch = -1
        self._batches: list[np.ndarray] = []

    def examples_before(self, step: int) -> int:
        """How many examples the steps before `step` have seen."""
        epoch, cursor = self.position(step)
        seen = epoch * len(self._lengths)
        if not cursor:
            return seen
        self._of(epoch)
        return seen + int(self._seen[cursor])

    def rows(self, step: int) -> np.ndarray:
        """The examples of step number `step`, from 0, shortest first: int64 [batch]."""
        epoch, cursor = self.position(step)
        return self._of(epoch)[cursor]

    def _of(self, epoch: int) -> list[np.ndarray]:
        """The batches of one epoch."""
        if epoch != self._epoch:
            random = generator(self._seed, "order", epoch)
            shuffled = random.permutation(len(self._lengths))
            batches = []
            for begin in range(0, len(shuffled), self._pool * self.batch):
                some = shuffled[begin : begin + self._pool * self.batch]
                by_length = some[np.argsort(self._lengths[some], kind="stable")]
                batches += [by_length[i : i + self.batch] for i in range(0, len(some), self.batch)]
            self._batches = [batches[i] for i in random.permutation(len(batches))]
            self._seen = np.cumsum([0, *map(len, self._batches)])
            self._epoch = epoch
        return self._batches


EMPTY_DIGEST = hashlib.sha256().hexdigest()


def chain_digest(digest: str, indices: np.ndarray) -> str:
    """Extends a running hash of the batches seen, step by step: int32 [steps, batch]."""
    for row in np.ascontiguousarray(indices, np.int32):
        digest = hashlib.sha256(bytes.fromhex(digest) + row.tobytes()).hexdigest()
    return digest
