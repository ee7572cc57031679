"""Recognise the layout of a user's images, and list them with its reader. What was recognised is printed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from t2idist import storage
from t2idist.ingest.fields import NAME_FIELDS, Fields
from t2idist.ingest.files import CAPTION_SUFFIXES, is_image, is_unsafe, walk
from t2idist.ingest.folder import CAPTIONS, FolderOptions, list_folder
from t2idist.ingest.huggingface import METADATA, field_names, has_file_names, list_image_folder
from t2idist.ingest.listing import Listing
from t2idist.ingest.parquet_images import files_with_images, list_parquet
from t2idist.ingest.tables import Columns, table_rows
from t2idist.ingest.webdataset_tars import TAR_SUFFIXES, list_tars

_TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
_TEXT_TABLE = re.compile(r"[^/]*(caption|result)[^/]*\.txt", re.IGNORECASE)
"""Name of a text file in the folder itself that may be a table, as captions.txt of Flickr8k is."""
_MAX_TABLES = 8
_HINTS = {
    ".zip": "unzip them first",
    ".7z": "unpack them first",
    ".rar": "unpack them first",
    **dict.fromkeys((".bz2", ".xz", ".zst"), "unpack them first; of archives, .tar and .tar.gz are read as they are"),
    ".arrow": "write them as Parquet first, with to_parquet of the package datasets",
    ".tfrecord": "write them as Parquet or as webdataset tars first",
}


@dataclass
class Survey:
    """What lies below a folder."""

    images: int = 0
    captions: int = 0
    """Text files, which may hold captions."""
    metadata: list[str] = field(default_factory=list)
    """Files that are named like the metadata of Hugging Face."""
    tars: list[str] = field(default_factory=list)
    parquets: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    """Files in the folder itself that may hold the captions of all images."""
    folders: set[str] = field(default_factory=set)
    """Those with images, up to two."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of other files by suffix."""

    def add(self, name: str) -> None:
        lower = name.lower()
        if is_image(name):
            self.images += 1
            if len(self.folders) < 2:
                self.folders.add(name.rpartition("/")[0])
        elif lower.rsplit("/", 1)[-1] in METADATA:
            self.metadata.append(name)
        elif lower.endswith(TAR_SUFFIXES):
            self.tars.append(name)
        elif lower.endswith(".parquet"):
            self.parquets.append(name)
        elif lower.endswith(CAPTION_SUFFIXES) and not _TEXT_TABLE.fullmatch(name):
            self.captions += 1
        else:
            base = lower.rsplit("/", 1)[-1]
            self.others[f".{base.rsplit('.', 1)[-1]}" if "." in base else ""] += 1
        if "/" not in name and (lower.endswith(_TABLE_SUFFIXES) or _TEXT_TABLE.fullmatch(name)):
            self.tables.append(name)

    @property
    def has_pairs(self) -> bool:
        """True if the images on their own look like a data set: most of them may have a file with captions."""
        return 0 < self.images <= 2 * self.captions

    def are_images_the_data(self, options: FolderOptions) -> bool:
        """Check whether the data is the images one by one, not the archives beside them."""
        archives = len(self.tars) + len(self.parquets)
        return self.has_pairs or (not options.needs_captions and self.images >= max(1, archives))


def list_layout(
    root: str,
    listing: Listing,
    options: FolderOptions,
    fields: Fields,
    list_plain: Callable[[], str],
    say: Callable[[str], None] = print,
) -> None:
    """Recognise the layout of a folder, or of a single tar or Parquet file, and list its images.

    Args:
        list_plain: lists a folder with captions.jsonl, or with captions beside the images.
        say: prints a line for the user.

    Raises:
        ValueError: as the reader of the layout.
    """
    folder, _, file = root.rstrip("/").rpartition("/")
    if file.lower().endswith((*TAR_SUFFIXES, ".parquet")) and not storage.list_dir(root):
        root, survey = folder or ("/" if root.startswith("/") else "."), Survey()
        survey.add(file)
    elif storage.exists(storage.join(root, CAPTIONS)):
        say(f"layout: images with {CAPTIONS}")
        say(list_plain())
        return
    else:
        survey, skipped = Survey(), list[str]()
        for name in walk(root, skipped):
            if listing.accepts(name):
                survey.add(name)
        if skipped:
            say(f"not read, because they are shard sets: {_some(skipped)}")
    say_splits = _list_surveyed(root, survey, listing, options, fields, say) or list_plain()
    say(say_splits)


