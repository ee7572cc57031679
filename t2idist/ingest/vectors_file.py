"""Sentence vectors that were made elsewhere, in one file of plain numbers: .npz, .safetensors or .parquet."""

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
    """Vectors by sample key and caption number.

    path: an .npz or .safetensors file with an array (captions, D) by sample key, or a .parquet file with the columns
    key, caption (its number, from 0) and vector. dim: D. Raises ValueError, naming the file, where it is none of these.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: files of vectors end in {', '.join(SUFFIXES)}")
        try:
            self._keys, self._read = _OPEN[path.suffix](path)
            self.dim = int(self._array(next(iter(self._keys))).shape[1]) if self._keys else 0
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        except (zipfile.BadZipFile, safetensors.SafetensorError, pa.ArrowException, KeyError) as error:
            raise ValueError(f"{path}: not a {path.suffix[1:]} file of vectors: {error}"[:300]) from None
        if not self.dim:
            raise ValueError(f"{path}: holds no vectors")

    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def of(self, samples: Sequence[tuple[str, Sequence[str]]]) -> list[NDArray[np.float32]]:
        """Each sample's vectors (captions, D). Raises ValueError, naming the sample, where there are none or others."""
        return [self._of(key, len(captions)) for key, captions in samples]

    def _of(self, key: str, captions: int) -> NDArray[np.float32]:
        if key not in self._keys:
            raise ValueError(f"{self.path}: has no vectors of sample {key!r}, and {len(self._keys)} others")
        found = self._array(key)
        if found.shape != (captions, self.dim):
            have, need = (" x ".join(str(size) for size in shape) for shape in (found.shape, (captions, self.dim)))
            raise ValueError(f"{self.path}: vectors of sample {key!r} are {have}; its captions need {need}")
        return found

    def _array(self, key: str) -> NDArray[np.float32]:
        try:
            found = np.asarray(self._read(key))
        except (ValueError, EOFError) as error:  # numpy's word for an array of objects, which it would unpickle
            raise ValueError(f"{self.path}: sample {key!r}: {error}") from None
        if found.ndim != 2 or found.dtype.kind != "f":
            raise ValueError(f"{self.path}: sample {key!r}: give floating numbers (captions, D), not {found.dtype}")
        return found.astype(np.float32)


Read = Callable[[str], Any]


def _npz(path: Path) -> tuple[frozenset[str], Read]:
    path.stat()  # raises OSError where it is missing
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("give one with an array for each sample key")
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
        raise ValueError(f"{path}: its vectors differ in length, or there are none")
    rows = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    order = np.argsort(table["caption"].to_numpy(), kind="stable")
    keys = np.asarray(table["key"].to_pylist())
    captions = table["caption"].to_numpy()
    places: dict[str, list[int]] = {}
    for row in order.tolist():
        places.setdefault(str(keys[row]), []).append(row)

    def read(key: str) -> NDArray[Any]:
        found = captions[places[key]].tolist()
        if found != list(range(len(found))):
            raise ValueError(f"captions {found}; they count from 0, each once")
        picked: NDArray[Any] = rows[places[key]]
        return picked

    return frozenset(places), read


_OPEN: dict[str, Callable[[Path], tuple[frozenset[str], Read]]] = {
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
}
