"""Reader for custom images: captions.jsonl, a table (CSV, TSV, Parquet), or name.jpg next to name.txt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from t2idist import storage
from t2idist.ingest.annotations import Annotation, read_jsonl
from t2idist.ingest.caption_files import CaptionFiles
from t2idist.ingest.fields import Fields
from t2idist.ingest.files import is_image, walk
from t2idist.ingest.listing import Listing
from t2idist.ingest.names import NameResolver, UnusableName
from t2idist.ingest.rejects import Reason
from t2idist.ingest.splits import NamedSplits
from t2idist.ingest.tables import Columns, table_rows

CAPTIONS = "captions.jsonl"
OUTSIDE_SPLITS = "other images are in folders or files named after splits; this one is in none"


@dataclass(frozen=True)
class FolderOptions:
    """How images are assigned to splits, and which are kept."""

    val: float = 0.05
    """Share of the images for this split, if the data names no splits."""
    test: float = 0.05
    """Likewise."""
    by_class: bool = False
    """Assign whole classes, not single images, to splits."""
    needs_captions: bool = True
    """Exclude images without captions."""
    split_folders: bool = True
    """Folders named train, validation or test are splits."""
    caption_extension: str | None = None
    """Of the caption files beside the images (None: .txt, or else .caption)."""

    def __post_init__(self) -> None:
        if not (0 <= self.val < 1 and 0 <= self.test < 1 and self.val + self.test < 1):
            raise ValueError(f"--val {self.val} --test {self.test}: shares must be at least 0, with a sum below 1")

    def split(self, name: str) -> str:
        """Choose the split of an image or of a class by the hash of its name."""
        position = int.from_bytes(hashlib.blake2b(f"split {name}".encode(), digest_size=8).digest()) / 2**64
        return "test" if position < self.test else "val" if position < self.test + self.val else "train"


class SplitChooser:
    """Choose the split of each image: the one that is stated, or else by the name of its file, or else by a hash."""

    def __init__(self, options: FolderOptions, splits: NamedSplits) -> None:
        self._options = options
        self._splits = splits
        self._named = bool(splits) and not splits.only_train
        self._stated = self._others = 0

    def choose(self, stated: str | None, name: str, class_name: str | None = None, inside: str = "") -> str | None:
        """Return the split. None: the file is in none.

        Args:
            stated: by the image's annotation.
            name: of the file.
            inside: name of the image inside the file, if the file holds several.
        """
        if stated is not None:
            self._stated += 1
            return stated
        self._others += 1
        if self._named:
            return self._splits.split(name)
        return self._options.split(class_name if self._options.by_class and class_name is not None else inside or name)

    def describe(self) -> str:
        """Return a sentence about the splits, for the user."""
        if not self._stated:
            return self._splits.describe()
        others = f"{self._others} {f'from the {self._splits.where}' if self._named else 'by hash'}"
        return f"splits: {self._stated} as stated" + (f", {others}" if self._others else "")


def list_folder(
    root: str,
    listing: Listing,
    options: FolderOptions,
    *,
    table: str | None = None,
    columns: Columns | None = None,
    captions_url: str | None = None,
    fields: Fields | None = None,
) -> str:
    """List the images below `root` with their annotations. Returns a sentence about the splits.

    Args:
        table: a .csv, .tsv or .parquet file whose `columns` hold image names relative to `root`, and annotations.
        captions_url: a captions.jsonl file. Default: captions.jsonl in `root`; without one, name.txt next to name.jpg.
        fields: names of the fields of captions.jsonl, where they are not the usual ones.

    Raises:
        ValueError: a file or a column is missing.
    """
    fields = fields or Fields()
    if table is not None:
        return list_annotated(root, table_rows(table, columns or Columns(), listing), listing, options)
    pairs = options.caption_extension is not None
    if captions_url is not None or (not pairs and storage.exists(storage.join(root, CAPTIONS))):
        url = captions_url or storage.join(root, CAPTIONS)
        rows = read_jsonl(url, listing, fields, needs_captions=options.needs_captions)
        return list_annotated(root, rows, listing, options)
    return _list_pairs(root, listing, options, fields)


def _list_pairs(root: str, listing: Listing, options: FolderOptions, fields: Fields) -> str:
    given = fields.options() | ({"--caption-column": "''"} if fields.caption == "" else {})
    for option, column in given.items():
        raise ValueError(f"{option} {column}: text files beside the images have no columns; --table names a table")
    if options.by_class:
        raise ValueError("--split-by-class: name.txt next to name.jpg has no classes; use captions.jsonl or --table")

    texts = CaptionFiles(root, listing, options.caption_extension)

    def images_of(names: Iterator[str]) -> Iterator[str]:
        for name in names:
            if is_image(name):
                yield name
            else:
                texts.add(name)

    splits = NamedSplits(images_of(walk(root)), ignore=not options.split_folders)
    images = 0
    chooser = SplitChooser(options, splits)
    for name in walk(root):
        if is_image(name) and listing.accepts(name):
            url, text_url = storage.join(root, name), texts.find(name)
            images += 1
            split = chooser.choose(None, name)
            if split is None:
                listing.exclude("", name, Reason.NO_SPLIT, OUTSIDE_SPLITS)
            elif options.needs_captions and not texts.any:  # no need to read the images
                listing.exclude(split, name, Reason.NO_CAPTIONS, "it has no caption file")
            else:
                listing.add(split, name, url, text_url=text_url, needs_captions=options.needs_captions)
    if not images:
        raise ValueError(f"{storage.redact(root)}: no images found; {texts.describe_others()}")
    texts.finish(options.needs_captions)
    return splits.describe()


def list_annotated(root: str, annotations: Iterator[Annotation], listing: Listing, options: FolderOptions) -> str:
    """List the images that annotations name. Returns a sentence about the splits."""
    classes: dict[str, None] = {}
    names = NameResolver(root, listing)
    names.add_files()
    for annotation in annotations:
        try:
            image = names.resolve(annotation.name)
        except UnusableName as error:
            detail = f"{annotation.location}: {error.detail}" if error.detail else annotation.location
            listing.exclude(annotation.split or "", annotation.name, error.reason, detail)
            continue
        if annotation.class_name is not None:
            classes[annotation.class_name] = None
        listing.add_annotation(image, asdict(annotation))
    if options.by_class and not classes:
        raise ValueError("--split-by-class: the data has no classes")
    class_ids = number_classes(classes, listing)
    splits = NamedSplits((name for name, _ in listing.annotations()), ignore=not options.split_folders)
    chooser = SplitChooser(options, splits)
    for name, rows in listing.annotations():
        url = storage.join(root, name)
        values = {key: {row[key] for row in rows} - {None} for key in ("class_name", "split")}
        conflict = next((key for key, distinct in values.items() if len(distinct) > 1), None)
        if conflict is not None:
            distinct = ", ".join(sorted(values[conflict]))
            detail = f"{conflict.removesuffix('_name')} differs: {distinct} ({rows[-1]['location']})"
            listing.exclude("", name, Reason.DUPLICATE, detail)
            listing.mark_annotated(url)
            continue
        class_name, split = (next(iter(values[key]), None) for key in ("class_name", "split"))
        split = chooser.choose(split, name, class_name)
        if split is None:
            listing.exclude("", name, Reason.NO_SPLIT, OUTSIDE_SPLITS)
            listing.mark_annotated(url)
            continue
        listing.add(
            split, name, url,
            captions=[caption for row in rows for caption in row["captions"]],
            attributes=list(dict.fromkeys(attribute for row in rows for attribute in row["attributes"])),
            class_id=None if class_name is None else class_ids[class_name], needs_captions=options.needs_captions,
        )  # fmt: skip
    listing.reject_unannotated_files()
    listing.notes += names.notes()
    return chooser.describe()


def number_classes(names: Iterable[str], listing: Listing) -> dict[str, int]:
    """Number the classes, and name them in the listing. Returns the ids by name."""
    class_ids = {name: number for number, name in enumerate(sorted(names, key=_class_order))}
    listing.classes = {number: name for name, number in class_ids.items()}
    return class_ids


def _class_order(name: str) -> tuple[int, int, str]:
    """Sort key: numbers by value, before names."""
    return (0, int(name), name) if name.isdecimal() and len(name) < 19 else (1, 0, name)
