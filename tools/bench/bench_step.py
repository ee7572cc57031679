"""Measure a training step in the authors' way and in ours: images/s by phase, on synthetic data.

    python tools/bench/bench_step.py attngan --preset cub [--like authors] [--best] [--group-size B] [--steps 5]
        [--threads 2] [--device cpu]

--like authors: the step of the authors' released code (tools/bench/reference_steps.py); --best: a run of the preset. By
default both are measured, with their ratio. They run in turns, so that other load on the machine affects both, each in
its own process, because ours changes how memory is kept. The best step of each counts, and phases are those of that
step. Frozen networks have random weights. Operations are counted on meta tensors; the peak is measured as a product of
two matrices on this machine, in bfloat16 if it has instructions for it, else in float32. On an accelerator the host
only waits after all steps: "host" is the time until it has submitted them, which limits the step if both are about
equal, and phases come from events of further steps.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from t2idist import config as configuration
from t2idist.config import RunConfig
from t2idist.contract import Batch, BuildInfo, Captions, DataInfo, System
from t2idist.engine.kernels import multiplies_bfloat16
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from t2idist.nn.fast.memory import keep_freed_memory
from t2idist.observability.command import command
from t2idist.preflight.cost import measure_step
from t2idist.training.stages import StageRun
from tools.bench import reference_steps

EPOCH_IMAGES = 10_000
EMPTY_STORAGE = "storage=memory://bench"
"""A storage without exports of earlier runs."""
MATRIX, PRODUCTS = 2048, 1
"""Rows and columns of the matrices whose product measures the peak of a CPU, and products that are timed together."""
DEVICE_MATRIX, DEVICE_PRODUCTS = 8192, 10
"""The same on an accelerator, where a wait for the device takes as long as a small product."""


class StepTimes(NamedTuple):
    """Mean seconds of a step."""

    seconds: float
    submit_seconds: float
    """Until the host has submitted the step."""
    phases: dict[str, float]


class TimedTrainer(Trainer):
    """A trainer that records the seconds of each phase and the roles that were updated."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.updated: set[str] = set()
        self.by_events = self.world.device.type != "cpu"
        self.marks: list[tuple[str, Any, Any]] | None = None

    def forward(self, role: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._phase(f"{role} forward"):
            return super().forward(role, fn, *args, **kwargs)

    def apply(self, role: str, loss: Tensor) -> None:
        self.updated.add(role)
        with self._phase(f"{role} backward, Adam, EMA"):
            super().apply(role, loss)

    @contextlib.contextmanager
    def frozen(self, *names: str) -> Iterator[Any]:
        with self._phase(f"through frozen {', '.join(names)}"), super().frozen(*names) as nets:
            yield nets

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        if self.marks is None:
            yield
            return
        start = self._mark()
        yield
        self.marks.append((name, start, self._mark()))

    def _mark(self) -> Any:
        """Return the time on a CPU, else an event that the device reaches; the host does not wait for it."""
        if not self.by_events:
            return time.perf_counter()
        event = torch.Event(self.world.device, enable_timing=True)
        event.record()
        return event

    def timed_steps(self, batch: Batch, count: int) -> StepTimes:
        """Run `count` steps; with events, as many again for the phases."""
        self.marks = None if self.by_events else []
        synchronise(self.world.device)
        start = time.perf_counter()
        for _ in range(count):
            self.run_step(batch)
        submitted = time.perf_counter()
        synchronise(self.world.device)
        total = (time.perf_counter() - start) / count
        if self.marks is None:
            self.marks = []
            for _ in range(count):
                self.run_step(batch)
            synchronise(self.world.device)
        phases: dict[str, float] = {}
        for name, first, last in self.marks:
            seconds = first.elapsed_time(last) / 1e3 if self.by_events else last - first
            phases[name] = phases.get(name, 0.0) + seconds / count
        self.marks = None
        return StepTimes(total, (submitted - start) / count, {**phases, "the rest": total - sum(phases.values())})


class TimedReferenceTrainer(TimedTrainer, reference_steps.ReferenceTrainer):
    """The same for the authors' step."""

    def run_step(self, batch: Any, momentum: float = 0.0) -> None:
        with reference_steps.reference_losses():
            super().run_step(batch, momentum)


class StepBenchmark:
    """A training step to measure in this process: a trainer and its batch."""

    def __init__(self, trainer: TimedTrainer, batch: Batch) -> None:
        self.trainer, self.batch = trainer, batch

    def timed_steps(self, count: int) -> StepTimes:
        """Run `count` steps."""
        return self.trainer.timed_steps(self.batch, count)

    def run_period(self) -> int:
        """Run steps until every role was updated. Returns their number."""
        steps = 0
        while self.trainer.updated < self.trainer.system.roles.keys():
            self.timed_steps(1)
            steps += 1
        return steps

    def memory(self, steps: int) -> int:
        """Run `steps` steps. Returns their peak bytes of tensors, without weights, averages and moments."""
        device = self.trainer.world.device
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)
            before = torch.accelerator.memory_allocated(device)
            self.timed_steps(steps)
            return int(torch.accelerator.max_memory_allocated(device) - before)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.timed_steps(steps)
        events = (e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]")  # type: ignore[union-attr]
        ordered = sorted(events, key=lambda event: event.start_ns())
        return int(max(itertools.accumulate((event.nbytes() for event in ordered), initial=0)))


