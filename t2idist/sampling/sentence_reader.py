"""Read sentences for an export: captions of those that it can draw, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from t2idist import storage
from t2idist.contract import Captions, SupportsTranslate, is_text_conditional
from t2idist.sampling.axes import PLACEHOLDER
from t2idist.sampling.generate import encode_captions
from t2idist.sampling.loading import LoadedExport
from t2idist.sampling.sentence_encoders import (
    SentenceEncoder,
    open_encoder,
    vector_captions,
    vector_encoder_facts,
    warnings_of_export,
)
from t2idist.sampling.sentences import Sentence, unreadable_sentence


@dataclass(frozen=True)
class ReadSentences:
    """Sentences as an export reads them."""

    captions: Captions
    """The sentences that can be drawn, on the device of the networks."""
    indices: tuple[int, ...]
    """Which of the sentences these are."""
    problems: tuple[str, ...]
    """Why the others cannot be drawn."""
    warnings: tuple[str, ...]
    """What is left out of the sentences that can be drawn."""


class SentenceReader:
    """Encodes sentences by the text encoder of an export, or by the encoder of the vectors that it was trained on.

    Args:
        loaded: export whose system reads sentences (`reads_sentences`).
        device: device of the networks.
        encoder: name for `open_encoder`; only for an export that reads sentence vectors.
        option: how the caller names the encoder, for messages.

    Raises:
        ValueError: the encoder is missing, unknown, not needed, or has vectors of another length.
    """

    def __init__(self, loaded: LoadedExport, device: torch.device, encoder: str | None, *, option: str) -> None:
        self._loaded, self._device = loaded, device
        self.encoder: SentenceEncoder | None = None
        """Encoder of sentence vectors; None if the export has its own text encoder."""
        self.warnings: tuple[str, ...] = ()
        """What is wrong with the encoder."""
        if "text" not in loaded.nets:
            self.encoder = self._open(encoder, option)
        elif encoder is not None:
            raise ValueError(f"{option}: this export has its own text encoder; remove the option")

    def _open(self, name: str | None, option: str) -> SentenceEncoder:
        dim = self._loaded.build_info.data.vector_dim
        trained_with = vector_encoder_facts(self._loaded.meta)
        if name is None:
            by = f", made by {trained_with['name']}" if trained_with else ""
            raise ValueError(
                f"{storage.redact(self._loaded.url)}: this export reads sentence vectors of {dim} elements{by}; give "
                f"their encoder as {option}"
            )
        encoder = open_encoder(name, self._device)
        if encoder.dim != dim:
            raise ValueError(
                f"{option} {storage.redact(name)}: its vectors have {encoder.dim} elements; the export reads {dim}"
            )
        if trained_with and trained_with.get("sha256") != encoder.facts["sha256"]:
            self.warnings = (f"{option} is not the encoder of the training data's vectors ({trained_with['name']})",)
        return encoder

    def read(self, sentences: Sequence[Sentence]) -> ReadSentences:
        """Encode the sentences that can be drawn; says what is wrong with the others."""
        vectors = None
        if self.encoder is not None:  # it does not see what is refused anyway, such as a file given by mistake
            given = [each.text if unreadable_sentence(each, None) is None else "" for each in sentences]
            vectors = self.encoder.encode(given)
        found = [
            self._problem(sentence, None if vectors is None else vectors[index])
            for index, sentence in enumerate(sentences)
        ]
        kept = [index for index, problem in enumerate(found) if problem is None]
        if vectors is None:
            texts = [sentences[index].text for index in kept]
            captions = encode_captions(self._loaded.vocabulary, texts, self._loaded.build_info.max_words)
        else:
            captions = vector_captions(vectors[kept])
        warnings = [warning for index in kept for warning in self._warnings_about(sentences[index])]
        problems = [problem for problem in found if problem is not None]
        return ReadSentences(captions.to(self._device), tuple(kept), tuple(problems), tuple(warnings))

    def read_text(self, text: str | None) -> ReadSentences:
        """Encode one sentence. Raises ValueError if it is none, or cannot be drawn."""
        if text is None:
            raise ValueError(f"text is missing: {storage.redact(self._loaded.url)} draws from sentences")
        if not isinstance(text, str):
            raise ValueError(f"text is {text!r}; give one sentence as a string")
        if not text.strip():
            raise ValueError(f"text is {text!r}; give a sentence")
        sentence = Sentence(text)
        check_placeholder([sentence], "put words in its place")
        read = self.read([sentence])
        if read.problems:
            raise ValueError(read.problems[0])
        return read

    def embed(self, captions: Captions) -> NDArray[np.float32]:
        """Return the sentence vectors (n, D) of captions that `read` has encoded."""
        if self.encoder is not None:
            return captions.vectors.cpu().numpy()
        with torch.inference_mode():
            vectors: NDArray[np.float32] = (
                self._loaded.nets["text"](captions.tokens, captions.lengths)[1].float().cpu().numpy()
            )
        return vectors

    def _problem(self, sentence: Sentence, vector: NDArray[np.float32] | None) -> str | None:
        if problem := unreadable_sentence(sentence, None if self.encoder else self._loaded.vocabulary):
            return problem
        if vector is not None and not np.isfinite(vector).all():
            return f"{sentence}: the encoder knows no word of this sentence"
        return None

    def _warnings_about(self, sentence: Sentence) -> list[str]:
        return self.encoder.warnings(sentence) if self.encoder else warnings_of_export(self._loaded, sentence)


def reads_sentences(loaded: LoadedExport) -> bool:
    """Return whether the system of an export reads sentences, or vectors of them."""
    translates = isinstance(loaded.system, SupportsTranslate)  # whatever vectors its data has
    return not translates and is_text_conditional(loaded.system, loaded.build_info.data.vector_dim)


def check_placeholder(sentences: Sequence[Sentence], remedy: str) -> None:
    """Raise ValueError if a sentence still has a placeholder; `remedy` says how it is filled."""
    unfilled = next((sentence for sentence in sentences if PLACEHOLDER in sentence.text), None)
    if unfilled is not None:
        raise ValueError(f"{unfilled} has a placeholder, {PLACEHOLDER}; {remedy}")
