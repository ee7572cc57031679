"""A node whose GPU fails twice is drained. The GPUs are only declared; the errors are raised by the test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = """
import time, ray, torch
from ray.cluster_utils import Cluster
from t2idist.launch import gpu_failures
head = {"num_cpus": 1, "num_gpus": 1, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
cluster.add_node(num_cpus=1, num_gpus=1, resources={"broken": 1})

@ray.remote(resources={"broken": 1})
def fail(smallest_workers, code=719):
    error = torch.AcceleratorError("CUDA error: unspecified launch failure")
    error.error_code = code
    gpu_failures.handle(error, smallest_workers)

def alive():
    return sum(node["Alive"] for node in ray.nodes())

def fails(smallest_workers, code=719):
    ray.get(fail.remote(smallest_workers, code))
    time.sleep(4)
    return alive()

assert [fails(1, 710), fails(1, 710)] == [2, 2], "a fault of the program"
assert fails(1) == 2, "the first failure"
assert fails(2) == 2, "the run needs both nodes"
ray.get(fail.remote(1))
deadline = time.monotonic() + 30
while alive() > 1 and time.monotonic() < deadline:
    time.sleep(0.2)
assert alive() == 1
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow  # two Ray nodes
def test_a_node_whose_gpu_fails_twice_is_drained(short_folder: str, tmp_path: Path) -> None:
    env = {**os.environ, "RAY_TMPDIR": short_folder, "TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SOURCE], cwd=ROOT, env=env, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
