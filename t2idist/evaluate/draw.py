"""Pictures of captions by given networks: the deterministic noise and the loop over batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from t2idist.contract import Captions, Draws, Sample
from t2idist.data.text import Vocabulary


class NormalDraw:
    """``draw(*shape) -> (N, *shape)`` standard normal; row i is a function of (seed, places[i], number of the call).

    Two pictures at the same place get the same noise, whatever batch they are drawn in.
    """

    def __init__(
        self, seed: int, places: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self._seed = seed
        self._places = places
        self._device = device
        self._dtype = dtype
        self._calls = 0

    def __call__(self, *shape: int) -> Tensor:
        generator = torch.Generator()
        rows = []
        for place in self._places:
            key = hashlib.blake2b(f"{self._seed}/{place}/{self._calls}".encode(), digest_size=8).digest()
            generator.manual_seed(int.from_bytes(key, "little") >> 1)
            rows.append(torch.randn(shape, generator=generator, dtype=torch.float32))
        self._calls += 1
        return torch.stack(rows).to(self._device, self._dtype)


def encode(vocabulary: Vocabulary, captions: Sequence[str], max_words: int) -> Captions:
    """Captions by word number; the end of a longer one is cut off, unknown words dropped.

    Raises ValueError where a caption has no known word.
    """
    tokens = torch.zeros(len(captions), max_words, dtype=torch.int64)
    lengths = torch.zeros(len(captions), dtype=torch.int64)
    for i, caption in enumerate(captions):
        ids, length = vocabulary.encode(caption, max_words, None)
        tokens[i, :length] = torch.as_tensor(ids, dtype=torch.int64)[:length]
        lengths[i] = length
    return Captions(tokens, lengths, torch.zeros(len(captions), 0))


def generate(
    system: Draws,
    nets: Mapping[str, nn.Module],
    captions: Captions,
    *,
    places: Sequence[int],
    seed: int,
    device: torch.device,
    batch_size: int = 64,
) -> Sample:
    """Pictures of N captions on the host, in float32, drawn batch by batch; places: the noise of each."""
    parts: list[Sample] = []
    with torch.inference_mode():
        for start in range(0, len(captions), batch_size):
            rows = slice(start, start + batch_size)
            draw = NormalDraw(seed, places[rows], device)
            parts.append(system.sample(nets, captions[rows].to(device), draw))
    images = tuple(
        torch.cat([x.float().cpu() for x in scale]) for scale in zip(*(p.images for p in parts), strict=True)
    )
    maps = tuple(
        torch.cat([x.float().cpu() for x in stage]) for stage in zip(*(p.attention for p in parts), strict=True)
    )
    return Sample(images, maps)
