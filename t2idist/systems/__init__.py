"""The published systems, one file each: ``system: attngan`` is ``t2idist/systems/attngan.py``.

A custom system needs no edit here: ``system: my_gan`` or ``system: my_package.my_gan`` is a module that Python finds on
every machine of the run (installed there, or in the job's working directory), with ``Config`` and ``build`` as
`contract.System` describes. A published name takes precedence. Importing a module runs its code, so an export that
names a custom system is loaded only if the user names that system too.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from t2idist.contract import BuildInfo, System


class SystemModule(Protocol):
    """What every file in this folder defines."""

    Config: type[Any]
    build: Callable[[Any, BuildInfo], System]


def names() -> list[str]:
    """Return the names of the published systems."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))


def is_custom(name: str) -> bool:
    """Return whether `load` would import `name` as a custom system. Imports nothing."""
    if "." in name:
        return True
    if name in names() or not name.isidentifier():
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module without a spec, such as __main__
        return False


def load(name: str) -> SystemModule:
    """Import the module of a published system, or of a custom one by its module path.

    Raises ValueError if there is none, or if it has no ``Config`` (a dataclass) or ``build``.
    """
    if is_custom(name):
        return _load_custom(name)
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? There" if near else "there"
        raise ValueError(
            f"system: {name!r}: no such system; {hint} are {', '.join(known)}, and custom modules that Python finds "
            "(my_gan, my_package.my_gan)"
        )
    module: SystemModule = importlib.import_module(f"t2idist.systems.{name}")  # type: ignore[assignment]
    return module


def _load_custom(path: str) -> SystemModule:
    if not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"system: {path!r}: not a module path, such as my_package.my_gan")
    try:
        module: Any = importlib.import_module(path)
    except ImportError as error:
        raise ValueError(f"system: {path!r}: cannot be imported ({error})") from None
    contents = vars(module)
    config = contents.get("Config")
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        raise ValueError(f"system: {path!r}: the module has no dataclass Config")
    if not callable(contents.get("build")):
        raise ValueError(f"system: {path!r}: the module has no function build(config, info)")
    system: SystemModule = module
    return system
