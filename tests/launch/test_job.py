"""``ray job submit`` of a run to a cluster started by hand, as a user would do it, with a token and without."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2idist.engine.checkpoint import export
from t2idist.observability import prometheus
from tests.helpers import small_systems
from tests.helpers.ray_head import Head, ray_head
from tests.helpers.runs import ROOT, check_finished, images_in_progress, write_recipe
from tests.helpers.wheel import install_wheel

WARNING = "is joined without a token (RAY_AUTH_MODE is not set)"

MAP = """
import sys
from t2idist.launch.parallel import map_unordered
from t2idist.observability.command import run_command
sys.exit(run_command("error", lambda: print(sorted(map_unordered(lambda n: n * n, range(3), 1, sys.argv[1]))) or 0))
"""
"""Distributes tasks as ``t2idist score --address`` does."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as its wheel installs it."""
    return install_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def head_with_token(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("home"), token=True, python_path=installed) as head:
        yield head


@pytest.fixture(scope="module")
def open_head(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("home"), token=False, python_path=installed) as head:
        yield head


class Scraper(threading.Thread):
    """Collects the names of our metrics that Prometheus would scrape, until `end` is called."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.names: set[str] = set()
        self._address, self._end = address, threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.5):
            with contextlib.suppress(OSError), urllib.request.urlopen(self._address, timeout=5) as response:
                text = response.read().decode()
                self.names |= set(re.findall(rf'^{prometheus.PREFIX}(t2idist_\w+){{.*run="tiny"', text, re.MULTILINE))

    def end(self) -> None:
        self._end.set()
        self.join()


def short_recipe(folder: Path) -> Path:
    """Write a recipe of one small stage and two steps."""
    scale = {"group_size": 4, "groups": 2, "images": 16, "checkpoint_every_images": 16, "pictures_every_images": 16}
    return write_recipe(folder, stages={"damsm": {"system": "damsm", **scale, "model": small_systems.DAMSM}})


def trained(folder: Path) -> bool:
    return int(export.read_index(str(folder / "runs/tiny/damsm/export"))["images"]) == 16


@pytest.mark.whole
def test_a_submitted_working_directory_trains_on_the_cluster(head_with_token: Head, tmp_path: Path) -> None:
    head, run = head_with_token, ["python", "-m", "t2idist.run"]
    file = write_recipe(tmp_path, cluster={"workers": [1, 2], "cpus_per_worker": 1})
    scraper = Scraper(head.metrics)
    scraper.start()
    done = head.submit("--working-dir", ".", "--", *run, str(file), "cluster.require_token=true", cwd=ROOT)
    scraper.end()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "workers 2" in done.stdout and WARNING not in done.stdout
    check_finished(tmp_path)
    absent = {
        f"t2idist_{name}" for name in ("device_memory_bytes", "recoveries", "recovery_seconds", "recovery_images")
    }
    assert scraper.names == prometheus.METRICS.keys() - absent  # there is no accelerator, and no restart
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        assert head.env["RAY_AUTH_TOKEN"].encode() not in file.read_bytes(), file
    assert head.env["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr
    wrong = head.submit("--working-dir", ".", "--", *run, "atngan", cwd=ROOT)
    assert wrong.returncode != 0
    assert "did you mean 'attngan'" in wrong.stdout + wrong.stderr


@pytest.mark.slow  # its parts, the wheel and the token, are in the other tests
def test_an_installed_wheel_trains_on_a_cluster_with_a_token(head_with_token: Head, tmp_path: Path) -> None:
    command = ["python", "-m", "t2idist.run", str(short_recipe(tmp_path)), "cluster.require_token=true"]
    done = head_with_token.submit("--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert WARNING not in done.stdout and trained(tmp_path)
    assert not (head_with_token.home / ".ray").exists()
    users = {name: value for name, value in head_with_token.env.items() if not name.startswith("RAY_AUTH_")}
    users["RAY_ADDRESS"] = head_with_token.address
    command = [sys.executable, "-m", "t2idist.run", str(short_recipe(tmp_path)), "name=refused"]
    refused = subprocess.run(command, cwd="/", env=users, capture_output=True, text=True, timeout=240, check=False)
    assert refused.returncode == 1
    (error,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "the cluster could not be joined without a token; if it has one, set RAY_AUTH_MODE=token" in error


@pytest.mark.slow
def test_a_wrong_token_is_one_sentence(head_with_token: Head, tmp_path: Path) -> None:
    wrong = "1" * 64
    env = {**head_with_token.env, "RAY_ADDRESS": head_with_token.address, "RAY_AUTH_TOKEN": wrong}
    command = [sys.executable, "-m", "t2idist.run", str(short_recipe(tmp_path))]
    refused = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=240, check=False)
    assert refused.returncode == 1
    (error,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "the cluster could not be joined with the token of RAY_AUTH_TOKEN" in error
    assert "Traceback" not in refused.stderr
    assert wrong not in refused.stderr and head_with_token.env["RAY_AUTH_TOKEN"] not in refused.stderr


@pytest.mark.slow
def test_workers_of_score_join_a_cluster_as_a_run_does(head_with_token: Head, open_head: Head) -> None:
    for head, warnings in ((head_with_token, 0), (open_head, 1)):
        command = [sys.executable, "-c", MAP, head.address]
        done = subprocess.run(command, cwd="/", env=head.env, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0 and "[0, 1, 4]" in done.stdout, done.stderr
        assert done.stderr.count(f"the Ray cluster at {head.address} (this machine) {WARNING}") == warnings
        assert not (head.home / ".ray").exists()


@pytest.mark.whole
def test_an_installed_wheel_trains_on_an_open_cluster_with_one_warning(
    open_head: Head, installed: Path, tmp_path: Path
) -> None:
    code = "import t2idist; print(t2idist.__file__)"
    assert f"\n{installed}/t2idist/__init__.py\n" in open_head.submit("--", "python", "-c", code).stdout
    done = open_head.submit("--", "python", "-m", "t2idist.run", str(short_recipe(tmp_path)))
    assert done.returncode == 0, done.stdout + done.stderr
    warnings = [line for line in done.stdout.splitlines() if "token" in line.lower()]
    assert len(warnings) == 1
    assert f"the Ray cluster at {open_head.address} (this machine) {WARNING}" in warnings[0]
    assert trained(tmp_path)
    assert not (open_head.home / ".ray").exists()


@pytest.mark.slow
def test_sigterm_on_a_joined_cluster_saves_the_state(open_head: Head, tmp_path: Path) -> None:
    file = write_recipe(tmp_path, cluster={"workers": 2, "cpus_per_worker": 1, "address": open_head.address})
    command = [sys.executable, "-m", "t2idist.run", str(file), "stages.attngan.images=100000"]
    at = tmp_path / "runs/tiny"
    with subprocess.Popen(command, cwd="/", env=open_head.env, stderr=subprocess.PIPE, text=True) as driver:
        while images_in_progress(at, "attngan") < 80:
            assert driver.poll() is None
            time.sleep(0.1)
        driver.terminate()
        stderr = driver.communicate(timeout=60)[1]
    match = re.search(r"ended on request, saved at (\d+) images; run the same command again to resume\n$", stderr)
    assert driver.returncode == 143 and match is not None and int(match[1]) >= 80, stderr
    newest = sorted((at / "attngan/checkpoints").iterdir())[-1]
    assert int(newest.name.partition("-")[0]) == int(match[1])


@pytest.mark.slow  # tests/launch/test_auth.py has the refusal
def test_an_open_cluster_is_refused_only_if_a_token_is_required(open_head: Head, tmp_path: Path) -> None:
    command = ["python", "-m", "t2idist.run", str(short_recipe(tmp_path))]
    upload = ["--working-dir", ".", "--"]
    refused = open_head.submit(*upload, *command, "cluster.require_token=true", cwd=ROOT)
    assert refused.returncode != 0
    assert "error: cluster.require_token: true, but RAY_AUTH_MODE is not set" in refused.stdout
    assert not (tmp_path / "runs").exists()
    done = open_head.submit(*upload, *command, "--insecure-cluster", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "token" not in done.stdout.lower() and trained(tmp_path)
