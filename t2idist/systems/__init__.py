"""The published systems, one file each: ``system: attngan`` is ``t2idist/systems/attngan.py``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from t2idist.contract import Plan, System


class SystemModule(Protocol):
    Config: type[Any]
    build: Callable[[Any, Plan], System]


def names() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))


def load(name: str) -> SystemModule:
    """The module of a system. Raises ValueError that says which there are."""
    if name not in names():
        raise ValueError(f"system: {name!r}: no such system; there are {', '.join(names())}")
    module: SystemModule = importlib.import_module(f"t2idist.systems.{name}")  # type: ignore[assignment]
    return module
