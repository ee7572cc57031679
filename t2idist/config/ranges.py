"""The ranges of a config's numbers, declared next to its fields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any


class RangeError(ValueError):
    """A value is out of its range; the sentence begins with the name of the field."""


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "above_0": (lambda value: value > 0, "above 0"),
    "at_least_0": (lambda value: value >= 0, "at least 0"),
    "at_least_1": (lambda value: value >= 1, "at least 1"),
    "share": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "below_1": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
}


def check_ranges(config: Any, **fields: str) -> None:
    """Check the numbers of a dataclass, for its `__post_init__`; each element of a tuple, and nothing for None.

    Args:
        fields: by range, the names of its fields, separated by blanks: ``check_ranges(self, above_0="lr width")``.
            The ranges are above_0, at_least_0, at_least_1, share (0 to 1) and below_1 (0 to 1 without 1).

    Raises:
        RangeError: A number is out of its range, or (in any field) not finite.
    """
    for field in dataclasses.fields(config):
        for value in _numbers(getattr(config, field.name)):
            if not math.isfinite(value):
                raise RangeError(f"{field.name}: {value}; it must be a finite number")
    for kind, names in fields.items():
        holds, text = _RANGES[kind]
        for name in names.split():
            for value in _numbers(getattr(config, name)):
                if not holds(value):
                    raise RangeError(f"{name}: {value}; it must be {text}")


def _numbers(value: Any) -> list[int | float]:
    if isinstance(value, tuple):
        return [number for element in value for number in _numbers(element)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []
