"""What keeps a shard set from teaching anything, found in its manifest and dataset.json without reading a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from t2idist.data.reasons import Reason
from t2idist.data.shards import Dataset, Split

IMAGES_KEY = "image_statistics"
"""Entry of dataset.json about images that are equal; sets without any, and sets of older versions, lack it."""
EXCLUDED = "left out"
"""Effect of a reject that leaves an image out."""
MAX_EXCLUDED_SHARE = 0.1
EXCLUSIVE_SHARE = 0.9
"""From this share of images with exactly one attribute, the others look like mistakes."""
_EXAMPLES = 3
_PARTS = 16


@dataclass(frozen=True)
class Finding:
    """A sentence about the data."""

    text: str
    fatal: bool = False
    """Training on it is meaningless."""


class ImageStatistics:
    """Find equal images while a set is written or checked, by a hash of each encoded image.

    It takes 17 bytes of memory per image.

    Args:
        sizes: number of images of each split, in the order of their positions.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._splits = list(sizes)
        self._ends = np.cumsum([*sizes.values()], dtype=np.int64)
        total = sum(sizes.values())
        self._hashes = np.zeros((total, 16), dtype=np.uint8)
        self._known = np.zeros(total, dtype=np.bool_)

    def add(self, position: int, digest: str) -> None:
        """Add the image at a position of the set. `digest`: 32 hexadecimal digits, a hash of its encoded bytes."""
        self._hashes[position] = np.frombuffer(bytes.fromhex(digest), dtype=np.uint8)
        self._known[position] = True

    def describe(self, key_at: Callable[[int], str]) -> dict[str, Any]:
        """Return the entry of dataset.json; empty unless all images are equal or some are in two splits.

        Args:
            key_at: returns the key of the sample at a position.
        """
        different = across_count = 0
        across: list[tuple[int, int]] = []
        for part in range(_PARTS):  # equal images are in one part; sorting all at once would take much more memory
            positions = np.flatnonzero(self._known & (self._hashes[:, 0] % _PARTS == part))
            order, first = self._group(positions)
            different += int((order == first).sum())
            elsewhere = np.flatnonzero(self._split_of(order) != self._split_of(first))
            across_count += len(elsewhere)
            pairs = ((int(order[i]), int(first[i])) for i in elsewhere[np.argsort(order[elsewhere])][:_EXAMPLES])
            across = sorted([*across, *pairs])[:_EXAMPLES]
        samples = int(self._known.sum())
        if not across_count and not (different == 1 < samples):
            return {}
        return {
            "samples": samples,
            "different_images": different,
            "across_splits": across_count,
            "examples": [[self._name(each, key_at) for each in (first, other)] for other, first in across],
        }

    def _group(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sort positions by the hash of their images. Returns them, and for each the first one with an equal image."""
        hashes = self._hashes[positions].view(np.uint64)
        order = np.lexsort((hashes[:, 0], hashes[:, 1]))  # equal ones stay in order
        hashes = hashes[order]
        is_first = np.append(True, (hashes[1:] != hashes[:-1]).any(axis=1))[: len(order)]
        firsts = positions[order[is_first]]
        return positions[order], firsts[np.cumsum(is_first) - 1]

    def _split_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._ends, positions, side="right")

    def _name(self, position: int, key_at: Callable[[int], str]) -> str:
        return f"{self._splits[int(self._split_of(np.array([position]))[0])]}/{key_at(position)}"


def problems_of(dataset: Dataset) -> list[Finding]:
    """Return what is wrong with a data set for any system, the worst first."""
    findings = [] if "train" in dataset.splits else [_no_train(dataset)]
    findings += _about_captions(dataset)
    findings += _about_images(dataset.quality.get(IMAGES_KEY) or {})
    findings += _about_rejects(dataset)
    if dataset.attribute_names:
        for split in dataset.splits.values():
            findings += _about_attributes(split, dataset.attribute_names)
    return findings


def print_findings(name: str, findings: Sequence[Finding], file: TextIO) -> None:
    """Print one line per finding. `name`: of the command."""
    for finding in findings:
        print(
            f"{name}: {'cannot be trained on' if finding.fatal else 'warning'}: {finding.text}", file=file, flush=True
        )


def problems_of_domain(
    dataset: Dataset, attributes: Sequence[str], exclusive: bool, where: str = "attributes"
) -> list[Finding]:
    """Return what is wrong with the labels of a system that learns attributes.

    Args:
        attributes: names of the attributes that it learns.
        exclusive: exactly one of them must hold for every image.
        where: config key of the attributes, for messages.
    """
    train = dataset.split("train")
    counts = train.attribute_counts()
    findings = []
    if nobody := [name for name in attributes if not counts.get(name)]:
        text = f"{where}: no image of split train has {_listed(nobody)}; leave it out, or give other data"
        findings.append(Finding(text, fatal=True))
    if exclusive:
        held = train.count_attributes(attributes)
        if wrong := _not_exactly_one(train, held):
            text = f"{where}: exclusive, but {wrong}; correct the labels, or set exclusive: false"
            findings.append(Finding(text, fatal=True))
    return findings


def problems_for_text(dataset: Dataset) -> list[Finding]:
    """Return what keeps a system that reads captions from learning from a data set."""
    only = dataset.split("train").only_caption()
    if only is None:
        return []
    return [Finding(f"all captions of split train are equal, {only!r:.80}; a model of text learns nothing", fatal=True)]


def _no_train(dataset: Dataset) -> Finding:
    names = ", ".join(dataset.splits)
    return Finding(f"no split 'train', only {names}; a run needs one (the tools' --splits, --split or --val)", True)


def _about_captions(dataset: Dataset) -> Iterator[Finding]:
    for name, split in dataset.splits.items():
        if len(split) > 1 and (only := split.only_caption()) is not None:
            yield Finding(f"split {name}: all captions are equal: {only!r:.80}")


def _about_images(images: Mapping[str, Any]) -> Iterator[Finding]:
    if not images:
        return
    if images["different_images"] == 1:
        yield Finding(f"all {images['samples']} images are equal")
    elif images["across_splits"]:
        examples = ", ".join(f"{first} = {second}" for first, second in images["examples"])
        yield Finding(
            f"{images['across_splits']} images are in two splits ({examples}), so scores on held-out images are too "
            "good"
        )


def _about_rejects(dataset: Dataset) -> Iterator[Finding]:
    by_reason = {
        reason: by_effect[EXCLUDED]
        for reason, by_effect in (dataset.quality.get("rejected") or {}).items()
        if by_effect.get(EXCLUDED)
    }
    without_image = by_reason.pop(Reason.NO_IMAGE, 0)
    excluded, kept = sum(by_reason.values()), sum(len(split) for split in dataset.splits.values())
    if excluded > MAX_EXCLUDED_SHARE * (excluded + kept):
        reasons = ", ".join(f"{reason} {count}" for reason, count in by_reason.items())
        yield Finding(f"{excluded} of {excluded + kept} images are left out: {reasons}; rejected.jsonl lists them")
    if without_image > MAX_EXCLUDED_SHARE * (without_image + kept):
        yield Finding(f"{without_image} files or entries with captions have no image; rejected.jsonl lists them")


def _about_attributes(split: Split, names: Sequence[str]) -> Iterator[Finding]:
    counts = split.attribute_counts()
    for kind, count in (("all", len(split)), ("none", 0)):
        if len(split) > 1 and (found := [name for name in names if counts.get(name, 0) == count]):
            yield Finding(f"split {split.name}: {kind} of its {len(split)} images have {_listed(found)}")
    held = split.count_attributes(names)
    if len(names) > 1 and EXCLUSIVE_SHARE <= (held == 1).mean() < 1:
        wrong = _not_exactly_one(split, held)
        yield Finding(f"split {split.name}: nearly all images have exactly one attribute, but {wrong}")


def _not_exactly_one(split: Split, held: NDArray[np.int64]) -> str:
    """Describe the images that have none or several of the attributes; empty if there is no such image."""
    parts = []
    for kind, wrong in (("none", held == 0), ("several", held > 1)):
        if count := int(wrong.sum()):
            parts.append(f"{count} of {len(split)} images have {kind} (such as {split.keys[int(wrong.argmax())]})")
    return " and ".join(parts)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
