"""Recognise the layout of a user's images, and list them with its reader. What was recognised is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from t2idist import storage
from t2idist.ingest.fields import Fields
from t2idist.ingest.files import is_image, walk
from t2idist.ingest.folder import CAPTIONS, FolderOptions
from t2idist.ingest.huggingface import METADATA, has_file_names, list_image_folder
from t2idist.ingest.listing import Listing
from t2idist.ingest.parquet_images import files_with_images, list_parquet
from t2idist.ingest.webdataset_tars import TAR_SUFFIXES, list_tars

_CAPTION_SUFFIXES = (".txt", ".caption")
_HINTS = {
    ".zip": "unzip them first",
    ".7z": "unpack them first",
    ".rar": "unpack them first",
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
    others: Counter[str] = field(default_factory=Counter)
    """Number of other files by suffix."""

    def add(self, name: str) -> None:
        lower = name.lower()
        if is_image(name):
            self.images += 1
        elif lower.rsplit("/", 1)[-1] in METADATA:
            self.metadata.append(name)
        elif lower.endswith(TAR_SUFFIXES):
            self.tars.append(name)
        elif lower.endswith(".parquet"):
            self.parquets.append(name)
        elif lower.endswith(_CAPTION_SUFFIXES):
            self.captions += 1
        else:
            base = lower.rsplit("/", 1)[-1]
            self.others[f".{base.rsplit('.', 1)[-1]}" if "." in base else ""] += 1

    @property
    def has_pairs(self) -> bool:
        """True if the images on their own look like a data set: most of them may have a file with captions."""
        return 0 < self.images <= 2 * self.captions


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
        survey = Survey()
        for name in walk(root):
            survey.add(name)
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
    if not survey.has_pairs and survey.tars:
        say(f"layout: webdataset ({_some(survey.tars)}){_beside(survey)}")
        return list_tars(root, sorted(survey.tars), listing, options, fields)
    parquets = sorted(survey.parquets + [name for name in survey.metadata if name.lower().endswith(".parquet")])
    if not survey.has_pairs and parquets:
        embedding = files_with_images(root, parquets, fields)
        if embedding:
            say(f"layout: Parquet with embedded images ({_some(list(embedding))}){_beside(survey)}")
            return list_parquet(root, embedding, listing, options, fields)
    if not survey.images:
        raise ValueError(_nothing(root, survey, parquets))
    say("layout: images with captions beside them")
    return None


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
