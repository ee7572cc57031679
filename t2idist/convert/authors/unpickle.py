"""A separate program: reads a captions.pickle from standard input and writes its words to standard output, as JSON.

`captions` starts it without the package and with limits, because a pickle is a program. Lists, dicts, strings and
integers are allowed; a pickle that needs anything else is refused.
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
ALLOWED_TYPES = (list, dict, str, int)


class RestrictedUnpickler(pickle.Unpickler):
    """Builds only lists, dicts, strings and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it needs {module}.{name}; only lists, dicts, strings and integers are allowed")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an external object")


def check_types(content: Any) -> None:
    """Raise ValueError unless the content has only lists, dicts, strings and integers."""
    pending, seen = [content], set()
    while pending:
        value = pending.pop()
        if type(value) not in ALLOWED_TYPES:
            raise ValueError(
                f"it contains a {type(value).__name__}; only lists, dicts, strings and integers are allowed"
            )
        if isinstance(value, (list, dict)) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(value)
            if isinstance(value, dict):
                pending.extend(value.values())


def words_by_id(content: Any) -> list[str]:
    """Return the words in id order. `content`: [train captions, test captions, words by id, ids by word]."""
    if not isinstance(content, list) or len(content) != 4 or not all(isinstance(part, dict) for part in content[2:]):
        raise ValueError("it is not [train captions, test captions, words by id, ids by word]")
    by_id, ids = content[2:]
    words = [by_id.get(word_id) for word_id in range(len(by_id))]
    for word_id, word in enumerate(words):
        if not isinstance(word, str):
            raise ValueError(f"it has {len(words)} words, but none with id {word_id}")
        if ids.get(word) != word_id:
            raise ValueError(f"word {word_id} is {word!r}, which has id {ids.get(word)} in the other table")
    if len(ids) != len(words):
        raise ValueError(f"it has {len(words)} words by id and {len(ids)} ids by word")
    return [str(word) for word in words]


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        content = RestrictedUnpickler(io.BytesIO(sys.stdin.buffer.read()), encoding="latin1").load()
        check_types(content)
        answer: dict[str, Any] = {"words": words_by_id(content)}
    except MemoryError:
        answer = {"error": f"it needs more than {MEMORY_BYTES >> 30} GB of memory"}
    except Exception as error:  # a pickle can raise any exception
        answer = {"error": str(error) or type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
