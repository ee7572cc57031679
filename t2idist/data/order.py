"""The data order of a whole run, as a pure function of (seed, epoch, shard sizes, groups, group size).

The run consumes one endless sequence of positions. Position ``p`` belongs to epoch ``p // N``, with N samples in the
split. At step ``t``, row ``i`` of group ``g`` takes position ``(t * groups + g) * group_size + i``. The number of
images seen is therefore the whole state of a loader, and every sample occurs exactly once per epoch for any N, groups
and group size. Nothing depends on the number of workers, or on what was read before.

Which sample a position takes is decided per epoch:

1. Every shard is cut into parts: consecutive samples, `part_samples` at most. The parts are permuted.
2. Lane g supplies group g. The permuted parts, laid end to end, are divided into one contiguous segment per lane, as
   long as the number of the lane's positions in this epoch.
3. A lane's segment is divided into windows, and each window is shuffled. A lane so reads long byte ranges, and holds
   one window in memory.

Example: two shards of 3 samples, so N = 6, and global sample indices 0-2 and 3-5.

>>> order = Order(seed=7, shard_sizes=[3, 3], groups=2, group_size=2, part_samples=2, window=2)
>>> [[order.sample_indices(step, group).tolist() for group in range(2)] for step in range(3)]
[[[3, 4], [2, 5]], [[1, 0], [4, 2]], [[3, 5], [0, 1]]]

Read row by row, these are positions 0 to 11: epoch 0 is 3 4 2 5 1 0, and epoch 1, which begins in the middle of step 1,
is 4 2 3 5 0 1. In epoch 0 the parts, as (shard, first sample, count), are permuted to (1, 0, 2), (0, 0, 2), (0, 2, 1),
(1, 2, 1). Lane 0 has 4 positions, hence the segment 3 4 0 1 and two windows; lane 1 has the segment 2 5:

>>> order.window(epoch=0, lane=0, index=1).ranges
(SampleRange(shard=0, first=0, count=2),)
>>> order.window(epoch=0, lane=0, index=1).indices.tolist()
[1, 0]
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_EPOCHS_KEPT = 3
_WINDOWS_KEPT_PER_LANE = 3
_WINDOW_SAMPLES = (256, 2048)
_ALL_WINDOWS_SAMPLES = 8192


def philox_generator(purpose: str, *keys: int, counter: int = 0) -> np.random.Philox:
    """Return a counter-based generator keyed by BLAKE2b of a purpose and integers, the same in every process."""
    packed = purpose.encode() + b"\0" + struct.pack(f"<{len(keys)}Q", *(key % 2**64 for key in keys))
    key = int.from_bytes(hashlib.blake2b(packed, digest_size=16).digest(), "little")
    return np.random.Philox(key=key, counter=counter)


def permutation(length: int, purpose: str, *keys: int) -> Indices:
    """Return a permutation of range(length).

    Computed from raw bits, which NumPy keeps stable between versions; its shuffle functions are not.
    """
    return np.argsort(philox_generator(purpose, *keys).random_raw(length), kind="stable").astype(np.int64)


def random_bits(seed: int, position: int, count: int) -> NDArray[np.uint64]:
    """Return random bits (count, 8) for consecutive positions; row i depends on (seed, position + i) alone."""
    raw = philox_generator("sample", seed, counter=2 * position).random_raw(8 * count)  # 4 values per counter
    return np.asarray(raw, dtype=np.uint64).reshape(count, 8)


def window_samples(groups: int) -> int:
    """Return the number of samples that a lane shuffles together.

    It falls with the number of groups of the whole run, so that one worker can hold the windows of all lanes. It must
    not depend on a worker's share of the groups, because the order does not.
    """
    fewest, most = _WINDOW_SAMPLES
    return max(fewest, min(most, _ALL_WINDOWS_SAMPLES // groups))


@dataclass(frozen=True)
class SampleRange:
    """Consecutive samples of one shard."""

    shard: int
    first: int
    """Index of the first sample within the shard."""
    count: int


@dataclass(frozen=True)
class Window:
    """Samples of a lane that are shuffled together."""

    epoch: int
    lane: int
    index: int
    """Index of the window within the lane's epoch."""
    ranges: tuple[SampleRange, ...]
    """The samples (n in all), in the order in which they are read."""
    permutation: Indices
    """(n,); the i-th sample to train on is number permutation[i] of those read."""
    shard_starts: Indices
    """(shards,) global index of each shard's first sample."""

    @cached_property
    def indices(self) -> Indices:
        """(n,) global sample indices, in the order of training."""
        read = [np.arange(part.count) + (self.shard_starts[part.shard] + part.first) for part in self.ranges]
        return np.concatenate(read)[self.permutation]


@dataclass(frozen=True)
class WindowSlice:
    """Samples [start, start + count) of a lane's window, in the order of training."""

    epoch: int
    window: int
    """Index of the window within the lane's epoch."""
    start: int
    count: int


@dataclass(frozen=True)
class _EpochLayout:
    """The permuted parts of an epoch, P in all, and their division among the lanes.

    Laid end to end, part k covers offsets ends[k] - sizes[k] to ends[k].
    """

    shards: Indices
    """(P,) shard of each part."""
    firsts: Indices
    """(P,) index of its first sample within the shard."""
    sizes: Indices
    """(P,) its number of samples."""
    ends: Indices
    """(P,) cumulative sum of `sizes`."""
    segments: Indices
    """(groups + 1,); lane g has offsets segments[g] to segments[g + 1]."""


