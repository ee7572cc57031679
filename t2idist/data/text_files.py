"""The encoding of text files. What was read becomes UTF-8; bytes that are no text stay invalid, so they are noticed.

Without a named encoding a file is UTF-8, or UTF-16 or UTF-32 if it has their byte order mark, or UTF-16 without one if
NUL bytes between the letters say so. A byte order mark has precedence over a named encoding.
"""

from __future__ import annotations

import codecs
import itertools
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator

UTF8 = "utf-8"
WINDOWS = "cp1252"
"""The encoding that messages offer for a byte that is not UTF-8."""

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before that of UTF-16, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SAMPLE_BYTES = 4096
_MAX_STRAY_NULS = 0.25
"""Share of NULs up to which what looks like text of another encoding is that, with stray NULs."""
_LATIN_SHARE = 0.6
"""Share of ASCII letters and blanks from which bytes are text of a Latin script; UTF-16 with few NULs has fewer."""
_LETTERS_AND_BLANKS = (string.ascii_letters + " ").encode()
_CONTROLS = re.compile(rb"[\x01-\x08\x0e-\x1f]")
_BETWEEN_LETTERS = re.compile(r"\w\x00+\w")
_KEEP_INVALID = "t2idist-keep-invalid"


def _keep_invalid(error: UnicodeError) -> tuple[str, int]:
    """Replace undecodable bytes by surrogates, which become invalid bytes of UTF-8."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    invalid = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + max(byte, 0x80)) for byte in invalid), error.end


codecs.register_error(_KEEP_INVALID, _keep_invalid)


def check_encoding(name: str) -> str:
    """Return Python's name of an encoding. Raises ValueError if there is none, or it is not one of text."""
    try:
        found = codecs.lookup(name)
        "a".encode(found.name)  # LookupError for codecs that convert something else
    except (LookupError, ValueError, UnicodeError):
        raise ValueError(
            f"--encoding {name}: no such text encoding; for example utf-8, utf-16, cp1252, latin-1, gb18030, shift_jis"
        ) from None
    return found.name


def to_utf8(data: bytes, encoding: str | None = None) -> bytes:
    """Convert the content of a text file to UTF-8, without a byte order mark."""
    return b"".join(blocks_to_utf8([data], encoding))


def blocks_to_utf8(blocks: Iterable[bytes], encoding: str | None = None) -> Iterator[bytes]:
    """Convert the content of a text file, block by block. The first bytes decide what the encoding is."""
    rest = iter(blocks)
    start = b""
    for block in rest:
        start += block
        if len(start) >= _SAMPLE_BYTES:
            break
    name, mark = _find_encoding(start, encoding)
    blocks = itertools.chain([start[mark:]], rest)
    if name == UTF8:
        yield from blocks
        return
    decoder = codecs.getincrementaldecoder(name)(_KEEP_INVALID)
    for block in blocks:
        yield _encode(decoder.decode(block))
    yield _encode(decoder.decode(b"", final=True))


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _find_encoding(data: bytes, encoding: str | None) -> tuple[str, int]:
    """Return the encoding, and the number of bytes of its byte order mark."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name, len(mark)
    if encoding is not None:
        return check_encoding(encoding), 0
    return _utf16_without_mark(data[:_SAMPLE_BYTES]) or UTF8, 0


def _utf16_without_mark(data: bytes) -> str | None:
    """Return the byte order of UTF-16 text; None if the NUL bytes do not show that it is such text."""
    nuls = data.strip(b"\0").count(0)
    if not nuls:
        return None
    if nuls < _MAX_STRAY_NULS * len(data) and _is_text_of_bytes(data):
        return None
    ascii_letters: dict[str, int] = {}
    for name in ("utf-16-le", "utf-16-be"):
        text = data[: len(data) // 2 * 2].decode(name, "replace").rstrip("\ufffd")  # the sample may cut a pair
        if not any(c not in "\t\r\n" and unicodedata.category(c) in ("Cc", "Cn", "Co") for c in text):
            ascii_letters[name] = sum(map(str.isascii, text))
    best = max(ascii_letters, key=lambda name: ascii_letters[name], default=None)
    return best if best is not None and ascii_letters[best] else None


def _is_text_of_bytes(data: bytes) -> bool:
    """Check whether bytes are UTF-8, with a cut character at the end or none, or text of any encoding like Latin-1."""
    if _CONTROLS.search(data):  # half of the letters of UTF-16 in many scripts
        return False
    try:
        codecs.getincrementaldecoder(UTF8)().decode(data)
        return True
    except UnicodeDecodeError:
        others = len(data.translate(None, _LETTERS_AND_BLANKS + b"\0"))
        return others <= (1 - _LATIN_SHARE) * (len(data) - data.count(0))


def is_utf8(text: str) -> bool:
    """Check that a text has no surrogates, which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def undecodable(text: bytes | str, encoding: str | None = None) -> str | None:
    """Say which byte of a text is not of its encoding, and what would read it; None if all are.

    Args:
        text: a part of what `to_utf8` returns, or a string in which surrogates stand for invalid bytes.
        encoding: that was named, as for `to_utf8`.
    """
    try:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        data.decode()
    except UnicodeEncodeError as error:
        return f"U+{ord(error.object[error.start]):04X} is half of a character"
    except UnicodeDecodeError as error:
        return _describe_byte(data, error.start, encoding)
    return None


def _describe_byte(data: bytes, position: int, encoding: str | None) -> str:
    byte = f"byte 0x{data[position]:02x}"
    if encoding is not None:
        return f"{byte} is not {encoding}; name the encoding of the text with --encoding"
    before, after = re.split(rb"\s", data[:position])[-1][-20:], re.split(rb"\s", data[position:])[0][:20]
    try:
        word = (before + after).decode(WINDOWS)
    except UnicodeDecodeError:
        return f"{byte} is not UTF-8; name the encoding of the text with --encoding, such as {WINDOWS}"
    return f"{byte} is not UTF-8; if the text is of Windows, --encoding {WINDOWS} reads {word!r}"


def has_nuls_between_letters(text: str) -> bool:
    """Check for what UTF-16 looks like that was read as another encoding."""
    return bool(_BETWEEN_LETTERS.search(text))


def decode_text(data: bytes, where: str, encoding: str | None = None) -> str:
    """Decode the content of a text file. Raises ValueError that names the file, the line and the byte."""
    converted = to_utf8(data, encoding)
    for number, line in enumerate(converted.split(b"\n"), start=1):
        if (problem := undecodable(line, encoding)) is not None:
            raise ValueError(f"{where}, line {number}: {problem}")
        if has_nuls_between_letters(line.decode()):
            raise ValueError(
                f"{where}, line {number}: has NUL bytes between letters, as UTF-16 does; name the encoding of the text "
                "with --encoding"
            )
    return converted.decode()
