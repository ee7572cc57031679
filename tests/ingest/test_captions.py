"""Cleaning of captions."""

from __future__ import annotations

from t2idist.ingest.captions import clean_captions
from t2idist.ingest.rejects import Reason


def test_clean_captions_rejects_unusable_ones_and_cuts_long_ones():
    raw = ["  a red\n bird ", "", " \t", "\u9e1f", "x" * 10_001, b"caf\xe9", b"one two", "bad \udce9", "y" * 50_000]
    cleaned = clean_captions(raw, None)
    assert cleaned.captions == ("a red bird", "one two")
    assert [reason for reason, _ in cleaned.rejected] == [
        Reason.EMPTY_CAPTION, Reason.EMPTY_CAPTION, Reason.CAPTION_WITHOUT_WORDS, Reason.CAPTION_TOO_LONG,
        Reason.INVALID_UTF8, Reason.INVALID_UTF8, Reason.CAPTION_TOO_LONG,
    ]  # fmt: skip
    cut = clean_captions(["one two, three four.", "one \u9e1f two three.", "one two."], 3)
    assert cut.captions == ("one two, three", "one \u9e1f two three.", "one two.") and cut.truncated == 1
