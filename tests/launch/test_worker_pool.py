"""The pool gives each bundle a process on its node: one that has trained on the same GPU, a spare one, or a new one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fsspec.asyn
import pytest
import torch

from t2idist.engine.checkpoint.replica_protocol import CHECKPOINT_THREAD
from t2idist.launch import callbacks, pooled_worker, ray_internals, worker_pool
from t2idist.launch.pooled_worker import PooledWorker
from t2idist.observability import process
from t2idist.training import warm_up

ROOT = Path(__file__).parents[2]
SOURCE = """
import copy, logging, os, signal, time, ray
from ray.util.placement_group import placement_group
from t2idist.launch.pooled_worker import PooledWorker
from t2idist.launch.worker_pool import WorkerPool, _Process
ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
node = ray.get_runtime_context().get_node_id()
pool = WorkerPool({"WHOSE": "the run's"}, spares=1, start_seconds=60)
pool.start_first({node: 2}, (1, 1))
assert not pool._free, "a cluster with room for more than the largest group: its nodes are not known yet"
pool.start_first({node: 2}, (1, 2))
started = [each.actor for each in pool._free]
assert len(started) == 2 and not copy.deepcopy(pool)._free
group = placement_group([{"CPU": 1, "GPU": 1}] * 2)
ray.get(group.ready())

def pids(processes):
    return ray.get([process.execute.remote(os.getpid) for process in processes])

first, facts = pool.take(group, [0, 1], 1)
assert {*first} == {*started} and not pool._free
assert sorted(fact.accelerator_ids["GPU"] for fact in facts) == [["0"], ["1"]]
assert ray.get([process.execute.remote(os.getenv, "WHOSE") for process in first]) == ["the run's"] * 2
assert pool.unprepared({node}) == {node}
deadline = time.monotonic() + 90
while pool.unprepared({node}) and time.monotonic() < deadline:
    time.sleep(0.1)
(spare,) = [each.actor for each in pool._free]
assert "t2idist.training.worker" in ray.get(spare.execute.remote(lambda: list(__import__("sys").modules)))
kept, lost = first
ray.kill(lost)
pool._free.append(_Process(kept, node, tuple(facts[0].accelerator_ids["GPU"]), None))
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("t2idist").addHandler(handler)
logging.getLogger("t2idist").setLevel("INFO")
pool._started = time.monotonic()  # as after a group has trained
second, again = pool.take(group, [0, 1], 1)
assert pids(second) == pids([kept, spare]), "the survivor has its GPU again, the spare process that of the lost one"
assert [fact.accelerator_ids for fact in again] == [fact.accelerator_ids for fact in facts]
third, _ = pool.take(group, [0], 1)
assert lines == [
    "new group of workers: 1 used before, 1 spare, 0 new",
    "new group of workers: 0 used before, 0 spare, 1 new",
], lines
assert not set(pids(third)) & set(pids(second))
pool.prepare({node})
(fresh,) = pool._free
(pid,) = pids([fresh.actor])
os.kill(pid, signal.SIGSTOP)
assert pool.unprepared({node}) == {node} and pool._free == [fresh], "an import may keep it from answering"
os.kill(pid, signal.SIGKILL)
deadline = time.monotonic() + 30
while fresh in pool._free and time.monotonic() < deadline:
    pool.unprepared({node})
