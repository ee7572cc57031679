"""The plan of a shard set: which pictures there are, what is said of them, and in which order they come.

It lies in a temporary SQLite file, so that memory does not grow with the number of pictures.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2idist.data.sample_format import KEY_PATTERN
from t2idist.ingest.rejects import Effect, Reason, Reject

_CACHE_KIB = 16 << 10
_TABLES = """
CREATE TABLE entry (key TEXT PRIMARY KEY, url TEXT UNIQUE, split TEXT, mix BLOB, name TEXT, text_url TEXT, facts TEXT);
CREATE INDEX entry_order ON entry (split, mix, key);
CREATE TABLE reject (place INTEGER PRIMARY KEY, split TEXT, name TEXT, reason TEXT, effect TEXT, detail TEXT);
CREATE TABLE named (url TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE file (url TEXT PRIMARY KEY, split TEXT, name TEXT) WITHOUT ROWID;
CREATE TABLE remark (place INTEGER PRIMARY KEY, name TEXT, facts TEXT);
CREATE INDEX remark_name ON remark (name, place);
"""


@dataclass(frozen=True)
class ListedImage:
    """One picture to be stored.

    name: relative, for messages. url: where it lies. captions: raw, of annotations. text_url: a file with one caption a
    line, read with the picture. box: left, top, width, height in pixels, to be cropped around. needs_captions: left out
    where none can be used.
    """

    split: str
    key: str
    name: str
    url: str
    captions: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    class_id: int | None = None
    box: tuple[float, float, float, float] | None = None
    text_url: str | None = None
    needs_captions: bool = True


def make_key(name: str) -> str:
    """The sample key of a picture: its name without extension, cleaned and with a hash where that is no key."""
    stem = re.sub(r"\.[^./]*$", "", name)
    return stem if KEY_PATTERN.fullmatch(stem) else hashed_key(name)


def hashed_key(name: str) -> str:
    """A key that tells names apart which look alike when cleaned."""
    stem = re.sub(r"\.[^./]*$", "", name)
    cleaned = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")[-60:].strip("-") or "picture"
    return f"{cleaned}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


class Listing:
    """Collects sources and rejects; gives each split's sources in the order of a hash of their keys.

    classes: names of the class numbers. licence: as the data itself names it. Use as a context manager: it removes its
    temporary file.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="t2idist-listing-")
        self._database = sqlite3.connect(Path(self._folder.name) / "listing.sqlite", isolation_level=None)
        self._database.executescript(
            f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{_CACHE_KIB};{_TABLES}"
        )
        self._database.execute("BEGIN")
        self.classes: dict[int, str] = {}
        self.licence: str | None = None

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *exception: object) -> None:
        self._database.close()
        self._folder.cleanup()

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
    ) -> None:
        """List a picture; a picture that is listed already becomes a reject."""
        if not KEY_PATTERN.fullmatch(split):
            detail = f"split {split[:100]!r}: allowed are 1 to 90 letters, digits, '_' and '-'"
            self.left_out("", name, Reason.MALFORMED, detail)
            return
        self.name_file(url)
        if self._database.execute("SELECT 1 FROM entry WHERE url = ?", (url,)).fetchone():
            self.left_out(split, name, Reason.DUPLICATE, "this picture is listed already")
            return
        facts = {
            "captions": list(captions),
            "attributes": list(attributes),
            "class_id": class_id,
            "box": box,
            "needs_captions": needs_captions,
        }
        for make, of in ((make_key, name), (hashed_key, name), (hashed_key, f"{split}/{name}")):
            key = make(of)
            mix = hashlib.blake2b(key.encode(), digest_size=8).digest()
            row = (key, url, split, mix, name, text_url, json.dumps(facts))
            if self._database.execute("INSERT OR IGNORE INTO entry VALUES (?, ?, ?, ?, ?, ?, ?)", row).rowcount:
                return
        self.left_out(split, name, Reason.DUPLICATE, "this name is listed already")

    def reject(self, reject: Reject) -> None:
        row = [reject.split, reject.name, str(reject.reason), str(reject.effect), reject.detail]
        texts = [text.encode("utf-8", "backslashreplace").decode() for text in row]
        self._database.execute("INSERT INTO reject VALUES (NULL, ?, ?, ?, ?, ?)", texts)

    def left_out(self, split: str, name: str, reason: Reason, detail: str) -> None:
        """A picture, or a line of the annotations, that does not come into the set."""
        self.reject(Reject(split, name, reason, Effect.LEFT_OUT, detail))

    def name_file(self, url: str) -> None:
        """Say that the annotations speak of this picture."""
        self._database.execute("INSERT OR IGNORE INTO named VALUES (?)", (url,))

    def note_file(self, split: str, name: str, url: str) -> None:
        """Say that this picture lies in the folder."""
        self._database.execute("INSERT OR IGNORE INTO file VALUES (?, ?, ?)", (url, split, name))

    def has_file(self, url: str) -> bool:
        return self._database.execute("SELECT 1 FROM file WHERE url = ?", (url,)).fetchone() is not None

    def reject_unnamed_files(
        self, reason: Reason = Reason.NO_CAPTIONS, detail: str = "nothing is said of this picture"
    ) -> None:
        """Every file in the folders that nothing speaks of becomes a reject."""
        left = "SELECT split, name FROM file WHERE url NOT IN (SELECT url FROM named) ORDER BY split, name"
        for split, name in self._database.execute(left):
            self.left_out(split, name, reason, detail)

    def remark(self, name: str, facts: dict[str, Any]) -> None:
        """Keep one row of a table that speaks of picture `name`."""
        self._database.execute("INSERT INTO remark VALUES (NULL, ?, ?)", (name, json.dumps(facts)))

    def remarks(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """All rows by picture, in the order in which they came."""
        name, facts = None, []
        for following, text in self._database.execute("SELECT name, facts FROM remark ORDER BY name, place"):
            if following != name and name is not None:
                yield name, facts
                facts = []
            name = following
            facts.append(json.loads(text))
        if name is not None:
            yield name, facts

    def splits(self) -> dict[str, int]:
        """Pictures by split, by name of the split."""
        return dict(self._database.execute("SELECT split, count(*) FROM entry GROUP BY split ORDER BY split"))

    def sources(self, split: str, first: int = 0) -> Iterator[ListedImage]:
        """The split's pictures in order, from place `first` on."""
        query = "SELECT key, name, url, text_url, facts FROM entry WHERE split = ? ORDER BY mix, key LIMIT -1 OFFSET ?"
        for key, name, url, text_url, text in self._database.execute(query, (split, first)):
            facts = json.loads(text)
            box = facts.pop("box")
            captions, attributes = tuple(facts.pop("captions")), tuple(facts.pop("attributes"))
            yield ListedImage(
                split, key, name, url, captions, attributes, facts["class_id"],
                None if box is None else (box[0], box[1], box[2], box[3]), text_url, facts["needs_captions"],
            )  # fmt: skip

    def rejects(self) -> Iterator[Reject]:
        query = "SELECT split, name, reason, effect, detail FROM reject ORDER BY place"
        for split, name, reason, effect, detail in self._database.execute(query):
            yield Reject(split, name, Reason(reason), Effect(effect), detail)

    def reject_counts(self) -> dict[str, dict[str, int]]:
        """By reason and effect."""
        query = "SELECT reason, effect, count(*) FROM reject GROUP BY reason, effect ORDER BY reason, effect"
        counts: dict[str, dict[str, int]] = {}
        for reason, effect, count in self._database.execute(query):
            counts.setdefault(reason, {})[effect] = count
        return counts

    def digest(self) -> str:
        """SHA-256 of all that is listed, in order; where the pictures lie does not count."""
        hashed = hashlib.sha256()
        query = "SELECT split, key, name, facts FROM entry ORDER BY split, mix, key"
        for row in self._database.execute(query):
            hashed.update("\0".join(row).encode("utf-8", "backslashreplace") + b"\n")
        for reject in self.rejects():
            hashed.update(reject.as_json().encode() + b"\n")
        return hashed.hexdigest()
