"""The local cluster end to end: start it, submit jobs from outside, lose a host, remove everything."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
import yaml
from PIL import Image

from t2idist import storage
from t2idist.engine.checkpoint import export
from tests.helpers.runs import ROOT, write_recipe
from tools import shard_folder
from tools.chaos import hosts, local_cluster

NAME = "test"
LOCAL = [str(ROOT / "cluster/local.sh"), "--name", NAME]
FOLDER = local_cluster.folder_of(NAME)
STEPS = 240
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (220, 210, 40)}


def local(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run([*LOCAL, *arguments], env=env, capture_output=True, text=True, check=False, timeout=400)


def clean_environment(home: Path) -> dict[str, str]:
    """Return the environment of a user outside the cluster: no token, no keys."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_")) and not k.endswith("_proxy")}
    return {**kept, "HOME": str(home), "RAY": hosts.RAY}


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Start a cluster of three hosts; yields its users' environment. This process can use its store."""
    if FOLDER.exists():
        assert local("down").returncode == 0
    started = local("up", "--hosts", "3", "--port", "0")
    if "need root" in started.stderr or "no network namespaces" in started.stderr:
        pytest.skip(started.stderr)
    assert started.returncode == 0, started.stderr
    try:
        lines = [shlex.split(line)[1].split("=", 1) for line in local("env").stdout.splitlines()]
        variables = dict(lines)
        for name, value in variables.items():
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, value)
        yield variables
    finally:
        if FOLDER.exists():
            local("down")


