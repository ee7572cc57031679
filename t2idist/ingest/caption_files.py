"""Find the caption file of each image: a.txt, a.caption or a.jpg.txt beside a.jpg."""

from __future__ import annotations

import re
from collections import Counter

from t2idist import storage
from t2idist.ingest.files import CAPTION_SUFFIXES, IMAGE_SUFFIXES
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason

_TABLES = (".csv", ".tsv", ".parquet")
_STRUCTURED = (*_TABLES, ".json", ".jsonl", ".xml", ".yaml", ".yml")
_BINARY = (".npy", ".npz", ".pt", ".pth", ".pkl", ".pickle", ".zip", ".gz", ".tar", ".db", ".safetensors", ".md", ".py")
_ANNOTATIONS = re.compile(
    r"[^/]+\.(csv|tsv|parquet|jsonl)|[^/]*(caption|annotation|label|result|metadata)[^/]*\.txt", re.IGNORECASE
)
"""Names of files in the folder itself that may hold the captions of all images."""
_HUGGING_FACE = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Are read as captions of all images if they have the column `file_name`."""
_NAMED = 3


class CaptionFiles:
    """The files with captions below a folder.

    First call `add` for every file, then `find` for every image.
    """

    def __init__(self, root: str, listing: Listing, extension: str | None = None) -> None:
        """`extension`: of the caption files (None: those that are recognised), in upper or lower case."""
        self._root = root
        self._listing = listing
        self._extension = extension
        self._allowed = CAPTION_SUFFIXES if extension is None else (check_extension(extension),)
        self._endings: list[str] = []
        self._used: Counter[str] = Counter()
        self._unused: Counter[str] = Counter()
        self._missing = 0
        self._others: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._annotations: list[str] = []

    def add(self, name: str) -> None:
        """Record a file."""
        ending = _ending(name)
        self._kinds[ending.lower()] += 1
        allowed = next((extension for extension in self._allowed if name.lower().endswith(extension)), None)
        if allowed is not None:
            ending = name[-len(allowed) :]
            if ending not in self._endings:
                self._endings.append(ending)
                self._endings.sort(key=lambda each: (self._allowed.index(each.lower()), each.isupper(), each))
            self._listing.add_file("", name, storage.join(self._root, name))
        if len(self._annotations) < _NAMED and _ANNOTATIONS.fullmatch(name):
            self._annotations.append(name)
        if allowed is None and ending and ending.lower() not in (*IMAGE_SUFFIXES, *_BINARY):
            self._others[ending.lower()] += 1

    def find(self, image: str) -> str | None:
        """Return the URL of the caption file of an image."""
        stem, found = image.rsplit(".", 1)[0], None
        for ending in self._endings:
            for name in (stem + ending, image + ending):
                url = storage.join(self._root, name)
                if not self._listing.has_file(url):
                    continue
                self._listing.mark_annotated(url)
                if found is None:
                    found = url
                    self._used[ending] += 1
                else:
                    self._unused[name[len(stem) :]] += 1
        self._missing += found is None
        return found

    def finish(self, needs_captions: bool) -> None:
        """Reject the caption files without an image, and note in the listing what was not read and may be captions."""
        endings = [ending for ending in self._endings if self._used[ending]]
        if self._extension is None and ".txt" in self._endings:
            endings.append(".txt")
        unfitting = tuple(dict.fromkeys(endings or (self._endings if needs_captions else ())))
        if unfitting:
            self._listing.reject_unannotated_files(Reason.NO_IMAGE, "captions without an image", unfitting)
        notes = self._listing.notes
        for ending, count in self._unused.items():
            others = {used.lower() for used in self._used} - {ending.lower()}
            option = f"--caption-extension {ending.lower()} reads those" if others else "an image has one caption file"
            was = "was" if count == 1 else "were"
            notes.append(f"{_files(count)} in {ending} beside captions in another file and {was} not read: {option}")
        images = self._missing + self._used.total()
        hints = self._hints() if self._missing else []
        if needs_captions and (hints or (images and self._missing == images)):
            looked = "; ".join(hints) or "no other file looks like captions"
            notes.append(
                f"{self._missing} of {images} images have no caption file; {looked}; "
                "--allow-no-captions keeps images without captions"
            )

    def describe_others(self) -> str:
        """Say which files are below the folder instead of images."""
        counts = self._kinds.most_common(2 * _NAMED)
        kinds = ", ".join(f"{count} {ending or 'without extension'}" for ending, count in counts)
        return f"files below it: {kinds}" if kinds else "the folder is empty or missing"

    @property
    def any(self) -> bool:
        """True if a file with the extension of captions was added."""
        return bool(self._endings)

    def _hints(self) -> list[str]:
        hints = []
        for ending, count in self._others.most_common(_NAMED):
            if 2 * count < self._missing:
                break
            if ending not in _STRUCTURED:
                hints.append(f"{_files(count)} in {ending}: --caption-extension {ending}")
            elif ending == ".json":
                hints.append(f"{_files(count)} in .json, which is not read: write captions.jsonl")
        for name in self._annotations:
            url = storage.redact(storage.join(self._root, name))
            option = f"{'--captions' if name.lower().endswith('.jsonl') else '--table'} {url}"
            if name.lower() in _HUGGING_FACE:
                option = "--image-column NAME, if NAME instead of 'file_name' holds the names of the images"
            hints.append(f"{name} may hold the captions: {option}")
        unfitting = Counter({ending: self._listing.count_unannotated(ending) for ending in self._endings})
        for ending, count in unfitting.most_common(1):
            if count and not self._used:
                hints.append(f"{_files(count)} in {ending}, none of them beside an image of its name")
        return hints


def check_extension(extension: str) -> str:
    """Return an extension in lower case, with its dot. Raises ValueError if it is not one of caption files."""
    lower = extension.lower()
    lower = lower if lower.startswith(".") else f".{lower}"
    if "/" in lower or len(lower) < 2 or lower.endswith((*IMAGE_SUFFIXES, *_STRUCTURED)):
        raise ValueError(
            f"--caption-extension {extension}: must be the end of the names of text files with one caption per line, "
            "such as .caption; for tables there is --table, for JSON captions.jsonl"
        )
    return lower


def _ending(name: str) -> str:
    file = name.rsplit("/", 1)[-1]
    return f".{file.rsplit('.', 1)[1]}" if "." in file else ""


def _files(count: int) -> str:
    return "1 file ends" if count == 1 else f"{count} files end"
