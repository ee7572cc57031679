"""Do pictures show what their captions say? A small classifier, trained on real pictures only, is the judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from t2idist.contract import to_float

ABSENT = -1
"""The class of a sample to which a trait does not apply (the hair colour of a bald head)."""


@dataclass(frozen=True)
class Trait:
    """A question with exclusive answers. One attribute: has it or not; several: which one of them."""

    name: str
    attributes: tuple[str, ...]

    @property
    def classes(self) -> int:
        return max(2, len(self.attributes))

    @property
    def chance(self) -> float:
        """The balanced accuracy of a blind answer."""
        return 1.0 / self.classes

    def answer(self, attributes: Sequence[str]) -> int:
        if len(self.attributes) == 1:
            return int(self.attributes[0] in attributes)
        return next((i for i, name in enumerate(self.attributes) if name in attributes), ABSENT)


TRAITS = (
    Trait("hair colour", ("Black_Hair", "Brown_Hair", "Blond_Hair", "Red_Hair", "Gray_Hair")),
    Trait("skin", ("Skin_Dark", "Skin_Brown", "Skin_Tanned", "Skin_Light", "Skin_Pale")),
    Trait("hat", ("Wearing_Hat",)),
    Trait("glasses", ("Eyeglasses",)),
    Trait("beard", ("Beard",)),
)
"""What the avatars' first captions always name. A mustache alone is no beard; sunglasses are glasses."""


def answers(attributes: Sequence[Sequence[str]], traits: Sequence[Trait] = TRAITS) -> Tensor:
    """(n, traits) class numbers of samples with these attributes; ABSENT where a trait does not apply."""
    return torch.tensor([[trait.answer(names) for trait in traits] for names in attributes], dtype=torch.int64)


class AttributeClassifier(nn.Module):
    """Pictures (N, 3, S, S) in [-1, 1] -> for each trait logits (N, classes)."""

    def __init__(self, traits: Sequence[Trait] = TRAITS, width: int = 16) -> None:
        super().__init__()
        channels = [3, width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(channels):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3))
        self.heads = nn.ModuleList(nn.Linear(4 * width * 16, trait.classes) for trait in traits)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.body(images)
        return [head(features) for head in self.heads]


def train_classifier(
    images: Tensor,
    wanted: Tensor,
    *,
    seed: int,
    traits: Sequence[Trait] = TRAITS,
    epochs: int = 6,
    batch_size: int = 64,
    lr: float = 2e-3,
) -> AttributeClassifier:
    """A judge trained on real pictures (n, 3, S, S), uint8 or in [-1, 1], with answers (n, traits).

    Pictures are mirrored at random; classes weigh equally, however rare. torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        judge = AttributeClassifier(traits)
        weights = [_class_weights(wanted[:, t], trait.classes) for t, trait in enumerate(traits)]
        steps = epochs * (len(images) // batch_size)
        optimizer = torch.optim.Adam(judge.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 1))
        for _ in range(epochs):
            order = torch.randperm(len(images))
            for start in range(0, len(images) - batch_size + 1, batch_size):
                rows = order[start : start + batch_size]
                pictures = to_float(images[rows])
                mirrored = torch.rand(len(rows)) < 0.5
                pictures[mirrored] = pictures[mirrored].flip(-1)
                losses = [
                    functional.cross_entropy(logits, wanted[rows, t], weights[t], ignore_index=ABSENT, reduction="sum")
                    for t, logits in enumerate(judge(pictures))
                ]
                optimizer.zero_grad(set_to_none=True)
                (torch.stack(losses).sum() / len(rows)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return judge.eval().requires_grad_(False)


def _class_weights(wanted: Tensor, classes: int) -> Tensor:
    counts = torch.bincount(wanted[wanted != ABSENT], minlength=classes).clamp(min=1).float()
    return counts.sum() / (classes * counts)


def classify(judge: AttributeClassifier, images: Tensor, batch_size: int = 256) -> Tensor:
    """(n, traits): the judge's answers about pictures (n, 3, S, S), uint8 or in [-1, 1]."""
    with torch.inference_mode():
        parts = [
            torch.stack([logits.argmax(1) for logits in judge(to_float(images[start : start + batch_size]))], 1)
            for start in range(0, len(images), batch_size)
        ]
    return torch.cat(parts)


def balanced_accuracy(decided: Tensor, wanted: Tensor) -> tuple[float, int]:
    """The mean over classes of the share of their samples that was decided right, and how many samples count.

    decided, wanted: (n,). Samples whose wanted class is ABSENT do not count, classes without samples neither.
    Raises ValueError where nothing counts.
    """
    present = wanted != ABSENT
    if not present.any():
        raise ValueError("balanced accuracy: no sample to judge")
    shares = [float((decided[wanted == c] == c).double().mean()) for c in sorted(set(wanted[present].tolist()))]
    return sum(shares) / len(shares), int(present.sum())
