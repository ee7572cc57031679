"""Files of precomputed sentence vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2idist.ingest.vectors_file import VectorsFile
from tests.ingest.vector_sets import (
    DIM,
    vectors,
    write_vectors_file,
)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_vectors_files_are_read(tmp_path: Path, suffix: str):
    arrays = {f"s{n:04d}": vectors(f"s{n:04d}", 3) for n in range(4)}
    file = VectorsFile(write_vectors_file(tmp_path / f"v{suffix}", arrays))
    assert file.dim == DIM and len(file.sha256()) == 64
    result = file.vectors([("s0002", "abc"), ("s0000", "abc")])
    assert np.array_equal(result[0], arrays["s0002"]) and np.array_equal(result[1], arrays["s0000"])
    assert result[0].dtype == np.float32
    with pytest.raises(ValueError, match="no vectors for sample 's9'; the file has 4 other samples"):
        file.vectors([("s9", "a")])
    with pytest.raises(ValueError, match="vectors of sample 's0001' are 3 x 7; its captions need 5 x 7"):
        file.vectors([("s0001", "abcde")])


def test_invalid_vectors_files_are_refused(tmp_path: Path):
    objects = np.empty((2, 2), dtype=object)
    np.savez(tmp_path / "code.npz", s1=objects)
    np.savez(tmp_path / "whole.npz", s1=np.zeros((2, 3), dtype=np.int64))
    np.savez(tmp_path / "none.npz")
    (tmp_path / "junk.npz").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    pq.write_table(
        pa.table({"key": ["a", "b"], "caption": [0, 0], "vector": [[1.0], [1.0, 2.0]]}), tmp_path / "odd.parquet"
    )
    pq.write_table(pa.table({"key": ["a"], "caption": [1], "vector": [[1.0]]}), tmp_path / "late.parquet")
    for name, message in (
        ("code.npz", "allow_pickle=False"),
        ("whole.npz", "of a float type, not int64"),
        ("none.npz", "contains no vectors"),
        ("junk.npz", "junk.npz: not a npz file of vectors"),
        ("junk.safetensors", "not a safetensors file"),
        ("junk.parquet", "not a parquet file"),
        ("odd.parquet", "differ in length"),
        ("late.parquet", r"captions \[1\]; they must count from 0"),
        ("missing.npz", "No such file"),
        ("v.pkl", "must end in .npz, .safetensors, .parquet"),
    ):
        with pytest.raises(ValueError, match=message):
            VectorsFile(tmp_path / name)
