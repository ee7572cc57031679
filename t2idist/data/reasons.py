"""Reasons for rejecting or repairing an image or a caption."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Code of a reason. The values are stored in rejected.jsonl and dataset.json."""

    ZERO_BYTES = "zero_bytes"
    NOT_AN_IMAGE = "not_a_picture"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    TOO_MANY_PIXELS = "too_many_pixels"
    FILE_TOO_LARGE = "file_too_large"
    BAD_BOX = "bad_box"
    GREY = "grey"
    CMYK = "cmyk"
    SIXTEEN_BIT = "sixteen_bit"
    PALETTE = "palette"
    ALPHA = "alpha"
    OTHER_COLOURS = "other_colours"
    EXIF_ROTATION = "exif_rotation"
    NO_IMAGE = "captions_without_picture"
    NO_CAPTIONS = "picture_without_captions"
    EMPTY_CAPTION = "empty_caption"
    CAPTION_WITHOUT_WORDS = "caption_without_words"
    CAPTION_TOO_LONG = "caption_too_long"
    INVALID_UTF8 = "invalid_utf8"
    DUPLICATE = "duplicate"
    UNSAFE_NAME = "unsafe_name"
    MALFORMED = "malformed"
    NO_SPLIT = "no_split"
    NO_PARTNER = "no_partner"
    SIZES_DIFFER = "sizes_differ"
