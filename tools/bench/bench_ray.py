"""Measure the cost of distribution: one worker with all cores, N workers with a core each, and N under torchrun.

    python tools/bench/bench_ray.py attngan [--workers 2] [--images 6400] [--rounds 3] [key.path=value ...]

All train the recipe's demo with the same groups and number of images, in turns, each into its own folder; the rate is
the median of the metric lines after the first third. Replicas in memory are off, so that torchrun differs only by Ray.
Also printed: the time from the command to the first step, to the second, and the largest memory of a worker's process
and of all processes together, sampled every 5 s (PSS: shared pages are divided among those that share them).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import re
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
from t2idist.observability.command import command
from t2idist.training import worker

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.helpers.runs import processes_with_mark

WORKER = re.compile("ray::[A-Za-z]*Worker|--torchrun=|--local")
"""Titles of the processes that train."""
_SAMPLE_SECONDS = 5.0


def load_config(options: argparse.Namespace, folder: Path, workers: int) -> RunConfig:
    settings = [
        f"storage={folder}", "checkpoint.memory=false", f"cluster.workers={workers}",
        f"cluster.cpus_per_worker={options.workers // workers}",
    ]  # fmt: skip
    for name in configuration.load(options.system, []).stages:
        images, stage = options.images if name == options.system else 1, f"stages.{name}"
        settings += [f"{stage}.groups={options.workers}", f"{stage}.images={images}"]
        settings += [f"{stage}.{kind}_every_images={10 * options.images}" for kind in ("checkpoint", "pictures")]
    return configuration.load(options.system, [*settings, *options.settings])


def rate(run: Path, stage: str) -> float:
    """Return the images per second of a stage after its start."""
    rates: list[float] = [
        line["images_per_second"] for line in read_metrics(str(run / stage)) if "images_per_second" in line
    ]
    return statistics.median(rates[len(rates) // 3 :])


def first_step(run: Path, config: RunConfig) -> float:
    """Return when the first stage wrote its first metrics: after its first step, if the stage is short."""
    return datetime.datetime.fromisoformat(read_metrics(str(run / next(iter(config.stages))))[0]["time"]).timestamp()


def run_and_measure(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Run a command; return the largest memory (MiB) of one of its workers, and of all processes that it started.

    Raises SystemExit if it fails.
    """
    mark, worker, total = f"{os.getpid()}-{time.time_ns()}", 0.0, 0.0
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env={**env, "T2IDIST_MARK": mark}, cwd=ROOT, stdout=log, stderr=log)
        while process.poll() is None:
            memory = [(title, pss(pid)) for pid, title in processes_with_mark(mark).items()]
            total = max(total, sum(each for _, each in memory))
            worker = max([worker, *(each for title, each in memory if WORKER.search(title))])
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SAMPLE_SECONDS)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{command} failed:\n{log.read()[-3000:]}")
    return worker, total


def pss(pid: int) -> float:
    """Return the proportional set size of a process in MiB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def under_torchrun(options: argparse.Namespace, folder: Path) -> None:
    """Run one process of torchrun."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    worker.main(load_config(options, folder, options.workers), torch.device("cpu"), worker.WorkerContext())
    dist.destroy_process_group()


@command("error")
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system")
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torchrun", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.torchrun:
        under_torchrun(options, Path(options.torchrun))
        return 0
    arguments = [options.system, *options.settings, f"--workers={options.workers}", f"--images={options.images}"]
    module = ["-m", "torch.distributed.run", f"--nproc-per-node={options.workers}"]
    torchrun = [sys.executable, *module, __file__, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launchers = {"one worker": 1, "Ray Train": options.workers, "torchrun": options.workers}
    rates: dict[str, list[float]] = {name: [] for name in launchers}
    start_seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="t2idist-bench-") as folder:
        for number in range(options.rounds):
            for name, workers in launchers.items():
                run_folder = Path(folder) / f"{number}-{name.split()[0]}"
                run_folder.mkdir()
                config = load_config(options, run_folder, workers)
                command = [*torchrun, f"--torchrun={run_folder}"]
                if name != "torchrun":
                    recipe = run_folder / "recipe.yaml"
                    recipe.write_text(to_yaml(config))
                    command = [sys.executable, "-m", "t2idist.run", str(recipe)]
                start = time.time()
                largest, total = run_and_measure(command, env)
                rates[name].append(rate(run_folder / config.name, options.system))
                delay = first_step(run_folder / config.name, config) - start
                print(
                    f"round {number}: {name:10} {rates[name][-1]:.1f} images/s, first step after {delay:.0f} s, "
                    f"at most {largest:.0f} MiB in a worker's process, {total:.0f} MiB in all",
                    flush=True,
                )
                if name == "Ray Train":
                    start_seconds.append(delay)
    single, ray, torchrun_rate = (statistics.median(each) for each in rates.values())
    print(f"medians of {options.rounds} rounds:")
    print(
        f"{options.workers} workers of one core reach {ray / single:.3f} times the images/s of "
        f"one worker of {options.workers}"
    )
    print(f"a step under Ray Train takes {torchrun_rate / ray:.3f} times that under torchrun")
    print(f"the first step ends {statistics.median(start_seconds):.0f} s after the command")
    return 0


if __name__ == "__main__":
    sys.exit(main())
