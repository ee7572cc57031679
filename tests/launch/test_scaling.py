"""How many workers the next group has, and on which nodes; without a cluster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import WorkerCrashedError
from ray.train import ScalingConfig

from t2idist.launch import ray_internals, ray_trainer, worker_pool
from t2idist.launch.worker_pool import WorkerPool

NODES = ("a", "b", "c")


class Pool:
    """Stands for the pool: on `loading` nodes no process is ready."""

    has_trained, keeps_processes = True, True

    def __init__(self) -> None:
        self.loading: set[str] = set()
        self.prepared: list[set[str]] = []

    def unprepared(self, nodes: Collection[str]) -> set[str]:
        return self.loading & set(nodes)

    def prepare(self, nodes: Collection[str]) -> None:
        self.prepared.append(set(nodes))


class Policy:
    """The policy on three nodes, with one worker each, and a clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workers: tuple[int, int] = (1, 3)) -> None:
        self.now, self.reserved = 1000.0, {node: {"CPU": 1.0} for node in NODES}
        base = ray_internals.ElasticScalingPolicy
        monkeypatch.setattr(base, "_get_reserved_resources", lambda policy: dict(self.reserved))
        monkeypatch.setattr(base, "_maybe_send_resource_request", lambda policy: None)
        monkeypatch.setattr(ray_trainer, "schedulable_nodes", lambda: dict(self.reserved))
        monkeypatch.setattr(ray_trainer, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(f"{base.__module__}.time_monotonic", lambda: self.now)
        self.liveness: Any = SimpleNamespace(silent=set(), unprepared=set(), check=lambda: None)
        config = ScalingConfig(
            num_workers=workers, resources_per_worker={"CPU": 1.0}, elastic_resize_monitor_interval_s=30.0
        )  # type: ignore[arg-type, call-arg]
        self.policy = ray_trainer.SkipDrainingNodes(config, self.liveness)
        self.pool = Pool()
        self.policy.pool = self.pool  # type: ignore[assignment]

    def next_group(self) -> int | None:
        """Return the size of the next group while none trains."""
        return getattr(self.policy.make_decision_for_non_running_worker_group(), "num_workers", None)

    def resize(self, nodes: str, after: float) -> int | None:
        """Return the new size of a group that trains on these nodes since `after` seconds; None: it stays."""
        workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in nodes]
        state = SimpleNamespace(workers=workers, num_workers=len(workers), start_time=self.now - after)
        return getattr(self.policy.make_decision_for_running_worker_group(state, None), "num_workers", None)


