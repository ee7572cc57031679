"""A node whose GPU failed twice within an hour is drained: restarts would land on the same GPU again."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch

from t2idist.launch import drain

logger = logging.getLogger(__name__)

_FAILURES = 2
_WITHIN_SECONDS = 3600.0
_DRAIN_SECONDS = 600.0
"""Ray ends the node when nothing runs on it any more, at the latest then."""
_DEVICE_ASSERT = 710
"""cudaErrorAssert: a fault of the program, on every GPU."""


def handle(error: torch.AcceleratorError, smallest_workers: int) -> None:
    """Count a failure of this node's GPU, and drain the node if it is one too many and the run can do without it."""
    if getattr(error, "error_code", None) == _DEVICE_ASSERT:
        return
    try:
        node = _own_node()
        if _count(Path(tempfile.gettempdir()) / f"t2idist-gpu-failures-{node.node_id}.json") < _FAILURES:
            return
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        others = [each["Resources"] for each in nodes if each["Alive"] and each["NodeID"] != node.node_id]
        gpus = int(sum(resources.get("GPU", 0) for resources in others))
        if gpus < smallest_workers:
            logger.error("the GPU of node %s failed again, and the other nodes have only %d", node.node_id, gpus)
            return
        logger.error("the GPU of node %s failed again: draining the node", node.node_id)
        drain.drain(node, _DRAIN_SECONDS, "its GPU failed twice")
    except (OSError, RuntimeError) as failure:  # the error of the GPU matters more
        logger.warning("the node of a broken GPU was not drained: %s", failure)


def _own_node() -> drain.Raylet:
    context = ray.get_runtime_context()
    return drain.Raylet(os.getppid(), context.get_node_id(), context.gcs_address)


def _count(file: Path) -> int:
    """Record a failure; return how many there were of late."""
    try:
        before = [float(moment) for moment in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError):
        before = []
    moments = [moment for moment in (*before, time.time()) if moment > time.time() - _WITHIN_SECONDS]
    file.write_text(json.dumps(moments))
    return len(moments)
