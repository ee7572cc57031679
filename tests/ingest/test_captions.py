"""Cleaning of captions."""

from __future__ import annotations

import unicodedata

import pytest

from t2idist.data.tokenizer import ASCII, tokenize
from t2idist.ingest.captions import CaptionOptions, clean_captions
from t2idist.ingest.rejects import Reason


def test_clean_captions_rejects_unusable_ones_and_cuts_long_ones():
    raw = ["  a red\n bird ", "", " \t", "\u2026!", "x" * 10_001, b"caf\xe9", b"one two", "bad \udce9", "y" * 50_000]
    cleaned = clean_captions(raw)
    assert cleaned.captions == ("a red bird", "one two")
    assert [reason for reason, _ in cleaned.rejected] == [
        Reason.EMPTY_CAPTION, Reason.EMPTY_CAPTION, Reason.CAPTION_WITHOUT_WORDS, Reason.CAPTION_TOO_LONG,
        Reason.INVALID_UTF8, Reason.INVALID_UTF8, Reason.CAPTION_TOO_LONG,
    ]  # fmt: skip
    cut = clean_captions(["one two, three four.", "one \u2014 two three.", "one two."], CaptionOptions(3))
    assert cut.captions == ("one two, three", "one \u2014 two three.", "one two.") and cut.truncated == 1


def test_captions_are_cut_at_words_of_their_script():
    for form in ("NFC", "NFD"):
        caption = unicodedata.normalize(form, "ein gr\u00fcner Vogel f\u00fcr dich")
        cut = clean_captions([caption], CaptionOptions(2)).captions[0]
        assert tokenize(cut, "unicode") == ["ein", "gr\u00fcner"]
    assert clean_captions(["\u7ea2\u8272\u7684\u9e1f"], CaptionOptions(3)).captions == ("\u7ea2\u8272\u7684",)
    ascii_words = clean_captions(["one \u9e1f two three.", "one two three four"], CaptionOptions(3, ASCII))
    assert ascii_words.captions == ("one \u9e1f two three.", "one two three")


def test_a_caption_is_never_reduced_to_its_digits():
    chinese = "\u7ea2\u8272\u7684\u9e1f 12"
    assert clean_captions([chinese]).captions == (chinese,)
    cleaned = clean_captions([chinese, "a red caf\u00e9"], CaptionOptions(tokenizer=ASCII))
    assert cleaned.captions == ("a red caf\u00e9",)
    ((reason, detail),) = cleaned.rejected
    assert reason is Reason.CAPTION_WITHOUT_WORDS and "would lose 4 of its 4 letters" in detail


@pytest.mark.parametrize("caption", ["a\0 \0r\0e\0d\0 \0b", b"r\0e\0d\0", "red\0bird"])
def test_letters_with_nuls_between_them_are_no_words(caption: str | bytes):
    cleaned = clean_captions([caption, "a bird\0\0"])
    assert cleaned.captions == ("a bird",)
    assert cleaned.rejected[0][0] is Reason.INVALID_UTF8 and "NUL bytes between its letters" in cleaned.rejected[0][1]


def test_an_undecodable_byte_is_named_with_the_offer():
    detail = clean_captions([b"the bird\x92s wing"], location="a.txt, line").rejected[0][1]
    assert detail == (
        "a.txt, line 1: byte 0x92 is not UTF-8; if the text is of Windows, --encoding cp1252 reads 'bird\u2019s'"
    )
