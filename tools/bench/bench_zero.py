"""Measure what ZeRO saves and costs: memory and time by strategy and number of workers.

    python tools/bench/bench_zero.py attngan --preset cub [--workers 1 2 4] [--steps 3] [--group-size 2]

Workers are processes on this machine that communicate by gloo, each with one group of synthetic samples. Columns: bytes
of Adam's state on a worker, its resident memory after the last step, the median seconds per step (without the first),
and seconds to gather the state for a checkpoint. All are the largest over the workers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from t2idist import config as configuration
from t2idist.config import RunConfig
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from t2idist.observability.command import command
from tools.bench.bench_step import EMPTY_STORAGE, build_system, synthetic_batch

STRATEGIES = {"ddp": 0, "zero 1": 1, "zero 2": 2}


def run_worker(
    rank: int, size: int, folder: str, run: RunConfig, stage: str, zero: int, steps: int, results: Any
) -> None:
    """Put (bytes of Adam's state, resident bytes, seconds per step, seconds to gather) into `results`."""
    torch.set_num_threads(1)
    world = World(device=torch.device("cpu"))
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
        world = World(rank, size, world.device, dist.group.WORLD)
    system, info = build_system(run, stage, 5450)
    trainer = Trainer(
        system,
        stage="bench",
        seed=0,
        group_size=info.group_size,
        share=Share.of(world, size),
        world=world,
        precision=Precision.of(run.precision, world.device),
        zero=zero,
    )
    batch = synthetic_batch(system.sizes, info)
    step_seconds = [_seconds(lambda: trainer.run_step(batch)) for _ in range(steps + 1)]
    resident = _resident_bytes()
    gather_seconds = _seconds(trainer.state)
    results.put((trainer.optimizer_bytes(), resident, statistics.median(step_seconds[1:]), gather_seconds))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def _seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def measure(run: RunConfig, stage: str, size: int, zero: int, steps: int) -> tuple[float, ...]:
    """Return the largest of each value over the workers."""
    context = mp.get_context("spawn")
    results: Queue[tuple[float, ...]] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_worker, (size, folder, run, stage, zero, steps, results), size, start_method="spawn")
    rows = [results.get(timeout=60) for _ in range(size)]
    return tuple(max(column) for column in zip(*rows, strict=True))


@command("error")
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", help="a stage's system: damsm, attngan, stackgan_pp")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each setting")
    parser.add_argument("--group-size", type=int, default=2, help="samples of a worker's one group")
    options = parser.parse_args()
    recipe = {"damsm": "attngan"}.get(options.system, options.system)
    run = configuration.load(recipe, [f"preset={options.preset}", EMPTY_STORAGE])
    stage = next(name for name, config in run.stages.items() if config.system == options.system)
    run = configuration.load(
        recipe, [f"preset={options.preset}", EMPTY_STORAGE, f"stages.{stage}.group_size={options.group_size}"]
    )
    print(f"{'workers':>7}  {'strategy':8}  {'Adam MiB':>9}  {'of ddp':>6}  {'resident MiB':>12}  step s  gather s")
    for size in options.workers:
        ddp_bytes = 0.0
        for name, zero in STRATEGIES.items() if size > 1 else [("ddp", 0)]:
            adam, resident, step, gather = measure(run, stage, size, zero, options.steps)
            ddp_bytes = ddp_bytes or adam
            print(
                f"{size:7}  {name:8}  {adam / 2**20:9.1f}  {adam / ddp_bytes:6.3f}  {resident / 2**20:12.0f}  "
                f"{step:6.2f}  {gather:8.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