BenchmarkFactory = Callable[[str, argparse.Namespace], Any]
"""Creates a benchmark from its name and the options of the command."""


class RemoteBenchmark:
    """A `StepBenchmark`, or another result of `factory`, in its own process, which `close` ends."""

    def __init__(self, factory: BenchmarkFactory, name: str, options: argparse.Namespace) -> None:
        local, remote = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(remote, factory, name, options)
        )
        self._process.start()
        remote.close()
        self._pipe = local
        self._receive()

    def timed_steps(self, count: int) -> StepTimes:
        result: StepTimes = self.call("timed_steps", count)
        return result

    def run_period(self) -> int:
        return int(self.call("run_period"))

    def memory(self, steps: int) -> int:
        return int(self.call("memory", steps))

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def call(self, name: str, *args: int) -> Any:
        self._pipe.send((name, args))
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("a benchmark process has exited") from None


def _serve(pipe: Connection, factory: BenchmarkFactory, name: str, options: argparse.Namespace) -> None:
    """Create a benchmark and answer calls until the pipe is closed."""
    torch.set_num_threads(options.threads)
    benchmark = factory(name, options)
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            method, args = pipe.recv()
            pipe.send(getattr(benchmark, method)(*args))


@dataclass
class Measurement:
    """The results of one benchmark."""

    seconds: float = float("inf")
    """Of the best step."""
    submit_seconds: float = 0.0
    """Of the best step, until the host has submitted it."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase of the best step."""
    memory: int = 0
    """Peak bytes of tensors in a step, without weights."""
    first_seconds: float = 0.0


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def synthetic_batch(sizes: tuple[int, ...], info: BuildInfo, count: int = 0) -> Batch:
    """Return a batch of one group, or of `count` samples."""
    count = count or info.group_size
    lengths = torch.randint(min(4, info.max_words), info.max_words + 1, (count,))
    vectors = torch.randn(count, info.data.vector_dim)
    tokens = torch.randint(1, info.vocabulary_size, (count, info.max_words))
    return Batch(
        images=tuple(torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8) for size in sizes),
        captions=Captions(tokens * (torch.arange(info.max_words) < lengths[:, None]), lengths, vectors),
        class_ids=torch.arange(count),
        attributes=torch.randint(0, 2, (count, len(info.data.attributes[0]))).float(),
        ids=tuple(str(i) for i in range(count)),
        groups=1,
    )


