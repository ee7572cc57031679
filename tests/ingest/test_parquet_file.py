"""Parquet files as Python values; what is wrong with the file, and what is wrong with the disk or the network."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2idist import storage
from t2idist.ingest import parquet_file
from t2idist.ingest.listing import Listing
from t2idist.ingest.parquet_file import ParquetFile, python_values
from tests.helpers.image_files import save_image
from tests.ingest.layout_sets import SMALL, captions, shard, write_parquet
from tools import shard_folder


def invalid(*values: bytes | None) -> pa.Array:
    return pa.array(values, pa.binary()).view(pa.string())


def test_values_of_all_types() -> None:
    text = invalid(b"one", b"gr\xfcn", None)
    assert python_values(text) == python_values(text.dictionary_encode()) == ["one", "gr\udcfcn", None]
    assert python_values(text.cast(pa.large_string(), safe=False)) == ["one", "gr\udcfcn", None]
    lists = pa.ListArray.from_arrays(pa.array([0, 2, None, 2, 3]), text)
    assert python_values(lists) == [["one", "gr\udcfcn"], [], None, [None]]
    assert python_values(lists.slice(1)) == [[], None, [None]]
    images = pa.StructArray.from_arrays(
        [pa.array([b"\xff", b"2", b"3"]), text], ["bytes", "path"], mask=pa.array([False, False, True])
    )
    assert python_values(images) == [{"bytes": b"\xff", "path": "one"}, {"bytes": b"2", "path": "gr\udcfcn"}, None]
    assert python_values(images.slice(1, 1)) == [{"bytes": b"2", "path": "gr\udcfcn"}]
    assert python_values(pa.array([1, None, 2.5])) == [1, None, 2.5]


def test_rows_of_several_groups(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"a": range(20), "b": [str(n) for n in range(20)]}), tmp_path / "x.parquet", row_group_size=7
    )
    with ParquetFile(str(tmp_path / "x.parquet")) as file:
        assert list(file.rows(["b", "a"], 3)) == [{"b": str(n), "a": n} for n in range(20)]


def test_damaged_content_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [os.urandom(100) for _ in range(200)]}), tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(data[:4] + b"\xff" * 64 + data[68:])
    file = ParquetFile(str(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match="x.parquet: not a readable parquet file"), file:
        list(file.rows(["a"], 16))


class LostConnection(io.BytesIO):
    """A file whose reads fail after the first few."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > 3:
            raise ConnectionError("the connection was lost")
        return super().read(size)


def test_errors_of_the_network_are_not_about_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "x.parquet", 0, 60)
    data = (tmp_path / "x.parquet").read_bytes()
    monkeypatch.setattr(parquet_file, "open_file", lambda url: LostConnection(data))
    with pytest.raises(ConnectionError, match="the connection was lost"), ParquetFile("x.parquet") as file:
        list(file.rows(["image", "text"], 1))


def test_a_full_disk_is_said_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "mine.parquet", 0, 3)

    def full(self: Listing, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Listing, "spool", full)
    shard_folder.main(["--folder", str(tmp_path / "mine.parquet"), "--out", str(tmp_path / "set"), *SMALL])
    error = capsys.readouterr().err
    assert "No space left on device" in error and "not a readable" not in error


def test_a_table_in_a_store_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        save_image(tmp_path / "mine" / f"{number}.jpg", number, (16, 16))
    columns = {"image": [f"{n}.jpg" for n in range(3)], "caption": ["x", "y", "z"]}
    padding = [os.urandom(8 << 20) for _ in range(3)]
    pq.write_table(pa.table({**columns, "embedding": padding}), tmp_path / "t.parquet", compression="none")
    storage.write_bytes("memory://tables/t.parquet", (tmp_path / "t.parquet").read_bytes())
    parts: list[int] = []
    read = storage.read_bytes

    def read_bytes(url: str, *arguments: Any, **keywords: Any) -> bytes:
        data = read(url, *arguments, **keywords)
        if url.startswith("memory:"):
            parts.append(len(data))
        return data

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    options = ("--table", "memory://tables/t.parquet", "--val", "0", "--test", "0")
    assert captions(shard(tmp_path / "mine", tmp_path / "set", *options)) == {"train": {"x", "y", "z"}}
    assert 0 < sum(parts) < 0.9 * sum(map(len, padding))
