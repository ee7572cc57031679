"""Measure the images per second of a generator: the authors' way (float32, unchanged layers) and ours, in turns.

    python tools/bench/bench_sample.py attngan --preset cub [--batch-size 20] [--steps 5] [--threads 2] [--device cpu]

Networks have random weights. Each variant runs in its own process, and its best batch counts.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from t2idist.contract import BuildInfo, Sample, SupportsSample, System
from t2idist.nn.fast.memory import keep_freed_memory
from t2idist.observability.command import command
from t2idist.sampling.generate import GaussianNoise, generate
from t2idist.sampling.loading import exported_network
from tools.bench import bench_step, reference_steps

VARIANTS = ("authors", "float32", "bfloat16")


def sampling_system(options: argparse.Namespace) -> tuple[System, BuildInfo]:
    """Build the system with random weights. Raises ValueError if it does not generate images."""
    run, stage = bench_step.select_stage(options)
    system, info = bench_step.build_system(run, stage, options.vocabulary_size)
    if not isinstance(system, SupportsSample):
        raise ValueError(f"{options.system} does not generate images from captions")
    return system, info


def samplers(options: argparse.Namespace) -> dict[str, Callable[[], Sample]]:
    """Return a function for each variant that generates a batch."""
    system, info = sampling_system(options)
    generator = cast(SupportsSample, system)
    device, count = torch.device(options.device), options.batch_size
    nets = {
        name.rpartition(".")[2]: exported_network(system, name).to(device).eval().requires_grad_(False)
        for name in system.exports
    }
    fast_nets = copy.deepcopy(nets)
    captions = bench_step.synthetic_batch(system.sizes, info, count).captions

    def sample_reference() -> Sample:
        with torch.inference_mode(), reference_steps.reference_losses():
            return generator.sample(nets, captions.to(device), GaussianNoise(0, range(count), device))

    def sample_ours(precision: str) -> Sample:
        noise = GaussianNoise(0, range(count), device)
        return generate(generator, fast_nets, captions, noise, device=device, precision=precision)

    ours = {precision: functools.partial(sample_ours, precision) for precision in VARIANTS[1:]}
    return {"authors": sample_reference, **ours}


class SampleBenchmark:
    """A function that generates a batch, to measure in this process."""

    def __init__(self, sample: Callable[[], Sample], device: torch.device) -> None:
        self._sample, self._device = sample, device

    def seconds(self) -> float:
        start = time.perf_counter()
        self._sample()
        bench_step.synchronise(self._device)
        return time.perf_counter() - start


def make_benchmark(name: str, options: argparse.Namespace) -> SampleBenchmark:
    if name != "authors":
        keep_freed_memory()
    return SampleBenchmark(samplers(options)[name], torch.device(options.device))


def build_parser() -> argparse.ArgumentParser:
    parser = bench_step.build_parser()
    parser.description = __doc__
    parser.add_argument("--batch-size", type=int, default=20, help="images in a batch (default: %(default)s)")
    return parser


@command("error")
def main() -> int:
    options = build_parser().parse_args()
    with torch.device("meta"):
        sampling_system(options)
    benchmarks = {name: bench_step.RemoteBenchmark(make_benchmark, name, options) for name in VARIANTS}
    try:
        best = {name: benchmark.call("seconds") for name, benchmark in benchmarks.items()}
        for _ in range(options.steps):
            best = {name: min(best[name], benchmark.call("seconds")) for name, benchmark in benchmarks.items()}
    finally:
        for benchmark in benchmarks.values():
            benchmark.close()
    title = f"{options.system} preset={options.preset}"
    print(f"{title}: {options.batch_size} at a time, {options.threads} threads, {options.device}")
    for name, seconds in best.items():
        ratio = best["authors"] / seconds
        print(f"{name:10} {options.batch_size / seconds:10.1f} images/s {ratio:8.2f} times the authors'")
    return bench_step.check_floor(best, "bfloat16", options.floor)


if __name__ == "__main__":
    sys.exit(main())
