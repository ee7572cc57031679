"""The data order: every sample once per epoch, for any groups, workers and interruptions."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2idist.data import order as data_order
from t2idist.data.order import Order, permutation, random_bits

shard_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)
small = st.integers(1, 7)


def sequence(order: Order, steps: int, start: int = 0) -> np.ndarray:
    """Return the samples of the endless sequence, in the order of positions."""
    rows = [order.sample_indices(step, group) for step in range(start, steps) for group in range(order.groups)]
    return np.concatenate(rows)


@settings(max_examples=150, deadline=None)
@given(shard_sizes, small, small, st.integers(1, 9), st.integers(1, 25), st.integers(-(2**63), 2**64 - 1))
def test_every_sample_occurs_once_per_epoch(sizes, groups, group_size, part, window, seed):
    order = Order(seed, sizes, groups, group_size, part, window)
    n = sum(sizes)
    seen = sequence(order, steps=-(-3 * n // (groups * group_size)))
    for epoch in range(3):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(shard_sizes, small, small, st.integers(0, 12), st.data())
def test_any_resume_and_any_partition_of_groups_give_the_same_order(sizes, groups, group_size, cut, data):
    whole = sequence(Order(5, sizes, groups, group_size, 4, 10), cut + 6)
    owner = data.draw(st.lists(st.integers(0, 2), min_size=groups, max_size=groups))
    workers = [Order(5, sizes, groups, group_size, 4, 10) for _ in range(3)]  # new objects, without state
    resumed = [
        workers[owner[group]].sample_indices(step, group) for step in range(cut, cut + 6) for group in range(groups)
    ]
    assert np.array_equal(np.concatenate(resumed), whole[cut * groups * group_size :])


@settings(max_examples=50, deadline=None)
@given(shard_sizes, small, small, st.integers(0, 4))
def test_windows_tile_the_epoch_in_few_long_ranges(sizes, groups, group_size, epoch):
    order = Order(1, sizes, groups, group_size, part_samples=8, window=32)
    windows = [order.window(epoch, g, w) for g in range(groups) for w in range(order.lane_windows(epoch, g))]
    indices = np.concatenate([window.indices for window in windows])
    assert sorted(indices) == list(range(sum(sizes)))
    parts = sum(-(-size // 8) for size in sizes)
    assert sum(len(window.ranges) for window in windows) <= parts + len(windows)
    for window in windows:
        assert len(window.permutation) == sum(part.count for part in window.ranges) <= 32


def test_epochs_lanes_and_seeds_differ():
    order = Order(0, [500, 500], groups=2, group_size=10, part_samples=50, window=200)
    seen = sequence(order, 100)
    assert not np.array_equal(seen[:1000], seen[1000:])
    assert not np.array_equal(seen[:1000], sequence(Order(1, [500, 500], 2, 10, 50, 200), 50))
    first_lane = [{i for w in range(3) for i in order.window(epoch, 0, w).indices} for epoch in (0, 1)]
    assert first_lane[0] != first_lane[1], "a lane has other parts in the next epoch"
    assert np.mean(np.abs(np.diff(seen[:1000])) == 1) < 0.05, "neighbours in a shard are neighbours in training"


def test_example_in_the_docstring_holds():
    results = doctest.testmod(data_order)
    assert results.failed == 0 and results.attempted == 4


def test_order_is_pinned():
    """A change breaks the resume of every existing run."""
    assert permutation(8, "epoch", 7, 3).tolist() == PINNED_PERMUTATION
    assert Order(7, [5, 6], 2, 3, 2, 4).sample_indices(1, 1).tolist() == PINNED_SAMPLES
    assert random_bits(7, 5, 1)[0, :2].tolist() == PINNED_BITS


def test_random_bits_depend_on_seed_and_position_alone():
    rows = random_bits(3, 100, 12)
    assert np.array_equal(rows[5:9], random_bits(3, 105, 4))
    assert not np.array_equal(rows, random_bits(4, 100, 12))
    assert len(np.unique(rows)) == rows.size


@pytest.mark.parametrize("invalid", [{"groups": 0}, {"group_size": 0}, {"shard_sizes": []}, {"shard_sizes": [3, 0]}])
def test_invalid_sizes_are_rejected(invalid):
    with pytest.raises(ValueError, match="at least"):
        Order(**{"seed": 0, "shard_sizes": [4], "groups": 1, "group_size": 1, **invalid})


PINNED_PERMUTATION = [7, 1, 6, 4, 2, 3, 0, 5]
PINNED_SAMPLES = [2, 6, 3]
PINNED_BITS = [10682484363505055219, 17621693105696422507]
