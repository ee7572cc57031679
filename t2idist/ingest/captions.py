"""Clean raw captions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from t2idist.data.sample_format import MAX_CAPTION_CHARACTERS
from t2idist.data.tokenizer import tokenize
from t2idist.ingest.rejects import Reason

_WORD = re.compile(r"\w+")
_SPACES = re.compile(r"[\s\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class CleanedCaptions:
    """Result of `clean_captions`."""

    captions: tuple[str, ...]
    rejected: tuple[tuple[Reason, str], ...]
    """Reason and detail of each unusable caption."""
    truncated: int
    """Number of captions that were cut to the maximum length."""


def clean_captions(raw: Sequence[str | bytes], max_words: int | None) -> CleanedCaptions:
    """Collapse whitespace, reject unusable captions, and cut captions after `max_words` words (None: no limit)."""
    captions: list[str] = []
    rejected: list[tuple[Reason, str]] = []
    truncated = 0
    for number, caption in enumerate(raw, start=1):
        try:
            cleaned = _clean_one(caption)
        except _CaptionError as error:
            rejected.append((error.reason, f"caption {number}{error.detail}"))
            continue
        shortened = cleaned if max_words is None else _first_words(cleaned, max_words)
        truncated += shortened != cleaned
        captions.append(shortened)
    return CleanedCaptions(tuple(captions), tuple(rejected), truncated)


class _CaptionError(Exception):
    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def _clean_one(caption: str | bytes) -> str:
    if len(caption) > 4 * MAX_CAPTION_CHARACTERS:
        raise _CaptionError(Reason.CAPTION_TOO_LONG, f" has more than {MAX_CAPTION_CHARACTERS} characters")
    try:
        text = caption.decode() if isinstance(caption, bytes) else caption.encode().decode()
    except UnicodeError:  # invalid bytes, or surrogates that stand for them
        raise _CaptionError(Reason.INVALID_UTF8) from None
    text = _SPACES.sub(" ", text).strip()
    if not text:
        raise _CaptionError(Reason.EMPTY_CAPTION)
    if len(text) > MAX_CAPTION_CHARACTERS:
        raise _CaptionError(Reason.CAPTION_TOO_LONG, f" has {len(text)} characters; at most {MAX_CAPTION_CHARACTERS}")
    if not tokenize(text):
        raise _CaptionError(
            Reason.CAPTION_WITHOUT_WORDS, f": {text[:40]!r} contains no word of ASCII letters or digits"
        )
    return text


def _first_words(caption: str, count: int) -> str:
    words = 0
    for word in _WORD.finditer(caption):
        words += bool(tokenize(word.group()))
        if words == count:
            rest = caption[word.end() :]
            return caption[: word.end()] if tokenize(rest) else caption
    return caption
