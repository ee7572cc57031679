"""The sentences that a command draws: where each was given, and which of its words an export reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from t2idist import storage
from t2idist.data.text_files import decode_text, is_utf8
from t2idist.data.tokenizer import Vocabulary, known_words
from t2idist.observability.command import describe_error

_MAX_NAMED = 5
_MAX_WORDS_NAMED = 20
_MAX_QUOTED = 200
MAX_CHARACTERS = 10_000
"""Longest sentence that is read, a hundred times a long caption; a longer one is a file given by mistake."""


@dataclass(frozen=True)
class Sentence:
    """A sentence of the command line or of a file."""

    text: str
    origin: str = ""
    """File and line; "" for one of the command line."""

    def __str__(self) -> str:
        text = self.text if len(self.text) <= _MAX_QUOTED else f"{self.text[:_MAX_QUOTED]}..."
        text = text.encode(errors="backslashreplace").decode()  # a message can be written everywhere
        return f'{self.origin}: "{text}"' if self.origin else f'"{text}"'


def read_captions(url: str, encoding: str | None) -> list[Sentence]:
    """Read a text file with one sentence per line; empty lines are skipped. Raises ValueError that names the file."""
    where = storage.redact(url)
    try:
        text = decode_text(storage.read_bytes(url), f"--captions {where}", encoding)
    except OSError as error:
        raise ValueError(f"--captions {describe_error(error)}") from None
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    return [Sentence(line, f"{where}, line {number}") for number, line in lines if line]


def unreadable_sentence(sentence: Sentence, vocabulary: Vocabulary | None) -> str | None:
    """Say why a sentence cannot be drawn; None if it can.

    Args:
        sentence: the sentence.
        vocabulary: the words that the reader knows; None: it reads any word.
    """
    if len(sentence.text) > MAX_CHARACTERS:
        return f"{sentence}: this sentence has {len(sentence.text):,} characters; at most {MAX_CHARACTERS:,} are read"
    if not is_utf8(sentence.text):
        return f"{sentence}: this sentence has characters that are not valid Unicode; give it as UTF-8"
    if vocabulary is None or known_words(vocabulary, sentence.text):
        return None
    words = _quote(vocabulary.unknown_words(sentence.text))
    return f"{sentence}: no word of this sentence is in the vocabulary of the export{': ' if words else ''}{words}"


def warnings_about(
    vocabulary: Vocabulary, sentence: Sentence, max_words: int, characters: int | None = None, reader: str = "export"
) -> list[str]:
    """Name what is left out of a sentence: unknown words, words above `max_words`, and characters above the limit.

    Args:
        characters: that the text encoder reads (None: words as a whole).
        reader: what reads the sentence, for the warnings.
    """
    warnings = []
    if unknown := vocabulary.unknown_words(sentence.text):
        plural = "words are" if len(unknown) > 1 else "word is"
        of_reader = "" if reader == "export" else f" of the {reader}"
        warnings.append(f"{sentence}: {plural} not in the vocabulary{of_reader} and left out: {_quote(unknown)}")
    known = known_words(vocabulary, sentence.text)
    if cut := known[max_words:]:
        warnings.append(
            f"{sentence}: is cut, because the {reader} reads {max_words} words and it has {len(known)}; left out: "
            f"{_quote(cut)}"
        )
    spelled = " ".join(known[:max_words])
    if characters is not None and (end := spelled[characters:]):
        warnings.append(
            f"{sentence}: is cut, because the {reader} reads {characters} characters and its words have "
            f"{len(spelled)}; left out: '{end}'"
        )
    return warnings


def join_problems(problems: Sequence[str]) -> str:
    """Join sentences about problems to one; many are counted."""
    more = len(problems) - _MAX_NAMED
    return "; ".join([*problems[:_MAX_NAMED], *([f"and {more} more"] if more > 0 else [])])


def _quote(words: Sequence[str]) -> str:
    more = len(words) - _MAX_WORDS_NAMED
    quoted = [f"'{word}'" for word in words[:_MAX_WORDS_NAMED]]
    return ", ".join([*quoted, *([f"and {more:,} more"] if more > 0 else [])])
