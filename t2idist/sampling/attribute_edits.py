"""Which attributes of a picture can be changed to what: the labels behind translated pictures and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from t2idist.data.shards import Split
from t2idist.evaluate.attribute_classifier import TRAITS, Trait

COMBINED = 3
"""So many traits are combined with each other in a grid; the paper shows hair colour, gender and age (figure 4)."""

EXPECTED = 5.0
"""Samples that two attributes must be expected to share before it counts that they share none."""


@dataclass(frozen=True)
class Labels:
    """The attributes that a system changes in one domain. Label tensors are (N, A), 0 or 1, in the order of `names`.

    traits: with one attribute: has it or not; with several: at most one of them, and setting one clears the others.
    apart: (A, A) bool, where two never hold together in the data: setting one clears the other.
    """

    names: tuple[str, ...]
    traits: tuple[Trait, ...]
    apart: Tensor

    @classmethod
    def of(cls, names: Sequence[str], exclusive: bool, split: Split | None = None) -> Labels:
        """exclusive: exactly one of all holds. split: of data that says what never holds together."""
        chosen = (Trait("label", tuple(names)),) if exclusive else tuple(_traits(names))
        apart = torch.zeros(len(names), len(names), dtype=torch.bool)
        return cls(tuple(names), chosen, apart if split is None else _never_together(names, split))

    def place(self, name: str) -> int:
        """Of a name among them. Raises ValueError that says which there are."""
        if name not in self.names:
            raise ValueError(f"'{name}' is not among the attributes that this export changes: {', '.join(self.names)}")
        return self.names.index(name)

    def rivals(self, name: str) -> list[int]:
        """Places of all that cannot hold beside an attribute."""
        mine = self.place(name)
        others = {self.place(other) for trait in self.traits if name in trait.attributes for other in trait.attributes}
        others |= set(torch.nonzero(self.apart[mine]).flatten().tolist())
        return sorted(others - {mine})

    def with_set(self, labels: Tensor, name: str) -> Tensor:
        """Labels with an attribute set, and what cannot hold beside it cleared."""
        made = labels.clone()
        made[:, self.rivals(name)] = 0
        made[:, self.place(name)] = 1
        return made

    def flipped(self, labels: Tensor, name: str) -> Tensor:
        """Labels with an attribute cleared where they have it, and set where they lack it."""
        cleared = labels.clone()
        cleared[:, self.place(name)] = 0
        return torch.where(labels[:, [self.place(name)]] > 0, cleared, self.with_set(labels, name))

    def changed(self, labels: Tensor, trait: Trait) -> Tensor:
        """Labels with another answer to a trait: the other one, or the next of several."""
        if len(trait.attributes) == 1:
            return self.flipped(labels, trait.attributes[0])
        return self._next(labels, trait, 1)

    def answers(self, labels: Tensor, trait: Trait) -> Tensor:
        """(N,) class numbers of a trait, as `attributes.answers` gives them of names."""
        rows = [[name for name, has in zip(self.names, row, strict=True) if has] for row in labels.tolist()]
        return torch.tensor([trait.answer(row) for row in rows], dtype=torch.int64)

    def others(self, labels: Tensor, trait: Trait) -> Iterator[Tensor]:
        """Labels with each other answer to a trait: one tensor for each, which differs from `labels` in every row."""
        if len(trait.attributes) == 1:
            yield self.flipped(labels, trait.attributes[0])
        else:
            for further in range(1, len(trait.attributes)):
                yield self._next(labels, trait, further)

    def _next(self, labels: Tensor, trait: Trait, further: int) -> Tensor:
        """The attribute so many places after the present one, in a ring (after the last, where there is none)."""
        wanted = (self.answers(labels, trait) + further) % len(trait.attributes)
        made = torch.stack([self.with_set(labels, name) for name in trait.attributes])
        return made[wanted.to(labels.device), torch.arange(len(labels), device=labels.device)]

    def columns(self, most: int) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """Titles and changes of a grid's columns: each attribute, then combinations; at most so many."""
        made: list[tuple[str, Callable[[Tensor], Tensor]]] = []
        for trait in self.traits:
            for name in trait.attributes:
                change = self.flipped if len(trait.attributes) == 1 else self.with_set
                made.append((name, _bound(change, name)))
        first: list[Trait] = []
        for trait in self.traits:
            if len(first) < COMBINED and all(self._go_together(trait, other) for other in first):
                first.append(trait)
        for count in range(2, len(first) + 1):
            for chosen in combinations(first, count):
                made.append((" + ".join(trait.name for trait in chosen), self._all_of(chosen)))
        return made[:most]

    def _go_together(self, one: Trait, other: Trait) -> bool:
        pairs = [(self.place(a), self.place(b)) for a in one.attributes for b in other.attributes]
        return not all(bool(self.apart[pair]) for pair in pairs)

    def _all_of(self, traits: Sequence[Trait]) -> Callable[[Tensor], Tensor]:
        def change(labels: Tensor) -> Tensor:
            for trait in traits:
                labels = self.changed(labels, trait)
            return labels

        return change


def _bound(change: Callable[[Tensor, str], Tensor], name: str) -> Callable[[Tensor], Tensor]:
    return lambda labels: change(labels, name)


def _traits(names: Sequence[str]) -> Iterator[Trait]:
    """Known traits of several attributes, as far as they are there, in the order of `names`; all else alone."""
    done: set[str] = set()
    for name in names:
        if name in done:
            continue
        several = next((trait for trait in TRAITS if len(trait.attributes) > 1 and name in trait.attributes), None)
        own = tuple(other for other in names if several is not None and other in several.attributes)
        done |= set(own)
        yield Trait(several.name, own) if several is not None and len(own) > 1 else Trait(name, (name,))


def _never_together(names: Sequence[str], split: Split) -> Tensor:
    """(A, A): whether two attributes never hold together in a split, although chance would have had them do so."""
    places = {name: place for place, name in enumerate(names)}
    has = torch.zeros(len(split), len(names))
    for index in range(len(split)):
        has[index, [places[name] for name in split.attributes(index) if name in places]] = 1
    counts = has.sum(0)
    expected = counts[:, None] * counts / len(split)  # by chance alone: where it is low, none tells nothing
    return ((has.T @ has) == 0) & (expected >= EXPECTED)
