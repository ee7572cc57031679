"""Safe file names, lines and folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2idist.ingest.files import is_unsafe, read_lines, walk
from tests.helpers.image_files import save_image


@pytest.mark.parametrize(
    "name",
    ["../a.jpg", "a/../../b.jpg", "/etc/passwd", "\\\\host\\a.jpg", "C:\\a.jpg", "https://x/a.jpg", "file:/etc/x", "",
     "pipe:cat x", "a\0.jpg", "a\n.jpg"],
)  # fmt: skip
def test_names_outside_the_folder_are_unsafe(name: str):
    assert is_unsafe(name)


def test_normal_names_are_safe():
    assert not any(map(is_unsafe, ["a.jpg", "b/c d.jpg", "..a.jpg", "a..b/x.png", "\u00e9.jpg"]))


def test_read_lines_cuts_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("t2idist.ingest.files.MAX_LINE_BYTES", 40)
    for block in (1, 7, 1000):
        monkeypatch.setattr("t2idist.ingest.files._BLOCK_BYTES", block)
        (tmp_path / "x").write_bytes(b"\xef\xbb\xbfone\r\n\n" + b"y" * 95 + b"\nlast")
        content = [line for _, line in read_lines(str(tmp_path / "x"))]
        assert content == [b"one\r\n", b"\n", b"y" * 40 + b"\0\n", b"last"]
    with pytest.raises(ValueError, match="no such file"):
        list(read_lines(str(tmp_path / "nothing")))


def test_lines_may_end_in_cr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for block in (4, 1000):
        monkeypatch.setattr("t2idist.ingest.files._BLOCK_BYTES", block)
        (tmp_path / "x").write_bytes(b"a\rbb\r\rlast")
        assert [line for _, line in read_lines(str(tmp_path / "x"))] == [b"a\r", b"bb\r", b"\r", b"last"]
        (tmp_path / "x").write_bytes(b"abc\r\nd\re\n")  # the first block ends between CR and LF
        assert [line for _, line in read_lines(str(tmp_path / "x"))] == [b"abc\r\n", b"d\re\n"]


def test_walk_is_sorted_and_skips_hidden_names(tmp_path: Path):
    for name in ("b/z.jpg", "a.jpg", "b/.x.jpg", ".git/y.jpg", "c.txt", "b/c/d.png"):
        save_image(tmp_path / name)
    assert list(walk(str(tmp_path))) == ["a.jpg", "c.txt", "b/z.jpg", "b/c/d.png"]
