"""Annotations of images, and the reader of captions.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from t2idist.ingest.files import UndecodableText, read_lines, text_of_line
from t2idist.ingest.flags import parse_attributes
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason


@dataclass(frozen=True)
class Annotation:
    """One line of captions.jsonl or one row of a table."""

    location: str
    """File and line, for messages."""
    name: str
    """Name of the image, relative to the folder of images."""
    captions: Sequence[str]
    attributes: Sequence[str] = ()
    class_name: str | None = None
    split: str | None = None


def read_jsonl(url: str, listing: Listing) -> Iterator[Annotation]:
    """Yield the annotations of a captions.jsonl file; invalid lines become rejects."""
    file = url.rsplit("/", 1)[-1]
    for number, line in read_lines(url):
        if not line.strip():
            continue
        location = f"{file}, line {number}"
        try:
            yield _parse(location, json.loads(text_of_line(line)), listing.attributes)
        except UndecodableText as error:
            listing.exclude("", location, Reason.INVALID_UTF8, str(error))
        except (ValueError, RecursionError) as error:
            listing.exclude("", location, Reason.MALFORMED, str(error)[:200])


def _parse(location: str, value: Any, seen: dict[str, bool]) -> Annotation:
    if not isinstance(value, dict) or not isinstance(value.get("image"), str):
        raise ValueError('the line must be an object with "image", the name of an image')
    captions = value.get("captions", value.get("caption", []))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError('"caption" must be a string, "captions" a list of strings')
    attributes = parse_attributes(value.get("attributes", []), "attributes", seen)
    class_name, split = value.get("class"), value.get("split")
    if isinstance(class_name, bool) or not isinstance(class_name, str | int | None):
        raise ValueError('"class" must be a string or an integer')
    if not isinstance(split, str | None):
        raise ValueError('"split" must be a string')
    class_name = None if class_name is None else str(class_name)
    return Annotation(location, value["image"], captions, [_to_utf8(name) for name in attributes], class_name, split)


def _to_utf8(name: str) -> str:
    """Replace surrogates, which stand for bytes that are not UTF-8; at most 200 characters."""
    return name[:200].encode("utf-8", "replace").decode()


def captions_by_image(url: str, listing: Listing) -> dict[str, list[str]]:
    """Read all captions of a captions.jsonl file, by image name."""
    captions: dict[str, list[str]] = {}
    for annotation in read_jsonl(url, listing):
        captions.setdefault(annotation.name, []).extend(annotation.captions)
    return captions