def _list_surveyed(
    root: str, survey: Survey, listing: Listing, options: FolderOptions, fields: Fields, say: Callable[[str], None]
) -> str | None:
    """List a layout of several files. Returns a sentence about the splits; None if the layout is a plain folder."""
    metadata = (
        [name for name in survey.metadata if has_file_names(storage.join(root, name), fields)] if survey.images else []
    )
    if metadata:
        say(f"layout: image folder of Hugging Face ({_some(metadata)})")
        return list_image_folder(root, metadata, listing, options, fields)
    if (table := _find_table(root, survey, fields)) is not None:
        base, name, columns = table
        say(f"layout: images with a table ({name}: images '{columns.image}', captions '{columns.caption}')")
        return list_folder(base, listing, options, table=storage.join(root, name), columns=columns)
    plain = survey.are_images_the_data(options)
    if not plain and survey.tars:
        say(f"layout: webdataset ({_some(survey.tars)}){_beside(survey)}")
        return list_tars(root, sorted(survey.tars), listing, options, fields)
    parquets = sorted(survey.parquets + [name for name in survey.metadata if name.lower().endswith(".parquet")])
    if not plain and parquets:
        embedding = files_with_images(root, parquets, fields)
        if embedding:
            say(f"layout: Parquet with embedded images ({_some(list(embedding))}){_beside(survey)}")
            return list_parquet(root, embedding, listing, options, fields)
    if not survey.images:
        raise ValueError(_nothing(root, survey, parquets))
    archives = f"; not read: {_some(survey.tars)}" if survey.tars else ""
    say(f"layout: images with captions beside them{archives}")
    return None


def _find_table(root: str, survey: Survey, fields: Fields) -> tuple[str, str, Columns] | None:
    """Find the one table that names images which exist, and has captions.

    Returns:
        The folder to which the names in the table are relative, the name of the table, and its columns.
    """
    if not survey.images or survey.has_pairs or len(survey.tables) > _MAX_TABLES:
        return None
    only = [storage.join(root, folder) for folder in survey.folders if folder and len(survey.folders) == 1]
    found = []
    for name in survey.tables:
        url = storage.join(root, name)
        header = [
            column.strip() for column in field_names(url, *NAME_FIELDS, *([fields.image] if fields.image else []))
        ]
        images = [fields.image] if fields.image else [column for column in NAME_FIELDS if column in header]
        caption = fields.caption_name(header)
        if not images or caption is None:
            continue
        columns = Columns(images[0], caption, fields.attributes, fields.class_name, fields.split)
        base = next((base for base in (root, *only) if _names_images(url, columns, base)), None)
        if base is not None:
            found.append((base, name, columns))
    return found[0] if len(found) == 1 else None


def _names_images(url: str, columns: Columns, base: str) -> bool:
    """Check whether the first row of a table names an image below a folder."""
    with Listing() as scratch:
        try:
            first = next(table_rows(url, columns, scratch), None)
        except ValueError:
            return False
    return first is not None and not is_unsafe(first.name) and storage.exists(storage.join(base, first.name))


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _beside(survey: Survey) -> str:
    return f"; {survey.images} image files beside them are not read" if survey.images else ""


def _nothing(root: str, survey: Survey, parquets: list[str]) -> str:
    """Say that there are no images, and what lies there instead."""
    counts = Counter({**survey.others, ".txt": survey.captions, ".parquet": len(parquets)})
    kinds = [f"{count} {suffix or 'files without extension'}" for suffix, count in counts.most_common(5) if count]
    hints = [hint for suffix, hint in _HINTS.items() if counts[suffix]]
    if parquets:
        hints.append(
            f"{parquets[0]} has no column with images, or several (--image-column names the one); if it names image "
            "files, --table reads it, and --folder is where they are"
        )
    found = f"; the folder has {', '.join(kinds)}" if kinds else "; the folder is missing or empty"
    return f"{storage.redact(root)}: no images found{found}{': ' if hints else ''}{'; '.join(hints)}"
