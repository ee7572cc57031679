"""The writer behind all layouts: listed sources into a shard set, in several processes, resumable, byte for byte equal.

After each shard that is stored, a record of it goes to the folder `progress` of the set: the same command goes on after
the last of them. At the end they become the manifest, dataset.json is written last, and the records are removed.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from t2idist import storage
from t2idist.data.shard_writer import Row, ShardPacker, refuse_finished, shard_name, write_index
from t2idist.data.shards import DESCRIPTION, Shard, stored_bytes
from t2idist.ingest.image import PictureOptions
from t2idist.ingest.listing import Listing
from t2idist.ingest.prepare import Outcome, Preparers, start_preparers
from t2idist.ingest.rejects import Effect, Reason, Reject

PROGRESS = "progress"
REJECTED = "rejected.jsonl"
PART_SAMPLES = 256
"""Samples that the order of training takes as one part (t2idist.data.order): shards hold whole parts."""

_SHARD_BYTES = 100 << 20
_UPLOADS = 2
_FORMAT = 1
_LEFT_OVER = re.compile(r"\..+\.(tar|json|jsonl|parquet)\.[0-9a-f]{8}")


@dataclass(frozen=True)
class IngestOptions:
    """What decides the bytes of a set, besides the pictures and captions.

    max_words: longer captions are cut (None: none is). min_count: rarer words are left out of the vocabulary.
    shard_samples: a multiple of 256; fewer where that would be far more than 100 MB.
    """

    picture: PictureOptions = field(default_factory=PictureOptions)
    max_words: int | None = None
    min_count: int = 1
    shard_samples: int = 1024

    def __post_init__(self) -> None:
        if self.picture.size < 0:
            raise ValueError(f"--size {self.picture.size}: give pixels, or 0 for no resizing")
        if not 1 <= self.picture.quality <= 100:
            raise ValueError(f"--quality {self.picture.quality}: allowed are 1 to 100")
        if self.shard_samples < PART_SAMPLES or self.shard_samples % PART_SAMPLES:
            raise ValueError(f"--shard-samples {self.shard_samples}: give a multiple of {PART_SAMPLES}")
        if self.max_words is not None and self.max_words < 1:
            raise ValueError(f"--max-words {self.max_words}: give at least 1")
        if self.min_count < 1:
            raise ValueError(f"--min-count {self.min_count}: give at least 1")

    def facts(self) -> dict[str, Any]:
        """As dataset.json has them."""
        return {
            **asdict(self.picture),
            "max_words": self.max_words,
            "min_count": self.min_count,
            "shard_samples": self.shard_samples,
            "order": "by a hash of the key",
        }


class Refused(ValueError):
    """Something is wrong with the data, and nothing was to be wrong (--strict)."""


@dataclass(frozen=True)
class Progress:
    """How far it is. images: done of all, shards: stored."""

    images: int
    total: int
    shards: int


def write_set(
    listing: Listing,
    out: str,
    options: IngestOptions,
    *,
    source: str,
    licence: str,
    processes: int,
    strict: bool = False,
    restart: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Write what is listed as a shard set at `out`, or go on with it; gives its dataset.json.

    processes: that prepare pictures. restart: forget what a run that was cut off has stored. report: is called as
    pictures are done. Raises ValueError for a finished set, for one that was begun with other options or other data,
    and where no picture can be used; Refused where `strict` and anything is wrong.
    """
    if storage.exists(storage.join(out, DESCRIPTION)):
        storage.remove(storage.join(out, PROGRESS))  # left where the last run was killed at its very end
    refuse_finished(out)
    if not listing.splits():
        raise ValueError(f"no picture is listed; wrong with the data: {_counts(listing) or 'nothing'}")
    store = _Store(out, _plan(listing, options))
    if restart:
        _forget(out)
    if strict:
        _refuse_any(list(itertools.islice(listing.rejects(), 3)))
    _remove_left_overs(out)
    run = _Run(listing, store, options, strict, report)
    if run.total > run.done:
        whole_memory = any(source.url.startswith("memory:") for s in listing.splits() for source in _first(listing, s))
        preparers = start_preparers(options.picture, options.max_words, 1 if whole_memory else processes)
        try:
            run.write(preparers)
        finally:
            preparers.close()
            store.close()
    return _finish(listing, store, options, source, licence)


def _first(listing: Listing, split: str) -> Iterator[Any]:
    return itertools.islice(listing.sources(split), 1)


@dataclass(frozen=True)
class _Stored:
    """A finished shard: next_source is the place of the first source after it, cut the number of captions cut."""

    split: str
    shard: Shard
    shard_samples: int
    next_source: int
    cut: int


