"""Ray's private classes that this package uses: the only file that names the modules they live in.

An upgrade of Ray starts here: every entry was checked against Ray 2.60, and tests/launch/test_ray_internals.py checks
that the attributes we call or override still exist. Names are imported on first use, because ``t2idist drain`` must not
wait for Ray Train and torch.
"""

from __future__ import annotations

import importlib
from typing import Any

CHECKED_VERSION = "2.60"

MODULES = {
    "AuthenticationTokenLoader": "ray._raylet",  # Ray 2.60: reset_cache(); it keeps the token of an earlier cluster
    "Config": "ray._raylet",  # Ray 2.60: initialize(), which reads RAY_AUTH_MODE again
    "GcsClient": "ray._raylet",  # Ray 2.60: drain_node(); there is no public call that drains a node
    "RAY_NODE_ID_KEY": "ray._raylet",  # Ray 2.60: label of a node that holds its id
    "autoscaler_pb2": "ray.core.generated",  # Ray 2.60: DrainNodeReason, an argument of drain_node()
    "state": "ray._private.state",  # Ray 2.60: get_draining_nodes(), job_table(); no public call without the dashboard
    "ControllerCallback": "ray.train.v2._internal.execution.callback",  # Ray 2.60: base class of callbacks.py
    "WorkerGroupCallback": "ray.train.v2._internal.execution.callback",  # Ray 2.60: base class of callbacks.py
    "DatasetsCallback": "ray.train.v2._internal.callbacks",  # Ray 2.60: left out, its actor has nothing to do
    "PlacementGroupCleanerCallback": "ray.train.v2._internal.callbacks.placement_group_callback",  # Ray 2.60: left out
    "TrainController": "ray.train.v2._internal.execution.controller",  # Ray 2.60: worker_group_cls, run(), get_result()
    "ElasticScalingPolicy": "ray.train.v2._internal.execution.scaling_policy",  # Ray 2.60: _get_reserved_resources()
    "FixedScalingPolicy": "ray.train.v2._internal.execution.scaling_policy",  # Ray 2.60: _maybe_send_resource_request()
    "RayTrainWorker": "ray.train.v2._internal.execution.worker_group.worker",  # Ray 2.60: get_metadata()
    "Worker": "ray.train.v2._internal.execution.worker_group",  # Ray 2.60: Worker(actor, metadata, resources)
    "WorkerStatus": "ray.train.v2._internal.execution.worker_group.poll",  # Ray 2.60: result of poll_status()
    "WorkerGroup": "ray.train.v2._internal.execution.worker_group",  # Ray 2.60: SynchronizationActor, _create_workers()
    "WorkerGroupState": "ray.train.v2._internal.execution.worker_group.state",  # Ray 2.60: _shutdown_sync_actor()
    "WorkerHealthCheckFailedError": "ray.train.v2._internal.exceptions",  # Ray 2.60: a worker's process has ended
    "WorkerHealthCheckTimeoutError": "ray.train.v2._internal.exceptions",  # Ray 2.60: it does not respond
    "WorkerGroupStartupFailedError": "ray.train.v2._internal.exceptions",  # Ray 2.60: the controller then tries again
    "get_train_context": "ray.train.v2._internal.execution.context",  # Ray 2.60: execution_context
}
"""Module of each name."""


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(MODULES[name]), name)