def status_of(url: str, token: str | None) -> int:
    request = urllib.request.Request(url, headers={} if token is None else {"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def submit(env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    line = [str(ROOT / "cluster/submit.sh"), *arguments]
    return subprocess.Popen(line, cwd="/", env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output_of_run_command(env: dict[str, str], *arguments: str) -> str:
    """Return the output of t2idist.run outside the cluster."""
    line = [sys.executable, "-m", "t2idist.run", *arguments]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    lines = []
    for number in range(count):
        name = sorted(COLOURS)[number % len(COLOURS)]
        draw = random.Random(number)
        pixels = [tuple(min(255, part + draw.randrange(30)) for part in COLOURS[name]) for _ in range(36 * 36)]
        image = Image.new("RGB", (36, 36))
        image.putdata(pixels)
        image.save(folder / f"{number:03d}.png")
        lines.append(json.dumps({"image": f"{number:03d}.png", "captions": [f"a {name} field", f"all is {name}"]}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def small_recipe(folder: Path, source: str, steps: int) -> Path:
    """Write a recipe for one to three workers of one group each."""
    folder.mkdir()
    file = write_recipe(folder, cluster={"workers": [1, 3], "grow_after_seconds": 5}, storage="s3://bucket/runs")
    values = yaml.safe_load(file.read_text())
    values["data"] = {**values["data"], "source": source}
    for stage in values["stages"].values():
        stage.update(groups=3, checkpoint_every_images=240)
    values["stages"]["attngan"]["images"] = 12 * steps
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def wait_for_step(run: str, stage: str, step: int, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while True:
        assert time.monotonic() < deadline and job.poll() is None, job.stdout.read() if job.stdout else ""
        try:
            message = storage.read_json(f"s3://bucket/runs/{run}/progress.json")
            if message["stage"] == stage and message["images"] >= 12 * step:
                return
        except (FileNotFoundError, KeyError):
            pass
        time.sleep(0.5)


def leftovers() -> list[str]:
    """Return everything of the cluster that is still on this machine."""
    leftover = [str(FOLDER)] if FOLDER.exists() else []
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    leftover += [line for line in spaces.splitlines() if line.startswith(f"t2idist-{NAME}-")]
    leftover += [line for line in links.splitlines() if line.startswith((f"t2b{NAME} ", f"t2v{NAME}n"))]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(f"{FOLDER}/") in arguments and process.name != str(os.getpid()):
            leftover.append(arguments.replace(b"\0", b" ")[:200].decode(errors="replace"))
    return leftover


def holders(secrets: dict[str, str], files: list[tuple[str, bytes]]) -> list[str]:
    return [f"{name} in {where}" for where, data in files for name, value in secrets.items() if value.encode() in data]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_jobs_from_outside_survive_lost_hosts_and_nothing_is_left(users: dict[str, str], tmp_path: Path) -> None:
    outside = clean_environment(tmp_path)
    address = users["RAY_API_SERVER_ADDRESS"]
    check_refusals(outside, users)

    own = write_images(tmp_path / "own", 96)
    assert shard_folder.main(["--folder", str(own), "--out", "s3://bucket/own", "--size", "36"]) == 0
    file = small_recipe(tmp_path / "a", "s3://bucket/own", STEPS)
    job = submit({**outside, **users}, "lost", str(file))
    wait_for_step("lost", "attngan", 40, job)
    assert local("kill", "2").returncode == 0
    output, _ = job.communicate(timeout=400)
    assert job.returncode == 0, output
    assert export.read_index("s3://bucket/runs/lost/attngan/export")["images"] == 12 * STEPS
    attempts = storage.read_json("s3://bucket/runs/lost/attempts.json")
    assert [attempt["workers"] for attempt in attempts][:2] == [3, 2]
    status = output_of_run_command({**outside, **users}, "--status", "s3://bucket/runs/lost")
    assert status.startswith("lost: finished\n") and f"attngan (attngan): done, {12 * STEPS:,} images" in status
    assert f"restarts    {len(attempts) - 1}" in status and ", 2 workers, attngan from " in status

    assert local("start", "2").returncode == 0
    job = submit({**outside, **users}, "embedded", str(small_recipe(tmp_path / "b", "emoji", STEPS)))
    wait_for_step("embedded", "attngan", 20, job)
    assert local("partition", "3").returncode == 0
    second_output, _ = job.communicate(timeout=400)
    assert job.returncode == 0, second_output
    assert local("heal", "3").returncode == 0
    assert export.read_index("s3://bucket/runs/embedded/attngan/export")["images"] == 12 * STEPS
    listed = output_of_run_command({**outside, **users}, "--list", "s3://bucket/runs").splitlines()
    assert {line.split()[0]: line.split()[1] for line in listed[1:]} == {"lost": "finished", "embedded": "finished"}
    assert storage.read_json("s3://bucket/runs/embedded/versions.json")["git"] not in ("", "unknown")

    secret = {name: users[name] for name in ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY")}
    logs = [(str(log), log.read_bytes()) for log in FOLDER.rglob("*") if log.suffix in (".log", ".out", ".err")]
    assert len(logs) > 10
    store = s3fs.S3FileSystem(endpoint_url=users["AWS_ENDPOINT_URL"], skip_instance_cache=True)
    run_files = [(name, store.cat_file(name)) for name in store.find("bucket/runs")]
    assert len(run_files) > 10
    assert holders(secret, [("the job's output", (output + second_output).encode()), *logs, *run_files]) == []

    assert status_of(f"{address}/api/jobs/", users["RAY_AUTH_TOKEN"]) == 200
    ended = local("down")
    assert ended.returncode == 0, ended.stderr
    assert leftovers() == []


def check_refusals(outside: dict[str, str], users: dict[str, str]) -> None:
    """Requests without the token, or with a wrong one, are refused."""
    address = users["RAY_API_SERVER_ADDRESS"]
    plain = [hosts.RAY, "job", "submit", "--address", address, "--", "true"]
    bare = subprocess.run(plain, cwd="/", env=outside, capture_output=True, text=True, check=False, timeout=120)
    assert bare.returncode != 0 and "nauthorized" in bare.stdout + bare.stderr
    wrong = {**outside, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    refused = subprocess.run(plain, cwd="/", env=wrong, capture_output=True, text=True, check=False, timeout=120)
    assert refused.returncode != 0 and "orbidden" in refused.stdout + refused.stderr
    assert status_of(f"{address}/api/jobs/", None) == 401
    assert status_of(f"{address}/api/jobs/", "0" * 64) == 403
    cluster, _, _ = local_cluster.load(NAME)
    with pytest.raises(ConnectionRefusedError):  # the dashboard is on the head's loopback address only
        socket.create_connection((cluster.addresses[hosts.HEAD], hosts.DASHBOARD_PORT), timeout=5).close()


def test_forward_passes_data_and_the_end_of_the_stream() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(
            target=local_cluster.forward, args=(listening.dup(), server.getsockname()), daemon=True
        ).start()
        with socket.create_connection(listening.getsockname(), timeout=10) as client:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            passed, _ = server.accept()
            with passed:
                assert passed.recv(100) == b"question" and passed.recv(100) == b""
                passed.sendall(b"answer")
            assert client.recv(100) == b"answer" and client.recv(100) == b""


def test_load_restores_a_cluster_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = local_cluster.folder_of("mine")
    folder.mkdir()
    subnet = ipaddress.IPv4Network("10.99.1.0/24")
    cluster = hosts.Cluster("mine", 2, folder, subnet, {"A": "b"}, 1, dashboard=True)
    local_cluster.write_state(cluster, subnet, {"RAY_AUTH_TOKEN": "secret"}, 17)
    loaded, users, store = local_cluster.load("mine")
    assert (loaded.addresses, loaded.env, loaded.folder) == (cluster.addresses, {"A": "b"}, folder)
    assert (users, store) == ({"RAY_AUTH_TOKEN": "secret"}, 17)
    assert (folder / "state.json").stat().st_mode & 0o777 == 0o600
    for host in range(3):
        assert len(loaded._link(host)) <= 15 and len(loaded.bridge) <= 15
