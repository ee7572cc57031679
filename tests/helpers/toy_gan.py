"""A small GAN that uses all of `contract.Train`, and random batches as functions of (step, lane, position)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Captions, DataInfo, Frozen, Role, Schedule, Train

VOCABULARY_SIZE = 40
DATA_INFO = DataInfo(
    words=tuple(f"word{i}" for i in range(VOCABULARY_SIZE)),
    epoch_images=50,
    vector_dim=12,
    attributes=(("Bangs", "Black_Hair", "Blond_Hair", "Smiling"),),
)
PAIRS = replace(DATA_INFO, paired=True)
"""Every sample is a pair of images."""
TWO_DOMAINS = replace(DATA_INFO, attributes=(*DATA_INFO.attributes, ("happy", "sad", "neutral")))
"""Two data sets that alternate step by step."""


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seed = nn.Linear(6 + 4, 8 * 16, bias=False)
        self.norm = nn.BatchNorm1d(8 * 16)
        self.drop = nn.Dropout(0.3)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.out = nn.ConvTranspose2d(8, 3, 4, 2, 1)

    def forward(self, z: Tensor, text: Tensor) -> Tensor:
        h = self.drop(self.norm(self.seed(torch.cat([z, text], 1))).relu())
        return self.out(self.norm2(self.conv(h.view(-1, 8, 4, 4))).relu()).tanh()


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2))
        self.head = nn.Linear(8 * 16 + 4, 1)

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        return self.head(torch.cat([self.body(images).flatten(1), text], 1)).squeeze(1)


class ToyGan:
    """Two roles, EMA, clipping, a schedule, a gradient penalty, and mismatched pairs inside a group."""

    def __init__(self, build_info: BuildInfo) -> None:
        schedule = Schedule("linear", start_images=100, end_images=400, floor=0.1)
        self.roles = {
            "generator": Role(Generator(), Adam(lr=1e-3), ema_half_life_images=200.0),
            "discriminator": Role(
                Discriminator(), Adam(lr=1e-3, schedule=schedule), clip_norm=1.0, clip_prefix="body."
            ),
        }
        self.frozen: dict[str, Frozen] = {}
        self.sizes = (8,)
        self.exports = ("generator", "discriminator.body")
        self.embedding = torch.randn(VOCABULARY_SIZE, 4, generator=torch.Generator().manual_seed(5))

    def step(self, batch: Batch, train: Train) -> None:
        real = batch.images[-1]
        text = self.embedding.to(real)[batch.captions.tokens].mean(1)
        wrong = text.view(batch.groups, -1, 4).roll(1, 1).reshape(-1, 4)
        fakes = train.forward("generator", lambda net, z: net(z, text), train.noise(6))

        def critic(net: nn.Module, fake: Tensor) -> Tensor:
            logits = net(real, text), net(real, wrong), net(fake, text)
            with torch.autocast(real.device.type, enabled=False):
                mixed = (0.5 * real + 0.5 * fake).requires_grad_()
                (slope,) = torch.autograd.grad(net(mixed, text).sum(), mixed, create_graph=True)
            penalty = slope.flatten(1).pow(2).sum(1).mean()
            a, b, c = (nn.functional.softplus(s * x).mean() for s, x in zip((-1, 1, 1), logits, strict=True))
            return a + (b + c) / 2 + penalty

        train.report("discriminator/loss", train.update("discriminator", critic, fakes.detach()))
        with train.frozen("discriminator") as net:
            loss = nn.functional.softplus(-net(fakes, text)).mean()
        train.report("generator/loss", loss)
        train.apply("generator", loss)


def batch(
    step: int,
    lanes: range,
    group_size: int,
    sizes: tuple[int, ...] = (8,),
    max_words: int = 5,
    data_info: DataInfo = DATA_INFO,
) -> Batch:
    """Return a random batch. A sample depends on (step, lane, position) alone, whatever the number of workers."""
    domain = step % len(data_info.attributes)
    count = len(data_info.attributes[domain])
    images: list[list[Tensor]] = [[] for _ in sizes]
    partners: list[list[Tensor]] = [[] for _ in sizes]
    tokens, lengths, vectors, attributes, ids = [], [], [], [], []
    for lane in lanes:
        generator = torch.Generator().manual_seed(1000 * step + lane)
        for scale, size in zip(images, sizes, strict=True):
            scale.append(torch.randint(0, 256, (group_size, 3, size, size), generator=generator, dtype=torch.uint8))
        others = torch.Generator().manual_seed(7_000_000 + 1000 * step + lane)
        for scale, size in zip(partners, sizes, strict=True):
            scale.append(torch.randint(0, 256, (group_size, 3, size, size), generator=others, dtype=torch.uint8))
        length = torch.randint(2, max_words + 1, (group_size,), generator=generator)
        words = torch.randint(1, VOCABULARY_SIZE, (group_size, max_words), generator=generator)
        tokens.append(words * (torch.arange(max_words)[None] < length[:, None]))
        lengths.append(length)
        vectors.append(torch.randn(group_size, DATA_INFO.vector_dim, generator=generator))
        attributes.append(torch.randint(0, 2, (group_size, count), generator=generator).float())
        ids += [f"{step}-{lane}-{position}" for position in range(group_size)]
    class_ids = torch.tensor([_sample_number(key) % 7 for key in ids])  # some samples of a group share a class
    captions = Captions(torch.cat(tokens), torch.cat(lengths), torch.cat(vectors))
    pyramid, second = (tuple(torch.cat(scale) for scale in each) for each in (images, partners))
    return Batch(pyramid, captions, class_ids, torch.cat(attributes), tuple(ids), len(lanes), domain, second)


def _sample_number(key: str) -> int:
    step, lane, position = (int(part) for part in key.split("-"))
    return step * 10_000 + lane * 100 + position


def batches(lanes: range, group_size: int, sizes: tuple[int, ...], max_words: int, step: int = 0) -> Iterator[Batch]:
    """Yield the batches from `step` on."""
    while True:
        yield batch(step, lanes, group_size, sizes, max_words)
        step += 1
