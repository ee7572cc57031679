"""What one worker draws and scores at a cadence: the grid of fixed captions by fixed noise, attention, R-precision."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from t2idist import storage
from t2idist.contract import Batch, Sample, SupportsEmbed, SupportsSample, System, to_float
from t2idist.data.tokenizer import Vocabulary, tokenise
from t2idist.evaluate.r_precision import most_candidates, r_precision
from t2idist.sampling.figures import attention_figure, grid, png_bytes, stacked
from t2idist.sampling.generate import NormalDraw, encode, generate, no_captions

logger = logging.getLogger(__name__)

CANDIDATES = 100
ATTENTION_CAPTIONS = 2
ROWS = 8
"""Of a grid."""


def can_draw(system: System) -> bool:
    """Whether the system draws pictures from captions (contract.Draws)."""
    return callable(getattr(system, "sample", None))


def can_match(system: System) -> bool:
    """Whether the system places pictures and captions in one space (contract.Matches)."""
    return callable(getattr(system, "embed_pictures", None))


def can_translate(system: System) -> bool:
    """Whether the system changes attributes of pictures (contract.Translates)."""
    return callable(getattr(system, "translate", None))


def reads_vectors(system: System, vector_dim: int) -> bool:
    """Whether the system reads the sentence vectors of its data: there are some, and it exports no text encoder."""
    return vector_dim > 0 and not _exports_text(system)


def reads_text(system: System, vector_dim: int) -> bool:
    """Whether the system draws from captions, by an encoder that it exports or by sentence vectors of its data."""
    return vector_dim > 0 or _exports_text(system)


def _exports_text(system: System) -> bool:
    return any(name.rpartition(".")[2] == "text" for name in system.exports)


class SampleGrid:
    """Draws the same captions with the same noise at every cadence.

    captions: one row of the grid each; none, of a system that reads none: rows of other noise. vectors: theirs, where
    they came with the data. max_words: the encoder's. draws: noise draws, one column each; a column has the same noise
    in every row of captions. real: (R, 3, S, S) in [-1, 1] or uint8, a real picture of each caption, shown beside.
    folder: URL under which pictures are written.
    """

    def __init__(
        self,
        system: System,
        vocabulary: Vocabulary,
        captions: Sequence[str],
        *,
        max_words: int,
        draws: int,
        seed: int,
        folder: str,
        device: torch.device,
        real: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> None:
        self._system = cast(SupportsSample, system)
        self.captions = tuple(captions)
        self._draws = draws
        self._seed = seed
        self._folder = folder
        self._device = device
        self._real = None if real is None else to_float(real)
        encoded = encode(vocabulary, self.captions, max_words) if captions else no_captions(ROWS)
        self._encoded = (encoded if vectors is None else replace(encoded, vectors=vectors)).each(draws)
        self._places = [i % draws if captions else i for i in range(len(self._encoded))]
        self._words = [known_words(vocabulary, caption)[:max_words] for caption in self.captions]

    def draw(self, nets: Mapping[str, nn.Module]) -> Sample:
        """Draw by `nets`, the exported networks, which are put into eval mode and back.

        Nothing random of the caller is touched.
        """
        with evaluating(nets):
            noise = NormalDraw(self._seed, self._places, self._device)
            return generate(self._system, nets, self._encoded, noise, device=self._device)

    def write(self, sample: Sample, images_seen: int) -> list[str]:
        """Write the grid, and attention where there is any; gives the URLs."""
        written = [storage.join(self._folder, f"images_{images_seen:09d}.png")]
        storage.write_bytes(
            written[0], png_bytes(grid(sample.images, self.captions or [""] * ROWS, self._draws, self._real))
        )
        if sample.attention:
            written.append(storage.join(self._folder, f"attention_{images_seen:09d}.png"))
            rows = [i * self._draws for i in range(min(ATTENTION_CAPTIONS, len(self.captions)))]
            figures = [
                attention_figure(
                    sample.images[-1][row], self._words[row // self._draws], [m[row] for m in sample.attention]
                )
                for row in rows
            ]
            storage.write_bytes(written[1], png_bytes(stacked(figures)))
        return written


def score_matching(
    system: System,
    nets: Mapping[str, nn.Module],
    batch: Batch,
    *,
    seed: int,
    device: torch.device,
    rows_at_once: int = 100,
) -> dict[str, float]:
    """R-precision of a system with `embed` on all pictures of `batch` (the val split): metrics by name.

    "val/r_precision" is out of 100 candidates; where the pictures give too few, the name says out of how many
    ("val/r_precision_of_37"), and fewer than two candidates give no metric.
    """
    candidates = min(CANDIDATES, most_candidates(batch.class_ids))
    if candidates < 2:
        return {}
    with evaluating(nets):
        images, captions = embed_all(cast(SupportsEmbed, system), nets, batch, device=device, rows_at_once=rows_at_once)
    score = r_precision(images, captions, seed=seed, class_ids=batch.class_ids, candidates=candidates)
    name = "val/r_precision" if candidates == CANDIDATES else f"val/r_precision_of_{candidates}"
    return {name: score.mean}


def embed_all(
    system: SupportsEmbed, nets: Mapping[str, nn.Module], batch: Batch, *, device: torch.device, rows_at_once: int = 100
) -> tuple[Tensor, Tensor]:
    """Image and caption codes (n, D) of all samples, on the host in float32, from the largest pictures of the batch."""
    pairs: list[tuple[Tensor, Tensor]] = []
    dtype = next(weight.dtype for net in nets.values() for weight in net.parameters())
    with torch.inference_mode():
        for start in range(0, len(batch.ids), rows_at_once):
            rows = slice(start, start + rows_at_once)
            pictures = to_float(batch.images[-1][rows], dtype).to(device)
            captions = batch.captions[rows].to(device)
            pairs.append((system.embed_pictures(nets, pictures), system.embed_captions(nets, captions)))
    return torch.cat([a.float().cpu() for a, _ in pairs]), torch.cat([b.float().cpu() for _, b in pairs])


def known_words(vocabulary: Vocabulary, caption: str) -> list[str]:
    """The caption's words that have a token, in order."""
    unknown = set(vocabulary.unknown(caption))
    return [word for word in tokenise(caption) if word not in unknown]


@contextmanager
def evaluating(nets: Mapping[str, nn.Module]) -> Iterator[None]:
    """The networks in eval mode inside, and each module in its own mode again after."""
    modes = [(module, module.training) for net in nets.values() for module in net.modules()]
    for net in nets.values():
        net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
