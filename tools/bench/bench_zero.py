"""What dividing the optimiser among workers saves and costs: memory and time by strategy and number of workers.

    python tools/bench/bench_zero.py attngan --preset cub [--workers 1 2 4] [--steps 3] [--group-size 2]

Workers are processes of this machine with gloo between them, each with one group of made-up samples. Columns: bytes of
Adam's state on a worker, its resident memory after the last step, the median seconds of a step after one that does not
count, and seconds to gather the state for a checkpoint (all of them the largest over workers).
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
from tools.bench.bench_step import NOWHERE, synthetic_batch, system_of

STRATEGIES = {"ddp": 0, "zero 1": 1, "zero 2": 2}


def work(rank: int, size: int, folder: str, run: RunConfig, stage: str, zero: int, steps: int, answers: Any) -> None:
    """One worker: give (bytes of Adam's state, resident bytes, seconds a step, seconds to gather)."""
    torch.set_num_threads(1)
    world = World(device=torch.device("cpu"))
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
        world = World(rank, size, world.device, dist.group.WORLD)
    system, plan = system_of(run, stage, 5450)
    trainer = Trainer(
        system,
        stage="bench",
        seed=0,
        group_size=plan.group_size,
        share=Share.of(world, size),
        world=world,
        precision=Precision(run.precision),
        zero=zero,
    )
    batch = synthetic_batch(system.sizes, plan)
    step_seconds = [_seconds(lambda: trainer.run_step(batch)) for _ in range(steps + 1)]
    resident = _resident_bytes()
    gather_seconds = _seconds(trainer.state)
    answers.put((trainer.optimizer_bytes(), resident, statistics.median(step_seconds[1:]), gather_seconds))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def measure(run: RunConfig, stage: str, size: int, zero: int, steps: int) -> tuple[float, ...]:
    """The largest of each value over the workers."""
    context = mp.get_context("spawn")
    answers: Queue[tuple[float, ...]] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (size, folder, run, stage, zero, steps, answers), size, start_method="spawn")
    rows = [answers.get(timeout=60) for _ in range(size)]
    return tuple(max(column) for column in zip(*rows, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", help="a stage's system: damsm, attngan, stackgan_pp")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each setting")
    parser.add_argument("--group-size", type=int, default=2, help="samples of a worker's one group")
    words = parser.parse_args()
    recipe = {"damsm": "attngan"}.get(words.system, words.system)
    run = configuration.load(recipe, [f"preset={words.preset}", NOWHERE])
    stage = next(name for name, each in run.stages.items() if each.system == words.system)
    run = configuration.load(
        recipe, [f"preset={words.preset}", NOWHERE, f"stages.{stage}.group_size={words.group_size}"]
    )
    print(f"{'workers':>7}  {'strategy':8}  {'Adam MiB':>9}  {'of ddp':>6}  {'resident MiB':>12}  step s  gather s")
    for size in words.workers:
        whole = 0.0
        for name, zero in STRATEGIES.items() if size > 1 else [("ddp", 0)]:
            adam, resident, step, gather = measure(run, stage, size, zero, words.steps)
            whole = whole or adam
            print(
                f"{size:7}  {name:8}  {adam / 2**20:9.1f}  {adam / whole:6.3f}  {resident / 2**20:12.0f}  {step:6.2f}  "
                f"{gather:8.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
