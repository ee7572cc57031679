"""Encodings of text files."""

from __future__ import annotations

import pytest

from t2idist.data.text_files import blocks_to_utf8, check_encoding, decode_text, to_utf8, undecodable

GERMAN = "ein gr\u00fcner Vogel, bird\u2019s\r\nein zweiter\n"
RUSSIAN = "\u043a\u0440\u0430\u0441\u043d\u0430\u044f \u043f\u0442\u0438\u0446\u0430\n"
CHINESE = "\u7ea2\u8272\u7684\u9e1f\u4e00\u4e8c\u4e09\n\u4e00\u53ea\u84dd\u8272\u7684\u9e1f\n"


@pytest.mark.parametrize("text", [GERMAN, CHINESE, RUSSIAN, "a red bird"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "BOM utf-16-be"]
)
def test_unicode_is_recognised_with_and_without_byte_order_mark(text: str, encoding: str):
    name = encoding.removeprefix("BOM ")
    data = text.encode(name) if name == encoding else ("\ufeff" + text).encode(name)
    assert decode_text(data, "x") == text
    for size in (1, 3, 5000):
        blocks = [data[start : start + size] for start in range(0, len(data), size)]
        assert b"".join(blocks_to_utf8(blocks)).decode() == text


@pytest.mark.parametrize("data", [b"", b"\0", b"a red birds\0", b"a red\0bird and a wing", b"a\0\0\0", b"caf\xe9\0\0"])
def test_stray_nuls_are_not_utf16(data: bytes):
    assert to_utf8(data) == data


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
@pytest.mark.parametrize("text", ["gr\u00fcn\0 Vogel", "ein gr\u00fcner\0V\u00f6gel\n", "x" * 4094 + "\0\u00fc und"])
def test_a_stray_nul_turns_no_text_into_other_letters(text: str, encoding: str):
    data = text.encode(encoding)
    assert to_utf8(data) == data


def test_a_stray_nul_leaves_other_scripts_alone():
    for text in (CHINESE, RUSSIAN):
        data = (text[:3] + "\0" + text[3:]).encode()
        assert to_utf8(data) == data


@pytest.mark.parametrize(("name", "text"), [("cp1252", GERMAN), ("gb18030", CHINESE), ("shift_jis", "\u8d64\u3044\n")])
def test_a_named_encoding_is_used_unless_there_is_a_byte_order_mark(name: str, text: str):
    assert to_utf8(text.encode(name), name).decode() == text
    assert to_utf8(text.encode("utf-8-sig"), name).decode() == text


def test_an_undecodable_byte_is_named_with_file_line_and_offer():
    with pytest.raises(
        ValueError, match=r"my.txt, line 2: byte 0x92 is not UTF-8; .* --encoding cp1252 reads 'bird\u2019s'"
    ):
        decode_text(b"one\nthe bird\x92s wing\n", "my.txt")
    assert (
        undecodable(b"x\x81") == "byte 0x81 is not UTF-8; name the encoding of the text with --encoding, such as cp1252"
    )
    assert undecodable(to_utf8(b"x\x81", "cp1252"), "cp1252") == (
        "byte 0x81 is not cp1252; name the encoding of the text with --encoding"
    )
    assert undecodable("bird\udc92s") == undecodable(b"bird\x92s")
    assert undecodable("\ud83d") == "U+D83D is half of a character"
    assert undecodable("gr\u00fcn") is None and undecodable(b"red") is None
    with pytest.raises(ValueError, match=r"my.txt, line 1: has NUL bytes between letters"):
        decode_text(b"red\0bird", "my.txt")


@pytest.mark.parametrize("name", ["utf-9", "rot13", "base64", "", "x\0"])
def test_an_encoding_that_is_none_is_an_error(name: str):
    with pytest.raises(ValueError, match="no such text encoding; for example utf-8, utf-16, cp1252"):
        check_encoding(name)
    assert check_encoding("Windows-1252") == "cp1252"
