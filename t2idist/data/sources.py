"""Open the data sets that a config names."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.data.shards import DESCRIPTION, Dataset


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
    check_names(config)
    opened = {name: _open(config, name, key) for key, name in _named(config).items() if name not in EMBEDDED}
    return tuple(opened.get(name) or _open(config, name, key) for key, name in _named(config).items())


def check_names(config: DataConfig) -> None:
    """Check the names of all sources, before avatars are drawn for one. Raises ValueError as `open_datasets` does."""
    named = _named(config)
    for i, (key, name) in enumerate(named.items()):
        _check_name(name, key)
        if name in list(named.values())[:i]:
            raise ValueError(f"{key}: {name!r} is listed twice; the data sets must differ")


def is_folder(source: str) -> bool:
    """Return whether a name without a slash is a shard set in the working directory."""
    return source not in EMBEDDED and "/" not in source and bool(source) and Path(source, DESCRIPTION).is_file()


def _named(config: DataConfig) -> dict[str, str]:
    return {"data.source": config.source} | {f"data.beside[{i}]": name for i, name in enumerate(config.beside)}


def _check_name(source: str, key: str) -> None:
    allowed = f"allowed are {', '.join(EMBEDDED)} and the URL of a shard set"
    if not source:
        raise ValueError(f"{key}: missing; {allowed}")
    if source in EMBEDDED or is_folder(source):
        return
    storage.check_url(source)
    if "/" not in source:
        near = difflib.get_close_matches(source, EMBEDDED, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        if Path(source).is_dir():
            hint = f" is a folder without {DESCRIPTION}, so no shard set"
        raise ValueError(f"{key}: {source!r}{hint}; {allowed}")


def _embedded_fingerprint(dataset: Dataset) -> str:
    """Hash settings and version of data that each machine draws itself, perhaps with other bytes in its files."""
    return storage.sha256(json.dumps([dataset.source, dataset.options], sort_keys=True).encode())


def _open(config: DataConfig, source: str, key: str) -> Dataset:
    if source in EMBEDDED:
        dataset = Dataset.open(EMBEDDED[source](config))
        if source == "avatars":
            dataset = replace(dataset, fingerprint=_embedded_fingerprint(dataset))
    else:
        _check_name(source, key)
        dataset = Dataset.open(source, endpoint_url=config.endpoint_url, cache=config.cache)
    if config.outlines and dataset.stored_pairs:
        raise ValueError(f"data.outlines: true, but {storage.redact(dataset.url)} has pairs already; give false")
    return replace(dataset, outlines=config.outlines)
