"""Edits of attribute labels for translated images and their scores: set, clear or change attributes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from t2idist.data.shards import Split

MAX_COMBINED_TRAITS = 3
"""Traits that are combined with each other in a grid; the paper shows hair colour, gender and age (figure 4)."""
MIN_EXPECTED_SAMPLES = 5.0
"""Two attributes that never occur together are taken to exclude each other if at least this many common samples were
expected by chance."""
NOT_APPLICABLE = -1
"""Class of a sample to which a trait does not apply (the hair colour of a bald head)."""

LabelEdit = Callable[[Tensor], Tensor]
"""Maps labels (N, A) to edited labels (N, A)."""


@dataclass(frozen=True)
class Trait:
    """A property with exclusive classes: of one attribute, absent or present; of several attributes, which of them."""

    name: str
    attributes: tuple[str, ...]

    @property
    def classes(self) -> int:
        return max(2, len(self.attributes))

    @property
    def chance(self) -> float:
        """Balanced accuracy of a random guess."""
        return 1.0 / self.classes

    def class_of(self, attributes: Sequence[str]) -> int:
        """Return the class of a sample with these attributes."""
        if len(self.attributes) == 1:
            return int(self.attributes[0] in attributes)
        return next((i for i, name in enumerate(self.attributes) if name in attributes), NOT_APPLICABLE)


TRAITS = (
    Trait("hair colour", ("Black_Hair", "Brown_Hair", "Blond_Hair", "Red_Hair", "Gray_Hair")),
    Trait("skin", ("Skin_Dark", "Skin_Brown", "Skin_Tanned", "Skin_Light", "Skin_Pale")),
    Trait("hat", ("Wearing_Hat",)),
    Trait("glasses", ("Eyeglasses",)),
    Trait("beard", ("Beard",)),
)
"""Traits that the first caption of every avatar names. A mustache alone is not a beard; sunglasses are glasses."""


@dataclass(frozen=True)
class AttributeEditor:
    """Edits the labels of one domain. Labels are (N, A) tensors of 0 and 1, in the order of `names`."""

    names: tuple[str, ...]
    traits: tuple[Trait, ...]
    """Setting an attribute of a trait clears the other attributes of the trait."""
    exclusive: Tensor
    """(A, A) bool, true if two attributes never occur together in the data: setting one clears the other."""

    @classmethod
    def from_names(cls, names: Sequence[str], one_hot: bool, split: Split | None = None) -> AttributeEditor:
        """Build an editor.

        Args:
            names: the A attributes.
            one_hot: exactly one attribute holds for every image.
            split: samples from which attributes that exclude each other are found; None: none are.
        """
        traits = (Trait("label", tuple(names)),) if one_hot else tuple(_group_into_traits(names))
        none = torch.zeros(len(names), len(names), dtype=torch.bool)
        return cls(tuple(names), traits, none if split is None else _never_together(names, split))

    def index(self, name: str) -> int:
        """Return the index of an attribute. Raises ValueError, naming the attributes, if it is unknown."""
        if name not in self.names:
            raise ValueError(f"'{name}' is not among the attributes that this export changes: {', '.join(self.names)}")
        return self.names.index(name)

    def conflicts(self, name: str) -> list[int]:
        """Return the indices of all attributes that cannot hold together with an attribute."""
        own = self.index(name)
        others = {self.index(other) for trait in self.traits if name in trait.attributes for other in trait.attributes}
        others |= set(torch.nonzero(self.exclusive[own]).flatten().tolist())
        return sorted(others - {own})

    def set_attribute(self, labels: Tensor, name: str) -> Tensor:
        """Set an attribute and clear all that conflict with it."""
        edited = labels.clone()
        edited[:, self.conflicts(name)] = 0
        edited[:, self.index(name)] = 1
        return edited

    def flip(self, labels: Tensor, name: str) -> Tensor:
        """Clear an attribute in the rows that have it and set it in the others."""
        cleared = labels.clone()
        cleared[:, self.index(name)] = 0
        return torch.where(labels[:, [self.index(name)]] > 0, cleared, self.set_attribute(labels, name))

    def change_trait(self, labels: Tensor, trait: Trait) -> Tensor:
        """Change a trait to its other class, or to the next of several."""
        if len(trait.attributes) == 1:
            return self.flip(labels, trait.attributes[0])
        return self._shift(labels, trait, 1)

    def trait_classes(self, labels: Tensor, trait: Trait) -> Tensor:
        """Return the class of a trait in every row, (N,) int64; NOT_APPLICABLE if it has none."""
        rows = [[name for name, has in zip(self.names, row, strict=True) if has] for row in labels.tolist()]
        return torch.tensor([trait.class_of(row) for row in rows], dtype=torch.int64)

    def alternatives(self, labels: Tensor, trait: Trait) -> Iterator[Tensor]:
        """Yield labels with every other class of a trait; each tensor differs from `labels` in every row."""
        if len(trait.attributes) == 1:
            yield self.flip(labels, trait.attributes[0])
        else:
            for offset in range(1, len(trait.attributes)):
                yield self._shift(labels, trait, offset)

    def _shift(self, labels: Tensor, trait: Trait, offset: int) -> Tensor:
        """Move each row's class of a trait by `offset`, modulo the number of classes; no class counts as the last."""
        target = (self.trait_classes(labels, trait) + offset) % len(trait.attributes)
        by_class = torch.stack([self.set_attribute(labels, name) for name in trait.attributes])
        return by_class[target.to(labels.device), torch.arange(len(labels), device=labels.device)]

    def grid_edits(self, limit: int) -> list[tuple[str, LabelEdit]]:
        """Return title and edit of a grid's columns: each attribute, then combinations of traits; at most `limit`."""
        edits: list[tuple[str, LabelEdit]] = []
        for trait in self.traits:
            for name in trait.attributes:
                edit = self.flip if len(trait.attributes) == 1 else self.set_attribute
                edits.append((name, functools.partial(edit, name=name)))
        combined: list[Trait] = []
        for trait in self.traits:
            if len(combined) < MAX_COMBINED_TRAITS and all(self._can_combine(trait, other) for other in combined):
                combined.append(trait)
        for count in range(2, len(combined) + 1):
            for chosen in combinations(combined, count):
                edits.append((" + ".join(trait.name for trait in chosen), self._change_all(chosen)))
        return edits[:limit]

    def _can_combine(self, first: Trait, second: Trait) -> bool:
        pairs = [(self.index(a), self.index(b)) for a in first.attributes for b in second.attributes]
        return not all(bool(self.exclusive[pair]) for pair in pairs)

    def _change_all(self, traits: Sequence[Trait]) -> LabelEdit:
        def edit(labels: Tensor) -> Tensor:
            for trait in traits:
                labels = self.change_trait(labels, trait)
            return labels

        return edit


def _group_into_traits(names: Sequence[str]) -> Iterator[Trait]:
    """Yield the known traits of several attributes, limited to `names`, and every other attribute as a trait."""
    done: set[str] = set()
    for name in names:
        if name in done:
            continue
        known = next((trait for trait in TRAITS if len(trait.attributes) > 1 and name in trait.attributes), None)
        own = tuple(other for other in names if known is not None and other in known.attributes)
        done |= set(own)
        yield Trait(known.name, own) if known is not None and len(own) > 1 else Trait(name, (name,))


def _never_together(names: Sequence[str], split: Split) -> Tensor:
    """(A, A) bool, true if two attributes never occur together in a split although enough samples were expected to."""
    indices = {name: index for index, name in enumerate(names)}
    has = torch.zeros(len(split), len(names))
    for row in range(len(split)):
        has[row, [indices[name] for name in split.attributes(row) if name in indices]] = 1
    counts = has.sum(0)
    expected = counts[:, None] * counts / len(split)  # if both were independent; a low value shows nothing
    return ((has.T @ has) == 0) & (expected >= MIN_EXPECTED_SAMPLES)
