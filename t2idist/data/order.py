"""The order of a whole run as a pure function of (seed, shard sizes, groups, group size).

Position ``p`` of one endless sequence is sample ``p % N`` of epoch ``p // N``; step ``t``, group ``g``, place ``i``
takes position ``(t * groups + g) * group_size + i``. Images seen is therefore the whole state of a loader, and every
sample comes once per epoch for any N, groups and group size.

In an epoch every shard is cut into parts of consecutive samples, the parts are permuted, and contiguous segments of
them are dealt to the lanes (lane g feeds group g). A lane's segment is shuffled in windows: it reads long byte ranges
and needs the memory of one window.
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


def philox(purpose: str, *numbers: int, counter: int = 0) -> np.random.Philox:
    """A counter-based generator keyed by a purpose and integers (BLAKE2b of both), the same in every process."""
    packed = purpose.encode() + b"\0" + struct.pack(f"<{len(numbers)}Q", *(number % 2**64 for number in numbers))
    key = int.from_bytes(hashlib.blake2b(packed, digest_size=16).digest(), "little")
    return np.random.Philox(key=key, counter=counter)


def permutation(length: int, purpose: str, *numbers: int) -> Indices:
    """A permutation of range(length), from raw bits: those numpy keeps equal over its versions, its shuffles not."""
    return np.argsort(philox(purpose, *numbers).random_raw(length), kind="stable").astype(np.int64)


def draws(seed: int, position: int, count: int) -> NDArray[np.uint64]:
    """(count, 8) random words: row i depends on (seed, position + i) alone."""
    raw = philox("sample", seed, counter=2 * position).random_raw(8 * count)  # Philox gives four words per count
    return np.asarray(raw, dtype=np.uint64).reshape(count, 8)


def window_samples(groups: int) -> int:
    """Samples that a lane shuffles together: fewer where there are many lanes, so that one worker can hold all windows.

    Depends on the groups of the whole run alone, never on a worker's share of them, as the order does.
    """
    fewest, most = _WINDOW_SAMPLES
    return max(fewest, min(most, _ALL_WINDOWS_SAMPLES // groups))


@dataclass(frozen=True)
class SampleRange:
    """`count` consecutive samples of shard number `shard`, from its sample `first` on."""

    shard: int
    first: int
    count: int


@dataclass(frozen=True)
class Window:
    """A lane's samples that are shuffled together: read the runs in order, then take them in order of `permutation`."""

    epoch: int
    lane: int
    number: int
    runs: tuple[SampleRange, ...]
    permutation: Indices
    shard_starts: Indices

    @cached_property
    def indices(self) -> Indices:
        """Global sample indices in the order in which they are trained on."""
        read = [np.arange(run.count) + (self.shard_starts[run.shard] + run.first) for run in self.runs]
        return np.concatenate(read)[self.permutation]


@dataclass(frozen=True)
class WindowSlice:
    """Places [start, start + count) of window `number` of the lane in `epoch`."""

    epoch: int
    number: int
    start: int
    count: int


@dataclass(frozen=True)
class _Epoch:
    """Permuted parts: part k holds `sizes[k]` samples and covers places ends[k] - sizes[k] .. ends[k] of the epoch."""

    shards: Indices
    firsts: Indices
    sizes: Indices
    ends: Indices
    segments: Indices


