"""Find the file that an annotation names, although its path is written in another way."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator

from t2idist import storage
from t2idist.data.text_files import is_utf8
from t2idist.ingest.files import is_image, is_unsafe, walk
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason


class UnusableName(Exception):
    """Raised for a name that leads to no file, or could lead out of the folder."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class NameResolver:
    """Match names in annotations to the files below a folder.

    A name that is the path of a file is taken as it is. Otherwise these are tried: backslashes as separators, a path
    that begins with the folder (absolute, or with the folder's name), composed and decomposed letters, and, for a name
    without an image's extension, the one image that has the name.
    """

    def __init__(self, root: str, listing: Listing) -> None:
        self._root = root
        self._listing = listing
        self._counts: Counter[str] = Counter()
        local = storage.local_path(root)
        folders = [root] if local is None else [str(local), os.path.abspath(local), os.path.realpath(local)]
        self._folders = [folder.rstrip("/") + "/" for folder in dict.fromkeys([root, *folders])]
        self._own_name = os.path.basename(self._folders[-1].rstrip("/"))

    def add_files(self) -> None:
        """Record all files below the folder in the listing."""
        for name in walk(self._root):
            self._listing.add_file("", name, storage.join(self._root, name), expected=is_image(name))

    def resolve(self, name: str) -> str:
        """Return the path of an image, relative to the folder. Raises UnusableName for an unsafe or ambiguous name."""
        if not is_utf8(name):
            raise UnusableName(Reason.INVALID_UTF8, "the image name is not valid UTF-8")
        if not is_unsafe(name):
            plain = normalize_name(name)
            if self._exists(plain):
                return plain
        for how, candidate in self._candidates(name):
            if not is_unsafe(candidate) and self._exists(candidate):
                self._counts[how] += 1
                return candidate
        return self._without_file(name)

    def notes(self) -> list[str]:
        """Return sentences about the names that were not taken as they are."""
        counts = sorted(self._counts.items())
        return [f"image names matched by {how}: {count}" for how, count in counts]

    def _exists(self, name: str) -> bool:
        return self._listing.has_file(storage.join(self._root, name))

    def _candidates(self, name: str) -> Iterator[tuple[str, str]]:
        slashed = name.replace("\\", "/")
        below = self._below(slashed)
        kinds = [("reading backslashes as slashes", slashed)] if slashed != name else []
        kinds += [("removing the folder from the path", path) for path in below]
        for how, path in [*kinds, ("composing or decomposing accents", slashed)]:
            for form in (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)):
                yield how, normalize_name(form)

    def _below(self, path: str) -> list[str]:
        """Return what follows the folder in a path: the folder's own path first, then its name anywhere."""
        rests = [path[len(folder) :] for folder in self._folders if path.startswith(folder)]
        parts = path.split("/")
        rests += ["/".join(parts[i + 1 :]) for i, part in enumerate(parts[:-1]) if part == self._own_name]
        return list(dict.fromkeys(rests))

    def _without_file(self, name: str) -> str:
        """Return the image that has this name and an extension, or else the name itself, whose file is missing."""
        slashed = name.replace("\\", "/")
        paths = [normalize_name(path) for path in (slashed, *self._below(slashed)) if not is_unsafe(path)]
        for path in paths:
            if is_image(path):
                continue
            fitting = self._listing.files_named(storage.join(self._root, path))
            if len(fitting) > 1:
                self._listing.mark_annotated(storage.join(self._root, path))
                raise UnusableName(Reason.NO_IMAGE, f"several images fit: {', '.join(fitting[:4])}")
            if fitting:
                self._counts["adding the extension"] += 1
                return fitting[0]
        if paths:
            return paths[0]
        raise UnusableName(Reason.UNSAFE_NAME, "")


def normalize_name(name: str) -> str:
    """Remove "./" and doubled slashes, so that an image has one name."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))
