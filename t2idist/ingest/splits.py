"""Splits that the names of folders and files state: train/, validation/, test/, train-00000-of-00002.parquet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_NAME = {name: split for split, names in _NAMES.items() for name in names}
"""The split by the lower-case name of a folder. The names are those of Hugging Face."""
_DEPTHS = 4
_WORDS = re.compile(r"[^A-Za-z]+")


def split_of_word(word: str) -> str | None:
    return SPLIT_OF_NAME.get(word.lower())


class NamedSplits:
    """The splits of a set of files.

    Folders state splits if every file is in a folder with the name of a split, or if at least two splits have such a
    folder; the folders are those of the first level at which the files differ. A single folder `train` beside others
    is not a split: it may be a class. If train is the only split that is named, val and test are taken from all files.
    If other splits are named, but not train, the files whose names state no split are train.

    Attributes:
        counts: number of files by split; empty if the names state no splits. The key "" counts the files without.
    """

    def __init__(self, names: Iterable[str], *, file_names: bool = False, ignore: bool = False) -> None:
        """Read the splits of the names.

        Args:
            names: relative names of the files.
            file_names: the name of a file may state its split too, as ``birds-train-00000.tar`` does.
            ignore: read the names to their end, but find no splits.
        """
        self._file_names = file_names
        self._ignored = ignore
        self._level = 0
        self._unnamed: str | None = None
        levels = [_Level() for _ in range(_DEPTHS)]
        by_name: Counter[str] = Counter()
        total = 0
        for name in names:
            total += 1
            folders = name.split("/")[:-1]
            for level, folder in zip(levels, folders, strict=False):
                level.add(folder)
            if file_names:
                by_name[self._by_words(name) or ""] += 1
        self.counts: Counter[str] = Counter()
        if ignore:
            return
        if file_names:
            self._count(by_name if set(by_name) - {""} else self.counts)
            return
        for number, level in enumerate(levels):
            split_counts = level.split_counts
            if split_counts and (len(split_counts) > 1 or split_counts.total() == total):
                self._level = number
                self._count(split_counts + Counter({"": total - split_counts.total()}))
                return
            if level.only is None or level.files < total:
                return

    def _count(self, counts: Counter[str]) -> None:
        self.counts = counts
        if counts and counts[""] and not counts["train"]:
            self._unnamed = "train"
            counts["train"] = counts.pop("")

    def __bool__(self) -> bool:
        """True if the names state splits."""
        return bool(self.counts)

    @property
    def only_train(self) -> bool:
        return bool(self.counts) and self.counts.keys() <= {"train", ""}

    @property
    def where(self) -> str:
        """Say what states the splits."""
        return "names of folders and files" if self._file_names else "folders"

    def split(self, name: str) -> str | None:
        """Return the split that the name of a file states."""
        if not self.counts:
            return None
        if self._file_names:
            return self._by_words(name) or self._unnamed
        folders = name.split("/")[:-1]
        return (split_of_word(folders[self._level]) if len(folders) > self._level else None) or self._unnamed

    def describe(self) -> str:
        """Return a sentence about the splits, for the user."""
        if self._ignored:
            return "splits: by --val and --test (the names of folders and files are not used)"
        if not self.counts:
            return "splits: by --val and --test (no folder or file is named after a split)"
        if self.only_train:
            return f"splits: by --val and --test (the {self.where} name only train)"
        counts = ", ".join(f"{split} {count}" for split, count in sorted(self.counts.items()) if split)
        left_out = f"; {self.counts['']} files in none of them are left out" if self.counts.get("") else ""
        unnamed = "; those without a split in their name are train" if self._unnamed else ""
        return f"splits: from the {self.where}: {counts} files{left_out}{unnamed}"

    @staticmethod
    def _by_words(name: str) -> str | None:
        *folders, file = name.split("/")
        words = [*folders, *_WORDS.split(file)]
        return next((split for word in words if (split := split_of_word(word)) is not None), None)


class _Level:
    """The folders of one level: how many files are in folders named after splits, and whether there is one folder."""

    def __init__(self) -> None:
        self.split_counts: Counter[str] = Counter()
        self.files = 0
        self.only: str | None = None

    def add(self, folder: str) -> None:
        self.only = folder if not self.files or self.only == folder else None
        self.files += 1
        split = split_of_word(folder)
        if split is not None:
            self.split_counts[split] += 1
