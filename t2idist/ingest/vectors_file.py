"""Read precomputed sentence vectors from a .npz, .safetensors or .parquet file."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors
from numpy.typing import NDArray

SUFFIXES = (".npz", ".safetensors", ".parquet")
COLUMNS = ("key", "caption", "vector")


class VectorsFile:
    """Sentence vectors by sample key and caption index.

    Args:
        path: an .npz or .safetensors file with an array (captions, D) per sample key, or a .parquet file with the
            columns key, caption (index, from 0) and vector.

    Attributes:
        dim: D, the elements of a vector.

    Raises:
        ValueError: the file is not of this form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: the name of a vectors file must end in {', '.join(SUFFIXES)}")
        try:
            self._keys, self._read = _OPEN[path.suffix](path)
            self.dim = int(self._array(next(iter(self._keys))).shape[1]) if self._keys else 0
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        except (zipfile.BadZipFile, safetensors.SafetensorError, pa.ArrowException, KeyError) as error:
            raise ValueError(f"{path}: not a {path.suffix[1:]} file of vectors: {error}"[:300]) from None
        if not self.dim:
            raise ValueError(f"{path}: contains no vectors")

    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def vectors(self, samples: Sequence[tuple[str, Sequence[str]]]) -> list[NDArray[np.float32]]:
        """Return the vectors (captions, D) of each sample. Raises ValueError if a sample has none or a wrong number."""
        return [self._vectors(key, len(captions)) for key, captions in samples]

    def _vectors(self, key: str, captions: int) -> NDArray[np.float32]:
        if key not in self._keys:
            raise ValueError(
                f"{self.path}: no vectors for sample {key!r}; the file has {len(self._keys)} other samples"
            )
        array = self._array(key)
        if array.shape != (captions, self.dim):
            actual, expected = (" x ".join(map(str, shape)) for shape in (array.shape, (captions, self.dim)))
            raise ValueError(f"{self.path}: vectors of sample {key!r} are {actual}; its captions need {expected}")
        return array

    def _array(self, key: str) -> NDArray[np.float32]:
        try:
            array = np.asarray(self._read(key))
        except (ValueError, EOFError) as error:  # numpy refuses arrays of objects, which it would have to unpickle
            raise ValueError(f"{self.path}: sample {key!r}: {error}") from None
        if array.ndim != 2 or array.dtype.kind != "f":
            raise ValueError(f"{self.path}: sample {key!r}: must be (captions, D) of a float type, not {array.dtype}")
        return array.astype(np.float32)


Read = Callable[[str], Any]


def _npz(path: Path) -> tuple[frozenset[str], Read]:
    path.stat()  # raises OSError if it is missing
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("expected one array per sample key")
    archive = np.load(path, allow_pickle=False)
    return frozenset(archive.files), archive.__getitem__


def _safetensors(path: Path) -> tuple[frozenset[str], Read]:
    archive = safetensors.safe_open(path, framework="numpy")
    keys: list[str] = archive.keys()  # type: ignore[no-untyped-call]
    return frozenset(keys), archive.get_tensor


def _parquet(path: Path) -> tuple[frozenset[str], Read]:
    table = pq.read_table(path, columns=list(COLUMNS)).combine_chunks()
    vectors = table["vector"].combine_chunks()
    if vectors.null_count or len(pc.unique(pc.list_value_length(vectors))) != 1:
        raise ValueError(f"{path}: the vectors differ in length, or there are none")
    rows = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    order = np.argsort(table["caption"].to_numpy(), kind="stable")
    keys = np.asarray(table["key"].to_pylist())
    captions = table["caption"].to_numpy()
    rows_of: dict[str, list[int]] = {}
    for row in order.tolist():
        rows_of.setdefault(str(keys[row]), []).append(row)

    def read(key: str) -> NDArray[Any]:
        indices = captions[rows_of[key]].tolist()
        if indices != list(range(len(indices))):
            raise ValueError(f"captions {indices}; they must count from 0, each once")
        selected: NDArray[Any] = rows[rows_of[key]]
        return selected

    return frozenset(rows_of), read


_OPEN: dict[str, Callable[[Path], tuple[frozenset[str], Read]]] = {
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
}
