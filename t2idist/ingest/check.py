"""Check a shard set against its manifest: every byte, tar member and image, several shards in parallel."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import signal
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from PIL import Image

from t2idist import storage
from t2idist.data.sample_format import EXTENSIONS, MAX_FILE_BYTES, VECTORS, image_hash
from t2idist.data.shards import DESCRIPTION, MANIFEST, Dataset, SentenceVectorInfo, Shard, Split, inflate
from t2idist.data.statistics import ImageStatistics
from t2idist.data.tokenizer import count_words
from t2idist.ingest.contact_sheet import thumbnail
from t2idist.ingest.duplicates import Fingerprint, fingerprint
from t2idist.ingest.files import PROGRESS
from t2idist.ingest.image import decode_rgb
from t2idist.ingest.writer import REJECTED

_PROBLEMS_KEPT = 20
_CODE_EXTENSIONS = ("pkl", "pickle", "pyd", "pth", "pt", "npy")


@dataclass(frozen=True)
class ExpectedSample:
    """A sample according to the manifest."""

    key: str
    offset: int
    size: int
    sha256: bytes
    facts: dict[str, Any]
    width: int
    height: int
    on_sheet: bool
    """Draw it on the contact sheet."""


@dataclass
class Problems:
    """The number of problems, and descriptions of the first few."""

    sentences: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, sentence: str) -> None:
        self.count += 1
        if len(self.sentences) < _PROBLEMS_KEPT:
            self.sentences.append(sentence)

    def merge(self, other: Problems) -> None:
        self.count += other.count - len(other.sentences)
        for sentence in other.sentences:
            self.add(sentence)


@dataclass
class ShardReport:
    """Result for one shard."""

    problems: Problems = field(default_factory=Problems)
    image_hashes: dict[str, str] = field(default_factory=dict)
    """Of the encoded images, by sample key."""
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    """By sample key."""
    thumbnails: dict[str, bytes] = field(default_factory=dict)
    """PNG of the samples on the contact sheet, by sample key."""


@dataclass
class SetReport(ShardReport):
    """Result for a whole set."""

    split_of: dict[str, str] = field(default_factory=dict)
    """Split of each sample with a fingerprint, by sample key."""
    equal_images: dict[str, Any] = field(default_factory=dict)
    """As dataset.json has it (`t2idist.data.statistics.IMAGES_KEY`)."""


def check_set(
    dataset: Dataset,
    description: dict[str, Any],
    *,
    processes: int,
    fingerprints: bool,
    on_sheet: Sequence[str] = (),
    report: Callable[[int, int], None] = lambda done, total: None,
) -> SetReport:
    """Check everything that opening the set does not check.

    Args:
        description: content of dataset.json.
        processes: number of shards that are checked in parallel.
        fingerprints: compute a fingerprint of every image.
        on_sheet: keys of the samples for the contact sheet.
        report: called with the number of samples checked, and the total.
    """
    result = SetReport()
    _check_folder(dataset, description, result.problems)
    _check_counts(dataset, description, result.problems)
    jobs = (
        (split, shard, first)
        for split in dataset.splits.values()
        for shard, first in zip(split.shards, _first_indices(split), strict=True)
    )
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    total = sum(sizes.values())
    images = ImageStatistics(sizes)
    sheet_keys = frozenset(on_sheet)
    done = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_ignore_interrupts) as pool:
        pending: deque[tuple[Split, Sequence[str], Future[ShardReport]]] = deque()

        def take_result() -> None:
            nonlocal done
            split, keys, future = pending.popleft()
            shard_report = future.result()
            result.problems.merge(shard_report.problems)
            for position, key in enumerate(keys, start=done):
                if (digest := shard_report.image_hashes.get(key)) is not None:
                    images.add(position, digest)
            result.fingerprints.update(shard_report.fingerprints)
            result.split_of.update(dict.fromkeys(shard_report.fingerprints, split.name))
            result.thumbnails.update(shard_report.thumbnails)
            done += len(keys)
            report(done, total)

        for split, shard, first in jobs:
            rows = [expected_sample(split, i, sheet_keys) for i in range(first, first + shard.samples)]
            url = storage.join(dataset.url, shard.name)
            future = pool.submit(check_shard, url, shard, rows, fingerprints, dataset.vector_info)
            pending.append((split, [row.key for row in rows], future))
            if len(pending) > 2 * processes:
                take_result()
        while pending:
            take_result()
    result.equal_images = images.describe(lambda position: _key_at(dataset, position))
    return result


def _key_at(dataset: Dataset, position: int) -> str:
    """Return the key of the sample at a position of all splits together."""
    for split in dataset.splits.values():
        if position < len(split):
            return split.keys[position]
        position -= len(split)
    raise AssertionError("unreachable")


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _first_indices(split: Split) -> Iterator[int]:
    first = 0
    for size in split.shard_sizes:
        yield first
        first += size


def expected_sample(split: Split, index: int, sheet_keys: frozenset[str]) -> ExpectedSample:
    facts = {
        "captions": split.captions(index),
        "attributes": split.attributes(index),
        "class_id": int(split.class_ids[index]) if split.has_class(index) else None,
    }
    key = split.keys[index]
    width, height = split.image_size(index)
    location = (int(split.offsets[index]), int(split.lengths[index]))
    return ExpectedSample(key, *location, split.sha256(index), facts, width, height, key in sheet_keys)


def _check_folder(dataset: Dataset, description: dict[str, Any], problems: Problems) -> None:
    """Check that the folder has no other files, and that rejected.jsonl agrees with the counts in dataset.json."""
    expected = {DESCRIPTION, MANIFEST, REJECTED, *(s.name for split in dataset.splits.values() for s in split.shards)}
    for name in storage.list_dir(dataset.url):
        # some stores keep empty folders
        leftover = name == PROGRESS and storage.list_dir(storage.join(dataset.url, name))
        if leftover or (".tar" in name and name not in expected):
            problems.add(f"{name}: is in the folder, but not part of the set")
    if "rejected" not in description:
        return
    stated = sum(count for effects in description["rejected"].values() for count in effects.values())
    try:
        lines = storage.read_bytes(storage.join(dataset.url, REJECTED)).splitlines()
        listed = sum(isinstance(json.loads(line), dict) for line in lines)
    except FileNotFoundError:
        problems.add(f"{REJECTED}: is missing")
        return
    except ValueError as error:
        problems.add(f"{REJECTED}: its lines are not JSON: {error}")
        return
    if listed != stated:
        problems.add(f"{REJECTED}: has {listed} lines; {DESCRIPTION} counts {stated}")


def _check_counts(dataset: Dataset, description: dict[str, Any], problems: Problems) -> None:
    counts: Counter[str] = Counter()
    for name, split in dataset.splits.items():
        captions = (caption for i in range(len(split)) for caption in split.captions(i))
        counts.update(count_words(captions, dataset.vocabulary.tokenizer))
        stated = description["splits"][name].get("samples")
        if stated != len(split):
            problems.add(f"{DESCRIPTION}: states {stated} samples of split {name}; its shards hold {len(split)}")
        if dataset.stored_pairs and (odd := [i for i in range(len(split)) if split.image_size(i)[0] % 2]):
            problems.add(
                f"{split.keys[odd[0]]} and {len(odd) - 1} others of split {name}: no pairs, as their width is odd"
            )
    wrong = [word for word, count in dataset.word_counts.items() if counts[word] != count]
    if wrong:
        word = wrong[0]
        problems.add(
            f"{DESCRIPTION}: {len(wrong)} word counts are wrong, for example {word!r}: {dataset.word_counts[word]}; "
            f"the captions have {counts[word]}"
        )
    attributes = {name for split in dataset.splits.values() for i in range(len(split)) for name in split.attributes(i)}
    if attributes != set(dataset.attribute_names):
        different = sorted(attributes ^ set(dataset.attribute_names))
        problems.add(f"{DESCRIPTION}: its attributes are not those of the samples, for example {different[0]!r}")


def check_shard(
    url: str, shard: Shard, rows: Sequence[ExpectedSample], fingerprints: bool, vectors: SentenceVectorInfo | None
) -> ShardReport:
    """Check the bytes, members, images and sentence vectors of one shard."""
    report = ShardReport()
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        report.problems.add(f"{shard.name}: is missing")
        return report
    if len(data) != shard.bytes or storage.sha256(data) != shard.sha256:
        report.problems.add(f"{shard.name}: its {len(data)} bytes differ from the SHA-256 in {DESCRIPTION}")
    try:
        tar = inflate(data, shard) if shard.name.endswith(".gz") else data
        per_sample = 2 if vectors is None else 3
        members = list(_members(tar, per_sample * len(rows)))
    except (tarfile.TarError, ValueError, EOFError, OSError, OverflowError) as error:
        report.problems.add(f"{shard.name}: not a readable tar: {type(error).__name__}: {str(error)[:200]}")
        return report
    if len(members) != per_sample * len(rows):
        report.problems.add(f"{shard.name}: holds {len(members)} members; the manifest needs {per_sample * len(rows)}")
    for i, row in enumerate(rows):
        sample_members = members[per_sample * i : per_sample * (i + 1)]
        for sentence in _check_sample(tar, sample_members, row, vectors, fingerprints, report):
            report.problems.add(f"{shard.name}, sample {row.key}: {sentence}")
    for member in members[per_sample * len(rows) :]:
        problem = _member_problem(member, "") or f"member {member.name[:100]!r} is not part of the set"
        report.problems.add(f"{shard.name}: {problem}")
    return report


def _members(tar: bytes, expected: int) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar without unpacking it; at most a few more than expected."""
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        yield from islice(archive, expected + 3)


