"""Which samples each step sees, as a pure function of (seed, epoch, cursor), and named child seeds.

Every trainer draws its batches here, so the same seed gives the same batches on every backend and after
every resume. NumPy only.
"""

import hashlib
from dataclasses import dataclass

import numpy as np


def child_seed(seed: int, *names: str | int) -> np.random.SeedSequence:
    """An independent seed for one named use, for example ``child_seed(0, "weights")``."""
    keys = [int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:4], "little") for name in names]
    return np.random.SeedSequence(entropy=seed, spawn_key=tuple(keys))


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for one named use; its stream is fixed (PCG64)."""
    return np.random.Generator(np.random.PCG64(child_seed(seed, *names)))


def seed_words(seed: int, *names: str | int) -> int:
    """A child seed as one unsigned 64-bit number, for a framework's own generator."""
    return int(child_seed(seed, *names).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Block:
    """The samples of some consecutive steps.

    Attributes:
      indices: int32 [steps, batch], rows of the training set; padding repeats row 0.
      weights: float32 [steps, batch], 1 / (real samples in the batch), and 0 for padding: a loss is the
        weighted sum of per-sample losses, so that it stays right when ranks take columns of it.
      epoch: the epoch of the first step, from 0.
      cursor: the first step's number within its epoch.
    """

    indices: np.ndarray
    weights: np.ndarray
    epoch: int
    cursor: int


class Order:
    """The stream of batches over a training set of `size` samples; `Order.size` is what an epoch visits.

    Each epoch visits every sample once, in a permutation drawn from (seed, epoch). The last batch of an
    epoch is padded when `batch` does not divide `size`, or left out with `drop_last`.
    """

    def __init__(self, size: int, batch: int, seed: int, *, drop_last: bool = False) -> None:
        """Plans the batches.

        Raises:
          ValueError: `size` or `batch` is not positive, or no whole batch is there to keep.
        """
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
        self._weights[-1, ragged:] = 0

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, cursor) of the batch that step number `step`, from 0, sees."""
        return divmod(step, self.steps_per_epoch)

    def samples_before(self, step: int) -> int:
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


EMPTY_DIGEST = hashlib.sha256().hexdigest()


def chain_digest(digest: str, indices: np.ndarray) -> str:
    """Extends a running hash of the batches seen, step by step: int32 [steps, batch]."""
    for row in np.ascontiguousarray(indices, np.int32):
        digest = hashlib.sha256(bytes.fromhex(digest) + row.tobytes()).hexdigest()
    return digest
