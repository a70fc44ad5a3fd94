"""Batch orders and child seeds: pure functions of the seed, the same in every version."""

import numpy as np
import pytest

from blacksmith.run.order import (
    EMPTY_DIGEST,
    LengthOrder,
    Order,
    chain_digest,
    child_seed,
    generator,
    seed_int,
)

SIZES = [(10, 4), (12, 4), (1, 4), (4, 1), (5, 5), (3500, 128)]
LENGTHS = np.random.default_rng(0).integers(5, 60, 4003)


def _epoch(order, epoch):
    return order.block(epoch * order.steps_per_epoch, order.steps_per_epoch)


# Order


@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_every_epoch_visits_every_sample_once(size, batch):
    order = Order(size, batch, seed=3)
    for epoch in range(3):
        block = _epoch(order, epoch)
        assert block.indices.shape == block.weights.shape == (order.steps_per_epoch, batch)
        assert sorted(block.indices[block.weights > 0]) == list(range(size))


@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_weights_are_one_over_the_real_samples_of_a_batch(size, batch):
    weights = _epoch(Order(size, batch, seed=0), 1).weights
    real = (weights > 0).sum(axis=1)
    assert real[:-1].tolist() == [batch] * (len(real) - 1)
    assert real[-1] == (size % batch or batch)
    # 64 terms of float32 1/n: off from 1 by the rounding of 1/n alone.
    np.testing.assert_allclose(weights.sum(axis=1, dtype=np.float64), 1, rtol=1e-7)
    for row, count in zip(weights, real):
        assert row.tolist() == [np.float32(1) / np.float32(count)] * count + [0] * (batch - count)


def test_drop_last_leaves_out_a_ragged_batch():
    order = Order(10, 4, seed=0, drop_last=True)
    assert (order.size, order.steps_per_epoch) == (8, 2)
    block = _epoch(order, 1)
    assert np.all(block.weights == 0.25)
    assert len(set(block.indices.ravel().tolist())) == 8
    # What is left out differs between epochs.
    assert len({row for epoch in range(5) for row in _epoch(order, epoch).indices.ravel().tolist()}) == 10
    with pytest.raises(ValueError, match="smaller than the batch of 4"):
        Order(3, 4, seed=0, drop_last=True)


def test_a_block_holds_its_steps_and_ends_with_the_epoch():
    order = Order(50, 8, seed=5)
    assert order.steps_per_epoch == 7
    block = order.block(9, 100)
    assert (block.epoch, block.cursor) == order.position(9) == (1, 2)
    assert len(block.indices) == 5
    for i in range(5):
        one = order.block(9 + i, 1)
        assert one.indices.tolist() == block.indices[i : i + 1].tolist()
        assert one.weights.tolist() == block.weights[i : i + 1].tolist()
        assert order.rows(9 + i).tolist() == one.indices[one.weights > 0].tolist()


def test_epochs_differ_and_seeds_differ():
    orders = [Order(50, 8, seed) for seed in range(4)]
    assert len({tuple(_epoch(o, epoch).indices.ravel()) for o in orders for epoch in range(4)}) == 16


def test_the_order_is_the_one_of_every_earlier_version():
    order = Order(10, 4, seed=0)
    assert order.block(0, 3).indices.tolist() == [[8, 9, 3, 6], [2, 4, 0, 7], [1, 5, 0, 0]]
    assert order.block(3, 3).indices.tolist() == [[3, 4, 1, 0], [2, 8, 6, 7], [9, 5, 0, 0]]
    assert Order(10, 4, seed=1).block(0, 1).indices.tolist() == [[0, 3, 2, 7]]


@pytest.mark.parametrize(("size", "batch"), [(0, 4), (4, 0), (-1, 4)])
def test_an_order_without_samples_or_batch_is_refused(size, batch):
    with pytest.raises(ValueError, match=f"size={size}, batch={batch}"):
        Order(size, batch, seed=0)


# LengthOrder


def test_every_epoch_by_length_visits_every_example_once():
    order = LengthOrder(LENGTHS[:103], 8, 4, seed=0)
    assert order.steps_per_epoch == 13
    for epoch in range(3):
        batches = [order.rows(epoch * 13 + cursor) for cursor in range(13)]
        assert sorted(np.concatenate(batches).tolist()) == list(range(103))
        assert sorted(map(len, batches)) == [7] + [8] * 12