class _Store:
    """Stores shards and their records; two at a time, off the main thread."""

    def __init__(self, out: str, plan: dict[str, Any]) -> None:
        self.out = out
        self.plan = plan
        self.stored: dict[str, list[_Stored]] = {}
        self._pool = ThreadPoolExecutor(_UPLOADS, "upload")
        self._under_way: deque[Future[_Stored]] = deque()

    def load(self, split: str, listing: Listing) -> None:
        """Take up the shards that an earlier run has stored; their rejects go to the listing."""
        names = set(storage.list_dir(storage.join(self.out, PROGRESS)))
        self.stored[split] = []
        for number in itertools.count():
            name = shard_name(split, number)
            if f"{name}.json" not in names:
                return
            record = self._record(name)
            if record is None:
                return
            stored = _Stored(
                split, Shard(**record["shard"]), record["shard_samples"], record["next_source"], record["cut"]
            )
            if stored_bytes(self.out, stored.shard) != stored.shard.bytes:
                return
            self.stored[split].append(stored)
            for reject in record["rejects"]:
                listing.reject(
                    Reject(**{**reject, "reason": Reason(reject["reason"]), "effect": Effect(reject["effect"])})
                )

    def rows(self) -> Iterator[list[Row]]:
        for split in sorted(self.stored):
            for stored in self.stored[split]:
                record = self._record(stored.shard.name)
                if record is None:
                    raise ValueError(f"{self._record_url(stored.shard.name)}: was damaged while this command ran")
                yield record["rows"]

    def put(self, packer: ShardPacker, name: str, record: dict[str, Any]) -> None:
        """Store a shard, then its record; waits where two are under way already."""
        while len(self._under_way) >= _UPLOADS:
            self._take_in()
        self._under_way.append(self._pool.submit(self._put, packer, name, record))

    def settle(self) -> None:
        """Wait for all that is under way."""
        while self._under_way:
            self._take_in()

    def close(self) -> None:
        self._pool.shutdown(wait=True)  # what was handed over is stored, also where the run is cut off

    def _take_in(self) -> None:
        stored = self._under_way.popleft().result()
        self.stored[stored.split].append(stored)

    def _put(self, packer: ShardPacker, name: str, record: dict[str, Any]) -> _Stored:
        shard, data = packer.finish(name)
        storage.write_bytes(storage.join(self.out, name), data)
        whole = {"plan": self.plan, "shard": asdict(shard), **record, "rows": packer.rows}
        storage.write_bytes(self._record_url(name), json.dumps(whole).encode())
        return _Stored(record["split"], shard, record["shard_samples"], record["next_source"], record["cut"])

    def _record_url(self, name: str) -> str:
        return storage.join(self.out, PROGRESS, f"{name}.json")

    def _record(self, name: str) -> dict[str, Any] | None:
        """The record of a shard, None where it is damaged; raises ValueError where it is of another plan."""
        try:
            record: dict[str, Any] = storage.read_json(self._record_url(name))
            plan = record["plan"]
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            return None
        if plan != self.plan:
            differ = [key for key in self.plan if plan.get(key) != self.plan[key]]
            which = ", ".join(f"{key} (then {plan.get(key)}, now {self.plan[key]})" for key in differ)
            raise ValueError(
                f"{storage.redact(self.out)}: was begun with another {which or 'plan'}; give the same again, or "
                "--restart to begin anew"
            )
        return record