def test_the_next_group_leaves_out_nodes_on_which_processes_load(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Policy(monkeypatch)
    run.pool.loading = {"b"}
    assert run.next_group() == 2 and run.liveness.unprepared == {"b"}
    run.pool.loading = {"b", "c"}
    assert run.next_group() == 1
    run.pool.loading = set()
    assert run.next_group() == 3 and run.liveness.unprepared == set()


@pytest.mark.parametrize("change", ["none is ready", "nothing has trained", "processes are not kept", "too few"])
def test_the_next_group_waits_for_loading_processes(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    run = Policy(monkeypatch, (2, 3) if change == "too few" else (1, 3))
    run.pool.loading = set(NODES) if change == "none is ready" else {"b", "c"}
    run.pool.has_trained = change != "nothing has trained"
    run.pool.keeps_processes = change != "processes are not kept"
    assert run.next_group() == 3 and run.liveness.unprepared == set()


def test_one_ready_node_of_many_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Policy(monkeypatch, (1, 8))
    run.reserved = {str(node): {"CPU": 1.0} for node in range(8)}
    run.pool.loading = set(run.reserved) - {"0"}
    assert run.next_group() == 8
    run.pool.loading -= {"1", "2"}
    assert run.next_group() == 3


def test_a_group_grows_once_the_processes_on_new_nodes_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Policy(monkeypatch)
    run.pool.loading = {"b", "c"}
    assert run.resize("a", after=31) is None and run.liveness.unprepared == {"b", "c"}
    assert run.pool.prepared == [{"b", "c"}]
    run.now += 1
    assert run.resize("a", after=32) is None and len(run.pool.prepared) == 1, "nodes are looked for every two seconds"
    run.now += 1.5
    run.pool.loading = {"c"}
    assert run.resize("a", after=33) is None, "one resize costs less than two"
    run.now += 30
    assert run.resize("a", after=63) == 2, "but not for ever"
    run.pool.loading = set()
    run.now += 3
    assert run.resize("ab", after=3) == 3 and run.liveness.unprepared == set()


def test_a_group_does_not_shrink_for_nodes_that_load(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Policy(monkeypatch, (1, 2))
    run.reserved = {"a": {"CPU": 1.0}, "b": {"CPU": 1.0}}
    run.pool.loading = {"b"}
    assert run.resize("cd", after=31) is None  # Ray placed it on other nodes than it reserved
    run.now += 60
    assert run.resize("cd", after=91) is None


def test_a_group_with_a_silent_node_is_not_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Policy(monkeypatch)
    run.liveness.silent = {"a"}
    assert run.resize("ab", after=31) is None
    run.liveness.silent = set()
    run.now += 0.5
    assert run.resize("ab", after=31.5) == 3, "it is looked at again soon"


# ------------------------------------------------------------ the group
@pytest.mark.parametrize(("created", "fails"), [(False, False), (True, False), (True, True)])
def test_a_group_that_fails_at_its_start_keeps_no_placement_group(
    monkeypatch: pytest.MonkeyPatch, created: bool, fails: bool
) -> None:
    """Ray Train itself removes it only if not all workers have been created; the next group would wait for ever."""
    calls: list[str] = []

    def start(group: Any) -> None:
        raise WorkerCrashedError

    def shutdown(group: Any) -> None:
        calls.append("shutdown")
        if fails:
            raise WorkerCrashedError

    base = ray_internals.WorkerGroup
    for name, method in {
        "_start": start,
        "shutdown": shutdown,
        "has_started": lambda group: created,
        "abort": lambda group: calls.append("abort"),
    }.items():
        monkeypatch.setattr(base, name, method)
    group = ray_trainer.PooledWorkerGroup.__new__(ray_trainer.PooledWorkerGroup)
    with pytest.raises(WorkerCrashedError):
        group._start()
    assert calls == (["shutdown"] if created else []) + (["abort"] if fails else [])


# ------------------------------------------------------------ the pool
class Process:
    """Stands for an actor that is loading."""

    prepare = SimpleNamespace(remote=lambda *_: object())


def make_pool(monkeypatch: pytest.MonkeyPatch, spares: int = 1, start_seconds: float = 60.0) -> WorkerPool:
    pool = WorkerPool({}, spares, start_seconds)
    monkeypatch.setattr(pool, "_start", lambda node: Process())
    monkeypatch.setattr(pool, "_check", lambda nodes: None)
    return pool


def test_a_node_without_spare_processes_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_pool(monkeypatch, spares=0).unprepared({"a"}) == set()
    assert make_pool(monkeypatch).unprepared({"a"}) == {"a"}


def test_a_process_that_loads_too_long_does_not_keep_its_node_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(monkeypatch)
    assert pool.unprepared({"a"}) == {"a"}
    monkeypatch.setattr(pool, "_start_seconds", -1.0)
    assert pool.unprepared({"a"}) == set()


def test_no_process_is_started_soon_again_on_a_node_short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(monkeypatch)
    clock = SimpleNamespace(monotonic=lambda: 1000.0)
    monkeypatch.setattr(worker_pool, "time", clock)
    pool._short_of_memory["a"] = 999.0
    pool.prepare({"a", "b"})
    assert [each.node for each in pool._free] == ["b"]
    clock.monotonic = lambda: 1000.0 + worker_pool._SHORT_OF_MEMORY_SECONDS
    pool.prepare({"a", "b"})
    assert [each.node for each in pool._free] == ["b", "a"]


@pytest.mark.whole
def test_first_processes_start_without_torch() -> None:
    code = "import sys, t2idist.launch.first_group; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
