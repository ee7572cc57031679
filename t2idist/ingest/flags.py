"""Values that say whether an attribute is present: 1, 0, -1, true, false, yes, no."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_SEPARATORS = re.compile(r"[,;|]")
_PRESENT = frozenset({"1", "1.0", "true", "yes"})
_ABSENT = frozenset({"0", "0.0", "-1", "-1.0", "false", "no"})


def is_flag(value: Any) -> bool:
    """Check whether `is_present` accepts the value."""
    return str(value).strip().lower() in _PRESENT | _ABSENT


def is_present(attribute: str, value: Any) -> bool:
    """Return whether the value says that an attribute is present. Raises ValueError for any other value."""
    text = str(value).strip().lower()
    if text in _PRESENT:
        return True
    if text in _ABSENT:
        return False
    raise ValueError(f"attribute {attribute[:100]!r} is {value!r:.60}; allowed are 1, 0, -1, true, false, yes and no")


def attributes_present(flags: Iterable[tuple[str, Any]], seen: dict[str, bool]) -> list[str]:
    """Return the names whose flag says that the attribute is present. Raises ValueError as `is_present` does.

    Args:
        flags: names and values of one image.
        seen: gets the names, and whether any image so far has them (`Listing.attributes`).
    """
    pairs = [(name, is_present(name, value)) for name, value in flags]
    for name, present in pairs:
        seen[name] = present or seen.get(name, False)
    return [name for name, present in pairs if present]


def parse_attributes(value: Any, key: str, seen: dict[str, bool]) -> list[str]:
    """Return the attributes of one image from names, or from a mapping of names to flags.

    Args:
        value: a list of names, a string of names separated by , ; or |, a mapping, or None for no attributes.
        key: of the value, for messages.
        seen: as for `attributes_present`.

    Raises:
        ValueError: The value is something else, or a flag is none of those that are allowed.
    """
    if isinstance(value, Mapping):
        return attributes_present(value.items(), seen)
    names = (
        [name.strip() for name in _SEPARATORS.split(value)]
        if isinstance(value, str)
        else []
        if value is None
        else value
    )
    if not isinstance(names, list) or not all(isinstance(name, str | None) for name in names):
        raise ValueError(f"'{key}' must be a list of names, or an object {{name: true or false}}")
    return [name for name in names if name]
