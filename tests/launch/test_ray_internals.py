"""Ray's private classes still have what we call and override, and no other file names their modules."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
import ray
from ray import _raylet

from t2idist.launch import callbacks, health, pooled_worker, ray_internals, ray_trainer, recovery, worker_pool

ROOT = Path(__file__).parents[2]
FILES = [
    file
    for folder in ("t2idist", "tools")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if file != Path(ray_internals.__file__)
]
USED = {
    "AuthenticationTokenLoader": ["instance", "reset_cache"],
    "Config": ["initialize"],
    "RAY_NODE_ID_KEY": [],
    "GcsClient": [],  # drain_node is its inner client's, see below
    "autoscaler_pb2": ["DrainNodeReason"],
    "state": ["get_draining_nodes", "job_table"],
    "ControllerCallback": [
        "after_controller_start",
        "before_controller_shutdown",
        "before_controller_execute_resize_decision",
        "on_controller_start_worker_group",
    ],
    "WorkerGroupCallback": [
        "after_worker_group_poll_status",
        "after_worker_group_shutdown",
        "after_worker_group_start",
        "after_worker_group_training_start",
        "before_init_train_context",
        "before_worker_group_abort",
        "before_worker_group_shutdown",
        "before_worker_group_start",
    ],
    "DatasetsCallback": [],
    "PlacementGroupCleanerCallback": [],
    "TrainController": [
        "_make_and_handle_scaling_decision_for_non_running_worker_group",
        "get_result",
        "run",
        "worker_group_cls",
    ],
    "ElasticScalingPolicy": [
        "_count_possible_workers",
        "_get_reserved_resources",
        "make_decision_for_non_running_worker_group",
        "make_decision_for_running_worker_group",
    ],
    "FixedScalingPolicy": ["_maybe_send_resource_request", "after_controller_start"],
    "RayTrainWorker": ["execute", "get_metadata", "init_train_context", "poll_status", "run_train_fn"],
    "Worker": ["execute_async"],
    "WorkerGroup": [
        "_assign_worker_ranks",
        "_create_placement_group",
        "_create_workers",
        "_init_train_context_on_workers",
        "_poll_workers_and_collect_errors",
        "_start",
        "abort",
        "get_latest_poll_status",
        "get_workers",
        "has_started",
        "shutdown",
    ],
    "WorkerStatus": ["error"],
    "WorkerGroupStartupFailedError": [],
    "WorkerGroupState": [],  # its module has _shutdown_sync_actor, see below
    "WorkerHealthCheckFailedError": [],
    "WorkerHealthCheckTimeoutError": [],
    "get_train_context": [],
}
OURS = [
    *(callbacks.StopOnSigterm, callbacks.PauseBeforeResize, callbacks.CheckNodes, callbacks.StartTimeout),
    *(ray_trainer.SkipDrainingNodes, ray_trainer.FixedLocalScaling, ray_trainer.PooledWorkerGroup),
    *(ray_trainer.InProcessController, ray_trainer.RayTrainer, worker_pool.WorkerPool, recovery.RecordRecovery),
    *(ray_trainer.NodeInterfaceBackend, callbacks.WatchDrainingNodes, health.WorkerHealth, pooled_worker.PooledWorker),
]
NOT_RAYS = {
    "on_sigterm",
    "_request_stop",
    "_cancel",
    "_begin",
    "take",
    "prepare",
    "unprepared",
    "_on_prepared_nodes",
    "_prepare_new_nodes",
}
NOT_RAYS |= {"_pop", "_start", "_check", "_drop_superfluous", "_end_stopped", "is_prepared", "assign", "recycle"}
NOT_RAYS |= {"check", "start_first", "_prepare"}


def test_every_name_imports_and_has_what_we_use() -> None:
    assert USED.keys() == ray_internals.MODULES.keys()
    for name, attributes in USED.items():
        value = getattr(ray_internals, name)
        assert [attribute for attribute in attributes if not hasattr(value, attribute)] == [], name
    assert hasattr(_raylet.InnerGcsClient, "drain_node")
    group, state = (
        sys.modules[each.__module__] for each in (ray_internals.WorkerGroup, ray_internals.WorkerGroupState)
    )
    assert hasattr(group, "SynchronizationActor") and hasattr(state, "_shutdown_sync_actor")
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ray_internals.Nothing


def test_the_installed_ray_is_the_checked_version() -> None:
    assert ray.__version__.startswith(f"{ray_internals.CHECKED_VERSION}.")
    source = Path(ray_internals.__file__).read_text()
    assert source.count(f"# Ray {ray_internals.CHECKED_VERSION}: ") == len(ray_internals.MODULES)


@pytest.mark.parametrize("ours", OURS, ids=lambda ours: ours.__name__)
def test_overridden_methods_exist_in_rays_class_with_the_same_parameters(ours: type) -> None:
    overridden = [name for name, value in vars(ours).items() if inspect.isroutine(value) and not name.startswith("__")]
    for name in set(overridden) - NOT_RAYS:
        inherited = next(vars(base)[name] for base in ours.__mro__[1:] if name in vars(base))
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in _parameters(vars(ours)[name])):
            continue
        expected = [parameter.name for parameter in _parameters(inherited)]
        assert [parameter.name for parameter in _parameters(vars(ours)[name])] == expected, name


def _parameters(function: object) -> list[inspect.Parameter]:
    return list(inspect.signature(getattr(function, "__func__", function)).parameters.values())  # type: ignore[arg-type]


def private(module: str) -> bool:
    parts = module.split(".")
    return parts[0] == "ray" and (
        any(re.match("_[^_]", part) for part in parts) or module.startswith("ray.core.generated")
    )


def private_names_of_ray(file: Path) -> list[str]:
    """Private modules of Ray that a file imports or reaches as attributes (ray._private.x)."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if private(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name for name in imported if private(node.module) or private(name)]
        elif isinstance(node, ast.Attribute) and private(ast.unparse(node)):
            names.append(ast.unparse(node))
    return names


def test_no_other_file_names_a_private_module_of_ray() -> None:
    assert len(FILES) > 100
    assert {str(file): names for file in FILES if (names := private_names_of_ray(file))} == {}


def test_private_modules_are_recognised(tmp_path: Path) -> None:
    lines = ["import ray._raylet", "from ray.train.v2._internal import x", "ray._private.state", "from ray import _y"]
    (tmp_path / "x.py").write_text("\n".join([*lines, "from ray.core.generated import pb2", "ray.nodes()"]))
    names = private_names_of_ray(tmp_path / "x.py")
    assert {"ray._raylet", "ray.train.v2._internal.x", "ray._private.state", "ray._y"} <= set(names)
    assert "ray.core.generated.pb2" in names and "ray.nodes" not in names
