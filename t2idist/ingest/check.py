"""A shard set against its own manifest: every byte, every tar member, every picture; several shards at a time."""

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
from t2idist.data.sample_format import EXTENSIONS, MAX_FILE_BYTES, VECTORS
from t2idist.data.shards import DESCRIPTION, MANIFEST, Dataset, Shard, Split, VectorFacts, inflate
from t2idist.data.tokenizer import count_words
from t2idist.ingest.contact_sheet import thumbnail
from t2idist.ingest.duplicates import Fingerprint, fingerprint
from t2idist.ingest.image import decode_rgb
from t2idist.ingest.writer import PROGRESS, REJECTED

_PROBLEMS_KEPT = 20
_CODE = ("pkl", "pickle", "pyd", "pth", "pt", "npy")


@dataclass(frozen=True)
class Expected:
    """What the manifest says of one sample."""

    key: str
    offset: int
    size: int
    sha256: bytes
    facts: dict[str, Any]
    width: int
    height: int
    pictured: bool


@dataclass
class Problems:
    """The first few sentences, and how many there are in all."""

    sentences: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, sentence: str) -> None:
        self.count += 1
        if len(self.sentences) < _PROBLEMS_KEPT:
            self.sentences.append(sentence)

    def take(self, other: Problems) -> None:
        self.count += other.count - len(other.sentences)
        for sentence in other.sentences:
            self.add(sentence)


@dataclass
class ShardReport:
    """problems: of one shard. fingerprints: by key. thumbnails: PNG of the samples that go on the sheet, by key."""

    problems: Problems = field(default_factory=Problems)
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    thumbnails: dict[str, bytes] = field(default_factory=dict)


@dataclass
class SetReport:
    """Of a whole set. split_of: by key, of the samples that have fingerprints."""

    problems: Problems
    fingerprints: dict[str, Fingerprint]
    thumbnails: dict[str, bytes]
    split_of: dict[str, str]


def check_set(
    dataset: Dataset,
    description: dict[str, Any],
    *,
    processes: int,
    fingerprints: bool,
    pictured: Sequence[str] = (),
    report: Callable[[int, int], None] = lambda done, total: None,
) -> SetReport:
    """Check everything that opening the set has not. fingerprints: of every picture. pictured: keys for the sheet.

    report: is called with samples checked, of all.
    """
    found = SetReport(Problems(), {}, {}, {})
    _check_folder(dataset, description, found.problems)
    _check_counts(dataset, description, found.problems)
    jobs = (
        (split, shard, first)
        for split in dataset.splits.values()
        for shard, first in zip(split.shards, _firsts(split), strict=True)
    )
    total = sum(len(split) for split in dataset.splits.values())
    wanted = frozenset(pictured)
    done = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_ignore_interrupts) as pool:
        under_way: deque[tuple[Split, Shard, Future[ShardReport]]] = deque()

        def settle() -> None:
            nonlocal done
            split, shard, future = under_way.popleft()
            of_shard = future.result()
            found.problems.take(of_shard.problems)
            found.fingerprints.update(of_shard.fingerprints)
            found.split_of.update(dict.fromkeys(of_shard.fingerprints, split.name))
            found.thumbnails.update(of_shard.thumbnails)
            done += shard.samples
            report(done, total)

        for split, shard, first in jobs:
            rows = [_expected(split, i, wanted) for i in range(first, first + shard.samples)]
            url = storage.join(dataset.url, shard.name)
            checked = pool.submit(check_shard, url, shard, rows, fingerprints, dataset.vectors)
            under_way.append((split, shard, checked))
            if len(under_way) > 2 * processes:
                settle()
        while under_way:
            settle()
    return found


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _firsts(split: Split) -> Iterator[int]:
    first = 0
    for size in split.shard_sizes:
        yield first
        first += size


def _expected(split: Split, index: int, pictured: frozenset[str]) -> Expected:
    own = int(split.class_ids[index])
    facts = {
        "captions": split.captions(index),
        "attributes": split.attributes(index),
        "class_id": own if split.has_class(index) else None,
    }
    key = split.keys[index]
    width, height = split.picture_size(index)
    place = (int(split.offsets[index]), int(split.lengths[index]))
    return Expected(key, *place, split.sha256(index), facts, width, height, key in pictured)


def _check_folder(dataset: Dataset, description: dict[str, Any], problems: Problems) -> None:
    """Nothing but the set's own files may lie there, and rejected.jsonl must say what dataset.json counts."""
    own = {DESCRIPTION, MANIFEST, REJECTED, *(s.name for split in dataset.splits.values() for s in split.shards)}
    for name in storage.list_dir(dataset.url):
        left = name == PROGRESS and storage.list_dir(storage.join(dataset.url, name))  # some stores keep empty folders
        if left or (".tar" in name and name not in own):
            problems.add(f"{name}: lies in the folder, but is not of the set")
    if "rejected" not in description:
        return
    said = sum(count for effects in description["rejected"].values() for count in effects.values())
    try:
        lines = storage.read_bytes(storage.join(dataset.url, REJECTED)).splitlines()
        listed = sum(isinstance(json.loads(line), dict) for line in lines)
    except FileNotFoundError:
        problems.add(f"{REJECTED}: is missing")
        return
    except ValueError as error:
        problems.add(f"{REJECTED}: not lines of JSON: {error}")
        return
    if listed != said:
        problems.add(f"{REJECTED}: has {listed} lines; {DESCRIPTION} counts {said}")


