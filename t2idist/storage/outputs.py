"""Names of files that a command writes, so that it overwrites none of its inputs and none of its other outputs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence

from t2idist.storage.objects import absolute, local_path, redact


def is_same_file(one: str, other: str) -> bool:
    """Check whether two URLs are one file, also by another path or link."""
    if absolute(one) == absolute(other):
        return True
    first, second = local_path(one), local_path(other)
    if first is None or second is None:
        return False
    try:
        return os.path.samefile(first, second)
    except OSError:  # one of them does not exist
        return False


def check_not_input(url: str, inputs: Iterable[str], option: str) -> None:
    """Raise ValueError if writing to `url` would overwrite an input. Case is ignored, as some file systems do.

    Args:
        inputs: URLs that the command reads.
        option: option of the command that the name of the output comes from.
    """
    for given in inputs:
        if is_same_file(url, given) or absolute(url).casefold() == absolute(given).casefold():
            raise ValueError(
                f"{redact(url)}: is an input of this command, which it would overwrite; give another {option}"
            )


def unique_names(stems: Sequence[str], extension: str, reserved: Iterable[str] = ()) -> list[str]:
    """Return a file name for each stem; one that is taken, in any case, gets "-2", "-3", ...

    Args:
        stems: Names without extension.
        extension: With its dot.
        reserved: Names that are taken.
    """
    taken, names = {name.casefold() for name in reserved}, []
    for stem in stems:
        numbered = (f"{stem}-{number}{extension}" for number in itertools.count(2))
        name = next(each for each in itertools.chain([f"{stem}{extension}"], numbered) if each.casefold() not in taken)
        taken.add(name.casefold())
        names.append(name)
    return names