class Order:
    """The samples of every step and group of a run.

    Args:
        seed: Seed of the run's data order.
        shard_sizes: Number of samples of each shard, in the order of the manifest.
        groups: Number of groups of the whole run.
        group_size: Number of samples of a group in one step.
        part_samples: Largest number of consecutive samples that are permuted as one.
        window: Number of samples that are shuffled together (None: `window_samples(groups)`).

    Raises:
        ValueError: If a size or a number is not positive.
    """

    def __init__(
        self,
        seed: int,
        shard_sizes: Sequence[int],
        groups: int,
        group_size: int,
        part_samples: int = 256,
        window: int | None = None,
    ) -> None:
        names = ("groups", "group_size", "part_samples", "window")
        for name, value in zip(names, (groups, group_size, part_samples, 1 if window is None else window), strict=True):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not shard_sizes or min(shard_sizes) < 1:
            raise ValueError(f"shard sizes {list(shard_sizes)[:8]} are invalid: at least one shard, none empty")
        self.seed = seed
        self.groups = groups
        self.group_size = group_size
        self.window_samples = window_samples(groups) if window is None else window
        self.epoch_samples = int(sum(shard_sizes))
        self.shard_starts: Indices = np.concatenate([[0], np.cumsum(shard_sizes)[:-1]]).astype(np.int64)
        self._parts = _split_into_parts(shard_sizes, part_samples)
        self._epochs: dict[int, _EpochLayout] = {}
        self._windows: dict[tuple[int, int, int], Window] = {}

    def position(self, step: int, group: int) -> int:
        """Return the first of the `group_size` consecutive positions that (step, group) takes."""
        return (step * self.groups + group) * self.group_size

    def lane_start(self, epoch: int, lane: int) -> int:
        """Return the number of samples that `lane` supplies before `epoch` begins."""
        cycles, rest = divmod(epoch * self.epoch_samples, self.groups * self.group_size)
        return cycles * self.group_size + min(max(rest - lane * self.group_size, 0), self.group_size)

    def lane_length(self, epoch: int, lane: int) -> int:
        """Return the number of samples that `lane` supplies in `epoch`."""
        return self.lane_start(epoch + 1, lane) - self.lane_start(epoch, lane)

    def lane_windows(self, epoch: int, lane: int) -> int:
        """Return the number of windows of `lane` in `epoch`."""
        return -(-self.lane_length(epoch, lane) // self.window_samples)

    def window_slices(self, step: int, group: int) -> list[WindowSlice]:
        """Return the slices that (step, group) takes, in order; more than one if it crosses a window or an epoch."""
        slices: list[WindowSlice] = []
        done = 0
        while done < self.group_size:
            epoch = (self.position(step, group) + done) // self.epoch_samples
            offset = step * self.group_size + done - self.lane_start(epoch, group)
            window, start = divmod(offset, self.window_samples)
            end = min((window + 1) * self.window_samples, self.lane_length(epoch, group))
            count = min(self.group_size - done, end - offset)
            slices.append(WindowSlice(epoch, window, start, count))
            done += count
        return slices

    def sample_indices(self, step: int, group: int) -> Indices:
        """Return the global indices (group_size,) of the samples of (step, group).

        A sample's global index is its index within the shard plus the number of samples of the shards before.
        """
        taken = [
            self.window(part.epoch, group, part.window).indices[part.start : part.start + part.count]
            for part in self.window_slices(step, group)
        ]
        return np.concatenate(taken)

    def window(self, epoch: int, lane: int, index: int) -> Window:
        """Return window `index` of `lane` in `epoch`."""
        key = (epoch, lane, index)
        if key not in self._windows:
            while len(self._windows) >= _WINDOWS_KEPT_PER_LANE * self.groups:
                self._windows.pop(next(iter(self._windows)))
            self._windows[key] = self._compute_window(epoch, lane, index)
        return self._windows[key]

    def _compute_window(self, epoch: int, lane: int, index: int) -> Window:
        layout = self._layout(epoch)
        start = int(layout.segments[lane]) + index * self.window_samples
        end = min(start + self.window_samples, int(layout.segments[lane + 1]))
        assert start < end, f"lane {lane} has no window {index} in epoch {epoch}"
        ranges = []
        part = int(np.searchsorted(layout.ends, start, side="right"))
        at = start
        while at < end:
            skipped = at - int(layout.ends[part] - layout.sizes[part])
            count = min(int(layout.ends[part]), end) - at
            ranges.append(SampleRange(int(layout.shards[part]), int(layout.firsts[part]) + skipped, count))
            at += count
            part += 1
        shuffled = permutation(end - start, "window", self.seed, epoch, lane, index)
        return Window(epoch, lane, index, tuple(ranges), shuffled, self.shard_starts)

    def _layout(self, epoch: int) -> _EpochLayout:
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                self._epochs.pop(next(iter(self._epochs)))
            shards, firsts, sizes = self._parts
            order = permutation(len(shards), "epoch", self.seed, epoch)
            lengths = [self.lane_length(epoch, lane) for lane in range(self.groups)]
            self._epochs[epoch] = _EpochLayout(
                shards=shards[order],
                firsts=firsts[order],
                sizes=sizes[order],
                ends=np.cumsum(sizes[order]),
                segments=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            )
        return self._epochs[epoch]


def _split_into_parts(shard_sizes: Sequence[int], part_samples: int) -> tuple[Indices, Indices, Indices]:
    """Return each part's shard, first sample and number of samples, (P,) each, in the order of the shards."""
    parts = [
        (shard, first, min(part_samples, size - first))
        for shard, size in enumerate(shard_sizes)
        for first in range(0, size, part_samples)
    ]
    columns = np.array(parts, dtype=np.int64)
    return columns[:, 0], columns[:, 1], columns[:, 2]
