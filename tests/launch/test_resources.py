"""Room for workers on a Ray cluster, nodes that do not respond, and placement groups of a dead controller."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(source: str, short_folder: str, home: Path) -> str:
    """Run a program that starts Ray, whose files are in `short_folder`; returns its output."""
    env = {**os.environ, "RAY_TMPDIR": short_folder, "HOME": str(home)}
    command = [sys.executable, "-c", source, short_folder]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


PLACEMENT_GROUPS = """
import sys, ray
from ray.util.placement_group import placement_group
from t2idist.launch.resources import own_placement_groups, remove_placement_groups
ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[1])
kept = placement_group([{"CPU": 1}]); assert kept.wait(60)
others = own_placement_groups()
left = placement_group([{"CPU": 1}]); assert left.wait(60)
remove_placement_groups(own_placement_groups() - others)
assert own_placement_groups() == others == {kept.id.hex()}
again = placement_group([{"CPU": 1}]); assert again.wait(60)
"""


@pytest.mark.whole
def test_removing_placement_groups_frees_their_resources_and_keeps_others(short_folder: str, tmp_path: Path) -> None:
    run(PLACEMENT_GROUPS, short_folder, tmp_path)


WAITING = """
import sys, time, ray
from concurrent.futures import ThreadPoolExecutor
from ray.cluster_utils import Cluster
from t2idist import config
from t2idist.launch import resources, submit
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
def wait(workers, seconds):
    overrides = ["preset=demo", "stages.dcgan.groups=3", f"cluster.workers={workers}", "cluster.cpus_per_worker=2"]
    submit._wait_for_resources(config.load("dcgan", overrides), seconds)
def slots(per_worker):
    return sum(resources.worker_slots(per_worker).values())
assert slots({"CPU": 2, "GPU": 0}) == 1 and slots({"CPU": 0.5}) == 6 and slots({"GPU": 1}) == 0
with ThreadPoolExecutor(1) as pool:
    waiting = pool.submit(wait, 2, 90)
    time.sleep(2)
    assert not waiting.done()
    cluster.add_node(num_cpus=3)
    waiting.result()
assert slots({"CPU": 2}) == 2
try:
    wait(3, 1)
except ValueError as error:
    print(error)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.whole
def test_run_waits_until_nodes_have_room_for_its_workers(short_folder: str, tmp_path: Path) -> None:
    assert run(WAITING, short_folder, tmp_path).splitlines()[-1] == (
        "cluster.workers: 3 workers of 2 CPU each are needed; the cluster has 6 CPU and 0 GPU on 2 nodes, room for 2 "
        "workers"
    )


SILENT = """
import os, signal, time, ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table
from t2idist.launch import callbacks
from t2idist.launch.replica_store import RayReplicaStore, ignore_nodes, _target_nodes
from t2idist.launch.resources import NodeLiveness
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
head = ray.get_runtime_context().get_node_id()
other = cluster.add_node(num_cpus=1)
store = RayReplicaStore("run")
actors = {node: store._start(node) for node in (head, other.node_id)}
assert set(_target_nodes()) == set(actors)
waiting, leaving = NodeLiveness(store, wait_seconds=20), NodeLiveness(store, wait_seconds=0)
check = callbacks.CheckNodes(leaving)
def selector():
    time.sleep(2.1)  # a ping counts for two seconds
    check.before_controller_execute_resize_decision(None)
    return check.on_controller_start_worker_group(scaling_config=None, num_workers=1)
assert selector() is None
pid = ray.get(actors[other.node_id].__ray_call__.remote(lambda actor: os.getpid()))
os.kill(pid, signal.SIGSTOP)
began = time.monotonic()
assert selector() == {"ray.io/node-id": f"!in({other.node_id})"}
assert time.monotonic() - began < 10, "a run that can do without the node does not wait for it"
groups = [placement_group([{"CPU": 0.2}], strategy="SPREAD", bundle_label_selector=[selector()]) for _ in range(4)]
ray.get([group.ready() for group in groups], timeout=60)
assert {placement_group_table(group)["bundles_to_node_id"][0] for group in groups} == {head}
ignore_nodes(leaving.silent)
assert _target_nodes() == [head] and [node for node, _ in store._actors_by_node()] == [head]
ignore_nodes([])
import threading
threading.Timer(3, os.kill, [pid, signal.SIGCONT]).start()
waiting.check()
assert not waiting.silent, "a run that needs the node waits for it"
assert selector() is None
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.whole
def test_no_worker_is_started_on_a_node_that_does_not_respond(short_folder: str, tmp_path: Path) -> None:
    run(SILENT, short_folder, tmp_path)
