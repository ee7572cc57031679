"""Raw captions into usable ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from t2idist.data.sample_format import MAX_CAPTION_CHARACTERS
from t2idist.data.tokenizer import tokenise
from t2idist.ingest.rejects import Reason

_WORD = re.compile(r"\w+")
_SPACES = re.compile(r"[\s\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class Cleaned:
    """captions: usable ones. left_out: why others are not, with details. cut: how many were cut."""

    captions: tuple[str, ...]
    left_out: tuple[tuple[Reason, str], ...]
    cut: int


def clean(raw: Sequence[str | bytes], max_words: int | None) -> Cleaned:
    """Spaces made single, unusable captions left out, long ones cut after `max_words` words (None: never)."""
    kept: list[str] = []
    left_out: list[tuple[Reason, str]] = []
    cut = 0
    for number, caption in enumerate(raw, start=1):
        try:
            usable = _clean_one(caption)
        except _Unusable as error:
            left_out.append((error.reason, f"caption {number}{error.detail}"))
            continue
        shorter = usable if max_words is None else _first_words(usable, max_words)
        cut += shorter != usable
        kept.append(shorter)
    return Cleaned(tuple(kept), tuple(left_out), cut)


class _Unusable(Exception):
    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def _clean_one(caption: str | bytes) -> str:
    if len(caption) > 4 * MAX_CAPTION_CHARACTERS:
        raise _Unusable(Reason.CAPTION_TOO_LONG, f" has more than {MAX_CAPTION_CHARACTERS} characters")
    try:
        text = caption.decode() if isinstance(caption, bytes) else caption.encode().decode()
    except UnicodeError:  # of bytes, or of the surrogates that stand for such bytes
        raise _Unusable(Reason.INVALID_UTF8) from None
    text = _SPACES.sub(" ", text).strip()
    if not text:
        raise _Unusable(Reason.EMPTY_CAPTION)
    if len(text) > MAX_CAPTION_CHARACTERS:
        raise _Unusable(Reason.CAPTION_TOO_LONG, f" has {len(text)} characters; at most {MAX_CAPTION_CHARACTERS}")
    if not tokenise(text):
        raise _Unusable(Reason.CAPTION_WITHOUT_WORDS, f": {text[:40]!r} has no word in letters or digits of ASCII")
    return text


def _first_words(caption: str, count: int) -> str:
    seen = 0
    for word in _WORD.finditer(caption):
        seen += bool(tokenise(word.group()))
        if seen == count:
            rest = caption[word.end() :]
            return caption[: word.end()] if tokenise(rest) else caption
    return caption
