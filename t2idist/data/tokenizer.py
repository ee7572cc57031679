"""Captions as word numbers, as AttnGAN and its descendants read them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

END = "<end>"
"""Word 0: padding, and the end of a caption."""

_WORD = re.compile(r"\w+")


def tokenise(caption: str) -> list[str]:
    """The caption's words: lower case, runs of letters, digits and underscores, characters outside ASCII dropped."""
    spaced = caption.replace("\ufffd\ufffd", " ").lower()
    stripped = (word.encode("ascii", "ignore").decode() for word in _WORD.findall(spaced))
    return [word for word in stripped if word]


def count_words(captions: Iterable[str]) -> Counter[str]:
    """How often each word occurs."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(tokenise(caption))
    return counts


class Vocabulary:
    """The words that a run knows; a word's number is its place.

    words: all of them, the first is "<end>". Raises ValueError for another first word and for doubled words.
    """

    def __init__(self, words: Sequence[str]) -> None:
        if not words or words[0] != END:
            raise ValueError(f"the vocabulary's first word is {words[0] if words else 'missing'}; it must be {END}")
        self.words = tuple(words)
        self.numbers = {word: number for number, word in enumerate(self.words)}
        if len(self.numbers) != len(self.words):
            twice = next(word for word, times in Counter(self.words).items() if times > 1)
            raise ValueError(f"the vocabulary has the word '{twice}' more than once")

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], min_count: int = 1) -> Vocabulary:
        """Words that occur at least `min_count` times, the most frequent first, equal counts by alphabet."""
        kept = [word for word, count in counts.items() if count >= min_count]
        return cls([END, *sorted(kept, key=lambda word: (-counts[word], word))])

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and other.words == self.words

    def __hash__(self) -> int:
        return hash(self.words)

    def unknown(self, caption: str) -> list[str]:
        """The caption's words that are not in the vocabulary, each once, in order."""
        return list(dict.fromkeys(word for word in tokenise(caption) if word not in self.numbers))

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Words of numbers, padding left out."""
        return [self.words[number] for number in ids if number]

    def encode(self, caption: str, max_words: int, seed: int | None = None) -> tuple[NDArray[np.int64], int]:
        """Word numbers (max_words,), padded with 0, and how many there are; unknown words are dropped.

        A longer caption keeps a random subset of its words in their order (`seed` given: training) or its first words
        (None: evaluation). Raises ValueError for a caption with no known word.
        """
        known = [self.numbers[word] for word in tokenise(caption) if word in self.numbers]
        if not known:
            raise ValueError(f"no word of the caption {caption[:80]!r} is in the vocabulary of {len(self)} words")
        if len(known) > max_words:
            if seed is not None:
                rng = np.random.Generator(np.random.Philox(key=seed))
                kept = np.sort(np.argsort(rng.random(len(known)), kind="stable")[:max_words])
                known = [known[place] for place in kept]
            known = known[:max_words]
        ids = np.zeros(max_words, dtype=np.int64)
        ids[: len(known)] = known
        return ids, len(known)
