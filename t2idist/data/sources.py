"""Which data a configuration means."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib.resources import files

from t2idist.config import DataConfig
from t2idist.data.shards import Dataset


def _emoji(config: DataConfig) -> str:
    return str(files("t2idist.data.embedded").joinpath("emoji"))


def _avatars(config: DataConfig) -> str:
    from t2idist.data.embedded.avatar_cache import ensure_avatars  # its needs are not those of other data

    return ensure_avatars(config.samples, config.size, config.cache)


EMBEDDED: dict[str, Callable[[DataConfig], str]] = {"avatars": _avatars, "emoji": _emoji}


def open_dataset(config: DataConfig) -> Dataset:
    """Open what `config.source` names: "avatars" (made on first use), "emoji" or the URL of a shard set.

    Raises ValueError for a name that is neither, and where the URL holds no shard set.
    """
    source = config.source
    if source in EMBEDDED:
        return Dataset.open(EMBEDDED[source](config))
    if "/" not in source:
        near = difflib.get_close_matches(source, EMBEDDED, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"data.source: {source!r}{hint}; allowed are {', '.join(EMBEDDED)} and the URL of a shard set")
    return Dataset.open(source, endpoint_url=config.endpoint_url)