class Order:
    """Which sample is trained on at each step, group and place.

    seed: of the run. shard_sizes: samples per shard. groups: of the whole run. group_size: samples per group and step.
    part_samples, window: samples of a part and of a window, how finely an epoch is shuffled (window: None for
    `window_samples(groups)`). Raises ValueError for sizes that are not positive.
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
            raise ValueError(f"shard sizes {list(shard_sizes)[:8]} are not usable: at least one shard, none empty")
        self.seed = seed
        self.groups = groups
        self.group_size = group_size
        self.window_samples = window_samples(groups) if window is None else window
        self.epoch_samples = int(sum(shard_sizes))
        self.shard_starts: Indices = np.concatenate([[0], np.cumsum(shard_sizes)[:-1]]).astype(np.int64)
        self._parts = _cut(shard_sizes, part_samples)
        self._epochs: dict[int, _Epoch] = {}
        self._windows: dict[tuple[int, int, int], Window] = {}

    def position(self, step: int, group: int) -> int:
        """The first of the `group_size` positions in the endless sequence that (step, group) takes."""
        return (step * self.groups + group) * self.group_size

    def lane_start(self, epoch: int, lane: int) -> int:
        """How many samples lane `lane` has had before `epoch`."""
        cycles, rest = divmod(epoch * self.epoch_samples, self.groups * self.group_size)
        return cycles * self.group_size + min(max(rest - lane * self.group_size, 0), self.group_size)

    def lane_length(self, epoch: int, lane: int) -> int:
        """How many samples of `epoch` belong to `lane`."""
        return self.lane_start(epoch + 1, lane) - self.lane_start(epoch, lane)

    def lane_windows(self, epoch: int, lane: int) -> int:
        """How many windows `lane` has in `epoch`."""
        return -(-self.lane_length(epoch, lane) // self.window_samples)

    def pieces(self, step: int, group: int) -> list[WindowSlice]:
        """The windows' places that (step, group) takes, in order; more than one at a border of windows or epochs."""
        found: list[WindowSlice] = []
        done = 0
        while done < self.group_size:
            epoch = (self.position(step, group) + done) // self.epoch_samples
            local = step * self.group_size + done - self.lane_start(epoch, group)
            number, start = divmod(local, self.window_samples)
            end = min((number + 1) * self.window_samples, self.lane_length(epoch, group))
            count = min(self.group_size - done, end - local)
            found.append(WindowSlice(epoch, number, start, count))
            done += count
        return found

    def sample_index(self, step: int, group: int) -> Indices:
        """(group_size,) global indices (shard's start + place in the shard) of the samples of (step, group)."""
        taken = [
            self.window(piece.epoch, group, piece.number).indices[piece.start : piece.start + piece.count]
            for piece in self.pieces(step, group)
        ]
        return np.concatenate(taken)

    def window(self, epoch: int, lane: int, number: int) -> Window:
        """Window `number` of `lane` in `epoch`."""
        key = (epoch, lane, number)
        if key not in self._windows:
            while len(self._windows) >= _WINDOWS_KEPT_PER_LANE * self.groups:
                self._windows.pop(next(iter(self._windows)))
            self._windows[key] = self._make_window(epoch, lane, number)
        return self._windows[key]

    def _make_window(self, epoch: int, lane: int, number: int) -> Window:
        parts = self._epoch(epoch)
        start = int(parts.segments[lane]) + number * self.window_samples
        end = min(start + self.window_samples, int(parts.segments[lane + 1]))
        assert start < end, f"lane {lane} has no window {number} in epoch {epoch}"
        runs = []
        part = int(np.searchsorted(parts.ends, start, side="right"))
        at = start
        while at < end:
            skipped = at - int(parts.ends[part] - parts.sizes[part])
            count = min(int(parts.ends[part]), end) - at
            runs.append(SampleRange(int(parts.shards[part]), int(parts.firsts[part]) + skipped, count))
            at += count
            part += 1
        shuffled = permutation(end - start, "window", self.seed, epoch, lane, number)
        return Window(epoch, lane, number, tuple(runs), shuffled, self.shard_starts)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                self._epochs.pop(next(iter(self._epochs)))
            shards, firsts, sizes = self._parts
            order = permutation(len(shards), "epoch", self.seed, epoch)
            lengths = [self.lane_length(epoch, lane) for lane in range(self.groups)]
            self._epochs[epoch] = _Epoch(
                shards=shards[order],
                firsts=firsts[order],
                sizes=sizes[order],
                ends=np.cumsum(sizes[order]),
                segments=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            )
        return self._epochs[epoch]


def _cut(shard_sizes: Sequence[int], part_samples: int) -> tuple[Indices, Indices, Indices]:
    """Shard number, first sample and size of each part."""
    parts = [
        (shard, first, min(part_samples, size - first))
        for shard, size in enumerate(shard_sizes)
        for first in range(0, size, part_samples)
    ]
    columns = np.array(parts, dtype=np.int64)
    return columns[:, 0], columns[:, 1], columns[:, 2]
