"""What a checkpoint costs: how long training stalls, how long it is written, beside plainer ways with the same state.

    python tools/bench/bench_checkpoint.py attngan --preset coco --url /tmp/bench [--repeats 3] [--threads 2]

The state is that of a whole training (weights, both Adam moments, EMA, buffers). Every way writes the same bytes to the
same place, in turns; the best of each counts.
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
from tools.bench.bench_step import NOWHERE, stopwatch, system_of


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(trainer: Trainer, url: str, repeats: int) -> dict[str, float]:
    """Best seconds of each way."""
    state = trainer.state()
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    flat = [tensor.detach().reshape(-1) for tensor in state.values()]
    copies = [torch.empty_like(tensor, device="cpu") for tensor in flat]
    raw = torch.empty(size, dtype=torch.uint8)
    raw.random_(0, 256)
    local = storage.local_path(url)
    checkpoints = CheckpointManager(storage.join(url, "ours"), World(), CheckpointConfig(keep=1), {})
    best: dict[str, float] = {}

    def take(name: str, value: float) -> None:
        best[name] = min(best.get(name, value), value)

    def copy(targets: list[Tensor]) -> None:
        for target, source in zip(targets, flat, strict=True):
            target.copy_(source)

    for number in range(repeats + 1):
        trainer.step += 1
        began = time.perf_counter()
        checkpoints.save(trainer)
        stall = time.perf_counter() - began
        checkpoints.finish()
        whole = time.perf_counter() - began
        copied = seconds(lambda: copy(copies))
        written = seconds(lambda: storage.write_bytes(storage.join(url, "plain"), raw.numpy().data))
        if number == 0:  # the first save also plans, and touches its memory for the first time
            best["first stall"] = stall
            continue
        take("stall", stall)
        take("bare copy in memory", copied)
        take("written beside the training", whole - stall)
        take("the same bytes written plainly", written)
        if local is not None:
            local.mkdir(parents=True, exist_ok=True)
            take("torch.save (blocks)", seconds(lambda: torch.save(state, local / "torch.pt")))
            folder = local / f"dcp-{number}"
            take("plain DCP (blocks)", seconds(functools.partial(_plain_dcp, state, str(folder))))
            shutil.rmtree(folder)
    storage.remove(url)
    return best


def _plain_dcp(state: dict[str, Tensor], folder: str) -> None:
    plain_dcp.save(dict(state), checkpoint_id=folder, no_dist=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", nargs="?", default="attngan")
    parser.add_argument("--preset", default="coco")
    parser.add_argument("--url", default="/tmp", help="a folder or object store URL; a folder of its own is made in it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocabulary-size", type=int, default=27_297)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    try:
        run = configuration.load(words.system, [f"preset={words.preset}", NOWHERE])
        name = next(name for name, stage in run.stages.items() if stage.system == words.system)
        system, plan = system_of(run, name, words.vocabulary_size)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    trainer = stopwatch(system, plan, Precision(run.precision), torch.device(words.device))
    size = sum(tensor.numel() * tensor.element_size() for tensor in trainer.state().values())
    print(
        f"{words.system} preset={words.preset}: {size / 1e9:.2f} GB of state, {words.threads} threads, {words.device}"
    )
    best = measure(trainer, storage.join(words.url, f"bench-{uuid.uuid4().hex[:8]}"), words.repeats)
    for what, value in best.items():
        print(f"{what:36}{value:9.3f} s{size / value / 1e9:9.2f} GB/s")
    print(f"stall / bare copy                   {best['stall'] / best['bare copy in memory']:9.2f}")
    background, plainly = best["written beside the training"], best["the same bytes written plainly"]
    print(f"written beside / written plainly    {background / plainly:9.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
