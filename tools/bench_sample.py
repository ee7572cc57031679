"""Pictures a second of a generator: the authors' way (float32, layers as they are) and ours, in turns in one process.

    python tools/bench_sample.py attngan --preset cub [--batch-size 20] [--steps 5] [--threads 2] [--device cpu]

Networks have newly drawn weights; the best batch of each way counts.
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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from t2idist.contract import Draws, Sample  # noqa: E402
from t2idist.evaluate.draw import NormalDraw, generate  # noqa: E402
from t2idist.evaluate.load import network  # noqa: E402
from t2idist.evaluate.monitor import can_draw  # noqa: E402
from tools import authors_way, bench_step  # noqa: E402


def ways(words: argparse.Namespace) -> dict[str, Callable[[], Sample]]:
    """Draw a batch: the authors' way, and ours in both precisions. Raises ValueError for what draws none."""
    run, stage = bench_step.chosen_stage(words)
    system, plan = bench_step.system_of(run, stage, words.vocabulary_size)
    if not can_draw(system):
        raise ValueError(f"{words.system} draws no pictures of captions")
    device, count = torch.device(words.device), words.batch_size
    nets = {
        name.rpartition(".")[2]: network(system, name).to(device).eval().requires_grad_(False)
        for name in system.exports
    }
    quick = copy.deepcopy(nets)
    batch = bench_step.synthetic_batch(system.sizes, plan, count)

    def theirs() -> Sample:
        with torch.inference_mode(), authors_way.losses():
            return cast(Draws, system).sample(nets, batch.captions.to(device), NormalDraw(0, range(count), device))

    def ours(precision: str) -> Callable[[], Sample]:
        return lambda: generate(
            cast(Draws, system),
            quick,
            batch.captions,
            NormalDraw(0, range(count), device),
            device=device,
            precision=precision,
        )

    return {"authors": theirs, "float32": ours("float32"), "bfloat16": ours("bfloat16")}


def seconds_of(draw: Callable[[], Sample], device: torch.device) -> float:
    start = time.perf_counter()
    draw()
    bench_step.synchronise(device)
    return time.perf_counter() - start


def parser() -> argparse.ArgumentParser:
    made = bench_step.parser()
    made.description = __doc__
    made.add_argument("--batch-size", type=int, default=20, help="pictures drawn at a time (default: %(default)s)")
    return made


def main() -> int:
    words = parser().parse_args()
    torch.set_num_threads(words.threads)
    device = torch.device(words.device)
    try:
        made = ways(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    best = {name: seconds_of(draw, device) for name, draw in made.items()}
    for _ in range(words.steps):
        best = {name: min(best[name], seconds_of(draw, device)) for name, draw in made.items()}
    print(f"{words.system} preset={words.preset}: {words.batch_size} at a time, {words.threads} threads, {device}")
    for name, seconds in best.items():
        ratio = best["authors"] / seconds
        print(f"{name:10} {words.batch_size / seconds:10.1f} images/s {ratio:8.2f} times the authors'")
    return bench_step.too_slow(best, "bfloat16", words.floor)


if __name__ == "__main__":
    sys.exit(main())
