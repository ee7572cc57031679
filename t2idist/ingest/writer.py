"""Write listed images as a shard set, in several processes. An interrupted run resumes; the bytes are always the same.

Each stored shard has a record in the folder `progress` of the set, and the same command resumes after the last one. At
the end the records become the manifest, dataset.json is written last, and the records are removed.
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
from t2idist.data.shard_writer import Row, ShardBuilder, check_unfinished, shard_name, write_index
from t2idist.data.shards import DESCRIPTION, Shard, stored_bytes
from t2idist.data.tokenizer import ASCII, TOKENIZERS, UNICODE
from t2idist.ingest.captions import CaptionOptions
from t2idist.ingest.files import PROGRESS
from t2idist.ingest.image import MAX_MEGAPIXELS, ImageOptions
from t2idist.ingest.listing import Listing
from t2idist.ingest.prepare import Preparer, SampleResult, start_preparer
from t2idist.ingest.rejects import Effect, Reason, Reject

REJECTED = "rejected.jsonl"
PART_SAMPLES = 256
"""Samples per part of the training order (t2idist.data.order); shards hold whole parts."""

_SHARD_BYTES = 100 << 20
_UPLOADS = 2
_FORMAT = 1
_TEMPORARY_FILE = re.compile(r"\..+\.(tar|json|jsonl|parquet)\.[0-9a-f]{8}")


@dataclass(frozen=True)
class IngestOptions:
    """Options that, with the images and captions, determine the bytes of a set."""

    image: ImageOptions = field(default_factory=ImageOptions)
    max_words: int | None = None
    """Longer captions are cut to this many words (None: no limit)."""
    min_count: int = 1
    """Words that occur less often are not in the vocabulary."""
    shard_samples: int = 1024
    """Samples per shard, a multiple of 256; less if a shard would be much larger than 100 MB."""
    tokenizer: str = UNICODE
    """What splits captions into words (`t2idist.data.tokenizer`)."""
    encoding: str | None = None
    """Of text files (None: as they say themselves)."""

    def __post_init__(self) -> None:
        if self.image.size < 0:
            raise ValueError(f"--size {self.image.size}: must be at least 0 (0: no resizing)")
        if not 1 <= self.image.quality <= 100:
            raise ValueError(f"--quality {self.image.quality}: must be from 1 to 100")
        megapixels = self.image.max_megapixels
        if megapixels < 1:
            raise ValueError(f"--max-megapixels {megapixels}: must be at least 1")
        if megapixels > MAX_MEGAPIXELS and (self.image.keep_original or not self.image.size):
            raise ValueError(
                f"--max-megapixels {megapixels}: above {MAX_MEGAPIXELS} the images must be stored smaller, by --size "
                "and without --keep-original"
            )
        if self.shard_samples < PART_SAMPLES or self.shard_samples % PART_SAMPLES:
            raise ValueError(f"--shard-samples {self.shard_samples}: must be a multiple of {PART_SAMPLES}")
        if self.max_words is not None and self.max_words < 1:
            raise ValueError(f"--max-words {self.max_words}: must be at least 1")
        if self.min_count < 1:
            raise ValueError(f"--min-count {self.min_count}: must be at least 1")
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(f"--tokenizer {self.tokenizer}: must be one of {', '.join(TOKENIZERS)}")

    @property
    def captions(self) -> CaptionOptions:
        return CaptionOptions(self.max_words, self.tokenizer, self.encoding)

    def describe(self) -> dict[str, Any]:
        """Return the options as dataset.json holds them."""
        image = asdict(self.image)
        if self.image.max_megapixels == MAX_MEGAPIXELS:  # as the sets have it that were made before this option
            del image["max_megapixels"]
        if not self.image.pairs:  # likewise
            del image["pairs"]
        return {
            **image,
            "max_words": self.max_words,
            "min_count": self.min_count,
            "shard_samples": self.shard_samples,
            "order": "by a hash of the key",
            **({} if self.encoding is None else {"encoding": self.encoding}),
        }


class StrictError(ValueError):
    """Raised by --strict if the data has any problem."""


ReportProgress = Callable[[int, int, int], None]
"""Called with the number of images done, the total, and the number of shards stored."""


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
    report: ReportProgress = lambda done, total, shards: None,
) -> dict[str, Any]:
    """Write the listed images as a shard set at `out`, or resume an interrupted run.

    Args:
        processes: number of processes that prepare images.
        restart: remove what an interrupted run has stored, and start again.
        report: called after each image.

    Returns:
        The content of dataset.json.

    Raises:
        ValueError: the set is finished, was started with other options or data, or no image is usable.
        StrictError: `strict`, and the data has a problem.
    """
    if storage.exists(storage.join(out, DESCRIPTION)):
        storage.remove(storage.join(out, PROGRESS))  # a run that was killed at the very end leaves it
    check_unfinished(out)
    if not listing.splits():
        raise _nothing_usable(listing, out, "no images are listed")
    store = _ShardStore(out, _plan(listing, options))
    if restart:
        _remove_unfinished(out)
    if strict:
        _check_strict(list(itertools.islice(listing.rejects(), 3)))
    _remove_temporary_files(out)
    writer = _SetWriter(listing, store, options, strict, report)
    if writer.total > writer.done:
        in_memory = any(image.url.startswith("memory:") for s in listing.splits() for image in _first(listing, s))
        preparer = start_preparer(options.image, options.captions, 1 if in_memory else processes)
        try:
            writer.write(preparer)
        finally:
            preparer.close()
            store.close()
    return _finish(listing, store, options, source, licence)


def _first(listing: Listing, split: str) -> Iterator[Any]:
    return itertools.islice(listing.images(split), 1)


@dataclass(frozen=True)
class _StoredShard:
    """A finished shard."""

    split: str
    shard: Shard
    shard_samples: int
    next_image: int
    """Position in the listing of the first image after it."""
    captions_cut: int


class _ShardStore:
    """Store shards and their records in the background, two at a time."""

    def __init__(self, out: str, plan: dict[str, Any]) -> None:
        self.out = out
        self.plan = plan
        self.stored: dict[str, list[_StoredShard]] = {}
        self._pool = ThreadPoolExecutor(_UPLOADS, "upload")
        self._pending: deque[Future[_StoredShard]] = deque()

    def load(self, split: str, listing: Listing) -> None:
        """Load the shards that an earlier run has stored; their rejects are added to the listing."""
        names = set(storage.list_dir(storage.join(self.out, PROGRESS)))
        self.stored[split] = []
        for number in itertools.count():
            name = shard_name(split, number)
            if f"{name}.json" not in names:
                return
            record = self._record(name)
            if record is None:
                return
            stored = _StoredShard(
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
                    raise ValueError(f"{self._record_url(stored.shard.name)}: was damaged during this run")
                yield record["rows"]

    def put(self, builder: ShardBuilder, name: str, record: dict[str, Any]) -> None:
        """Store a shard, then its record; wait if two are pending."""
        while len(self._pending) >= _UPLOADS:
            self._take_result()
        self._pending.append(self._pool.submit(self._put, builder, name, record))

    def wait(self) -> None:
        """Wait until all shards are stored."""
        while self._pending:
            self._take_result()

    def close(self) -> None:
        self._pool.shutdown(wait=True)  # pending shards are stored even if the run is interrupted

    def _take_result(self) -> None:
        stored = self._pending.popleft().result()
        self.stored[stored.split].append(stored)

    def _put(self, builder: ShardBuilder, name: str, record: dict[str, Any]) -> _StoredShard:
        shard, data = builder.finish(name)
        storage.write_bytes(storage.join(self.out, name), data)
        record = {"plan": self.plan, "shard": asdict(shard), **record, "rows": builder.rows}
        storage.write_bytes(self._record_url(name), json.dumps(record).encode())
        return _StoredShard(record["split"], shard, record["shard_samples"], record["next_source"], record["cut"])

    def _record_url(self, name: str) -> str:
        return storage.join(self.out, PROGRESS, f"{name}.json")

    def _record(self, name: str) -> dict[str, Any] | None:
        """Read the record of a shard; None if it is damaged. Raises ValueError if it belongs to another plan."""
        try:
            record: dict[str, Any] = storage.read_json(self._record_url(name))
            plan = record["plan"]
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            return None
        if plan != self.plan:
            changed = [key for key in self.plan if plan.get(key) != self.plan[key]]
            changes = ", ".join(f"{key} (then {plan.get(key)}, now {self.plan[key]})" for key in changed)
            raise ValueError(
                f"{storage.redact(self.out)}: was started with another {changes or 'plan'}; use the same options and "
                "data, or --restart to start again"
            )
        return record


class _SetWriter:
    """Write the images that remain, split by split."""

    def __init__(
        self, listing: Listing, store: _ShardStore, options: IngestOptions, strict: bool,
        report: ReportProgress,
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
            self.done += stored[-1].next_image if stored else 0
            self._shards += len(stored)
        if strict:
            _check_strict(list(itertools.islice(listing.rejects(), 3)))

    def write(self, preparer: Preparer) -> None:
        self._report_progress()
        for split, size in self._sizes.items():
            stored = self._store.stored[split]
            first = stored[-1].next_image if stored else 0
            if first == size:
                continue
            results = self._counted(preparer.run(self._listing.images(split, first)))
            if stored:
                shard_samples = stored[-1].shard_samples
            else:
                shard_samples, results = _choose_shard_samples(results, self._options.shard_samples)
            self._write_split(split, first, shard_samples, results)
        self._store.wait()

    def _counted(self, results: Iterator[SampleResult]) -> Iterator[SampleResult]:
        for result in results:
            if self._strict:
                _check_strict(result.rejects)
            self.done += 1
            self._report_progress()
            yield result

    def _report_progress(self) -> None:
        self._report(self.done, self.total, self._shards)

    def _write_split(self, split: str, first: int, shard_samples: int, results: Iterator[SampleResult]) -> None:
        number = len(self._store.stored[split])
        builder, rejects, cut = ShardBuilder(), list[Reject](), 0
        position = first

        def close() -> None:
            facts = {"split": split, "shard_samples": shard_samples, "next_source": position, "cut": cut}
            self._store.put(builder, shard_name(split, number), {**facts, "rejects": [asdict(r) for r in rejects]})
            self._shards += 1
            for reject in rejects:
                self._listing.reject(reject)

        for result in results:
            if result.packed is not None and len(builder.rows) == shard_samples:
                close()
                number, builder, rejects, cut = number + 1, ShardBuilder(), [], 0
            position += 1
            rejects += result.rejects
            cut += result.captions_cut
            if result.packed is not None:
                builder.add(result.packed)
        if builder.rows:
            close()
        else:
            for reject in rejects:  # the split has no usable image
                self._listing.reject(reject)


def _choose_shard_samples(results: Iterator[SampleResult], requested: int) -> tuple[int, Iterator[SampleResult]]:
    """Choose the samples per shard by the mean size of the first samples. Returns it with all the results."""
    seen: list[SampleResult] = []
    usable = size_bytes = 0
    for result in results:
        seen.append(result)
        if result.packed is not None:
            usable += 1
            size_bytes += len(result.packed.tar)
        if usable == PART_SAMPLES or size_bytes >= _SHARD_BYTES:
            break
    fitting = _SHARD_BYTES * usable // size_bytes if usable else requested
    if fitting >= PART_SAMPLES:
        return min(requested, fitting // PART_SAMPLES * PART_SAMPLES), itertools.chain(seen, results)
    return 1 << max(3, fitting.bit_length() - 1), itertools.chain(seen, results)  # huge images: 8, 16 ... 128


def _plan(listing: Listing, options: IngestOptions) -> dict[str, Any]:
    """Return what must be equal for a run to be resumed. The keys are in the records of interrupted runs."""
    facts = {key: value for key, value in options.describe().items() if key not in ("min_count", "order")}
    if options.tokenizer != ASCII:  # the only one there was when the first records were written
        facts["tokenizer"] = options.tokenizer
    return {"format": _FORMAT, **facts, "number of pictures": sum(listing.splits().values()), "list": listing.digest()}


def _check_strict(rejects: tuple[Reject, ...] | list[Reject]) -> None:
    if rejects:
        raise StrictError(f"--strict, and the data has problems: {'; '.join(str(r) for r in rejects[:3])}")


def _finish(listing: Listing, store: _ShardStore, options: IngestOptions, source: str, licence: str) -> dict[str, Any]:
    shards = {split: [s.shard for s in store.stored[split]] for split in sorted(store.stored) if store.stored[split]}
    if not shards:
        raise _nothing_usable(listing, store.out, "no image is usable")
    _write_rejects(listing, store.out)
    facts = {
        "source": source,
        "licence": licence,
        "options": options.describe(),
        "classes": {str(number): listing.classes[number] for number in sorted(listing.classes)},
        "rejected": listing.reject_counts(),
        "captions_cut": sum(shard.captions_cut for split in store.stored.values() for shard in split),
    }
    description = write_index(
        store.out, shards, store.rows(), facts=facts, min_count=options.min_count, tokenizer=options.tokenizer
    )
    storage.remove(storage.join(store.out, PROGRESS))
    return description


def _write_rejects(listing: Listing, out: str) -> None:
    lines = "".join(f"{reject.as_json()}\n" for reject in listing.rejects())
    storage.write_bytes(storage.join(out, REJECTED), lines.encode())


def _nothing_usable(listing: Listing, out: str, problem: str) -> ValueError:
    """Write rejected.jsonl. Returns an error with the number of rejects by reason, and the first three in full."""
    counts = listing.reject_counts()
    if not counts:
        return ValueError(problem)
    _write_rejects(listing, out)
    excluded = (reject for reject in listing.rejects() if reject.effect is Effect.EXCLUDED)
    first = "; ".join(map(str, itertools.islice(excluded, 3)))
    by_reason = ", ".join(f"{reason} {sum(by_effect.values())}" for reason, by_effect in counts.items())
    url = storage.redact(storage.join(out, REJECTED))
    return ValueError(f"{problem}: {by_reason}; the first: {first}; all of them are in {url}")


def _remove_unfinished(out: str) -> None:
    """Remove the shards and records of an interrupted run."""
    for name in storage.list_dir(storage.join(out, PROGRESS)):
        shard = name.removesuffix(".json")
        if re.fullmatch(r"[A-Za-z0-9_-]+\.tar", shard):
            storage.remove(storage.join(out, shard))
    storage.remove(storage.join(out, PROGRESS))


def _remove_temporary_files(out: str) -> None:
    """Remove half-written files of a killed run, if `out` is a folder on disk."""
    folder = storage.local_path(out)
    if folder is not None and folder.is_dir():
        for path in [*folder.glob(".*"), *(folder / PROGRESS).glob(".*")]:
            if _TEMPORARY_FILE.fullmatch(path.name):
                path.unlink(missing_ok=True)
