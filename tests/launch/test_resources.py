"""What a run starts on the cluster and asks of it, and what is given back when Ray Train's controller fails."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from t2idist import config
from t2idist.launch import callbacks, ray_trainer, submit

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, ray
from ray.util.placement_group import placement_group
from t2idist.launch.ray_trainer import own_placement_groups, remove_placement_groups
ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[1])
kept = placement_group([{"CPU": 1}]); assert kept.wait(60)
others = own_placement_groups()
left = placement_group([{"CPU": 1}]); assert left.wait(60)
remove_placement_groups(own_placement_groups() - others)
assert own_placement_groups() == others == {kept.id.hex()}
again = placement_group([{"CPU": 1}]); assert again.wait(60)
"""


@pytest.mark.whole
def test_what_a_dead_controller_held_is_free_again_and_nothing_else(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("r")
    words = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


WAITING = """
import sys, time, ray
from concurrent.futures import ThreadPoolExecutor
from ray.cluster_utils import Cluster
from t2idist import config, launch, nodes
made = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
def wait(workers, seconds):
    over = ["preset=demo", "stages.dcgan.groups=3", f"cluster.workers={workers}", "cluster.cpus_per_worker=2"]
    launch._wait_for_room(config.load("dcgan", over), seconds)
assert nodes.room({"CPU": 2, "GPU": 0}) == 1 and nodes.room({"CPU": 0.5}) == 6 and nodes.room({"GPU": 1}) == 0
with ThreadPoolExecutor(1) as beside:
    waiting = beside.submit(wait, 2, 90)
    time.sleep(2)
    assert not waiting.done()
    made.add_node(num_cpus=3)
    waiting.result()
assert nodes.room({"CPU": 2}) == 2
try:
    wait(3, 1)
except ValueError as error:
    print(error)
ray.shutdown()
made.shutdown()
"""


@pytest.mark.whole
def test_a_run_waits_until_machines_have_room_for_its_workers(tmp_path_factory: pytest.TempPathFactory) -> None:
    env = {**os.environ, "RAY_TMPDIR": str(tmp_path_factory.mktemp("r"))}
    done = subprocess.run(
        [sys.executable, "-c", WAITING], cwd=ROOT, env=env, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == (
        "cluster.workers: 3 workers of 2 CPU each; the cluster has 6 CPU and 0 GPU, on 2 machines, which hold 2 of them"
    )


@pytest.mark.parametrize("own", [True, False])
def test_no_actor_is_started_that_has_nothing_to_do(own: bool, tmp_path: Path) -> None:
    """Each takes seconds before the first step (tools/bench/bench_ray.py)."""
    settings = config.load("dcgan", ["preset=demo", f"storage={tmp_path}"])
    trainer = submit._trainer(settings, str(tmp_path), own, None, callbacks.StopOnSigterm())
    kinds = [type(each) for each in trainer._create_default_callbacks()]
    assert ray_trainer.DatasetsCallback not in kinds
    assert (ray_trainer.PlacementGroupCleanerCallback in kinds) is not own
    assert {ray_trainer.WaitForNodeLiveness, ray_trainer.StartTimeout} <= set(kinds)


class _Interrupted(Exception):
    """What SIGTERM does outside."""


def test_workers_are_asked_to_leave_and_those_that_take_their_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: queue.Queue[list[str]] = queue.Queue()
    monkeypatch.setattr(callbacks, "_ask", asked.put)

    def outside(*_: object) -> None:
        raise _Interrupted

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def group(*workers: str) -> SimpleNamespace:
        return SimpleNamespace(get_workers=lambda: workers)

    before = signal.signal(signal.SIGTERM, outside)
    leaving = callbacks.StopOnSigterm()
    try:
        with leaving.on_sigterm(), pytest.raises(_Interrupted):
            terminate()  # none train yet: nothing to be saved
        leaving = callbacks.StopOnSigterm()
        with leaving.on_sigterm():
            leaving.after_worker_group_training_start(group("a", "b"))
            terminate()
            assert asked.get(timeout=10) == ["a", "b"]
            leaving.before_worker_group_abort(None)
        with leaving.on_sigterm():  # the controller failed, and the run is taken up again
            leaving.after_worker_group_training_start(group("c"))
            assert asked.get(timeout=10) == ["c"]
            with pytest.raises(_Interrupted):
                terminate()  # a second one
        assert signal.getsignal(signal.SIGTERM) is outside
    finally:
        signal.signal(signal.SIGTERM, before)
