"""Measure checkpoint saving: how long training stalls, how long writing takes, and simpler ways with the same state.

    python tools/bench/bench_checkpoint.py attngan --preset coco --url /tmp/bench [--repeats 3] [--threads 2]

The state is that of a whole training run (weights, both Adam moments, EMA, buffers). All ways write the same bytes to
the same storage, in turns; the best time of each counts.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import time
import uuid
from collections.abc import Callable

import torch
import torch.distributed.checkpoint as plain_dcp
from torch import Tensor

from t2idist import config as configuration
from t2idist import storage
from t2idist.config import CheckpointConfig
from t2idist.engine.checkpoint.manager import CheckpointManager
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World
from t2idist.observability.command import command
from tools.bench.bench_step import EMPTY_STORAGE, build_system, build_trainer


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(trainer: Trainer, url: str, repeats: int) -> dict[str, float]:
    """Return the best seconds of each way."""
    state = trainer.state()
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    flat = [tensor.detach().reshape(-1) for tensor in state.values()]
    copies = [torch.empty_like(tensor, device="cpu") for tensor in flat]
    raw = torch.empty(size, dtype=torch.uint8)
    raw.random_(0, 256)
    local = storage.local_path(url)
    checkpoints = CheckpointManager(storage.join(url, "ours"), World(), CheckpointConfig(keep=1), {})
    best: dict[str, float] = {}

    def keep_best(name: str, value: float) -> None:
        best[name] = min(best.get(name, value), value)

    def copy_state(targets: list[Tensor]) -> None:
        for target, source in zip(targets, flat, strict=True):
            target.copy_(source)

    for number in range(repeats + 1):
        trainer.step += 1
        start = time.perf_counter()
        checkpoints.save(trainer)
        stall = time.perf_counter() - start
        checkpoints.finish()
        whole = time.perf_counter() - start
        copied = seconds(lambda: copy_state(copies))
        written = seconds(lambda: storage.write_bytes(storage.join(url, "plain"), raw.numpy().data))
        if number == 0:  # the first save also plans the shards and allocates its buffers
            best["first stall"] = stall
            continue
        keep_best("stall", stall)
        keep_best("bare copy in memory", copied)
        keep_best("written during training", whole - stall)
        keep_best("same bytes in one write", written)
        if local is not None:
            local.mkdir(parents=True, exist_ok=True)
            keep_best("torch.save (blocks)", seconds(lambda: torch.save(state, local / "torch.pt")))
            folder = local / f"dcp-{number}"
            keep_best("plain DCP (blocks)", seconds(functools.partial(_save_dcp, state, str(folder))))
            shutil.rmtree(folder)
    storage.remove(url)
    return best


def _save_dcp(state: dict[str, Tensor], folder: str) -> None:
    plain_dcp.save(dict(state), checkpoint_id=folder, no_dist=True)


@command("error")
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", nargs="?", default="attngan")
    parser.add_argument("--preset", default="coco")
    parser.add_argument("--url", default="/tmp", help="a folder or object store URL; a new folder is created in it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocabulary-size", type=int, default=27_297)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = configuration.load(options.system, [f"preset={options.preset}", EMPTY_STORAGE])
    stage_name = next(name for name, stage in run.stages.items() if stage.system == options.system)
    system, info = build_system(run, stage_name, options.vocabulary_size)
    device = torch.device(options.device)
    trainer = build_trainer(system, info, Precision.of(run.precision, device), device)
    size = sum(tensor.numel() * tensor.element_size() for tensor in trainer.state().values())
    print(
        f"{options.system} preset={options.preset}: {size / 1e9:.2f} GB of state, {options.threads} threads, "
        f"{options.device}"
    )
    best = measure(trainer, storage.join(options.url, f"bench-{uuid.uuid4().hex[:8]}"), options.repeats)
    for name, value in best.items():
        print(f"{name:36}{value:9.3f} s{size / value / 1e9:9.2f} GB/s")
    print(f"stall / bare copy                   {best['stall'] / best['bare copy in memory']:9.2f}")
    background, single = best["written during training"], best["same bytes in one write"]
    print(f"during training / in one write      {background / single:9.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
