"""Sharded checkpoints with torch.distributed.checkpoint (DCP): a safetensors file per worker and a JSON commit marker.

DCP plans which worker writes which tensor (each once, evenly over the workers) and loads them at any number of workers.
This file keeps the plan, fills a buffer in the format of the file, and implements DCP's reader. Nothing is pickled:
every part is a safetensors file, and ``commit.json``, written last, has their sizes, their hashes and the file of each
tensor. A folder without a commit marker is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from t2idist import storage
from t2idist.engine.checkpoint.format import COMMIT, FORMAT, TYPES, CorruptCheckpoint, read_part
from t2idist.engine.world import World

_READS_AT_ONCE = 3
CODES = {getattr(torch, name): code for name, code in TYPES.items()}
DTYPES = {name: getattr(torch, name) for name in TYPES}


@dataclass(frozen=True)
class PartPlan:
    """The tensors that this worker writes; every tensor is written by one worker."""

    names: tuple[str, ...]
    dcp_metadata: Metadata | None
    """Of all tensors; only on the first worker."""


def plan_parts(state: Mapping[str, Tensor], world: World) -> PartPlan:
    """Plan checkpoints of `state`. The plan is valid for all saves of the same names and shapes. A collective."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(state), is_coordinator=world.is_main)
    plans = world.all_gather_object(planner.create_local_plan())
    planned = planner.create_global_plan(plans) if world.is_main else None
    plan = world.broadcast_object(planned[0] if planned is not None else [])[world.rank]
    return PartPlan(tuple(item.index.fqn for item in plan.items), planned[1] if planned is not None else None)


class PartBuffer:
    """A worker's part of a checkpoint in host memory, in the format of a safetensors file; filled for each save."""

    def __init__(self, state: Mapping[str, Tensor], names: Sequence[str]) -> None:
        ordered = sorted(names, key=lambda name: (-state[name].element_size(), name))  # aligns all of them
        header: dict[str, Any] = {}
        end = 0
        for name in ordered:
            tensor = state[name]
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        head = len(head).to_bytes(8, "little") + head
        pin = any(state[name].device.type != "cpu" for name in ordered)
        self._bytes = torch.empty(len(head) + end, dtype=torch.uint8, pin_memory=pin)
        self._bytes[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        body = self._bytes[len(head) :]
        self._views = {
            name: body[slice(*header[name]["data_offsets"])].view(state[name].dtype).view(state[name].shape)
            for name in ordered
        }

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Copy the current values of the tensors."""
        devices = set()
        with torch.no_grad():
            for name, view in self._views.items():
                view.copy_(state[name], non_blocking=True)
                devices.add(state[name].device)
        for device in devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)

    @property
    def data(self) -> memoryview:
        return self._bytes.numpy().data


def part_name(rank: int) -> str:
    """Return the file name of a worker's part."""
    return f"part-{rank:05d}.safetensors"


def write_part(url: str, name: str, buffer: PartBuffer) -> dict[str, Any]:
    """Store a part and hash it in parallel; return its entry for `commit`: file, bytes, sha256."""
    with ThreadPoolExecutor(1, "hash") as pool:
        digest = pool.submit(storage.sha256, buffer.data)
        storage.write_bytes(storage.join(url, name), buffer.data)
        return {"file": name, "bytes": len(buffer.data), "sha256": digest.result()}


def commit(
    url: str, metadata: Metadata, parts: Sequence[tuple[Sequence[str], dict[str, Any]]], meta: Mapping[str, Any]
) -> None:
    """Write the commit marker, which completes a checkpoint.

    Args:
        parts: for each worker, the names of its tensors and the result of `write_part`.
        meta: further values of the marker.
    """
    files = {entry["file"]: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for names, entry in parts if names}
    tensors = describe_tensors(metadata, [names for names, _ in parts])
    storage.write_json(storage.join(url, COMMIT), {"format": FORMAT, **meta, "files": files, "tensors": tensors})


def describe_tensors(metadata: Metadata, names_by_rank: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Return file, type and shape of each tensor of a checkpoint."""
    tensors: dict[str, dict[str, Any]] = {}
    for rank, names in enumerate(names_by_rank):
        for name in names:
            tensor = metadata.state_dict_metadata[name]
            assert isinstance(tensor, TensorStorageMetadata)
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            tensors[name] = {"file": part_name(rank), "dtype": dtype, "shape": list(tensor.size)}
    return tensors


ReadPart = Callable[[str], bytes]
"""Returns the bytes of a part by its file name; raises `CorruptCheckpoint`."""


class CheckpointReader(StorageReader):
    """Reads a checkpoint for DCP, from its commit marker and its parts."""

    def __init__(self, marker: dict[str, Any], read: ReadPart) -> None:
        self.marker, self.read = marker, read

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        return

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries: dict[str, Any] = {}
        files: dict[MetadataIndex, str] = {}
        for name, tensor in self.marker["tensors"].items():
            shape = torch.Size(tensor["shape"])
            start = torch.Size([0] * len(shape))
            properties = TensorProperties(dtype=DTYPES[tensor["dtype"]])
            entries[name] = TensorStorageMetadata(properties, shape, [ChunkStorageMetadata(start, shape)])
            files[MetadataIndex(name, start)] = tensor["file"]
        return Metadata(state_dict_metadata=entries, storage_data=files)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.files = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files = sorted({self.files[item.storage_index] for item in plan.items})
        with ThreadPoolExecutor(_READS_AT_ONCE, "part") as pool:
            parts = dict(zip(files, pool.map(lambda file: _tensors(file, self.read(file)), files), strict=True))
        for item in plan.items:
            name = item.storage_index.fqn
            target = planner.resolve_tensor(item)
            target.copy_(parts[self.files[item.storage_index]][name])
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _tensors(name: str, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CorruptCheckpoint(f"{name}: not a safetensors file: {error}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence DCP's advice against running without torch.distributed, and its log of failures that are handled here."""
    log = logging.getLogger("torch.distributed.checkpoint")
    level = log.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)


def load(
    state: dict[str, Tensor], url: str, marker: dict[str, Any], world: World, read: ReadPart | None = None
) -> None:
    """Load the tensors of `state` in place, all of them on every worker. A collective.

    Args:
        read: returns a part by its name. By default it is the file under `url`, checked against the marker.

    Raises:
        CorruptCheckpoint: on every worker, if a part is missing or damaged on any of them.
    """
    _check_names(state, url, marker)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    reader = CheckpointReader(marker, read or (lambda name: read_part(url, name, marker["files"][name])))
    causes: list[str] = []
    try:
        with _quiet():
            load_state(state, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        causes = [str(cause) for cause, _ in error.failures.values()]
    everywhere = {cause for of_worker in world.all_gather_object(causes) for cause in of_worker}
    if everywhere:
        raise CorruptCheckpoint("; ".join(sorted(everywhere)))


def _check_names(state: dict[str, Tensor], url: str, marker: dict[str, Any]) -> None:
    for name, tensor in state.items():
        saved = marker["tensors"].get(name)
        if saved is None:
            raise CorruptCheckpoint(f"{url}: has no '{name}'; it was written by another system or configuration")
        if list(tensor.shape) != saved["shape"]:
            raise CorruptCheckpoint(
                f"{url}: '{name}' has shape {saved['shape']}; this configuration has {list(tensor.shape)}"
            )
