"""Generate images from captions in batches, with noise that depends on the seed and the position only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from t2idist.contract import Captions, Sample, SupportsSample
from t2idist.data.tokenizer import Vocabulary
from t2idist.engine.strategy import Precision
from t2idist.nn.fast.layers import use_fast_layers


class NoiseSource(Protocol):
    """Noise of N images (contract.NoiseFn) that can be sliced by image."""

    def __call__(self, *shape: int) -> Tensor: ...

    def __getitem__(self, rows: slice) -> NoiseSource:
        """Return the noise of these images, starting again at the first call."""
        ...


class GaussianNoise:
    """``noise(*shape) -> (N, *shape)``, standard normal. Row i depends on (seed, positions[i], index of the call) only.

    Two images at the same position get the same noise, whatever batch they are generated in.

    Args:
        seed: seed of all rows.
        positions: one position per image.
        device: device of the noise, which is drawn on the host.
        truncation: values of a larger magnitude are drawn again until none is left (the truncation trick: BigGAN,
            section 3.1); the others stay as they are.
    """

    def __init__(
        self, seed: int, positions: Sequence[int], device: torch.device, *, truncation: float = math.inf
    ) -> None:
        self._seed = seed
        self._positions = positions
        self._device = device
        self._truncation = truncation
        self._calls = 0

    def __call__(self, *shape: int) -> Tensor:
        generator = torch.Generator()
        rows = []
        for position in self._positions:
            key = hashlib.blake2b(f"{self._seed}/{position}/{self._calls}".encode(), digest_size=8).digest()
            generator.manual_seed(int.from_bytes(key, "little") >> 1)
            row = torch.randn(shape, generator=generator, dtype=torch.float32)
            while (outside := row.abs() > self._truncation).any():
                row[outside] = torch.randn(int(outside.sum()), generator=generator, dtype=torch.float32)
            rows.append(row)
        self._calls += 1
        return torch.stack(rows).to(self._device)

    def __getitem__(self, rows: slice) -> GaussianNoise:
        return GaussianNoise(self._seed, self._positions[rows], self._device, truncation=self._truncation)


class InterpolatedNoise:
    """Interpolation between two noise sources: row i of every call is at `fractions[i]` in [0, 1] of the way.

    Noise a and b are combined to cos(s) a + sin(s) b, a quarter turn. Independent normal vectors are nearly orthogonal,
    so this is spherical interpolation; every point is again standard normal, in any dimension.
    """

    def __init__(self, start: NoiseSource, end: NoiseSource, fractions: Sequence[float]) -> None:
        self._start, self._end = start, end
        self._fractions = fractions

    def __call__(self, *shape: int) -> Tensor:
        start, end = self._start(*shape), self._end(*shape)
        angles = torch.tensor(self._fractions, dtype=torch.float64).view(-1, *[1] * len(shape)) * (math.pi / 2)
        return angles.cos().to(start) * start + angles.sin().to(end) * end

    def __getitem__(self, rows: slice) -> InterpolatedNoise:
        return InterpolatedNoise(self._start[rows], self._end[rows], self._fractions[rows])


class FixedFirstNoise:
    """Return `first` (N, D), such as inverted noise, at the first call and the noise of `rest` at later ones."""

    def __init__(self, first: Tensor, rest: NoiseSource) -> None:
        self._first, self._rest = first, rest
        self._calls = 0

    def __call__(self, *shape: int) -> Tensor:
        noise = self._rest(*shape)  # drawn at the first call too, so that `rest` counts its calls as it does alone
        self._calls += 1
        if self._calls > 1:
            return noise
        assert noise.shape == self._first.shape, f"fixed noise {tuple(self._first.shape)}, needed {tuple(noise.shape)}"
        return self._first.to(noise)

    def __getitem__(self, rows: slice) -> FixedFirstNoise:
        return FixedFirstNoise(self._first[rows], self._rest[rows])


def encode_captions(vocabulary: Vocabulary, captions: Sequence[str], max_words: int) -> Captions:
    """Encode captions as token ids; unknown words are dropped and longer captions are cut at the end.

    Raises ValueError if a caption has no known word.
    """
    tokens = torch.zeros(len(captions), max_words, dtype=torch.int64)
    lengths = torch.zeros(len(captions), dtype=torch.int64)
    for i, caption in enumerate(captions):
        ids, length = vocabulary.encode(caption, max_words, None)
        tokens[i, :length] = torch.as_tensor(ids, dtype=torch.int64)[:length]
        lengths[i] = length
    return Captions(tokens, lengths, torch.zeros(len(captions), 0))


def empty_captions(count: int) -> Captions:
    """Return placeholder captions for an unconditional system."""
    return Captions(
        torch.zeros(count, 1, dtype=torch.int64), torch.ones(count, dtype=torch.int64), torch.zeros(count, 0)
    )


def generate(
    system: SupportsSample,
    nets: Mapping[str, nn.Module],
    captions: Captions,
    noise: NoiseSource,
    *,
    device: torch.device,
    batch_size: int = 64,
    precision: str = "float32",
) -> Sample:
    """Generate images of N captions, batch by batch.

    Args:
        system: system that the networks belong to.
        nets: exported networks; their layers are replaced by the fast forms in place.
        captions: N captions.
        noise: noise of N images.
        device: device of the networks.
        batch_size: images per batch.
        precision: of matrix products and convolutions; "bfloat16" takes a third of the time and is less exact.

    Returns:
        The images and attention maps, on the host, in float32.
    """
    parts: list[Sample] = []
    for net in nets.values():
        use_fast_layers(net)
    with torch.inference_mode(), Precision(precision).autocast(device):
        for start in range(0, len(captions), batch_size):
            rows = slice(start, start + batch_size)
            parts.append(system.sample(nets, captions[rows].to(device), noise[rows]))
    images = tuple(
        torch.cat([x.float().cpu() for x in scale]) for scale in zip(*(p.images for p in parts), strict=True)
    )
    maps = tuple(
        torch.cat([x.float().cpu() for x in stage]) for stage in zip(*(p.attention for p in parts), strict=True)
    )
    return Sample(images, maps)


@contextmanager
def eval_mode(nets: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put the networks into eval mode; restores the mode of every module on exit."""
    modes = [(module, module.training) for net in nets.values() for module in net.modules()]
    for net in nets.values():
        net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
