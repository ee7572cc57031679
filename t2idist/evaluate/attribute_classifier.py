"""Check whether generated images show what their captions name, with a small classifier trained on real images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from t2idist.nn.images import to_float
from t2idist.sampling.attribute_edits import NOT_APPLICABLE, TRAITS, Trait


def trait_classes(attributes: Sequence[Sequence[str]], traits: Sequence[Trait] = TRAITS) -> Tensor:
    """Return the class of every trait, (n, traits), of samples with these attributes; NOT_APPLICABLE if it has none."""
    return torch.tensor([[trait.class_of(names) for trait in traits] for names in attributes], dtype=torch.int64)


class AttributeClassifier(nn.Module):
    """Maps images (N, 3, S, S) in [-1, 1] to logits (N, classes) of each trait."""

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
    targets: Tensor,
    *,
    seed: int,
    traits: Sequence[Trait] = TRAITS,
    epochs: int = 6,
    batch_size: int = 64,
    lr: float = 2e-3,
) -> AttributeClassifier:
    """Train a classifier on real images, with random flips and equal weight for every class.

    Args:
        images: (n, 3, S, S), uint8 or in [-1, 1].
        targets: (n, traits) classes.
        seed: seed of weights, order and flips; torch's global generator is left unchanged.
        traits: traits of the columns of `targets`.
        epochs: passes over the images.
        batch_size: images per step.
        lr: peak learning rate of Adam.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        classifier = AttributeClassifier(traits)
        weights = [_class_weights(targets[:, t], trait.classes) for t, trait in enumerate(traits)]
        steps = epochs * (len(images) // batch_size)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 1))
        for _ in range(epochs):
            order = torch.randperm(len(images))
            for start in range(0, len(images) - batch_size + 1, batch_size):
                rows = order[start : start + batch_size]
                batch = to_float(images[rows])
                flipped = torch.rand(len(rows)) < 0.5
                batch[flipped] = batch[flipped].flip(-1)
                losses = [
                    functional.cross_entropy(
                        logits, targets[rows, t], weights[t], ignore_index=NOT_APPLICABLE, reduction="sum"
                    )
                    for t, logits in enumerate(classifier(batch))
                ]
                optimizer.zero_grad(set_to_none=True)
                (torch.stack(losses).sum() / len(rows)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return classifier.eval().requires_grad_(False)


def _class_weights(targets: Tensor, classes: int) -> Tensor:
    counts = torch.bincount(targets[targets != NOT_APPLICABLE], minlength=classes).clamp(min=1).float()
    return counts.sum() / (classes * counts)


def classify(classifier: AttributeClassifier, images: Tensor, batch_size: int = 256) -> Tensor:
    """Return the predicted classes, (n, traits), of images (n, 3, S, S), uint8 or in [-1, 1]."""
    with torch.inference_mode():
        parts = [
            torch.stack([logits.argmax(1) for logits in classifier(to_float(images[start : start + batch_size]))], 1)
            for start in range(0, len(images), batch_size)
        ]
    return torch.cat(parts)


def balanced_accuracy(predicted: Tensor, targets: Tensor) -> tuple[float, int]:
    """Return the mean recall over classes and the number of samples that count.

    Samples whose target is NOT_APPLICABLE and classes without samples do not count. Raises ValueError if no sample
    counts.

    Args:
        predicted: (n,) classes.
        targets: (n,) classes.
    """
    applies = targets != NOT_APPLICABLE
    if not applies.any():
        raise ValueError("balanced accuracy: no sample has a class")
    recalls = [float((predicted[targets == c] == c).double().mean()) for c in sorted(set(targets[applies].tolist()))]
    return sum(recalls) / len(recalls), int(applies.sum())