def _check_counts(dataset: Dataset, description: dict[str, Any], problems: Problems) -> None:
    counts: Counter[str] = Counter()
    for name, split in dataset.splits.items():
        counts.update(count_words(caption for i in range(len(split)) for caption in split.captions(i)))
        said = description["splits"][name].get("samples")
        if said != len(split):
            problems.add(f"{DESCRIPTION}: says {said} samples of split {name}; its shards hold {len(split)}")
    wrong = [word for word, count in dataset.word_counts.items() if counts[word] != count]
    if wrong:
        word = wrong[0]
        problems.add(
            f"{DESCRIPTION}: {len(wrong)} word counts are wrong, such as {word!r}: {dataset.word_counts[word]}; "
            f"the captions have {counts[word]}"
        )
    attributes = {name for split in dataset.splits.values() for i in range(len(split)) for name in split.attributes(i)}
    if attributes != set(dataset.attribute_names):
        differ = sorted(attributes ^ set(dataset.attribute_names))
        problems.add(f"{DESCRIPTION}: its attributes are not those of the samples, such as {differ[0]!r}")


def check_shard(
    url: str, shard: Shard, rows: Sequence[Expected], fingerprints: bool, vectors: VectorFacts | None
) -> ShardReport:
    """Check one shard's bytes, members, pictures and sentence vectors."""
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
        each = 2 if vectors is None else 3
        members = list(_members(tar, each * len(rows)))
    except (tarfile.TarError, ValueError, EOFError, OSError, OverflowError) as error:
        report.problems.add(f"{shard.name}: not a readable tar: {type(error).__name__}: {str(error)[:200]}")
        return report
    if len(members) != each * len(rows):
        report.problems.add(f"{shard.name}: holds {len(members)} members; the manifest needs {each * len(rows)}")
    for place, row in enumerate(rows):
        own = members[each * place : each * (place + 1)]
        for sentence in _check_sample(tar, own, row, vectors, fingerprints, report):
            report.problems.add(f"{shard.name}, sample {row.key}: {sentence}")
    for member in members[each * len(rows) :]:
        why = _refusal(member, "") or f"member {member.name[:100]!r} is not of the set"
        report.problems.add(f"{shard.name}: {why}")
    return report


def _members(tar: bytes, expected: int) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar, none of which is ever unpacked; a few more than there should be at most."""
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        yield from islice(archive, expected + 3)


def _refusal(member: tarfile.TarInfo, wanted: str) -> str | None:
    """Why such a member may be in no shard, None where it may. wanted: a name that may be there, whatever its kind."""
    name = member.name[:100]
    if not member.isreg() or member.issparse():
        kinds = ((member.issym(), "a link"), (member.islnk(), "a link"), (member.isdir(), "a folder"))
        kind = next((text for holds, text in kinds if holds), "a device" if member.isdev() else "no plain file")
        return f"member {name!r} is {kind}; only plain files are allowed"
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        return f"member {name!r} has a name that leaves its folder"
    extension = name.rsplit(".", 1)[-1].lower()
    if extension in _CODE and name != wanted:
        return f"member {name!r} could run code when it is read; it is not allowed"
    if extension not in (*EXTENSIONS, "json") and name != wanted:
        return f"member {name!r} is of a kind that is not allowed"
    if member.size > MAX_FILE_BYTES:
        return f"member {name!r} has {member.size} bytes; at most {MAX_FILE_BYTES}"
    return None


def _check_sample(
    tar: bytes, members: Sequence[tarfile.TarInfo], row: Expected, vectors: VectorFacts | None, fingerprints: bool,
    report: ShardReport,
) -> Iterator[str]:  # fmt: skip
    end = row.offset + row.size
    if hashlib.sha256(tar[row.offset : end]).digest() != row.sha256:
        yield "its bytes differ from the manifest's hash"
    named = ("json",) if vectors is None else ("json", VECTORS)
    refused = [why for member in members if (why := _refusal(member, f"{row.key}.{named[-1]}"))]
    if refused or len(members) != 1 + len(named):
        yield from refused or ["its members are missing"]
        return
    picture, facts, last = members[0], members[1], members[-1]
    extension = picture.name.rsplit(".", 1)[-1]
    expected = [f"{row.key}.{extension}", *(f"{row.key}.{kind}" for kind in named)]
    if [member.name for member in members] != expected or extension not in EXTENSIONS:
        yield f"its members are {' and '.join(repr(member.name[:100]) for member in members)}"
        return
    if picture.offset != row.offset or last.offset_data + last.size + -last.size % tarfile.BLOCKSIZE != end:
        yield "does not lie where the manifest says"
        return
    if vectors is not None:
        try:
            vectors.read(_bytes(tar, last), len(row.facts["captions"]))
        except ValueError as error:
            yield str(error)
    try:
        found = json.loads(_bytes(tar, facts))
    except (ValueError, RecursionError) as error:
        yield f"its JSON cannot be read: {str(error)[:100]}"
    else:
        if found != row.facts:
            yield "its JSON differs from the manifest"
    try:
        image = decode_rgb(_bytes(tar, picture), extension)
    except ValueError as error:
        yield f"its picture {error}"
        return
    if image.size != (row.width, row.height):
        yield f"its picture is {image.width} x {image.height} pixels; the manifest says {row.width} x {row.height}"
    _look(image, row, fingerprints, report)


def _bytes(tar: bytes, member: tarfile.TarInfo) -> bytes:
    return tar[member.offset_data : member.offset_data + member.size]


def _look(image: Image.Image, row: Expected, fingerprints: bool, report: ShardReport) -> None:
    if fingerprints:
        report.fingerprints[row.key] = fingerprint(image)
    if row.pictured:
        report.thumbnails[row.key] = thumbnail(image)
