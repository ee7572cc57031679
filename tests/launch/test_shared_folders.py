"""Folders of a run that the nodes of a cluster do not share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from t2idist import config, storage
from t2idist.launch import shared_folders

ROOT = Path(__file__).parents[2]
TWO_NODES = """
import subprocess, sys, ray
from ray.cluster_utils import Cluster
from t2idist import config
from t2idist.launch import shared_folders, submit
shared, own = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray_start = f"{sys.executable} -m ray.scripts.scripts start --address={cluster.address} --num-cpus=1 --block"
start = f"mount -t tmpfs none {own} && exec {ray_start}"
other = subprocess.Popen(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", start], stdout=sys.stderr)
ray.init(address=cluster.address, logging_level="ERROR")
for runs in (shared, own):
    scale = ["cluster.workers=2", "cluster.cpus_per_worker=1", "stages.dcgan.groups=2"]
    run = config.load("dcgan", [f"storage={runs}", *scale])
    submit._wait_for_resources(run, 60)
    submit._run_id(run)
    try:
        shared_folders.check(run)
        print("all nodes see", runs)
    except ValueError as error:
        print(error)
ray.shutdown()
other.terminate()
cluster.shutdown()
"""


def test_a_file_that_is_absent_or_different_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run_id.json"
    file.write_text("here")
    files = {
        "storage": (str(file), storage.sha256(b"here")),
        "data.source": (str(file), storage.sha256(b"elsewhere")),
        "data.beside": (str(tmp_path / "dataset.json"), storage.sha256(b"here")),
    }
    assert shared_folders.missing(files) == ["data.source", "data.beside"]


@pytest.mark.parametrize(("folder", "warnings"), [("runtime_resources/working_dir_files/_ray_pkg_1", 1), ("mine", 0)])
def test_storage_in_the_uploaded_folder_is_a_warning(
    folder: str, warnings: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared_folders.warn_if_uploaded(config.load("dcgan", [f"storage={tmp_path}/{folder}/runs"]))
    assert len([text for text in caplog.messages if "Ray's copy of the uploaded folder" in text]) == warnings


@pytest.mark.slow  # two Ray nodes
def test_a_folder_that_one_node_does_not_share_is_refused(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("shared", "own")]
    for folder in folders:
        folder.mkdir()
    command = [sys.executable, "-c", TWO_NODES, *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"all nodes see {folders[0]}\n" in done.stdout
    assert f"storage: {folders[1]}/" in done.stdout and "is not the same folder on the node" in done.stdout
