"""The published systems, one file each: ``system: attngan`` is ``t2idist/systems/attngan.py``.

A system of one's own needs no edit here: ``system: my_package.my_gan``, a name with a dot, is a module that Python
finds on every machine of the run (installed there, or in the job's working directory), with ``Config`` and ``build`` as
`contract.System` says. Its code runs when it is imported, so an export that names one is only loaded for somebody who
names it too.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from t2idist.contract import BuildInfo, System


class SystemModule(Protocol):
    Config: type[Any]
    build: Callable[[Any, BuildInfo], System]


def names() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))


def load(name: str) -> SystemModule:
    """The module of a published system, or of a user's own by its dotted path.

    Raises ValueError where there is none, or where it lacks ``Config`` (a dataclass) or ``build``.
    """
    if "." in name:
        return _load_user_module(name)
    if name not in names():
        raise ValueError(
            f"system: {name!r}: no such system; there are {', '.join(names())}, "
            "and modules of your own by their dotted path (my_package.my_gan)"
        )
    module: SystemModule = importlib.import_module(f"t2idist.systems.{name}")  # type: ignore[assignment]
    return module


def _load_user_module(path: str) -> SystemModule:
    if not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"system: {path!r}: not a module's dotted path, such as my_package.my_gan")
    try:
        module: Any = importlib.import_module(path)
    except ImportError as error:
        raise ValueError(f"system: {path!r}: cannot be imported ({error})") from None
    held = vars(module)
    config = held.get("Config")
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        raise ValueError(f"system: {path!r}: the module has no Config, a dataclass of its settings")
    if not callable(held.get("build")):
        raise ValueError(f"system: {path!r}: the module has no function build(config, plan)")
    made: SystemModule = module
    return made