class _Run:
    """Everything that is still to be written, split by split."""

    def __init__(
        self, listing: Listing, store: _Store, options: IngestOptions, strict: bool,
        report: Callable[[Progress], None],
    ) -> None:  # fmt: skip
        self._listing = listing
        self._store = store
        self._options = options
        self._strict = strict
        self._report = report
        self._sizes = listing.splits()
        self.total = sum(self._sizes.values())
        self._shards = 0
        self.done = 0
        for split in self._sizes:
            store.load(split, listing)
            stored = store.stored[split]
            self.done += stored[-1].next_source if stored else 0
            self._shards += len(stored)
        if strict:
            _refuse_any(list(itertools.islice(listing.rejects(), 3)))

    def write(self, preparers: Preparers) -> None:
        self._tell()
        for split, size in self._sizes.items():
            stored = self._store.stored[split]
            first = stored[-1].next_source if stored else 0
            if first == size:
                continue
            outcomes = self._counted(preparers.run(self._listing.sources(split, first)))
            if stored:
                shard_samples = stored[-1].shard_samples
            else:
                shard_samples, outcomes = _choose_shard_samples(outcomes, self._options.shard_samples)
            self._write_split(split, first, shard_samples, outcomes)
        self._store.settle()

    def _counted(self, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
        for outcome in outcomes:
            if self._strict:
                _refuse_any(outcome.rejects)
            self.done += 1
            self._tell()
            yield outcome

    def _tell(self) -> None:
        self._report(Progress(self.done, self.total, self._shards))

    def _write_split(self, split: str, first: int, shard_samples: int, outcomes: Iterator[Outcome]) -> None:
        number = len(self._store.stored[split])
        packer, rejects, cut = ShardPacker(), list[Reject](), 0
        place = first

        def close() -> None:
            facts = {"split": split, "shard_samples": shard_samples, "next_source": place, "cut": cut}
            self._store.put(packer, shard_name(split, number), {**facts, "rejects": [asdict(r) for r in rejects]})
            self._shards += 1
            for reject in rejects:
                self._listing.reject(reject)

        for outcome in outcomes:
            if outcome.packed is not None and len(packer.rows) == shard_samples:
                close()
                number, packer, rejects, cut = number + 1, ShardPacker(), [], 0
            place += 1
            rejects += outcome.rejects
            cut += outcome.captions_cut
            if outcome.packed is not None:
                packer.add(outcome.packed)
        if packer.rows:
            close()
        else:
            for reject in rejects:  # of a split in which nothing can be used
                self._listing.reject(reject)


def _choose_shard_samples(outcomes: Iterator[Outcome], wanted: int) -> tuple[int, Iterator[Outcome]]:
    """How many samples a shard shall hold, by the mean size of the first ones, and all outcomes again."""
    seen: list[Outcome] = []
    good = size_bytes = 0
    for outcome in outcomes:
        seen.append(outcome)
        if outcome.packed is not None:
            good += 1
            size_bytes += len(outcome.packed.tar)
        if good == PART_SAMPLES or size_bytes >= _SHARD_BYTES:
            break
    fit = _SHARD_BYTES * good // size_bytes if good else wanted
    if fit >= PART_SAMPLES:
        return min(wanted, fit // PART_SAMPLES * PART_SAMPLES), itertools.chain(seen, outcomes)
    return 1 << max(3, fit.bit_length() - 1), itertools.chain(seen, outcomes)  # huge pictures: 8, 16 ... 128


def _plan(listing: Listing, options: IngestOptions) -> dict[str, Any]:
    """What must be equal for a run to be taken up."""
    facts = {key: value for key, value in options.facts().items() if key not in ("min_count", "order")}
    return {"format": _FORMAT, **facts, "number of pictures": sum(listing.splits().values()), "list": listing.digest()}


def _refuse_any(rejects: tuple[Reject, ...] | list[Reject]) -> None:
    if rejects:
        raise Refused(f"--strict, and something is wrong with the data: {'; '.join(str(r) for r in rejects[:3])}")


def _finish(listing: Listing, store: _Store, options: IngestOptions, source: str, licence: str) -> dict[str, Any]:
    shards = {split: [s.shard for s in store.stored[split]] for split in sorted(store.stored) if store.stored[split]}
    if not shards:
        raise ValueError(f"no picture can be used: {_counts(listing)}")
    lines = "".join(f"{reject.as_json()}\n" for reject in listing.rejects())
    storage.write_bytes(storage.join(store.out, REJECTED), lines.encode())
    facts = {
        "source": source,
        "licence": licence,
        "options": options.facts(),
        "classes": {str(number): listing.classes[number] for number in sorted(listing.classes)},
        "rejected": listing.reject_counts(),
        "captions_cut": sum(stored.cut for of_split in store.stored.values() for stored in of_split),
    }
    description = write_index(store.out, shards, store.rows(), facts=facts, min_count=options.min_count)
    storage.remove(storage.join(store.out, PROGRESS))
    return description


def _counts(listing: Listing) -> str:
    counts = listing.reject_counts()
    return ", ".join(f"{reason} {sum(by_effect.values())}" for reason, by_effect in counts.items())


def _forget(out: str) -> None:
    """Remove the shards and records of a run that did not finish."""
    for name in storage.list_dir(storage.join(out, PROGRESS)):
        shard = name.removesuffix(".json")
        if re.fullmatch(r"[A-Za-z0-9_-]+\.tar", shard):
            storage.remove(storage.join(out, shard))
    storage.remove(storage.join(out, PROGRESS))


def _remove_left_overs(out: str) -> None:
    """Half-written files of a run that was killed, where `out` is a folder on disk."""
    folder = storage.local_path(out)
    if folder is not None and folder.is_dir():
        for path in [*folder.glob(".*"), *(folder / PROGRESS).glob(".*")]:
            if _LEFT_OVER.fullmatch(path.name):
                path.unlink(missing_ok=True)
