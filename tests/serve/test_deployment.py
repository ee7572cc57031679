"""On Ray Serve: the bytes of the command, a full queue, and replicas that are killed."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import t2idist
from tests.helpers.served import Client, command
from tests.sampling.conftest import FIRST, SECOND

pytestmark = pytest.mark.whole
TEXTS = (FIRST, SECOND, "heart", "a red face word1 word2")
SEEDS = 12
LEAVES = 5
"""Every so many requests, a client leaves."""
REPLICAS = 2


@dataclass(frozen=True)
class Served:
    """A server on Ray."""

    client: Client
    pid: int


@pytest.fixture(scope="module")
def on_ray(served: dict[str, str], home: Path) -> Iterator[Served]:
    options = ["--replicas", str(REPLICAS), "--cpus-per-replica", "0.5", "--max-images", "32", "--queue", "32"]
    with command(home, "--export", served["attngan"], *options) as (client, process):
        yield Served(client, process.pid)


def expected(url: str) -> dict[tuple[str, int], list[bytes]]:
    """Return the pixels of 4 images of each sentence and seed."""
    model = t2idist.load(url)
    return {
        (text, seed): [image.tobytes() for image in model.draw(text, seed=seed)]
        for text in TEXTS
        for seed in range(SEEDS)
    }


def pixels(files: list[list[bytes]]) -> list[bytes]:
    return [Image.open(io.BytesIO(png)).tobytes() for (png,) in files]


def replica_pids(server: int) -> list[int]:
    """Return the processes of the replicas: descendants of the server's process."""
    parents: dict[int, int] = {}
    names: dict[int, bytes] = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                pid = int(folder.name)
                names[pid] = (folder / "cmdline").read_bytes()
                parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])

    def belongs(pid: int) -> bool:
        return pid == server or (pid in parents and belongs(parents[pid]))

    return [pid for pid, name in names.items() if name.startswith(b"ray::ServeReplica") and belongs(pid)]


def resident_kib(pids: list[int]) -> int:
    """Return the memory of processes together."""
    return sum(int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) for pid in pids)


def test_the_same_as_local(on_ray: Served, served: dict[str, str]) -> None:
    client, model = on_ray.client, t2idist.load(served["attngan"])
    assert pixels(client.draw(text=FIRST, n=6, seed=2).files) == [
        image.tobytes() for image in model.draw(FIRST, n=6, seed=2)
    ]
    assert client.ask("/healthz").json["ok"] and client.ask("/").headers["content-security-policy"]
    assert client.ask("/model", Host="evil.example").status == 421
    assert client.draw(text=FIRST, n=10**6).error == "n 1000000: give at least 1 and at most 32"
    assert client.draw(text="zeppelins").status == 422
    assert client.ask("/translate", b"x" * (17 << 20), Content_Type="image/png").status == 413


def test_a_full_queue_answers_503(on_ray: Served) -> None:
    client = on_ray.client
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda seed: client.draw(text=FIRST, n=32, seed=seed), range(24)))
    statuses = Counter(answer.status for answer in answers)
    assert set(statuses) == {200, 503}, statuses
    for answer in answers:
        if answer.status == 503:
            assert "the queue is full" in answer.error
    assert client.draw(text=FIRST, n=32).status == 200


def ask_many(client: Client, count: int, wanted: dict[tuple[str, int], list[bytes]]) -> Counter[str]:
    """Ask from 16 clients, some of which leave; returns how many answers were right, wrong, refused and lost.

    While the queue is full, as it may be until a new replica is ready, clients wait and ask again.
    """
    deadline = time.monotonic() + 240
    rng = random.Random(3)
    asked = [(rng.choice(TEXTS), rng.randrange(SEEDS), rng.choice((1, 1, 2, 4))) for _ in range(count)]

    def ask(number: int) -> str:
        text, seed, n = asked[number]
        if number % LEAVES == 0:
            try:
                client.leave(text=text, seed=seed, n=n)
            except OSError:
                return "lost"
            return "left"
        try:
            answer = client.draw(text=text, seed=seed, n=n)
            while answer.status == 503 and time.monotonic() < deadline:
                time.sleep(float(answer.headers["retry-after"]))
                answer = client.draw(text=text, seed=seed, n=n)
        except (OSError, http.client.HTTPException):  # also an answer that was cut off
            return "lost"
        if answer.status != 200:
            return f"status {answer.status}"
        return "right" if pixels(answer.files) == wanted[text, seed][:n] else "wrong"

    with ThreadPoolExecutor(16) as pool:
        return Counter(pool.map(ask, range(count)))


@contextlib.contextmanager
def replicas_killed(server: int, every: float) -> Iterator[list[int]]:
    """Kill a replica every so many seconds while the block runs, when there are as many as there should be."""
    ended, killed = threading.Event(), list[int]()

    def kill() -> None:
        while not ended.wait(every):
            pids = replica_pids(server)
            if len(pids) == REPLICAS:
                killed.append(random.choice(pids))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


def wait_for_replicas(served: Served, seconds: float = 60) -> list[int]:
    """Wait until all replicas run and nothing waits; returns their processes."""
    deadline = time.monotonic() + seconds
    while True:
        pids = replica_pids(served.pid)
        with contextlib.suppress(OSError):
            answers = [served.client.ask("/healthz") for _ in range(4)]
            if len(pids) == REPLICAS and all(a.status == 200 and a.json == {"ok": True, "waiting": 0} for a in answers):
                return pids
        assert time.monotonic() < deadline, pids
        time.sleep(0.2)


@pytest.mark.slow
def test_a_killed_replica_is_replaced_and_no_picture_is_wrong(on_ray: Served, served: dict[str, str]) -> None:
    wanted = expected(served["attngan"])
    before = set(wait_for_replicas(on_ray))
    with replicas_killed(on_ray.pid, every=1.0) as killed:
        results = ask_many(on_ray.client, 300, wanted)
        while not killed:
            results += ask_many(on_ray.client, 100, wanted)
    assert killed and results["wrong"] == 0, results
    assert results["right"] > 0.5 * sum(results.values()), results
    after = set(wait_for_replicas(on_ray))
    assert after != before and not after & set(killed)
    assert ask_many(on_ray.client, 50, wanted).keys() == {"right", "left"}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_requests_leave_no_picture_wrong_and_no_memory_taken(on_ray: Served, served: dict[str, str]) -> None:
    """With clients that leave and replicas killed; T2IDIST_REQUESTS is their number."""
    count = int(os.environ.get("T2IDIST_REQUESTS", "2000"))
    wanted = expected(served["attngan"])
    ask_many(on_ray.client, 400, wanted)
    before = resident_kib(wait_for_replicas(on_ray))
    first = ask_many(on_ray.client, count // 2, wanted)
    after = resident_kib(wait_for_replicas(on_ray))
    with replicas_killed(on_ray.pid, every=3.0) as killed:
        second = ask_many(on_ray.client, count - count // 2, wanted)
    wait_for_replicas(on_ray)
    print(f"{first=} {second=} {len(killed)} killed, {before} KiB, then {after} KiB")
    assert set(first) == {"right", "left"} and second["wrong"] == 0
    assert second["right"] > 0.5 * sum(second.values()) and killed
    assert after - before < 100 << 10, "KiB of two replicas; a leak of one answer a request would be twice that"
