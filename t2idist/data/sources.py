"""Open the data sets that a config names."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.data.shards import Dataset


def _emoji(config: DataConfig) -> str:
    return str(files("t2idist.data.embedded").joinpath("emoji"))


def _avatars(config: DataConfig) -> str:
    from t2idist.data.embedded.avatar_cache import ensure_avatars  # its dependencies are needed for avatars only

    return ensure_avatars(config.samples, config.size, config.cache)


EMBEDDED: dict[str, Callable[[DataConfig], str]] = {"avatars": _avatars, "emoji": _emoji}


def open_dataset(config: DataConfig) -> Dataset:
    """Open `config.source`: "avatars" (generated on first use), "emoji", or the URL of a shard set.

    Raises:
        ValueError: If the name is unknown, or the URL holds no shard set.
    """
    return _open(config, config.source, "data.source")


def open_datasets(config: DataConfig) -> tuple[Dataset, ...]:
    """Open `config.source` and all of `config.beside`.

    Raises:
        ValueError: As for `open_dataset`; also if one is named twice.
    """
    named = {"data.source": config.source} | {f"data.beside[{i}]": name for i, name in enumerate(config.beside)}
    for i, (key, name) in enumerate(named.items()):
        if not name:
            raise ValueError(f"{key}: missing; allowed are {', '.join(EMBEDDED)} and the URL of a shard set")
        if name in list(named.values())[:i]:
            raise ValueError(f"{key}: {name!r} is listed twice; the data sets must differ")
    return tuple(_open(config, name, key) for key, name in named.items())


def _embedded_fingerprint(dataset: Dataset) -> str:
    """Hash settings and version of data that each machine draws itself, perhaps with other bytes in its files."""
    return storage.sha256(json.dumps([dataset.source, dataset.options], sort_keys=True).encode())


def _open(config: DataConfig, source: str, key: str) -> Dataset:
    if source in EMBEDDED:
        dataset = Dataset.open(EMBEDDED[source](config))
        return replace(dataset, fingerprint=_embedded_fingerprint(dataset)) if source == "avatars" else dataset
    if "/" not in source:
        near = difflib.get_close_matches(source, EMBEDDED, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{key}: {source!r}{hint}; allowed are {', '.join(EMBEDDED)} and the URL of a shard set")
    return Dataset.open(source, endpoint_url=config.endpoint_url)
