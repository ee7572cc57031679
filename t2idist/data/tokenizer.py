"""Captions as token ids, with the tokenization of AttnGAN and its descendants."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

END_TOKEN = "<end>"
"""Token 0: padding, and the end of a caption."""

_WORD = re.compile(r"\w+")


def tokenize(caption: str) -> list[str]:
    """Split a caption into lower-case words: runs of letters, digits and underscores, without non-ASCII characters."""
    spaced = caption.replace("\ufffd\ufffd", " ").lower()
    stripped = (word.encode("ascii", "ignore").decode() for word in _WORD.findall(spaced))
    return [word for word in stripped if word]


def count_words(captions: Iterable[str]) -> Counter[str]:
    """Count how often each word occurs in the captions."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(tokenize(caption))
    return counts


class Vocabulary:
    """The words that a run knows; the token id of a word is its index.

    Args:
        words: All words; the first is "<end>".

    Raises:
        ValueError: If the first word is another one, or a word occurs twice.
    """

    def __init__(self, words: Sequence[str]) -> None:
        if not words or words[0] != END_TOKEN:
            first = words[0] if words else "missing"
            raise ValueError(f"the vocabulary's first word is {first}; it must be {END_TOKEN}")
        self.words = tuple(words)
        self.ids = {word: token for token, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            duplicate = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"the vocabulary has the word '{duplicate}' more than once")

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], min_count: int = 1) -> Vocabulary:
        """Build the vocabulary of the words that occur at least `min_count` times, ordered by (-count, word)."""
        kept = [word for word, count in counts.items() if count >= min_count]
        return cls([END_TOKEN, *sorted(kept, key=lambda word: (-counts[word], word))])

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and other.words == self.words

    def __hash__(self) -> int:
        return hash(self.words)

    def unknown_words(self, caption: str) -> list[str]:
        """Return the caption's words that are not in the vocabulary, each once, in order."""
        return list(dict.fromkeys(word for word in tokenize(caption) if word not in self.ids))

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the words of token ids, without padding."""
        return [self.words[token] for token in ids if token]

    def encode(self, caption: str, max_words: int, seed: int | None = None) -> tuple[NDArray[np.int64], int]:
        """Encode a caption; unknown words are dropped.

        Args:
            caption: The text.
            max_words: Length of the result. A caption with more known words is shortened.
            seed: If given (training), a shortened caption keeps a random subset of its words in their order; if None
                (evaluation), it keeps its first words.

        Returns:
            Token ids (max_words,), padded with 0, and the number of tokens before the padding.

        Raises:
            ValueError: If the caption has no known word.
        """
        known = [self.ids[word] for word in tokenize(caption) if word in self.ids]
        if not known:
            raise ValueError(f"no word of the caption {caption[:80]!r} is in the vocabulary of {len(self)} words")
        if len(known) > max_words:
            if seed is not None:
                rng = np.random.Generator(np.random.Philox(key=seed))
                kept = np.sort(np.argsort(rng.random(len(known)), kind="stable")[:max_words])
                known = [known[i] for i in kept]
            known = known[:max_words]
        ids = np.zeros(max_words, dtype=np.int64)
        ids[: len(known)] = known
        return ids, len(known)


def known_words(vocabulary: Vocabulary, caption: str) -> list[str]:
    """Return the caption's words that are in the vocabulary, in order."""
    return [word for word in tokenize(caption) if word in vocabulary.ids]