def build_system(run: RunConfig, stage: str, vocabulary_size: int) -> tuple[System, BuildInfo]:
    """Build the system of a stage without its data; the attributes are those that the recipe names."""
    domains = run.stages[stage].model.get("domains") or [{}]
    attributes = tuple(tuple(domain.get("attributes", ())) for domain in domains)
    data = DataInfo(("",) * vocabulary_size, EPOCH_IMAGES, vector_dim=1024, attributes=attributes)
    info = StageRun(run, stage).build_info(data)
    torch.manual_seed(0)
    return StageRun(run, stage).build(info), info


def build_trainer(
    system: System,
    info: BuildInfo,
    precision: Precision,
    device: torch.device,
    trainer_class: type[TimedTrainer] = TimedTrainer,
) -> TimedTrainer:
    world = World(device=device)
    return trainer_class(
        system,
        stage="bench",
        seed=0,
        group_size=info.group_size,
        share=Share.of(world, 1),
        world=world,
        precision=precision,
    )


def make_benchmark(name: str, options: argparse.Namespace) -> StepBenchmark:
    """Create the benchmark "authors" or "best"."""
    run, stage = select_stage(options)
    device = torch.device(options.device)
    system, info = build_system(run, stage, options.vocabulary_size)
    if name == "authors":
        precision = Precision.of(options.precision or reference_steps.FLOAT32.name, device)
        trainer = build_trainer(system, info, precision, device, TimedReferenceTrainer)
    else:
        keep_freed_memory()
        trainer = build_trainer(system, info, Precision.of(options.precision or run.precision, device), device)
    return StepBenchmark(trainer, synthetic_batch(system.sizes, info))


def measure(benchmarks: Mapping[str, StepBenchmark | RemoteBenchmark], steps: int) -> dict[str, Measurement]:
    """Measure `steps` steps of each benchmark in turns; the first step of each is reported separately.

    If roles are updated at different steps (StarGAN's generator at every fifth), a step is the mean over a period.
    """
    results = {name: Measurement() for name in benchmarks}
    period = 1
    for name, benchmark in benchmarks.items():
        results[name].first_seconds = benchmark.timed_steps(1).seconds
        period = max(period, 1 + benchmark.run_period())
    for _ in range(steps):
        for name, benchmark in benchmarks.items():
            times, result = benchmark.timed_steps(period), results[name]
            if times.seconds < result.seconds:
                result.seconds, result.submit_seconds, result.phases = times
    for name, benchmark in benchmarks.items():
        results[name].memory = benchmark.memory(period)
    return results


def peak_flops(device: torch.device, seconds: float = 1.0) -> float:
    """Return the operations per second of the fastest product of two matrices within `seconds`.

    They are bfloat16, or float32 if the device has no instructions for bfloat16.
    """
    dtype = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    size, products = (MATRIX, PRODUCTS) if device.type == "cpu" else (DEVICE_MATRIX, DEVICE_PRODUCTS)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b)
        synchronise(device)
        best = min(best, (time.perf_counter() - start) / products)
    return 2 * size**3 / best


def flops_per_image(system: System, info: BuildInfo) -> float:
    """Return the operations of our step, forward and backward. The networks are on the meta device."""
    vectors, attributes = info.data.vector_dim, info.data.attributes
    return measure_step(system, info.group_size, info.max_words, vectors, attributes).flops / info.group_size


