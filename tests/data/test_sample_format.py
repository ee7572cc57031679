"""The format of a sample in a shard."""

from __future__ import annotations

import tarfile

import pytest

from t2idist.data.sample_format import header


@pytest.mark.parametrize(("name", "size"), [("a.jpg", 0), ("a" * 90 + ".json", 77), ("s_1-2.webp", 8**11 - 1)])
def test_tar_header_equals_that_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    assert header(name.encode(), size) == info.tobuf(tarfile.USTAR_FORMAT)
