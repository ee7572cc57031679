"""What the bytes of a file are that are not what they should be."""

from __future__ import annotations

_LFS = b"version https://git-lfs.github.com/spec/"


def describe_stranger(data: bytes) -> str:
    """Return what was stored in place of a binary file, with the way on: a web page, a Git LFS pointer; else ""."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(_LFS):
        return "a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
    if start[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page (HTML or XML), not the file itself; download the file that the page links to"
    return "empty" if not data else ""
