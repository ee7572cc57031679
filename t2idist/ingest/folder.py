"""Own pictures: captions.jsonl, a table (CSV, TSV, Parquet), or name.jpg beside name.txt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from t2idist import storage
from t2idist.ingest.annotations import Annotation, read_jsonl
from t2idist.ingest.files import is_picture, is_unsafe, walk
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason
from t2idist.ingest.tables import Columns, table_rows

CAPTIONS = "captions.jsonl"


@dataclass(frozen=True)
class FolderOptions:
    """How pictures become splits, and which are kept.

    val, test: shares of the pictures that become these splits, where the data names none. by_class: whole classes are
    drawn, not pictures. needs_captions: pictures without are left out.
    """

    val: float = 0.05
    test: float = 0.05
    by_class: bool = False
    needs_captions: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.val < 1 and 0 <= self.test < 1 and self.val + self.test < 1):
            raise ValueError(
                f"--val {self.val} --test {self.test}: give shares from 0 to 1 that leave some to train on"
            )

    def split(self, what: str) -> str:
        """Of a key or of a class, by its hash."""
        place = int.from_bytes(hashlib.blake2b(f"split {what}".encode(), digest_size=8).digest()) / 2**64
        return "test" if place < self.test else "val" if place < self.test + self.val else "train"


def list_folder(
    root: str,
    listing: Listing,
    options: FolderOptions,
    *,
    table: str | None = None,
    columns: Columns | None = None,
    captions_url: str | None = None,
) -> None:
    """List the pictures below `root` with what is said of them.

    table: a .csv, .tsv or .parquet file whose `columns` name pictures below root. captions_url: a captions.jsonl
    elsewhere. Else root's own captions.jsonl is taken, and where there is none, name.txt beside name.jpg. Raises
    ValueError for files and columns that are not there.
    """
    if table is not None:
        _list_remarks(root, table_rows(table, columns or Columns(), listing), listing, options)
    elif captions_url is not None or storage.exists(storage.join(root, CAPTIONS)):
        _list_remarks(root, read_jsonl(captions_url or storage.join(root, CAPTIONS), listing), listing, options)
    else:
        _list_pairs(root, listing, options)


def _list_pairs(root: str, listing: Listing, options: FolderOptions) -> None:
    if options.by_class:
        raise ValueError(
            "--split-by-class: name.txt beside name.jpg says nothing of classes; give captions.jsonl or --table"
        )
    for name in walk(root):
        if name.endswith(".txt"):
            listing.note_file("", name, storage.join(root, name))
    pictures = 0
    for name in walk(root):
        if is_picture(name):
            text_url: str | None = storage.join(root, f"{name.rsplit('.', 1)[0]}.txt")
            if text_url is not None and listing.has_file(text_url):
                listing.name_file(text_url)
            else:
                text_url = None
            url = storage.join(root, name)
            listing.add(options.split(name), name, url, text_url=text_url, needs_captions=options.needs_captions)
            pictures += 1
    if not pictures:
        raise ValueError(f"{storage.redact(root)}: no picture there; is the folder right?")
    listing.reject_unnamed_files(Reason.NO_PICTURE, "captions of no picture")


def _list_remarks(root: str, remarks: Iterator[Annotation], listing: Listing, options: FolderOptions) -> None:
    classes: dict[str, None] = {}
    for remark in remarks:
        if is_unsafe(remark.name):
            listing.left_out(remark.split or "", remark.name, Reason.UNSAFE_NAME, remark.where)
            continue
        if remark.class_name is not None:
            classes[remark.class_name] = None
        facts = {"captions": list(remark.captions), "attributes": list(remark.attributes), "where": remark.where}
        listing.remark(_plain(remark.name), {**facts, "class": remark.class_name, "split": remark.split})
    if options.by_class and not classes:
        raise ValueError("--split-by-class: the data names no classes")
    numbers = {name: number for number, name in enumerate(sorted(classes, key=_class_order))}
    listing.classes = {number: name for name, number in numbers.items()}
    for name, of_picture in listing.remarks():
        url = storage.join(root, name)
        said = {key: {fact[key] for fact in of_picture} - {None} for key in ("class", "split")}
        wrong = next((key for key, values in said.items() if len(values) > 1), None)
        if wrong is not None:
            detail = f"{wrong} differs: {', '.join(sorted(said[wrong]))} ({of_picture[-1]['where']})"
            listing.left_out("", name, Reason.DUPLICATE, detail)
            listing.name_file(url)
            continue
        class_name, split = (next(iter(said[key]), None) for key in ("class", "split"))
        if split is None:
            split = options.split(class_name if options.by_class and class_name is not None else name)
        listing.add(
            split, name, url,
            captions=[caption for fact in of_picture for caption in fact["captions"]],
            attributes=list(dict.fromkeys(attribute for fact in of_picture for attribute in fact["attributes"])),
            class_id=None if class_name is None else numbers[class_name], needs_captions=options.needs_captions,
        )  # fmt: skip
    for name in walk(root):
        if is_picture(name):
            listing.note_file("", name, storage.join(root, name))
    listing.reject_unnamed_files()


def _class_order(name: str) -> tuple[int, int, str]:
    """Numbers by value, before names."""
    return (0, int(name), name) if name.isdecimal() and len(name) < 19 else (1, 0, name)


def _plain(name: str) -> str:
    """Without "./" and doubled slashes, so that a picture has one name."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))
