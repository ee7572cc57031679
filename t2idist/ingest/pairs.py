"""Readers for image-to-image translation: folders of domains, and pairs of images in two folders or side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from t2idist import storage
from t2idist.ingest.files import is_image, walk
from t2idist.ingest.folder import OUTSIDE_SPLITS, FolderOptions, SplitChooser
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason
from t2idist.ingest.splits import NamedSplits, split_of_word

_PUBLISHED_FOLDER = re.compile(r"([a-z]+)([AB])")
"""trainA, testB and so on, of the unpaired data sets of CycleGAN."""
PUBLISHED_DOMAINS = ("A", "B")


def parse_domains(given: Sequence[str]) -> dict[str, str]:
    """Parse NAME=FOLDER of every domain. Raises ValueError."""
    domains: dict[str, str] = {}
    for text in given:
        name, separator, folder = text.partition("=")
        if not (name and separator and folder):
            raise ValueError(f"--domain {text}: give NAME=FOLDER")
        if name in domains:
            raise ValueError(f"--domain {text}: the domain {name} is given twice")
        domains[name] = folder
    if len(domains) < 2:
        raise ValueError(f"--domain {' '.join(given)}: it is the only domain; give --domain twice or more")
    return domains


def list_domains(domains: Mapping[str, str], listing: Listing, options: FolderOptions) -> list[str]:
    """List the images of a folder for each domain, whose name becomes their attribute.

    Returns:
        A sentence about the splits of each domain.

    Raises:
        ValueError: a folder has no images.
    """
    sentences = []
    for domain, root in domains.items():
        splits, chooser = _splits_of(root, options)
        found = 0
        for name in _images(root, listing):
            found += 1
            # the domain makes the names of two folders differ
            _add(listing, chooser, name, f"{domain}/{name}", storage.join(root, name), domain)
        if not found:
            raise ValueError(f"--domain {domain}={storage.redact(root)}: no images found")
        sentences.append(f"{domain}: {found} images, {splits.describe()}")
    return sentences


def has_published_domains(root: str) -> bool:
    """Return whether a folder has the layout of CycleGAN's unpaired data sets: trainA, trainB and so on."""
    return set(storage.list_dir(root)) >= {"trainA", "trainB"}


def list_published_domains(root: str, listing: Listing) -> str:
    """List the images of CycleGAN's unpaired data sets, with attribute A or B. Returns a sentence about the splits."""
    counts: dict[str, int] = {}
    for name in _images(root, listing):
        folder = name.partition("/")[0]
        match = _PUBLISHED_FOLDER.fullmatch(folder)
        split = split_of_word(match[1]) if match else None
        if match is None or split is None:
            listing.exclude("", name, Reason.NO_SPLIT, "it is in no folder such as trainA or testB")
            continue
        counts[folder] = counts.get(folder, 0) + 1
        listing.add(split, name, storage.join(root, name), attributes=[match[2]], needs_captions=False)
    for folder in ("trainA", "trainB"):
        if not counts.get(folder):
            raise ValueError(f"{storage.redact(root)}/{folder}: no images found")
    listed = ", ".join(f"{folder} {count}" for folder, count in sorted(counts.items()))
    return f"layout: unpaired domains A and B; splits: from the folders: {listed} files"


def list_pairs(first: str, second: str, listing: Listing, options: FolderOptions) -> str:
    """List pairs of images with the same name in two folders. Returns a sentence about the splits.

    Raises:
        ValueError: a folder has no images, or no image has a partner.
    """
    for root in (first, second):
        if next(_images(root, listing), None) is None:
            raise ValueError(f"--pairs {storage.redact(root)}: no images found")
    for name in _images(second, listing):
        listing.add_file("", name, storage.join(second, name))
    splits, chooser = _splits_of(first, options)
    listing.pairs, pairs = True, 0
    for name in _images(first, listing):
        partner = storage.join(second, name)
        if not listing.has_file(partner):
            listing.exclude("", name, Reason.NO_PARTNER, f"{storage.redact(second)} has no image of this name")
            continue
        pairs += 1
        listing.mark_annotated(partner)
        _add(listing, chooser, name, name, storage.join(first, name), partner=partner)
    listing.reject_unannotated_files(Reason.NO_PARTNER, f"{storage.redact(first)} has no image of this name")
    if not pairs:
        raise ValueError(
            f"--pairs {storage.redact(first)} {storage.redact(second)}: no image has the name of another one"
        )
    return splits.describe()


def list_side_by_side(root: str, listing: Listing, options: FolderOptions) -> str:
    """List images of which each is a pair, side by side. Returns a sentence about the splits."""
    splits, chooser = _splits_of(root, options)
    listing.pairs, pairs = True, 0
    for name in _images(root, listing):
        pairs += 1
        _add(listing, chooser, name, name, storage.join(root, name))
    if not pairs:
        raise ValueError(f"{storage.redact(root)}: no images found")
    return splits.describe()


def _images(root: str, listing: Listing) -> Iterator[str]:
    """Yield the names of the images below a folder."""
    return (name for name in walk(root) if is_image(name) and listing.accepts(name))


def _splits_of(root: str, options: FolderOptions) -> tuple[NamedSplits, SplitChooser]:
    names = (name for name in walk(root) if is_image(name))
    splits = NamedSplits(names, ignore=not options.split_folders)
    return splits, SplitChooser(options, splits)


def _add(
    listing: Listing,
    chooser: SplitChooser,
    file: str,
    name: str,
    url: str,
    domain: str | None = None,
    partner: str | None = None,
) -> None:
    """Add an image to the listing.

    Args:
        file: name of the file below its folder, which states or determines the split.
        name: unique name of the image.
    """
    split = chooser.choose(None, file)
    if split is None:
        listing.exclude("", name, Reason.NO_SPLIT, OUTSIDE_SPLITS)
        return
    attributes = [] if domain is None else [domain]
    listing.add(split, name, url, attributes=attributes, needs_captions=False, partner_url=partner)
