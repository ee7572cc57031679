"""What distribution costs: one worker with all cores, so many with a core each, and these under torchrun, without Ray.

    python tools/bench/bench_ray.py attngan [--workers 2] [--images 6400] [--rounds 3] [key.path=value ...]

All train the recipe's demo with the same groups for so many images, in turns, into a folder of their own; the rate is
the median of the metric lines after the first third. Copies in memory are off, so that under torchrun only Ray itself
differs. Besides: how long after the command the first step was done (to a second).
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from t2idist import config as configuration
from t2idist.config import RunConfig
from t2idist.config.strict import to_yaml
from t2idist.engine.metrics import read_metrics
from t2idist.training import worker

ROOT = Path(__file__).parents[2]


def load(words: argparse.Namespace, folder: Path, workers: int) -> RunConfig:
    settings = [
        f"storage={folder}", "checkpoint.memory=false", f"cluster.workers={workers}",
        f"cluster.cpus_per_worker={words.workers // workers}",
    ]  # fmt: skip
    for name in configuration.load(words.system, []).stages:
        images, stage = words.images if name == words.system else 1, f"stages.{name}"
        settings += [f"{stage}.groups={words.workers}", f"{stage}.images={images}"]
        settings += [f"{stage}.{what}_every_images={10 * words.images}" for what in ("checkpoint", "pictures")]
    return configuration.load(words.system, [*settings, *words.settings])


def rate(run: Path, stage: str) -> float:
    """Images a second of a stage once it is under way."""
    rates: list[float] = [
        line["images_per_second"] for line in read_metrics(str(run / stage)) if "images_per_second" in line
    ]
    return statistics.median(rates[len(rates) // 3 :])


def first_step(run: Path, config: RunConfig) -> float:
    """When the first stage wrote its first line: after its first step, where it is short."""
    return datetime.datetime.fromisoformat(read_metrics(str(run / next(iter(config.stages))))[0]["time"]).timestamp()


def under_torchrun(words: argparse.Namespace, folder: Path) -> None:
    """What each process of torchrun does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    worker.main(load(words, folder, words.workers), torch.device("cpu"), worker.WorkerContext())
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system")
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torchrun", help=argparse.SUPPRESS)
    words = parser.parse_intermixed_args()
    if words.torchrun:
        under_torchrun(words, Path(words.torchrun))
        return
    same = [words.system, *words.settings, f"--workers={words.workers}", f"--images={words.images}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={words.workers}", __file__, *same]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ways = {"one worker": 1, "Ray Train": words.workers, "torchrun": words.workers}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    waits: list[float] = []
    with tempfile.TemporaryDirectory(prefix="t2idist-bench-") as folder:
        for number in range(words.rounds):
            for name, workers in ways.items():
                place = Path(folder) / f"{number}-{name.split()[0]}"
                place.mkdir()
                config = load(words, place, workers)
                line = [*torchrun, f"--torchrun={place}"]
                if name != "torchrun":
                    recipe = place / "recipe.yaml"
                    recipe.write_text(to_yaml(config))
                    line = [sys.executable, "-m", "t2idist.run", str(recipe)]
                start = time.time()
                done = subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
                rates[name].append(rate(place / config.name, words.system))
                wait = first_step(place / config.name, config) - start
                print(
                    f"round {number}: {name:10} {rates[name][-1]:.1f} images/s, first step after {wait:.0f} s",
                    flush=True,
                )
                if name == "Ray Train":
                    waits.append(wait)
    one, ray, plain = (statistics.median(each) for each in rates.values())
    print(f"medians of {words.rounds} rounds:")
    print(f"{words.workers} workers of one core do {ray / one:.3f} times the images/s of one worker of {words.workers}")
    print(f"a step under Ray Train takes {plain / ray:.3f} times that under torchrun")
    print(f"the first step is done {statistics.median(waits):.0f} s after the command")


if __name__ == "__main__":
    main()
