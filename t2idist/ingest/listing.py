"""The list of images for a shard set, with their annotations and their order.

It is stored in a temporary SQLite file, so that memory does not grow with the number of images.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from t2idist.data.sample_format import KEY_PATTERN
from t2idist.data.statistics import Finding
from t2idist.data.text_files import is_utf8
from t2idist.ingest.files import ByteRange
from t2idist.ingest.rejects import Effect, Reason, Reject

_CACHE_KIB = 16 << 10
_TABLES = """
CREATE TABLE entry (
    key TEXT PRIMARY KEY, url TEXT, split TEXT, mix BLOB, name TEXT, text_url TEXT, facts TEXT,
    start INTEGER, length INTEGER, partner_url TEXT
);
CREATE UNIQUE INDEX entry_url ON entry (url) WHERE start IS NULL;
CREATE INDEX entry_order ON entry (split, mix, key);
CREATE TABLE reject (position INTEGER PRIMARY KEY, split TEXT, name TEXT, reason TEXT, effect TEXT, detail TEXT);
CREATE TABLE annotated (url TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE file (url TEXT PRIMARY KEY, split TEXT, name TEXT, expected INTEGER) WITHOUT ROWID;
CREATE TABLE annotation (position INTEGER PRIMARY KEY, name TEXT, facts TEXT);
CREATE INDEX annotation_name ON annotation (name, position);
"""


@dataclass(frozen=True)
class ListedImage:
    """An image to store."""

    split: str
    key: str
    name: str
    """Relative name, for messages."""
    url: str
    captions: tuple[str, ...] = ()
    """Raw captions from annotations."""
    attributes: tuple[str, ...] = ()
    class_id: int | None = None
    box: tuple[float, float, float, float] | None = None
    """Left, top, width and height in pixels of the box to crop around."""
    text_url: str | None = None
    """File with one caption per line."""
    needs_captions: bool = True
    """Exclude the image if it has no usable caption."""
    part: ByteRange | None = None
    """Where the image is inside the file at `url` (None: it is the whole file)."""
    partner_url: str | None = None
    """File of the second image of the pair."""


def make_key(name: str) -> str:
    """Return the sample key of an image: its name without extension, or `hashed_key` if that is not a valid key."""
    stem = re.sub(r"\.[^./]*$", "", name)
    return stem if KEY_PATTERN.fullmatch(stem) else hashed_key(name)


def hashed_key(name: str) -> str:
    """Return a cleaned name with a hash, which keeps names distinct that are equal when cleaned."""
    stem = re.sub(r"\.[^./]*$", "", name)
    cleaned = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")[-60:].strip("-") or "picture"
    return f"{cleaned}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


class Listing:
    """Collect images and rejects; iterate over the images of a split in the order of a hash of their keys.

    Use it as a context manager, which removes the temporary file.

    Attributes:
        classes: names by class id.
        licence: the licence that the data names, if any.
        notes: sentences about how the data was read, for stderr.
        attributes: names that flags were read for, and whether any image has them.
        pairs: each image is a pair: with the one at its `partner_url` or, without one, two side by side.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="t2idist-listing-")
        self._database = sqlite3.connect(Path(self._folder.name) / "listing.sqlite", isolation_level=None)
        self._database.executescript(
            f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{_CACHE_KIB};{_TABLES}"
        )
        self._database.execute("BEGIN")
        self._spool: BinaryIO | None = None
        self.classes: dict[int, str] = {}
        self.licence: str | None = None
        self.notes: list[str] = []
        self.attributes: dict[str, bool] = {}
        self.pairs = False
        self._undecodable: set[str] = set()

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *exception: object) -> None:
        self._database.close()
        if self._spool is not None:
            self._spool.close()
        self._folder.cleanup()

    def findings(self) -> list[Finding]:
        """Return what is wrong with the attributes that flags were read for."""
        nobody = [name for name, found in self.attributes.items() if not found]
        return [Finding(f"no image has the attribute {', '.join(nobody[:8])}; the set lacks it")] if nobody else []

    def add(
        self,
        split: str,
        name: str,
        url: str,
        *,
        captions: Sequence[str] = (),
        attributes: Sequence[str] = (),
        class_id: int | None = None,
        box: tuple[float, float, float, float] | None = None,
        text_url: str | None = None,
        needs_captions: bool = True,
        part: ByteRange | None = None,
        partner_url: str | None = None,
    ) -> None:
        """Add an image; a duplicate becomes a reject."""
        if not KEY_PATTERN.fullmatch(split):
            detail = f"split {split[:100]!r}: allowed are 1 to 90 letters, digits, '_' and '-'"
            self.exclude("", name, Reason.MALFORMED, detail)
            return
        start, length = (None, None) if part is None else (part.start, part.length)
        if part is None:
            self.mark_annotated(url)
            if self._database.execute("SELECT 1 FROM entry WHERE url = ? AND start IS NULL", (url,)).fetchone():
                self.exclude(split, name, Reason.DUPLICATE, "this image is already listed")
                return
        facts = {
            "captions": list(captions),
            "attributes": list(attributes),
            "class_id": class_id,
            "box": box,
            "needs_captions": needs_captions,
        }
        for make, unique_name in ((make_key, name), (hashed_key, name), (hashed_key, f"{split}/{name}")):
            key = make(unique_name)
            mix = hashlib.blake2b(key.encode(), digest_size=8).digest()
            row = (key, url, split, mix, name, text_url, json.dumps(facts), start, length, partner_url)
            places = ", ".join("?" * len(row))
            if self._database.execute(f"INSERT OR IGNORE INTO entry VALUES ({places})", row).rowcount:
                return
        self.exclude(split, name, Reason.DUPLICATE, "this name is already listed")

    def spool(self, data: bytes) -> tuple[str, ByteRange]:
        """Keep the bytes of an image that cannot be read at a position of its own file, in a temporary file."""
        path = Path(self._folder.name) / "images"
        if self._spool is None:
            self._spool = open(path, "ab")  # noqa: SIM115
        part = ByteRange(self._spool.tell(), len(data))
        self._spool.write(data)
        self._spool.flush()  # other processes read it
        return str(path), part

    def spool_bytes_free(self) -> int:
        """Return the free disk space for `spool`."""
        return shutil.disk_usage(self._folder.name).free

    def reject(self, reject: Reject) -> None:
        row = [reject.split, reject.name, str(reject.reason), str(reject.effect), reject.detail]
        texts = [text.encode("utf-8", "backslashreplace").decode() for text in row]
        self._database.execute("INSERT INTO reject VALUES (NULL, ?, ?, ?, ?, ?)", texts)

    def exclude(self, split: str, name: str, reason: Reason, detail: str) -> None:
        """Reject an image, or a line of an annotation file."""
        self.reject(Reject(split, name, reason, Effect.EXCLUDED, detail))

    def mark_annotated(self, url: str) -> None:
        """Record that an image is annotated."""
        self._database.execute("INSERT OR IGNORE INTO annotated VALUES (?)", (url,))

    def accepts(self, name: str) -> bool:
        """Check that the name of a file is UTF-8. Another one becomes a reject, once."""
        if is_utf8(name):
            return True
        if name not in self._undecodable:
            self._undecodable.add(name)
            self.exclude("", name, Reason.INVALID_UTF8, "the name of the file is not UTF-8; rename it")
        return False

    def add_file(self, split: str, name: str, url: str, *, expected: bool = True) -> None:
        """Record that a file exists. `expected`: it should have an annotation."""
        if not self.accepts(name):
            return
        self._database.execute("INSERT OR IGNORE INTO file VALUES (?, ?, ?, ?)", (url, split, name, expected))

    def has_file(self, url: str) -> bool:
        return self._database.execute("SELECT 1 FROM file WHERE url = ?", (url,)).fetchone() is not None

    def files_named(self, url: str) -> list[str]:
        """Return the names of the images at this URL with one extension after it."""
        query = "SELECT name FROM file WHERE url >= ? AND url < ? AND expected ORDER BY url"
        names = [name for (name,) in self._database.execute(query, (f"{url}.", f"{url}/"))]  # "/" follows "."
        stem = url.rsplit("/", 1)[-1]
        return [name for name in names if name.rsplit("/", 1)[-1].rsplit(".", 1)[0] == stem]

    def count_unannotated(self, ending: str) -> int:
        """Count the expected files whose name has this ending and that are not annotated."""
        query = (
            "SELECT count(*) FROM file WHERE expected AND substr(name, -?) = ? "
            "AND url NOT IN (SELECT url FROM annotated)"
        )
        return int(self._database.execute(query, (len(ending), ending)).fetchone()[0])

    def reject_unannotated_files(
        self, reason: Reason = Reason.NO_CAPTIONS, detail: str = "no annotation for this image",
        endings: tuple[str, ...] = ("",),
    ) -> None:  # fmt: skip
        """Reject every expected file that is not annotated and whose name has one of the endings."""
        query = (
            "SELECT split, name FROM file WHERE expected AND url NOT IN (SELECT url FROM annotated) "
            "ORDER BY split, name"
        )
        for split, name in self._database.execute(query):
            if name.endswith(endings):
                self.exclude(split, name, reason, detail)

    def add_annotation(self, name: str, facts: dict[str, Any]) -> None:
        """Store one annotation of image `name`."""
        self._database.execute("INSERT INTO annotation VALUES (NULL, ?, ?)", (name, json.dumps(facts)))

    def annotations(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Yield each image name with its annotations, in the order in which they were added."""
        name, facts = None, []
        for next_name, text in self._database.execute("SELECT name, facts FROM annotation ORDER BY name, position"):
            if next_name != name and name is not None:
                yield name, facts
                facts = []
            name = next_name
            facts.append(json.loads(text))
        if name is not None:
            yield name, facts

    def splits(self) -> dict[str, int]:
        """Return the number of images per split, sorted by split name."""
        return dict(self._database.execute("SELECT split, count(*) FROM entry GROUP BY split ORDER BY split"))

    def images(self, split: str, first: int = 0) -> Iterator[ListedImage]:
        """Yield the images of a split in order, from position `first`."""
        query = (
            "SELECT key, name, url, text_url, facts, start, length, partner_url FROM entry WHERE split = ? "
            "ORDER BY mix, key LIMIT -1 OFFSET ?"
        )
        for key, name, url, text_url, text, start, length, partner_url in self._database.execute(query, (split, first)):
            facts = json.loads(text)
            box = facts.pop("box")
            captions, attributes = tuple(facts.pop("captions")), tuple(facts.pop("attributes"))
            yield ListedImage(
                split, key, name, url, captions, attributes, facts["class_id"],
                None if box is None else (box[0], box[1], box[2], box[3]), text_url, facts["needs_captions"],
                None if start is None else ByteRange(start, length), partner_url,
            )  # fmt: skip

    def rejects(self) -> Iterator[Reject]:
        query = "SELECT split, name, reason, effect, detail FROM reject ORDER BY position"
        for split, name, reason, effect, detail in self._database.execute(query):
            yield Reject(split, name, Reason(reason), Effect(effect), detail)

    def reject_counts(self) -> dict[str, dict[str, int]]:
        """Count the rejects by reason and effect."""
        query = "SELECT reason, effect, count(*) FROM reject GROUP BY reason, effect ORDER BY reason, effect"
        counts: dict[str, dict[str, int]] = {}
        for reason, effect, count in self._database.execute(query):
            counts.setdefault(reason, {})[effect] = count
        return counts

    def digest(self) -> str:
        """Return the SHA-256 of all entries and rejects, in order. The URLs are not included."""
        hashed = hashlib.sha256()
        query = "SELECT split, key, name, facts FROM entry ORDER BY split, mix, key"
        for row in self._database.execute(query):
            hashed.update("\0".join(row).encode("utf-8", "backslashreplace") + b"\n")
        for reject in self.rejects():
            hashed.update(reject.as_json().encode() + b"\n")
        return hashed.hexdigest()
