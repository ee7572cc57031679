"""Measure pictures per second and latency of ``t2idist serve`` by clients and pictures in a request, beside `sample`.

    python tools/bench/bench_serve.py attngan --preset cub [--clients 1 8 32] [--n 1 4 16] [--seconds 10] [--rounds 3]
        [--threads 1] [--replicas 0] [--export URL] [--floor 0.85]

Networks have random weights, unless an export is given. `sample` draws 4 pictures of a sentence at a time and writes
them, as the command does, in a process of its own, for as long before every round: other load on the machine affects
both alike. The round with the median ratio counts. --replicas 0 is --local, more are replicas on Ray Serve.
--floor is the least ratio of served to sampled pictures per second at the most clients, for requests of 4.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from t2idist import storage
from t2idist.config.strict import to_dict
from t2idist.data.tokenizer import END_TOKEN
from t2idist.engine.checkpoint import export
from t2idist.nn.fast.memory import keep_freed_memory
from t2idist.observability.command import command
from t2idist.sampling.axes import BATCH_IMAGES, SheetRow, noise_columns
from t2idist.sampling.draw import draw_row
from t2idist.sampling.drawings import export_sha256, png_with_settings, sample_settings
from t2idist.sampling.figures import to_pil
from t2idist.sampling.loading import exported_network, load_export
from t2idist.sampling.sentence_reader import SentenceReader
from t2idist.training.stages import StageRun
from tools.bench import bench_step

START_SECONDS = 300
SENTENCES = 32
WORDS_PER_SENTENCE = 8


@dataclass(frozen=True)
class Measured:
    """Pictures and latency of one round."""

    pictures_per_second: float
    median_ms: float
    p99_ms: float
    sampled_per_second: float = 0.0
    """Pictures of `sample`, measured just before."""

    @property
    def ratio(self) -> float:
        return self.pictures_per_second / self.sampled_per_second


def write_random_export(options: argparse.Namespace, url: str) -> None:
    """Write an export of a recipe's stage with random weights."""
    run, name = bench_step.select_stage(options)
    system, info = bench_step.build_system(run, name, options.vocabulary_size)
    nets = {dotted.rpartition(".")[2]: exported_network(system, dotted) for dotted in system.exports}
    index = {
        "system": options.system,
        "config": to_dict(StageRun(run, name).model_config()),
        "plan": info.describe(),
        "vocabulary": [END_TOKEN, *(f"word{i}" for i in range(1, info.vocabulary_size))],
        "images": 0,
    }
    export.write(url, nets, index)


def sentences(url: str) -> list[str]:
    """Return sentences of known words."""
    words = export.read_index(url)["vocabulary"][1:]
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, WORDS_PER_SENTENCE)) for _ in range(SENTENCES)]


# ------------------------------------------------------------ sample
def sample_rounds(connection: Connection, url: str, threads: int, folder: str) -> None:
    """Sample for as many seconds as is asked for, again and again; the function of a process."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    device = torch.device("cpu")
    loaded = load_export(url, device)
    reader = SentenceReader(loaded, device, None, option="--encoder")
    settings = sample_settings(export_sha256(url), seed=0, columns=BATCH_IMAGES)
    texts = sentences(url)
    while (seconds := connection.recv()) is not None:
        drawn, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            text = texts[drawn // BATCH_IMAGES % len(texts)]
            row = SheetRow(text, reader.read_text(text).captions, loaded.nets)
            columns = noise_columns(drawn, BATCH_IMAGES, float("inf"), device)
            for i, image in enumerate(draw_row(loaded, row, columns, device).images[-1]):
                png = png_with_settings(to_pil(image), {**settings, "sentence": text})
                storage.write_bytes(storage.join(folder, f"{i}.png"), png)
            drawn += BATCH_IMAGES
        connection.send(drawn / (time.perf_counter() - start))


# ------------------------------------------------------------ serve
@contextlib.contextmanager
def server(url: str, options: argparse.Namespace) -> Iterator[int]:
    """Run the server as a program; yields its port."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(ROOT)}
    where = ["--replicas", str(options.replicas), "--cpus-per-replica", str(options.threads)]
    words = [sys.executable, "-m", "t2idist.cli", "serve", "--export", url, "--port", "0", "--queue", "4096"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*words, *(where if options.replicas else ["--local"])], env=environment, stdout=log, stderr=log
        )
        try:
            yield _port(process, log.fileno())
        finally:
            process.terminate()
            process.wait()


