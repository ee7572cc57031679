"""What is said of pictures, line by line, and the reader of captions.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from t2idist.ingest.files import lines
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason


@dataclass(frozen=True)
class Annotation:
    """What one line of captions.jsonl, or one row of a table, says of a picture. where: for messages."""

    where: str
    name: str
    captions: Sequence[str]
    attributes: Sequence[str] = ()
    class_name: str | None = None
    split: str | None = None


def read_jsonl(url: str, listing: Listing) -> Iterator[Annotation]:
    """The lines of a captions.jsonl; those that are not right become rejects."""
    where = url.rsplit("/", 1)[-1]
    for number, line in lines(url):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            yield _remark(place, json.loads(line.decode()))
        except UnicodeDecodeError:
            listing.left_out("", place, Reason.INVALID_UTF8, "the line is not UTF-8")
        except (ValueError, RecursionError) as error:
            listing.left_out("", place, Reason.MALFORMED, str(error)[:200])


def _remark(where: str, value: Any) -> Annotation:
    if not isinstance(value, dict) or not isinstance(value.get("image"), str):
        raise ValueError('a line must be an object with "image": its name')
    captions = value.get("captions", value.get("caption", []))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError('"caption" must be a text, "captions" a list of texts')
    attributes = value.get("attributes", [])
    if isinstance(attributes, dict):
        attributes = [name for name, has in attributes.items() if has in (True, 1)]
    if not isinstance(attributes, list) or not all(isinstance(name, str) for name in attributes):
        raise ValueError('"attributes" must be a list of names, or name: true or false')
    class_name, split = value.get("class"), value.get("split")
    if isinstance(class_name, bool) or not isinstance(class_name, str | int | None):
        raise ValueError('"class" must be a name or a number')
    if not isinstance(split, str | None):
        raise ValueError('"split" must be a name')
    class_name = None if class_name is None else str(class_name)
    return Annotation(where, value["image"], captions, [_clean(name) for name in attributes], class_name, split)


def _clean(name: str) -> str:
    """Readable even where it holds bytes that are no UTF-8."""
    return name[:200].encode("utf-8", "replace").decode()


def captions_by_picture(url: str, listing: Listing) -> dict[str, list[str]]:
    """All captions of a captions.jsonl by picture."""
    captions: dict[str, list[str]] = {}
    for remark in read_jsonl(url, listing):
        captions.setdefault(remark.name, []).extend(remark.captions)
    return captions
