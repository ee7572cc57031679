"""Values that say whether an attribute is present: 1, 0, -1, true, false, yes, no."""

from __future__ import annotations

from typing import Any

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
