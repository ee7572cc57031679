"""One job of a Ray cluster trains a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIRST = """
import sys, time, ray
from t2idist import config
from t2idist.launch import one_job
ray.init(address=sys.argv[1], logging_level="ERROR")
with one_job.only_one(config.load("dcgan", ["name=mine", f"storage={sys.argv[2]}"])):
    print("trains", flush=True)
    time.sleep(120)
"""
SECOND = """
import atexit, subprocess, sys, ray
from pathlib import Path
from ray.cluster_utils import Cluster
from t2idist import config, storage
from t2idist.launch import one_job
from t2idist.training.lifecycle import RunIsTaken
runs = sys.argv[1]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
first = subprocess.Popen([sys.executable, "-c", sys.argv[2], cluster.address, runs], stdout=subprocess.PIPE, text=True)
atexit.register(first.kill)
assert first.stdout.readline() == "trains\\n"
ray.init(address=cluster.address, logging_level="ERROR")
mine, other = (config.load("dcgan", [f"name={name}", f"storage={runs}"]) for name in ("mine", "other"))
with one_job.only_one(other):
    one_job._GRACE_SECONDS = 1.0
    try:
        with one_job.only_one(mine):
            print("both train")
    except RunIsTaken as error:
        print(error)
first.kill()
first.wait()
one_job._GRACE_SECONDS = 15.0
with one_job.only_one(mine):
    assert storage.read_json(f"{runs}/mine/job.json")["job"] == ray.get_runtime_context().get_job_id()
assert not list(Path(runs).rglob("job.json"))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow  # two Ray nodes
def test_a_second_job_is_refused_while_the_first_one_lives(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SECOND, str(tmp_path / "runs"), FIRST]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"trains the run mine in {tmp_path}/runs; wait for it or stop it" in done.stdout
    assert "both train" not in done.stdout
