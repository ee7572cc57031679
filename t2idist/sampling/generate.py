"""Pictures of captions by given networks: the deterministic noise and the loop over batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from t2idist.contract import Captions, Sample, SupportsSample
from t2idist.data.tokenizer import Vocabulary
from t2idist.engine.strategy import Precision
from t2idist.nn.fast.layers import use_fast_layers


class RowsDraw(Protocol):
    """Noise of N pictures, as a system draws it (contract.Draw), and that of some of them."""

    def __call__(self, *shape: int) -> Tensor: ...

    def __getitem__(self, rows: slice) -> RowsDraw:
        """The noise of these pictures, from the first call on."""
        ...


class NormalDraw:
    """``draw(*shape) -> (N, *shape)`` standard normal; row i is a function of (seed, places[i], number of the call).

    Two pictures at the same place get the same noise, whatever batch they are drawn in. truncation: values whose size
    is above it are drawn again until none is (the truncation trick: BigGAN, section 3.1), the others stay.
    """

    def __init__(self, seed: int, places: Sequence[int], device: torch.device, *, truncation: float = math.inf) -> None:
        self._seed = seed
        self._places = places
        self._device = device
        self._truncation = truncation
        self._calls = 0

    def __call__(self, *shape: int) -> Tensor:
        generator = torch.Generator()
        rows = []
        for place in self._places:
            key = hashlib.blake2b(f"{self._seed}/{place}/{self._calls}".encode(), digest_size=8).digest()
            generator.manual_seed(int.from_bytes(key, "little") >> 1)
            row = torch.randn(shape, generator=generator, dtype=torch.float32)
            while (outside := row.abs() > self._truncation).any():
                row[outside] = torch.randn(int(outside.sum()), generator=generator, dtype=torch.float32)
            rows.append(row)
        self._calls += 1
        return torch.stack(rows).to(self._device)

    def __getitem__(self, rows: slice) -> NormalDraw:
        return NormalDraw(self._seed, self._places[rows], self._device, truncation=self._truncation)


class ArcDraw:
    """Noise on the way from one draw to another, all calls of a picture equally far: shares[i] in [0, 1].

    The way is the quarter turn cos(s) a + sin(s) b. Independent draws are nearly at a right angle, where this is the
    spherical interpolation; and every point of it is as normal as its ends, in any dimension.
    """

    def __init__(self, start: RowsDraw, end: RowsDraw, shares: Sequence[float]) -> None:
        self._start, self._end = start, end
        self._shares = shares

    def __call__(self, *shape: int) -> Tensor:
        start, end = self._start(*shape), self._end(*shape)
        turns = torch.tensor(self._shares, dtype=torch.float64).view(-1, *[1] * len(shape)) * (math.pi / 2)
        return turns.cos().to(start) * start + turns.sin().to(end) * end

    def __getitem__(self, rows: slice) -> ArcDraw:
        return ArcDraw(self._start[rows], self._end[rows], self._shares[rows])


class GivenDraw:
    """The first call gives `first` (N, D), what a system's `invert` found; the others are those of `rest`."""

    def __init__(self, first: Tensor, rest: RowsDraw) -> None:
        self._first, self._rest = first, rest
        self._calls = 0

    def __call__(self, *shape: int) -> Tensor:
        drawn = self._rest(*shape)  # also for the first call, so that the rest counts its calls as it does alone
        self._calls += 1
        if self._calls > 1:
            return drawn
        assert drawn.shape == self._first.shape, f"{tuple(self._first.shape)} given, {tuple(drawn.shape)} drawn"
        return self._first.to(drawn)

    def __getitem__(self, rows: slice) -> GivenDraw:
        return GivenDraw(self._first[rows], self._rest[rows])


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


def no_captions(count: int) -> Captions:
    """For a system that draws without text."""
    return Captions(
        torch.zeros(count, 1, dtype=torch.int64), torch.ones(count, dtype=torch.int64), torch.zeros(count, 0)
    )


def generate(
    system: SupportsSample,
    nets: Mapping[str, nn.Module],
    captions: Captions,
    draw: RowsDraw,
    *,
    device: torch.device,
    batch_size: int = 64,
    precision: str = "float32",
) -> Sample:
    """Pictures of N captions on the host, in float32, drawn batch by batch; draw: the noise of each.

    precision: of products of matrices ("bfloat16": in a third of the time, less true to the last digits). The networks
    get quick layers in place.
    """
    parts: list[Sample] = []
    for net in nets.values():
        use_fast_layers(net)
    with torch.inference_mode(), Precision(precision).autocast(device):
        for start in range(0, len(captions), batch_size):
            rows = slice(start, start + batch_size)
            parts.append(system.sample(nets, captions[rows].to(device), draw[rows]))
    images = tuple(
        torch.cat([x.float().cpu() for x in scale]) for scale in zip(*(p.images for p in parts), strict=True)
    )
    maps = tuple(
        torch.cat([x.float().cpu() for x in stage]) for stage in zip(*(p.attention for p in parts), strict=True)
    )
    return Sample(images, maps)
