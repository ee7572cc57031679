"""Clean raw captions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from t2idist.data.sample_format import MAX_CAPTION_CHARACTERS
from t2idist.data.text_files import has_nuls_between_letters, undecodable
from t2idist.data.tokenizer import ASCII, UNICODE, lost_letters, normalize, tokenize, word_ends
from t2idist.ingest.rejects import Reason

_SPACES = re.compile(r"[\s\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are read and cleaned."""

    max_words: int | None = None
    """Longer captions are cut to this many words (None: no limit)."""
    tokenizer: str = UNICODE
    """What splits captions into words (`t2idist.data.tokenizer`)."""
    encoding: str | None = None
    """Of text files (None: as they say themselves, `t2idist.data.text_files`)."""


@dataclass(frozen=True)
class CleanedCaptions:
    """Result of `clean_captions`."""

    captions: tuple[str, ...]
    rejected: tuple[tuple[Reason, str], ...]
    """Reason and detail of each unusable caption."""
    truncated: int
    """Number of captions that were cut to the maximum length."""


def clean_captions(
    raw: Sequence[str | bytes], options: CaptionOptions = CaptionOptions(), location: str = "caption"
) -> CleanedCaptions:
    """Collapse whitespace, reject unusable captions, and cut captions that have too many words.

    Args:
        raw: bytes are UTF-8; surrogates stand for bytes that are not.
        location: what the number of a rejected caption counts, for the details.
    """
    captions: list[str] = []
    rejected: list[tuple[Reason, str]] = []
    truncated = 0
    for number, caption in enumerate(raw, start=1):
        try:
            cleaned = _clean_one(caption, options)
        except _CaptionError as error:
            rejected.append((error.reason, f"{location} {number}{error.detail}"))
            continue
        shortened = cleaned
        if options.max_words is not None:
            shortened = _first_words(cleaned, options.max_words, options.tokenizer)
        truncated += shortened != cleaned
        captions.append(shortened)
    return CleanedCaptions(tuple(captions), tuple(rejected), truncated)


class _CaptionError(Exception):
    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def _clean_one(caption: str | bytes, options: CaptionOptions) -> str:
    if len(caption) > 4 * MAX_CAPTION_CHARACTERS:
        raise _CaptionError(Reason.CAPTION_TOO_LONG, f" has more than {MAX_CAPTION_CHARACTERS} characters")
    try:
        text = caption.decode() if isinstance(caption, bytes) else caption.encode().decode()
    except UnicodeError:  # invalid bytes, or surrogates that stand for them
        raise _CaptionError(Reason.INVALID_UTF8, f": {undecodable(caption, options.encoding)}") from None
    if has_nuls_between_letters(text):
        detail = ": has NUL bytes between its letters, as UTF-16 has that was read as another encoding"
        raise _CaptionError(Reason.INVALID_UTF8, detail)
    text = _SPACES.sub(" ", text).strip()
    if not text:
        raise _CaptionError(Reason.EMPTY_CAPTION)
    if len(text) > MAX_CAPTION_CHARACTERS:
        raise _CaptionError(Reason.CAPTION_TOO_LONG, f" has {len(text)} characters; at most {MAX_CAPTION_CHARACTERS}")
    _check_words(text, options.tokenizer)
    return text


def _check_words(text: str, tokenizer: str) -> None:
    """Raise _CaptionError if the tokenizer finds no word, or loses most of the letters."""
    kinds = "ASCII letters or digits" if tokenizer == ASCII else "letters or digits"
    if not tokenize(text, tokenizer):
        raise _CaptionError(Reason.CAPTION_WITHOUT_WORDS, f": {text[:40]!r} contains no word of {kinds}")
    lost, letters = len(lost_letters(text, tokenizer)), sum(map(str.isalpha, text))
    if lost and 2 * lost >= letters:
        detail = f": {text[:40]!r} would lose {lost} of its {letters} letters, which are not ASCII"
        raise _CaptionError(Reason.CAPTION_WITHOUT_WORDS, detail)


def _first_words(caption: str, count: int, tokenizer: str) -> str:
    """Return the caption up to its last word if it has at most `count`, else up to that one."""
    text = caption if tokenizer == ASCII else normalize(caption)
    words = last = 0
    for end, in_run in word_ends(text, tokenizer):
        if words + in_run > count:
            return text[:last]
        words, last = words + in_run, end if in_run else last
    return caption
