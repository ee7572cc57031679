"""Check that the folders of a run are the same on all nodes of the cluster."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.launch import resources
from t2idist.training.stages import RUN_ID, run_url

logger = logging.getLogger(__name__)

_UPLOADED = ("runtime_resources", "working_dir_files")
"""Folders of Ray's copy of a `--working-dir`."""
_DESCRIPTION = "dataset.json"
"""File of every shard set."""
_ANSWER_SECONDS = 60.0


def check(config: RunConfig) -> None:
    """Check the local folders of `storage` and of the data on every node that may get a worker.

    Raises:
        ValueError: A node has no such folder, or another one under the same path.
    """
    files = _files(config)
    own = ray.get_runtime_context().get_node_id()
    others = [node for node in _worker_nodes(config) if node != own]
    if not files or not others:
        return
    task = ray.remote(num_cpus=0, max_retries=0)(missing)
    asked = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(files)
        for node in others
    }
    for node, answer in asked.items():
        try:
            keys = ray.get(answer, timeout=_ANSWER_SECONDS)
        except (RayError, TimeoutError):  # the node is being lost; workers on it fail and are replaced
            continue
        if keys:
            raise ValueError(
                f"{keys[0]}: {Path(files[keys[0]][0]).parent} is not the same folder on the node {_address(node)} as "
                "on this one; on several nodes it must be a URL, or a folder that all of them share"
            )


def warn_if_uploaded(config: RunConfig) -> None:
    """Warn if the run is stored in Ray's copy of a `--working-dir`, as a relative `storage` is."""
    folder = storage.local_path(run_url(config))
    if folder is not None and _UPLOADED in zip(folder.parts, folder.parts[1:], strict=False):
        logger.warning(
            "storage: %s is in Ray's copy of the uploaded folder, which is lost with the cluster, or sooner; give a "
            "URL or an absolute path",
            config.storage,
        )


def missing(files: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return the keys of the files that are not here, or that have another SHA-256."""
    return [key for key, (name, digest) in files.items() if _digest(Path(name)) != digest]


def _digest(file: Path) -> str:
    try:
        return storage.sha256(file.read_bytes())
    except OSError:
        return ""


def _files(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Return path and hash of one small file in each local folder, by the folder's key."""
    run_folder = storage.local_path(run_url(config))
    files = {} if run_folder is None else {"storage": run_folder / RUN_ID}
    for stage in config.stages:
        data = config.stage_data(stage)
        for source in (data.source, *data.beside):
            folder = storage.local_path(source) if "/" in source else None  # names of built-in data have none
            if folder is not None:
                files["data.source" if source == data.source else "data.beside"] = folder / _DESCRIPTION
    return {key: (str(file), _digest(file)) for key, file in files.items()}


def _worker_nodes(config: RunConfig) -> list[str]:
    slots = resources.worker_slots(resources.per_worker(config.cluster))
    return [node for node, count in slots.items() if count]


def _address(node: str) -> str:
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return next((str(info["NodeManagerAddress"]) for info in nodes if info["NodeID"] == node), node)