def test_a_batch_by_length_has_similar_lengths_shortest_first():
    def padding(order):
        batches = [LENGTHS[order.rows(step)] for step in range(order.steps_per_epoch)]
        assert all(np.all(np.diff(lengths) >= 0) for lengths in batches)
        return sum(int((lengths.max() - lengths).sum()) for lengths in batches)

    assert padding(LengthOrder(LENGTHS, 32, 50, seed=0)) < padding(LengthOrder(LENGTHS, 32, 1, seed=0)) / 10


def test_short_batches_do_not_come_first():
    order = LengthOrder(LENGTHS, 8, 4, seed=0)
    means = [LENGTHS[order.rows(step)].mean() for step in range(order.steps_per_epoch)]
    # Five deviations of the correlation of 501 independent pairs, 1/sqrt(501).
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.23


def test_the_order_by_length_is_the_one_of_every_earlier_version():
    order = LengthOrder([5, 3, 9, 1, 7, 2, 8, 6, 4, 0], 3, 2, seed=0)
    assert [order.rows(step).tolist() for step in range(5)] == [[9, 3, 8], [7], [5, 1, 0], [4, 6, 2], [6]]


# Both


@pytest.mark.parametrize("make", [lambda s: Order(50, 8, s), lambda s: LengthOrder(LENGTHS[:50], 8, 3, s)])
def test_a_batch_depends_on_seed_and_step_alone(make):
    forwards, backwards, other = make(5), make(5), make(6)
    expected = [forwards.rows(step).tolist() for step in range(40)]
    for step in np.random.default_rng(0).permutation(40):
        assert backwards.rows(int(step)).tolist() == expected[step]
    assert other.rows(0).tolist() != expected[0] != expected[7]


@pytest.mark.parametrize(
    "order", [*(Order(*size, seed=0) for size in SIZES), LengthOrder(LENGTHS[:10], 4, 2, seed=3)]
)
def test_examples_are_counted_without_padding(order):
    counted = 0
    for step in range(min(2 * order.steps_per_epoch + 2, 80)):
        assert order.examples_before(step) == counted
        assert order.epoch(step) == pytest.approx(step / order.steps_per_epoch)
        counted += len(order.rows(step))


# Child seeds


def test_child_seeds_are_those_of_every_earlier_version():
    assert seed_int(0, "weights", "hidden_1/kernel") == 8200750981392767293
    assert seed_int(0, "step") == 1574026024176255630
    assert seed_int(2**63 - 1, "step") == 17253317171206818828
    assert generator(0, "validation").integers(0, 1000, 5).tolist() == [496, 347, 399, 433, 990]
    assert generator(7, "order", 3).random(2).tolist() == [0.46885265465862136, 0.7697305439060738]
    # Not from str.__hash__, which is salted in each process.
    assert child_seed(0, "weights").spawn_key == (948966042,)


def test_child_seeds_of_different_names_or_seeds_differ():
    names = [(), ("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",), ("a", 0), ("a", 1), ("a", 10)]
    words = {seed_int(seed, *name) for seed in (0, 1, 2**63 - 1) for name in names}
    assert len(words) == 3 * len(names)


def test_streams_of_different_names_are_uncorrelated():
    drawn = np.stack([generator(0, name).standard_normal(10_000) for name in ("a", "b", "c", "d")])
    correlations = np.corrcoef(drawn)[np.triu_indices(4, 1)]
    # Five deviations of the correlation of 10,000 independent pairs, 1/sqrt(10,000).
    assert np.abs(correlations).max() < 0.05


# The running hash of the batches


def test_chain_digest_depends_on_batches_and_not_on_blocks():
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    digest = chain_digest(EMPTY_DIGEST, rows)
    assert chain_digest(chain_digest(EMPTY_DIGEST, rows[:1]), rows[1:]) == digest
    for same in (rows.astype(np.int64), np.asfortranarray(rows)):
        assert chain_digest(EMPTY_DIGEST, same) == digest
    assert chain_digest(EMPTY_DIGEST, rows[:0]) == EMPTY_DIGEST
    changed = rows + np.eye(3, 4, dtype=np.int32)
    assert (
        len({digest, *(chain_digest(EMPTY_DIGEST, other) for other in (rows[::-1], rows[:2], changed))}) == 4
    )


def test_chain_digest_is_that_of_every_earlier_version():
    digest = chain_digest(EMPTY_DIGEST, Order(10, 4, seed=0).block(0, 3).indices)
    assert digest == "a023b2546d8ee5ca6dcdbe2cf5261e43b403d062c3dde8fecb53616907f84e8a"
