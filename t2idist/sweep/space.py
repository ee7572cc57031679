"""The search space of a sweep: parsed from ``key=[a,b]`` and ``key=uniform(a,b)``, and drawn from."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from t2idist.config.strict import parse_yaml

_Kind = Literal["uniform", "loguniform", "randint"]
_RANGE = re.compile(r"(uniform|loguniform|randint)\((.*)\)", re.DOTALL)
_CALL = re.compile(r"[A-Za-z_]\w*\(.*\)", re.DOTALL)
_PLAIN_TEXT = re.compile(r"[A-Za-z_./][\w./:-]*")
_DIGITS = 6
"""Significant digits of a drawn number."""


@dataclass(frozen=True)
class Choice:
    """A key that takes each of some values."""

    values: tuple[str, ...]
    """As they are written after ``key=``."""

    def draw(self, generator: random.Random) -> str:
        return generator.choice(self.values)


@dataclass(frozen=True)
class Range:
    """A key that takes numbers from `low` to `high`."""

    kind: _Kind
    low: float
    high: float

    def draw(self, generator: random.Random) -> str:
        if self.kind == "randint":
            return str(generator.randint(int(self.low), int(self.high)))
        if self.kind == "uniform":
            value = generator.uniform(self.low, self.high)
        else:
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        return f"{min(max(float(f'{value:.{_DIGITS}g}'), self.low), self.high)!r}"


Space = dict[str, Choice | Range]


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], Space]:
    """Split ``key=value`` arguments into those that all trials share and the search space.

    Raises:
        ValueError: a list is empty or a range is invalid, in one sentence.
    """
    fixed: list[str] = []
    space: Space = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r}: expected key.path=value")
        found = _parse(text.strip(), override)
        if found is None:
            fixed.append(override)
        elif key in space:
            raise ValueError(f"{override}: {key} is swept twice; give one list or range")
        else:
            space[key] = found
    if twice := sorted(space.keys() & {text.partition("=")[0] for text in fixed}):
        raise ValueError(f"{twice[0]}: swept and also given one value; remove one of the two")
    return fixed, space


def _parse(text: str, source: str) -> Choice | Range | None:
    """Parse what follows ``key=``; None if it is one value."""
    if match := _RANGE.fullmatch(text):
        return _parse_range(match[1], match[2], source)
    if text.startswith("["):
        values = parse_yaml(text, source)
        if not values:
            raise ValueError(f"{source}: an empty list; give the values to try, such as [1,2]")
        written = tuple(dict.fromkeys(format_value(value) for value in values))
        return Choice(written)
    if _CALL.fullmatch(text):
        raise ValueError(f"{source}: no such range; there are uniform(a,b), loguniform(a,b), randint(a,b) and [a,b,c]")
    return None


def _parse_range(kind: str, text: str, source: str) -> Range:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{source}: expected {kind}(low,high) with two numbers") from None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{source}: expected {kind}(low,high) with two finite numbers")
    if low >= high:
        raise ValueError(f"{source}: the first number must be below the second; give {kind}(low,high)")
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"{source}: loguniform needs numbers above 0; use uniform")
    if kind == "randint":
        if low % 1 or high % 1:
            raise ValueError(f"{source}: randint needs whole numbers; use uniform")
        return Range("randint", low, high)
    return Range("uniform" if kind == "uniform" else "loguniform", low, high)


def format_value(value: Any) -> str:
    """Write a YAML value as it stands after ``key=``."""
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value) and parse_yaml(value, value) == value:
        return value
    if isinstance(value, list):
        return f"[{','.join(format_value(v) for v in value)}]"
    return json.dumps(value, ensure_ascii=False, default=str)


def combinations(space: Space) -> int | None:
    """Return the number of different trials; None if a key has a range."""
    sizes = [len(domain.values) for domain in space.values() if isinstance(domain, Choice)]
    return math.prod(sizes) if len(sizes) == len(space) else None


def draw(space: Space, seed: int, count: int) -> list[dict[str, str]]:
    """Draw the values of the first `count` trials: trial n's depend on the seed and n only.

    If every key has a list, no combination comes twice, and there are at most as many trials as combinations.
    """
    return list(itertools.islice(_draws(space, seed), count))


def _draws(space: Space, seed: int) -> Iterator[dict[str, str]]:
    total, seen = combinations(space), set()
    for number in itertools.count(1):
        values = {key: domain.draw(random.Random(f"{seed} {number} {key}")) for key, domain in space.items()}
        if total is not None:
            if tuple(values.values()) in seen:
                continue
            seen.add(tuple(values.values()))
        yield values
        if len(seen) == total:
            return


def describe(space: Space) -> dict[str, str]:
    """Write each key's domain as on the command line."""
    return {key: _describe(domain) for key, domain in space.items()}


def _describe(domain: Choice | Range) -> str:
    if isinstance(domain, Choice):
        return f"[{','.join(domain.values)}]"
    number = "{:.0f}".format if domain.kind == "randint" else "{:g}".format
    return f"{domain.kind}({number(domain.low)},{number(domain.high)})"


def check(fixed: Sequence[str], space: Space) -> None:
    """Raise ValueError if nothing is swept."""
    if all(isinstance(domain, Choice) and len(domain.values) == 1 for domain in space.values()):
        keys = [*describe(space).items(), *(text.split("=", 1) for text in fixed)]
        single = [f"{key}={text}" for key, text in keys if key not in ("name", "storage", "preset")]
        given = f"; {single[0]} is one value" if single else ""
        raise ValueError(
            f"no key to sweep{given}: give one or more of key=[a,b,c], key=uniform(a,b), key=loguniform(a,b)"
        )
