"""The order of samples and the child seeds: pure functions of the seed, fixed for all time."""

import numpy as np
import pytest

from blacksmith.run.order import EMPTY_DIGEST, Order, chain_digest, child_seed, generator, seed_int

SIZES = [(10, 4), (12, 4), (1, 4), (4, 1), (5, 5), (3500, 128)]


def _epoch(order, epoch):
    return order.block(epoch * order.steps_per_epoch, order.steps_per_epoch)


@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_every_epoch_visits_every_sample_once(size, batch):
    order = Order(size, batch, seed=3)
    for epoch in range(3):
        block = _epoch(order, epoch)
        assert block.indices.shape == block.weights.shape == (order.steps_per_epoch, batch)
        assert sorted(block.indices[block.weights > 0]) == list(range(size))


@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_weights_are_one_over_the_real_samples_of_a_batch_and_zero_for_padding(size, batch):
    weights = _epoch(Order(size, batch, seed=0), 1).weights
    real = (weights > 0).sum(axis=1)
    assert real[:-1].tolist() == [batch] * (len(real) - 1)
    assert real[-1] == (size % batch or batch)
    # 64 terms of float32 1/n: off from 1 by the rounding of 1/n alone.
    np.testing.assert_allclose(weights.sum(axis=1, dtype=np.float64), 1, rtol=1e-7)
    for row, count in zip(weights, real):
        assert row.tolist() == [np.float32(1) / np.float32(count)] * count + [0] * (batch - count)


def test_a_batch_depends_on_seed_and_step_alone_and_not_on_what_was_asked_before():
    steps = 40
    forwards = Order(50, 8, seed=5)
    expected = [forwards.block(step, 1).indices.tolist() for step in range(steps)]
    asked = Order(50, 8, seed=5)
    for step in np.random.default_rng(0).permutation(steps):
        assert asked.block(int(step), 1).indices.tolist() == expected[step]


def test_a_block_holds_the_same_batches_as_its_steps_one_by_one():
    order = Order(50, 8, seed=5)
    block = order.block(9, 4)
    assert (block.epoch, block.cursor) == order.position(9) == (1, 2)
    for i in range(4):
        one = order.block(9 + i, 1)
        assert one.indices.tolist() == block.indices[i : i + 1].tolist()
        assert one.weights.tolist() == block.weights[i : i + 1].tolist()


def test_a_block_ends_with_the_epoch():
    order = Order(50, 8, seed=5)
    assert order.steps_per_epoch == 7
    assert len(order.block(5, 100).indices) == 2
    assert len(order.block(7, 100).indices) == 7


def test_epochs_differ_and_seeds_differ():
    seen = {
        tuple(_epoch(Order(50, 8, seed), epoch).indices.ravel()) for seed in range(4) for epoch in range(4)
    }
    assert len(seen) == 16


def test_the_order_is_the_one_of_every_earlier_version():
    order = Order(10, 4, seed=0)
    assert order.block(0, 3).indices.tolist() == [[8, 9, 3, 6], [2, 4, 0, 7], [1, 5, 0, 0]]
    assert order.block(3, 3).indices.tolist() == [[3, 4, 1, 0], [2, 8, 6, 7], [9, 5, 0, 0]]
    assert Order(10, 4, seed=1).block(0, 1).indices.tolist() == [[0, 3, 2, 7]]


@pytest.mark.parametrize(("size", "batch"), [(0, 4), (4, 0), (-1, 4)])
def test_an_order_without_samples_or_batch_is_refused(size, batch):
    with pytest.raises(ValueError, match=f"size={size}, batch={batch}"):
        Order(size, batch, seed=0)


@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_samples_before_counts_real_samples(size, batch):
    order = Order(size, batch, seed=0)
    counted = 0
    for step in range(min(2 * order.steps_per_epoch + 1, 80)):
        assert order.samples_before(step) == counted
        counted += int((order.block(step, 1).weights > 0).sum())


def test_child_seeds_are_those_of_every_earlier_version():
    assert seed_int(0, "weights", "hidden_1/kernel") == 8200750981392767293
    assert seed_int(0, "step") == 1574026024176255630
    assert seed_int(2**63 - 1, "step") == 17253317171206818828
    assert generator(0, "validation").integers(0, 1000, 5).tolist() == [496, 347, 399, 433, 990]
    assert generator(7, "order", 3).random(2).tolist() == [0.46885265465862136, 0.7697305439060738]


def test_child_seeds_of_different_names_or_seeds_differ():
    names = [(), ("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",), ("a", 0), ("a", 1), ("a", 10)]
    words = {seed_int(seed, *name) for seed in (0, 1, 2**63 - 1) for name in names}
    assert len(words) == 3 * len(names)


def test_drawing_from_one_child_seed_leaves_the_others_alone():
    untouched = generator(0, "weights").random(3).tolist()
    first = generator(0, "order", 0)
    first.random(1000)
    assert generator(0, "weights").random(3).tolist() == untouched
    assert generator(0, "order", 0).random() != first.random()


def test_streams_of_different_names_are_uncorrelated():
    drawn = np.stack([generator(0, name).standard_normal(10_000) for name in ("a", "b", "c", "d")])
    correlations = np.corrcoef(drawn)[np.triu_indices(4, 1)]
    # Five deviations of the correlation of 10,000 independent pairs, 1/sqrt(10,000).
    assert np.abs(correlations).max() < 0.05


def test_a_child_seed_does_not_depend_on_the_python_process():
    # str.__hash__ is salted in each process; the spawn key must not come from it.
    assert child_seed(0, "weights").spawn_key == (948966042,)


def test_chain_digest_does_not_depend_on_where_blocks_end():
    order = Order(50, 8, seed=5)
    whole = chain_digest(EMPTY_DIGEST, order.block(0, 7).indices)
    in_parts = EMPTY_DIGEST
    for step, count in ((0, 1), (1, 3), (4, 2), (6, 1)):
        in_parts = chain_digest(in_parts, order.block(step, count).indices)
    assert in_parts == whole


def test_chain_digest_tells_other_batches_and_another_order_of_them_apart():
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    changed = rows.copy()
    changed[2, 3] += 1
    digests = {chain_digest(EMPTY_DIGEST, r) for r in (rows, rows[::-1], rows[:2], changed)}
    assert len(digests) == 4


def test_chain_digest_does_not_depend_on_dtype_or_memory_layout():
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    expected = chain_digest(EMPTY_DIGEST, rows)
    assert chain_digest(EMPTY_DIGEST, rows.astype(np.int64)) == expected
    assert chain_digest(EMPTY_DIGEST, np.asfortranarray(rows)) == expected
    assert chain_digest(EMPTY_DIGEST, rows[:0]) == EMPTY_DIGEST


def test_chain_digest_is_that_of_every_earlier_version():
    digest = chain_digest(EMPTY_DIGEST, Order(10, 4, seed=0).block(0, 3).indices)
    assert digest == "a023b2546d8ee5ca6dcdbe2cf5261e43b403d062c3dde8fecb53616907f84e8a"