def _port(process: subprocess.Popen[bytes], log: int) -> int:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        text = os.pread(log, 1 << 16, 0).decode(errors="replace")
        if found := re.search(r"^serving .* at http://\S+:(\d+)", text, re.M):
            return int(found[1])
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start: {os.pread(log, 1 << 16, 0).decode(errors='replace')[-500:]}")


def served_round(port: int, texts: Sequence[str], clients: int, n: int, seconds: float) -> Measured:
    """Ask from so many clients, each again as soon as it is answered."""
    latencies: list[float] = []
    begin = time.perf_counter()

    def ask(client: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
        number = client
        while (start := time.perf_counter()) - begin < seconds:
            body = json.dumps({"text": texts[number % len(texts)], "n": n, "seed": number})
            connection.request("POST", "/draw", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}: {content[:200]!r}")
            latencies.append(time.perf_counter() - start)
            number += clients
        connection.close()

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = time.perf_counter() - begin
    median, p99 = (1e3 * float(value) for value in np.percentile(latencies, (50, 99)))
    return Measured(len(latencies) * n / total, median, p99)


# ------------------------------------------------------------ the program
def build_parser() -> argparse.ArgumentParser:
    parser = bench_step.build_parser()
    parser.description = __doc__
    add = parser.add_argument
    add("--export", metavar="URL", help="measure this export instead of random weights")
    add("--clients", type=int, nargs="+", default=[1, 8, 32], help="clients at once (default: 1 8 32)")
    add("--n", type=int, nargs="+", default=[1, 4, 16], help="pictures in a request (default: 1 4 16)")
    add("--seconds", type=float, default=10.0, help="of a round (default: %(default)s)")
    add("--rounds", type=int, default=3, help="rounds of each (default: %(default)s)")
    add("--replicas", type=int, default=0, help="replicas on Ray Serve; 0: --local (default: 0)")
    return parser


def measure(url: str, options: argparse.Namespace, folder: str) -> dict[tuple[int, int], list[Measured]]:
    """Return the rounds by clients and pictures in a request."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=sample_rounds, args=(theirs, url, options.threads, folder), daemon=True)
    process.start()
    theirs.close()  # so that recv raises EOFError if the process dies
    texts = sentences(url)
    rounds: dict[tuple[int, int], list[Measured]] = {(c, n): [] for c in options.clients for n in options.n}

    def sample(seconds: float) -> float:
        ours.send(seconds)
        try:
            return float(ours.recv())
        except EOFError:
            raise RuntimeError("the process that samples has died") from None

    sample(1.0)
    with server(url, options) as port:
        served_round(port, texts, 4, BATCH_IMAGES, 1.0)
        for _ in range(options.rounds):
            for (clients, n), found in rounds.items():
                sampled = sample(options.seconds)
                served = served_round(port, texts, clients, n, options.seconds)
                found.append(replace(served, sampled_per_second=sampled))
    ours.send(None)
    process.join()
    return rounds


@command("error")
def main() -> int:
    options = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = options.export or f"{folder}/export"
        if options.export is None:
            write_random_export(options, url)
        rounds = measure(url, options, folder)
    where = f"{options.replicas} replicas on Ray" if options.replicas else "--local"
    print(f"{options.export or f'{options.system} preset={options.preset}'}: {where}, {options.threads} threads")
    sampled = statistics.median(each.sampled_per_second for found in rounds.values() for each in found)
    print(f"sample, {BATCH_IMAGES} at a time: {sampled:.1f} pictures/s")
    print("clients  n  pictures/s  of sample  p50 ms  p99 ms")
    ratios = {}
    for (clients, n), found in rounds.items():
        middle = sorted(found, key=lambda each: each.ratio)[len(found) // 2]
        ratios[clients, n] = middle.ratio
        rates = f"{middle.pictures_per_second:11.1f} {middle.ratio:10.2f}"
        print(f"{clients:7} {n:2} {rates} {middle.median_ms:7.0f} {middle.p99_ms:7.0f}")
    ratio = ratios[max(options.clients), BATCH_IMAGES] if options.floor is not None else 0.0
    if options.floor is not None and ratio < options.floor:
        print(f"error: {ratio:.2f} of what sample draws; --floor is {options.floor:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
