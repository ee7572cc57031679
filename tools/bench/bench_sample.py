"""Pictures a second of a generator: the authors' way (float32, layers as they are) and ours, in turns.

    python tools/bench/bench_sample.py attngan --preset cub [--batch-size 20] [--steps 5] [--threads 2] [--device cpu]

Networks have newly drawn weights; each way has a process of its own, and its best batch counts.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from t2idist.contract import BuildInfo, Sample, SupportsSample, System
from t2idist.evaluate.monitor import can_draw
from t2idist.nn.fast.memory import keep_freed_memory
from t2idist.sampling.generate import NormalDraw, generate
from t2idist.sampling.loading import network
from tools.bench import authors_way, bench_step

WAYS = ("authors", "float32", "bfloat16")


def drawing_system(words: argparse.Namespace) -> tuple[System, BuildInfo]:
    """With newly drawn weights. Raises ValueError for what draws no pictures."""
    run, stage = bench_step.chosen_stage(words)
    system, plan = bench_step.system_of(run, stage, words.vocabulary_size)
    if not can_draw(system):
        raise ValueError(f"{words.system} draws no pictures of captions")
    return system, plan


def ways(words: argparse.Namespace) -> dict[str, Callable[[], Sample]]:
    """Draw a batch: the authors' way, and ours in both precisions."""
    system, plan = drawing_system(words)
    device, count = torch.device(words.device), words.batch_size
    nets = {
        name.rpartition(".")[2]: network(system, name).to(device).eval().requires_grad_(False)
        for name in system.exports
    }
    quick = copy.deepcopy(nets)
    batch = bench_step.synthetic_batch(system.sizes, plan, count)

    def theirs() -> Sample:
        with torch.inference_mode(), authors_way.losses():
            return cast(SupportsSample, system).sample(
                nets, batch.captions.to(device), NormalDraw(0, range(count), device)
            )

    def ours(precision: str) -> Callable[[], Sample]:
        return lambda: generate(
            cast(SupportsSample, system),
            quick,
            batch.captions,
            NormalDraw(0, range(count), device),
            device=device,
            precision=precision,
        )

    return dict(zip(WAYS, (theirs, *map(ours, WAYS[1:])), strict=True))


class Drawing:
    """A way to draw, in this process."""

    def __init__(self, draw: Callable[[], Sample], device: torch.device) -> None:
        self._draw, self._device = draw, device

    def seconds(self) -> float:
        start = time.perf_counter()
        self._draw()
        bench_step.synchronise(self._device)
        return time.perf_counter() - start


def make_way(name: str, words: argparse.Namespace) -> Drawing:
    if name != "authors":
        keep_freed_memory()
    return Drawing(ways(words)[name], torch.device(words.device))


def parser() -> argparse.ArgumentParser:
    made = bench_step.parser()
    made.description = __doc__
    made.add_argument("--batch-size", type=int, default=20, help="pictures drawn at a time (default: %(default)s)")
    return made


def main() -> int:
    words = parser().parse_args()
    try:
        with torch.device("meta"):
            drawing_system(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    made = {name: bench_step.Remote(make_way, name, words) for name in WAYS}
    try:
        best = {name: way.ask("seconds") for name, way in made.items()}
        for _ in range(words.steps):
            best = {name: min(best[name], way.ask("seconds")) for name, way in made.items()}
    finally:
        for way in made.values():
            way.close()
    what = f"{words.system} preset={words.preset}"
    print(f"{what}: {words.batch_size} at a time, {words.threads} threads, {words.device}")
    for name, seconds in best.items():
        ratio = best["authors"] / seconds
        print(f"{name:10} {words.batch_size / seconds:10.1f} images/s {ratio:8.2f} times the authors'")
    return bench_step.too_slow(best, "bfloat16", words.floor)


if __name__ == "__main__":
    sys.exit(main())