assert fresh not in pool._free, "it has ended"
ray.shutdown()
"""


@pytest.mark.whole  # a Ray node with declared GPUs
def test_survivors_keep_their_gpu_and_spares_replace_the_lost(short_folder: str, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "RAY_TMPDIR": short_folder,
        "TMPDIR": str(tmp_path),
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SOURCE], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("memory", [(1e9, 20e9), (0.6e9, 2e9)])
def test_spare_process_loads_nothing_if_memory_is_short(
    memory: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "memory", lambda: process.AvailableMemory(*memory))
    monkeypatch.setattr(pooled_worker, "_load_quietly", lambda *_: pytest.fail("loaded"))
    assert pooled_worker.PooledWorker({}).prepare("", []) is False


def test_requests_of_a_spare_process_do_not_get_its_low_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec.asyn, "loop", [None])
    monkeypatch.setattr(fsspec.asyn, "iothread", [None])
    monkeypatch.setattr(warm_up, "warm_up", lambda run_url, systems: None)
    monkeypatch.setattr(pooled_worker.importlib, "import_module", lambda name: None)
    loading = threading.Thread(target=pooled_worker._load_quietly, args=("", []))
    loading.start()
    loading.join(30)
    requests = fsspec.asyn.iothread[0].native_id
    assert os.getpriority(os.PRIO_PROCESS, requests) == os.getpriority(os.PRIO_PROCESS, os.getpid())


def test_what_is_wrong_with_a_run_does_not_keep_a_spare_process_from_loading(tmp_path: Path) -> None:
    warm_up.warm_up("s3://user:wrong@host/runs", ["no_such_system", "tests.no_such_module", "attngan"])


def test_available_memory_is_a_part_of_the_machines() -> None:
    memory = process.memory()
    assert 0 < memory.available < memory.total < 2**60


def test_memory_of_a_container_is_what_is_left_of_the_limits_of_its_cgroups(tmp_path: Path) -> None:
    membership, root, own = tmp_path / "membership", tmp_path / "cgroup", tmp_path / "cgroup/slice/job"
    assert list(process._of_containers(root, membership)) == []
    membership.write_text("11:memory:/elsewhere\n0::/slice/job\n")
    assert list(process._of_containers(root, membership)) == [], "cgroup v1"
    own.mkdir(parents=True)
    counters = "anon 700\ninactive_file 100\nactive_file 60\nslab_reclaimable 40\nslab 90"
    for folder, limit in ((own, "1000"), (own.parent, "max")):
        for name, text in {"max": limit, "current": "950", "stat": counters}.items():
            (folder / f"memory.{name}").write_text(f"{text}\n")
    assert list(process._of_containers(root, membership)) == [process.AvailableMemory(250, 1000)], (
        "files can be read again"
    )
    (own.parent / "memory.max").write_text("800\n")
    assert list(process._of_containers(root, membership))[1] == process.AvailableMemory(50, 800)


def test_age_of_a_process_is_in_seconds() -> None:
    code = (
        "import time; from t2idist.observability import process; time.sleep(0.5); print(process.seconds_since_start())"
    )
    begin = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout)
    assert 0.5 <= age <= time.monotonic() - begin + 0.02


def test_a_worker_that_raised_is_not_lost() -> None:
    assert not worker_pool.is_lost(RuntimeError("Connection closed by peer"))
    assert worker_pool.is_lost(ray_internals.WorkerHealthCheckFailedError("ended", RuntimeError()))
    assert worker_pool.is_lost(ray_internals.WorkerHealthCheckTimeoutError("silent"))


def test_process_is_not_used_again_after_an_error_of_its_device() -> None:
    assert pooled_worker._is_reusable_after(None)
    assert pooled_worker._is_reusable_after(RuntimeError("Connection closed by peer"))
    assert not pooled_worker._is_reusable_after(torch.AcceleratorError("CUDA error: unspecified launch failure"))
    assert not pooled_worker._is_reusable_after(MemoryError())


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({}, ""),
        ({"running": True}, "its training did not end within 0 s"),
        ({"writer": CHECKPOINT_THREAD}, f"its {CHECKPOINT_THREAD} did not end within 0 s"),
        ({"deepspeed": True}, "DeepSpeed cannot join another process group"),
        ({"error": torch.AcceleratorError("CUDA error: an illegal memory access")}, "its device or memory failed"),
    ],
)
def test_a_process_says_why_it_cannot_train_again(
    state: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = SimpleNamespace(is_running=lambda: state.get("running", False), get_error=lambda: state.get("error"))
    context = SimpleNamespace(execution_context=SimpleNamespace(training_thread_runner=runner))
    monkeypatch.setattr(pooled_worker, "get_train_context", lambda: context)
    monkeypatch.setattr(pooled_worker, "_writer", lambda: state.get("writer", ""))
    closed: list[set[str]] = []
    monkeypatch.setattr(pooled_worker.interfaces, "close_connections", closed.append)
    if state.get("deepspeed"):
        monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    else:
        monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    worker = PooledWorker({})
    monkeypatch.setattr(worker, "get_metadata", lambda: SimpleNamespace(node_ip="10.0.0.1"))
    try:
        said = worker.recycle(0.0, ["10.0.0.1", "10.0.0.2"])
    finally:
        callbacks.forget_requests()
    assert said.startswith(reason) if reason else said == ""
    assert closed == [{"10.0.0.2"}], "not the connections to its own node"


def test_release_ends_a_pause_and_a_new_group_starts_without_requests() -> None:
    callbacks._request_stop()
    callbacks._request_pause()
    callbacks.release()
    with pytest.raises(callbacks.GroupEnded):
        callbacks.pause(60)
    callbacks.forget_requests()
    assert not callbacks.stop_requested() and not callbacks.must_pause()


def test_nothing_that_a_failed_training_used_is_kept_by_its_errors() -> None:
    class Network:
        pass

    kept: list[weakref.ref[Network]] = []

    def fail() -> None:
        network = Network()
        kept.append(weakref.ref(network))
        raise RuntimeError("Connection closed by peer")

    def train() -> None:
        try:
            fail()
        finally:
            raise OSError("the store is gone")

    try:
        train()
    except OSError as error:
        pooled_worker._clear_frames(error)
        assert kept[0]() is None
