"""Annotations of images, and the reader of JSON lines: captions.jsonl, and metadata.jsonl of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from t2idist import storage
from t2idist.ingest.fields import Fields, require_captions, require_named
from t2idist.ingest.files import UndecodableText, read_lines, text_of_line
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason

_CAPTIONS_JSONL = Fields(
    image="image", attributes="attributes", class_name="class", split="split", usual_captions=("captions", "caption")
)
_GIVEN_BY_OPTIONS = Fields()


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


def read_jsonl(
    url: str,
    listing: Listing,
    given: Fields = _GIVEN_BY_OPTIONS,
    *,
    usual: Fields = _CAPTIONS_JSONL,
    name: str | None = None,
    needs_captions: bool = False,
) -> Iterator[Annotation]:
    """Yield the annotations of a file of JSON lines; invalid lines become rejects.

    Args:
        given: names of the fields, where they are not `usual`.
        name: of the file, for messages.
        needs_captions: refuse a file whose lines have no field with captions.

    Raises:
        ValueError: a field that is given is in no line, or none holds captions.
    """
    file, fields = name or url.rsplit("/", 1)[-1], given.or_else(usual)
    found: dict[str, None] = {}
    captioned = False
    for number, line in read_lines(url):
        if not line.strip():
            continue
        location = f"{file}, line {number}"
        try:
            value = json.loads(text_of_line(line))
            annotation = _parse(location, value, fields, listing)
        except UndecodableText as error:
            listing.exclude("", location, Reason.INVALID_UTF8, str(error))
        except (ValueError, RecursionError) as error:
            listing.exclude("", location, Reason.MALFORMED, str(error)[:200])
        else:
            found |= dict.fromkeys(value)
            captioned |= bool(annotation.captions)
            yield annotation
    if found and needs_captions and not captioned:
        require_captions(storage.redact(url), fields, found)
    if found:
        require_named(storage.redact(url), given, found)


def _parse(location: str, value: Any, fields: Fields, listing: Listing) -> Annotation:
    if not isinstance(value, dict) or not isinstance(value.get(fields.image), str):
        raise ValueError(f'the line must be an object with "{fields.image}", the name of an image')
    facts = fields.read(value, listing.attributes)
    return Annotation(location, value[fields.image], facts.captions, facts.attributes, facts.class_name, facts.split)


def captions_by_image(url: str, listing: Listing) -> dict[str, list[str]]:
    """Read all captions of a captions.jsonl file, by image name."""
    captions: dict[str, list[str]] = {}
    for annotation in read_jsonl(url, listing):
        captions.setdefault(annotation.name, []).extend(annotation.captions)
    return captions
