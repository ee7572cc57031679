"""The data that a run was started on, by its hash: a later attempt on other data is refused, a copy elsewhere is not.

The hash is that of the manifest, which holds the captions and the hash of every sample, and of what else of the set a
run depends on (`Dataset.fingerprint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from t2idist import storage
from t2idist.data.shards import Dataset

FILE = "data.json"
"""By stage, the data sets in order: hash, images and URL. A run of an older version gets it at its next attempt."""


def read(run_url: str) -> dict[str, list[dict[str, Any]]]:
    """Return the record of a run by stage; empty if there is none."""
    content: dict[str, list[dict[str, Any]]] | None = storage.read_json_if_present(storage.join(run_url, FILE))
    return content or {}


def check(run_url: str, stage: str, datasets: Sequence[Dataset]) -> None:
    """Check that these are the data sets that a stage was started on, if it was. Raises ValueError with both hashes."""
    recorded = read(run_url).get(stage)
    if recorded is None:
        return
    run = run_url.rpartition("/")[2]
    for i, dataset in enumerate(datasets[: len(recorded)]):
        before = recorded[i]
        if before["sha256"] != dataset.fingerprint:
            key = "data.source" if i == 0 else f"data.beside[{i - 1}]"
            raise ValueError(
                f"{key}: {storage.redact(dataset.url)} has the data {dataset.fingerprint} ({_images(dataset):,} "
                f"images), but stage {stage} of the run {run} was started on the data {before['sha256']} "
                f"({before['images']:,} images, then in {before['url']}); give the URL of that data, or name=ANOTHER "
                "for a new run"
            )
    if len(recorded) != len(datasets):
        raise ValueError(
            f"data.beside: names {len(datasets) - 1}, but stage {stage} of the run {run} was started with "
            f"{len(recorded) - 1}; give name=ANOTHER for a new run"
        )


def record(run_url: str, opened: Mapping[str, Sequence[Dataset]]) -> None:
    """Write the data of stages, by name, to the run folder; a stage that is recorded keeps its record."""
    before = read(run_url)
    new = {name: [_describe(dataset) for dataset in datasets] for name, datasets in opened.items()}
    if new.keys() - before.keys():
        storage.write_json(storage.join(run_url, FILE), {**new, **before})


def _describe(dataset: Dataset) -> dict[str, Any]:
    return {"sha256": dataset.fingerprint, "images": _images(dataset), "url": storage.redact(dataset.url)}


def _images(dataset: Dataset) -> int:
    return sum(len(split) for split in dataset.splits.values())