def _member_problem(member: tarfile.TarInfo, allowed: str) -> str | None:
    """Return why a member is not allowed in a shard, or None. `allowed`: a name that is allowed with any extension."""
    name = member.name[:100]
    if not member.isreg() or member.issparse():
        kinds = ((member.issym(), "a link"), (member.islnk(), "a link"), (member.isdir(), "a folder"))
        kind = next((text for holds, text in kinds if holds), "a device" if member.isdev() else "a special file")
        return f"member {name!r} is {kind}; only regular files are allowed"
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        return f"member {name!r} has a name outside its folder"
    extension = name.rsplit(".", 1)[-1].lower()
    if extension in _CODE_EXTENSIONS and name != allowed:
        return f"member {name!r} could run code when it is read; this is not allowed"
    if extension not in (*EXTENSIONS, "json") and name != allowed:
        return f"member {name!r} has an extension that is not allowed"
    if member.size > MAX_FILE_BYTES:
        return f"member {name!r} has {member.size} bytes; at most {MAX_FILE_BYTES}"
    return None


def _check_sample(
    tar: bytes, members: Sequence[tarfile.TarInfo], row: ExpectedSample, vectors: SentenceVectorInfo | None,
    fingerprints: bool, report: ShardReport,
) -> Iterator[str]:  # fmt: skip
    end = row.offset + row.size
    if hashlib.sha256(tar[row.offset : end]).digest() != row.sha256:
        yield "its bytes differ from the manifest's hash"
    extensions = ("json",) if vectors is None else ("json", VECTORS)
    forbidden = [problem for member in members if (problem := _member_problem(member, f"{row.key}.{extensions[-1]}"))]
    if forbidden or len(members) != 1 + len(extensions):
        yield from forbidden or ["its members are missing"]
        return
    image_member, facts, last = members[0], members[1], members[-1]
    extension = image_member.name.rsplit(".", 1)[-1]
    expected = [f"{row.key}.{kind}" for kind in (extension, *extensions)]
    if [member.name for member in members] != expected or extension not in EXTENSIONS:
        yield f"its members are {' and '.join(repr(member.name[:100]) for member in members)}"
        return
    if image_member.offset != row.offset or last.offset_data + last.size + -last.size % tarfile.BLOCKSIZE != end:
        yield "is not at the offset that the manifest states"
        return
    if vectors is not None:
        try:
            vectors.decode(_bytes(tar, last), len(row.facts["captions"]))
        except ValueError as error:
            yield str(error)
    try:
        content = json.loads(_bytes(tar, facts))
    except (ValueError, RecursionError) as error:
        yield f"its JSON is invalid: {str(error)[:100]}"
    else:
        if content != row.facts:
            yield "its JSON differs from the manifest"
    report.image_hashes[row.key] = image_hash(_bytes(tar, image_member))
    try:
        image = decode_rgb(_bytes(tar, image_member), extension)
    except ValueError as error:
        yield f"its image {error}"
        return
    if image.size != (row.width, row.height):
        yield f"its image is {image.width} x {image.height} pixels; the manifest states {row.width} x {row.height}"
    _add_image_results(image, row, fingerprints, report)


def _bytes(tar: bytes, member: tarfile.TarInfo) -> bytes:
    return tar[member.offset_data : member.offset_data + member.size]


def _add_image_results(image: Image.Image, row: ExpectedSample, fingerprints: bool, report: ShardReport) -> None:
    if fingerprints:
        report.fingerprints[row.key] = fingerprint(image)
    if row.on_sheet:
        report.thumbnails[row.key] = thumbnail(image)
