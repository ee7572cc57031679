"""Run as a program of its own: the words of a captions.pickle on standard input, as JSON on standard output.

`captions` starts it, without the package and with limits, because a pickle is a program. It may build lists, dicts,
texts and whole numbers; where it asks for anything else, nothing is taken from it.
"""

from __future__ import annotations

import io
import json
import pickle
import resource
import sys
from typing import Any

MEMORY_BYTES = 4 << 30
CPU_SECONDS = 120
PLAIN = (list, dict, str, int)


class Unpickler(pickle.Unpickler):
    """Builds nothing but Python's own containers, texts and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; lists, dicts, texts and whole numbers are allowed")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for an object from elsewhere")


def check(found: Any) -> None:
    """Raises ValueError for anything but lists, dicts, texts and whole numbers."""
    waiting, seen = [found], set()
    while waiting:
        value = waiting.pop()
        if type(value) not in PLAIN:
            raise ValueError(f"it holds a {type(value).__name__}; lists, dicts, texts and whole numbers are allowed")
        if isinstance(value, (list, dict)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value)
            if isinstance(value, dict):
                waiting.extend(value.values())


def words_of(found: Any) -> list[str]:
    """The words by number of [train captions, test captions, words by number, numbers by word]."""
    if not isinstance(found, list) or len(found) != 4 or not all(isinstance(part, dict) for part in found[2:]):
        raise ValueError("it is not [train captions, test captions, words by number, numbers by word]")
    by_number, by_word = found[2:]
    words = [by_number.get(number) for number in range(len(by_number))]
    for number, word in enumerate(words):
        if not isinstance(word, str):
            raise ValueError(f"it has {len(words)} words and none with number {number}")
        if by_word.get(word) != number:
            raise ValueError(f"word {number} is {word!r}, which has number {by_word.get(word)} in the other table")
    if len(by_word) != len(words):
        raise ValueError(f"it has {len(words)} words by number and {len(by_word)} numbers by word")
    return [str(word) for word in words]


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        found = Unpickler(io.BytesIO(sys.stdin.buffer.read()), encoding="latin1").load()
        check(found)
        answer: dict[str, Any] = {"words": words_of(found)}
    except MemoryError:
        answer = {"error": f"it needs more than {MEMORY_BYTES >> 30} GB of memory"}
    except Exception as error:  # a pickle can make Python raise anything
        answer = {"error": str(error) or type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
