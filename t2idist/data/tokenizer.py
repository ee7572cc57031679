"""Captions as token ids. A set of captions and what was trained on it share one tokenizer, which both record.

Two tokenizers exist. `unicode` is that of new shard sets. `ascii` is that of AttnGAN and its descendants, of the
authors' weights, and of shard sets and exports that name none. Captions of ASCII characters have the same words in
both.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

END_TOKEN = "<end>"
"""Token 0: padding, and the end of a caption."""

ASCII = "ascii"
"""Runs of letters, digits and underscores, without the characters that are not ASCII."""

UNICODE = "unicode"
"""Words in any script, in NFKC; in scripts that put no blanks between words, each character is one."""

TOKENIZER_KEY = "tokenizer"
"""Key of dataset.json and export.json; a file without it was written with `ASCII`."""

_WORD = re.compile(r"\w+")
_WITHOUT_BLANKS = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf"  # Tai Le, New Tai Lue, Tai Tham
    "\u3005-\u3007\u3031-\u3035\u303b\u3041-\u30ff\u31f0-\u31ff"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
_INVISIBLE = re.compile(
    "[\u00ad\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
)
"""Soft hyphens, marks of direction and variants of glyphs: no part of the spelling."""
_JOINERS = "\u200c\u200d"
_STACKING = "\u1039\u17d2"
"""Signs of Burmese and Khmer that join the next letter to the one before."""


@functools.cache
def _unicode_words() -> re.Pattern[str]:
    """Return the pattern of a word of `UNICODE`: a letter, digit or underscore, with the marks that combine with it.

    `\\w` has no marks, without which words of many scripts would fall apart.
    """
    points = [*range(0x300, 0x20000), *range(0xE0100, 0xE01F0)]
    marks = "".join(re.escape(c) for c in map(chr, points) if unicodedata.category(c).startswith("M"))
    single = f"(?=\\w)[{_WITHOUT_BLANKS}]"
    other = f"(?![{_WITHOUT_BLANKS}])\\w"
    return re.compile(
        f"{single}(?:[{marks}]|(?<=[{_STACKING}]){single})*|{other}(?:[{marks}]|[{_JOINERS}]+(?={other})|{other})*"
    )


def normalize(caption: str) -> str:
    """Return the text in which `UNICODE` finds words: NFKC, without invisible characters. ASCII text is unchanged."""
    return caption if caption.isascii() else unicodedata.normalize("NFKC", _INVISIBLE.sub("", caption))


def _tokenize_unicode(caption: str) -> list[str]:
    if caption.isascii():
        return _WORD.findall(caption.lower())
    return [normalize(word.lower()) for word in _unicode_words().findall(normalize(caption))]


def _tokenize_ascii(caption: str) -> list[str]:
    spaced = caption.replace("\ufffd\ufffd", " ").lower()
    stripped = (word.encode("ascii", "ignore").decode() for word in _WORD.findall(spaced))
    return [word for word in stripped if word]


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {UNICODE: _tokenize_unicode, ASCII: _tokenize_ascii}
"""By name. What a name means never changes, because vocabularies were built with it."""


def tokenize(caption: str, tokenizer: str = ASCII) -> list[str]:
    """Split a caption into lower-case words.

    Raises ValueError if there is no tokenizer of that name.
    """
    return _tokenizer(tokenizer)(caption)


def _tokenizer(name: str) -> Callable[[str], list[str]]:
    if not isinstance(name, str) or name not in TOKENIZERS:
        raise ValueError(f"{TOKENIZER_KEY} is {name!r}; this program has {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]


def word_ends(caption: str, tokenizer: str) -> Iterator[tuple[int, int]]:
    """Yield the position after each word-like run of a caption, and the number of words in the run.

    With `UNICODE`, `caption` must be the result of `normalize`.
    """
    split, pattern = _tokenizer(tokenizer), _WORD if tokenizer == ASCII else _unicode_words()
    for match in pattern.finditer(caption):
        yield match.end(), len(split(match.group()))


def lost_letters(caption: str, tokenizer: str) -> str:
    """Return the letters of a caption that are in none of its words."""
    if tokenizer != ASCII:
        return ""
    return "".join(character for character in caption if character.isalpha() and not character.isascii())


_PLAIN_WORDS = "lower case, NFKC"
WORDS = f"{_PLAIN_WORDS}; each character is a word in Chinese, Japanese, Thai, Lao, Burmese and Khmer (no segmenter)"
"""The words of `UNICODE`."""


def words_of(words: Iterable[str]) -> str:
    """Return what dataset.json says about the words of `UNICODE`; of characters only if some of these words are."""
    blankless = re.compile(f"[{_WITHOUT_BLANKS}]")
    return WORDS if any(blankless.match(word) for word in words) else _PLAIN_WORDS


def recorded(tokenizer: str) -> dict[str, str]:
    """Return the entry of dataset.json or export.json that names the tokenizer; none for `ASCII`."""
    return {} if tokenizer == ASCII else {TOKENIZER_KEY: tokenizer}


def count_words(captions: Iterable[str], tokenizer: str = ASCII) -> Counter[str]:
    """Count how often each word occurs in the captions."""
    counts: Counter[str] = Counter()
    split = _tokenizer(tokenizer)
    for caption in captions:
        counts.update(split(caption))
    return counts


class Vocabulary:
    """The words that a run knows; the token id of a word is its index.

    Args:
        words: All words; the first is "<end>".
        tokenizer: Name of the tokenizer that splits captions into these words.

    Raises:
        ValueError: If the first word is another one, a word occurs twice, or there is no such tokenizer.
    """

    def __init__(self, words: Sequence[str], tokenizer: str = ASCII) -> None:
        self._split = _tokenizer(tokenizer)
        self.tokenizer = tokenizer
        if not words or words[0] != END_TOKEN:
            first = words[0] if words else "missing"
            raise ValueError(f"the vocabulary's first word is {first}; it must be {END_TOKEN}")
        self.words = tuple(words)
        self.ids = {word: token for token, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            duplicate = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"the vocabulary has the word '{duplicate}' more than once")

    @classmethod
    def from_index(cls, index: Mapping[str, Any]) -> Vocabulary:
        """Return the vocabulary of an export, from its index. Raises ValueError as the constructor does."""
        return cls(index["vocabulary"], index.get(TOKENIZER_KEY, ASCII))

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], min_count: int = 1, tokenizer: str = ASCII) -> Vocabulary:
        """Build the vocabulary of the words that occur at least `min_count` times, ordered by (-count, word)."""
        kept = [word for word, count in counts.items() if count >= min_count]
        return cls([END_TOKEN, *sorted(kept, key=lambda word: (-counts[word], word))], tokenizer)

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (other.words, other.tokenizer) == (self.words, self.tokenizer)

    def __hash__(self) -> int:
        return hash(self.words)

    def tokenize(self, caption: str) -> list[str]:
        """Split a caption into words as it was done for this vocabulary."""
        return self._split(caption)

    def words_read_by(self, tokenizer: str) -> list[str]:
        """Return the words as another tokenizer reads them, for example without the characters that are not ASCII."""
        if tokenizer == self.tokenizer:
            return list(self.words)
        read = (part for word in self.words[1:] for part in tokenize(word, tokenizer))
        return list(dict.fromkeys([END_TOKEN, *read]))

    def unknown_words(self, caption: str) -> list[str]:
        """Return the caption's words that are not in the vocabulary, each once, in order.

        With `ASCII`, a word that loses characters is named as it was written.
        """
        if self.tokenizer == ASCII and not caption.isascii():
            written = _WORD.findall(caption.replace("\ufffd\ufffd", " ").lower())
            return list(dict.fromkeys(word for word in written if "".join(self._split(word)) not in self.ids))
        return list(dict.fromkeys(word for word in self._split(caption) if word not in self.ids))

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
        known = [self.ids[word] for word in self._split(caption) if word in self.ids]
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
    return [word for word in vocabulary.tokenize(caption) if word in vocabulary.ids]