def print_table(results: Mapping[str, Measurement], images: int, flops: float, peak: float) -> None:
    """Print the results.

    Args:
        images: images per step.
        flops: operations per image in our step.
        peak: operations per second of this machine.
    """
    names = list(results)
    print(f"{'phase':46}" + "".join(f"{name + ' ms':>16}" for name in names))
    for phase in dict.fromkeys(phase for result in results.values() for phase in result.phases):
        print(f"{phase:46}" + "".join(f"{1e3 * result.phases.get(phase, 0.0):16.1f}" for result in results.values()))
    rows: dict[str, Callable[[Measurement], float]] = {
        "step": lambda result: 1e3 * result.seconds,
        "host": lambda result: 1e3 * result.submit_seconds,
        "first step": lambda result: 1e3 * result.first_seconds,
        "memory of a step, MiB": lambda result: result.memory / 2**20,
        "images/s": lambda result: images / result.seconds,
        f"% of {peak / 1e12:.2f} TFLOP/s (matrix product)": lambda result: 100 * flops * images / peak / result.seconds,
    }
    for name, value in rows.items():
        print(f"{name:46}" + "".join(f"{value(result):16.1f}" for result in results.values()))
    print(f"{flops / 1e9:.2f} GFLOP an image")
    if len(names) > 1:
        print(f"{names[1]} is {results[names[0]].seconds / results[names[1]].seconds:.2f} times as fast as {names[0]}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", help="a stage's system: attngan, damsm, stackgan_pp, stargan ...")
    parser.add_argument("--recipe", help="the recipe of the stage (default: named like the system; attngan for damsm)")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--stage", help="the stage (default: the first one of that system)")
    parser.add_argument("--like", choices=["authors"], help="measure only the authors' step")
    parser.add_argument("--best", action="store_true", help="measure only ours (default: both)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--group-size", type=int, help="samples in the group (default: the preset's)")
    parser.add_argument("--vocabulary-size", type=int, default=5450)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--floor", type=float, help="exit with 1 if the ratio of both is below this")
    parser.add_argument(
        "--precision", choices=configuration.PRECISIONS, help="of both (default: float32 and the preset's)"
    )
    return parser


@command("error")
def main() -> int:
    options = build_parser().parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    selected = {"authors": options.like, "best": options.best}
    names = [name for name, given in selected.items() if given] or list(selected)
    if options.floor is not None and len(names) < 2:
        raise ValueError("--floor needs both steps; leave --like and --best out")
    run, stage = select_stage(options)
    with torch.device("meta"):  # the benchmark processes draw the weights
        system, info = build_system(run, stage, options.vocabulary_size)
    flops = flops_per_image(system, info)
    print(
        f"{options.system} preset={options.preset}: {info.group_size} images a step, sizes {system.sizes}, "
        f"{options.threads} threads, {device}, torch {torch.__version__}"
    )
    benchmarks = {name: RemoteBenchmark(make_benchmark, name, options) for name in names}
    try:
        results = measure(benchmarks, options.steps)
    finally:
        for benchmark in benchmarks.values():
            benchmark.close()
    print_table(results, info.group_size, flops, peak_flops(device))
    return check_floor({name: result.seconds for name, result in results.items()}, "best", options.floor)


def check_floor(seconds: Mapping[str, float], name: str, floor: float | None) -> int:
    """Return 1, with an error message, if this step is less than `floor` times as fast as the authors'; else 0."""
    ratio = seconds["authors"] / seconds[name] if floor is not None else 0.0
    if floor is None or ratio >= floor:
        return 0
    print(f"error: {ratio:.2f} times as fast as authors; --floor is {floor:g}", file=sys.stderr)
    return 1


def select_stage(options: argparse.Namespace) -> tuple[RunConfig, str]:
    """Return the run and the name of its stage. Raises ValueError if the recipe has no such stage."""
    recipe = options.recipe or {"damsm": "attngan", "style": "gan_cls", "captioner": "mirrorgan"}.get(
        options.system, options.system
    )
    settings = [f"preset={options.preset}", EMPTY_STORAGE]
    run = configuration.load(recipe, settings)
    names = [name for name, stage in run.stages.items() if stage.system == options.system]
    if not names:
        raise ValueError(f"recipe {recipe} has no stage of system '{options.system}'; it has {', '.join(run.stages)}")
    if options.stage is not None and options.stage not in names:
        raise ValueError(f"--stage {options.stage}: stages of system '{options.system}' are {', '.join(names)}")
    name = options.stage or names[0]
    if options.group_size is not None:
        run = configuration.load(recipe, [*settings, f"stages.{name}.group_size={options.group_size}"])
    return run, name


if __name__ == "__main__":
    sys.exit(main())
