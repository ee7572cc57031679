"""How torch.distributed.checkpoint meets storage: safetensors files written by all workers, and one JSON commit marker.

DCP plans who writes which tensor (each once, evenly over the workers) and runs the collectives; this file gives it a
writer and a reader. Nothing is pickled: every part is a safetensors file, and ``commit.json``, written last, holds
their sizes and hashes and which tensor lies where. A folder without a commit marker is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from t2idist import storage

COMMIT = "commit.json"
FORMAT = 1
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
}


class Broken(ValueError):
    """A checkpoint that is torn, rotten, or not one of ours; the message names the file."""


def _finished(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class Writer(StorageWriter):
    """Writes one safetensors file a worker into `url`, then the commit marker with `meta`."""

    def __init__(self, url: str, meta: dict[str, Any]) -> None:
        self.url, self.meta = url, meta

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        return

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        return

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=f"part-{n:05d}.safetensors") for n, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            tensors[item.index.fqn] = tensor.detach().cpu().contiguous().clone()
        if not tensors:
            return _finished([])
        data = safetensors.torch.save(tensors)
        storage.write_bytes(storage.join(self.url, plan.storage_data), data)
        place = {"file": plan.storage_data, "bytes": len(data), "sha256": storage.sha256(data)}
        return _finished([WriteResult(item.index, tensors[item.index.fqn].nbytes, place) for item in plan.items])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, dict[str, Any]] = {}
        tensors: dict[str, dict[str, Any]] = {}
        for result in (r for part in results for r in part):
            place = result.storage_data
            files[place["file"]] = {"bytes": place["bytes"], "sha256": place["sha256"]}
            kind = metadata.state_dict_metadata[result.index.fqn]
            assert isinstance(kind, TensorStorageMetadata)
            dtype = str(kind.properties.dtype).removeprefix("torch.")
            tensors[result.index.fqn] = {"file": place["file"], "dtype": dtype, "shape": list(kind.size)}
        marker = {"format": FORMAT, **self.meta, "files": files, "tensors": tensors}
        storage.write_json(storage.join(self.url, COMMIT), marker)

    def storage_meta(self) -> StorageMeta | None:
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class Reader(StorageReader):
    """Reads a committed checkpoint; every file is checked against its hash before a tensor of it is used."""

    def __init__(self, url: str, marker: dict[str, Any]) -> None:
        self.url, self.marker = url, marker

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        return

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries: dict[str, Any] = {}
        places: dict[MetadataIndex, str] = {}
        for name, tensor in self.marker["tensors"].items():
            shape = torch.Size(tensor["shape"])
            start = torch.Size([0] * len(shape))
            properties = TensorProperties(dtype=DTYPES[tensor["dtype"]])
            entries[name] = TensorStorageMetadata(properties, shape, [ChunkStorageMetadata(start, shape)])
            places[MetadataIndex(name, start)] = tensor["file"]
        return Metadata(state_dict_metadata=entries, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files = {self.places[item.storage_index] for item in plan.items}
        parts = {file: read_part(self.url, file, self.marker["files"][file]) for file in sorted(files)}
        for item in plan.items:
            name = item.storage_index.fqn
            target = planner.resolve_tensor(item)
            target.copy_(parts[self.places[item.storage_index]][name])
            planner.commit_tensor(item, target)
        return _finished(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def read_marker(url: str) -> dict[str, Any]:
    """The commit marker of a checkpoint. Raises `Broken`."""
    where = storage.join(url, COMMIT)
    try:
        marker = storage.read_json(where)
        if marker["format"] != FORMAT:
            raise Broken(f"{where}: format {marker['format']}; this version reads {FORMAT}")
        if not all(
            tensor["dtype"] in DTYPES and tensor["file"] in marker["files"] for tensor in marker["tensors"].values()
        ):
            raise Broken(f"{where}: names a tensor type or a file that it does not describe")
    except Broken:
        raise
    except FileNotFoundError:
        raise Broken(f"{where}: missing; the checkpoint was never completed") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Broken(f"{where}: not a commit marker: {error}") from None
    return dict(marker)


def read_part(url: str, name: str, expected: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of one file, checked against size and hash first. Raises `Broken`."""
    where = storage.join(url, name)
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError:
        raise Broken(f"{where}: missing") from None
    if len(data) != expected["bytes"]:
        raise Broken(f"{where}: {len(data)} bytes; {expected['bytes']} were written")
    if storage.sha256(data) != expected["sha256"]:
        raise Broken(f"{where}: its bytes changed since they were written (sha256 differs)")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise Broken(f"{where}: not a safetensors file: {error}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's advice to a process that works alone on purpose, and its log of every failure that is handled."""
    log = logging.getLogger("torch.distributed.checkpoint")
    level = log.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)


def save(state: dict[str, Tensor], url: str, meta: dict[str, Any], group: Any) -> None:
    """Write `state` into `url` with all workers of `group` (None: this one alone), and commit it."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    with _quiet():
        save_state(state, storage_writer=Writer(url, meta), planner=planner, process_group=group, no_dist=group is None)


def load(state: dict[str, Tensor], url: str, marker: dict[str, Any], group: Any) -> None:
    """Fill the tensors of `state` in place. Raises `Broken` on every worker where one finds a fault."""
    _check_names(state, url, marker)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    try:
        with _quiet():
            load_state(
                state, storage_reader=Reader(url, marker), planner=planner, process_group=group, no_dist=group is None
            )
    except CheckpointException as error:
        raise Broken("; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))) from None


def _check_names(state: dict[str, Tensor], url: str, marker: dict[str, Any]) -> None:
    for name, tensor in state.items():
        saved = marker["tensors"].get(name)
        if saved is None:
            raise Broken(f"{url}: has no '{name}'; it was made by another system or configuration")
        if list(tensor.shape) != saved["shape"]:
            raise Broken(f"{url}: '{name}' is {saved['shape']} there and {list(tensor.shape)} in this configuration")
