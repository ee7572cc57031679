"""Where the time of a training step goes, the authors' way and ours: images/s by phase, on synthetic data.

    python tools/bench/bench_step.py attngan --preset cub [--like authors] [--best] [--group-size B] [--steps 5]
        [--threads 2] [--device cpu]

--like authors: float32, no compilation, gradients that are thrown away, loops (tools/bench/reference_steps.py); --best: what a
run of the preset does. Without either, both, and their ratio. They run in turns, so that whatever else the machine does
meets both alike, each in a process of its own, for ours sets how memory is kept; the best step of each counts, and
phases are those of that step. Frozen networks have newly drawn weights: it is time that is measured. Operations are
counted on tensors without data; the peak is that of a product of two bfloat16 matrices, measured here and now.
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
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from t2idist import config as configuration
from t2idist.config import RunConfig
from t2idist.contract import Batch, BuildInfo, Captions, DataInfo, System
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from t2idist.nn.fast.memory import keep_freed_memory
from t2idist.preflight.cost import measure_step
from t2idist.training.stages import StageRun
from tools.bench import reference_steps

EPOCH_IMAGES = 10_000
EMPTY_STORAGE = "storage=memory://bench"
"""So that no export of an earlier run is looked at."""
MATRIX = 2048
"""Rows and columns of the matrices whose product gives the machine's peak."""


class TimedTrainer(Trainer):
    """A trainer, with the seconds of each phase, and the roles that have been updated."""

    seconds: dict[str, float]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.updated: set[str] = set()

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
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        synchronise(self.world.device)
        return time.perf_counter()

    def timed_steps(self, batch: Batch, count: int) -> tuple[float, dict[str, float]]:
        """Seconds of a mean step of so many, and of its phases."""
        self.seconds = {}
        start = self._now()
        for _ in range(count):
            self.run_step(batch)
        total = (self._now() - start) / count
        phases = {name: seconds / count for name, seconds in self.seconds.items()}
        return total, {**phases, "the rest": total - sum(phases.values())}


class TimedReferenceTrainer(TimedTrainer, reference_steps.ReferenceTrainer):
    """The same of a step the authors' way."""

    def run_step(self, batch: Any, momentum: float = 0.0) -> None:
        with reference_steps.reference_losses():
            super().run_step(batch, momentum)


class StepBenchmark:
    """A way to do a step, in this process: a trainer and the batch that it trains on."""

    def __init__(self, trainer: TimedTrainer, batch: Batch) -> None:
        self.trainer, self.batch = trainer, batch

    def timed_steps(self, count: int) -> tuple[float, dict[str, float]]:
        """Seconds of a mean step of so many, and of its phases."""
        return self.trainer.timed_steps(self.batch, count)

    def turn(self) -> int:
        """Steps that it takes for every role to be updated, which are run."""
        steps = 0
        while self.trainer.updated < self.trainer.system.roles.keys():
            self.timed_steps(1)
            steps += 1
        return steps

    def memory(self, turn: int) -> int:
        """Most bytes of tensors that a step of a turn takes beside what stays: weights, averages, moments."""
        device = self.trainer.world.device
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)
            before = torch.accelerator.memory_allocated(device)
            self.timed_steps(turn)
            return int(torch.accelerator.max_memory_allocated(device) - before)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.timed_steps(turn)
        events = (e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]")  # type: ignore[union-attr]
        ordered = sorted(events, key=lambda event: event.start_ns())
        return int(max(itertools.accumulate((event.nbytes() for event in ordered), initial=0)))


BenchmarkFactory = Callable[[str, argparse.Namespace], Any]
"""Makes a way by its name and the command's words."""


class RemoteBenchmark:
    """What `make` makes (a `StepBenchmark`) in a process of its own, which ends with `close`."""

    def __init__(self, make: BenchmarkFactory, name: str, words: argparse.Namespace) -> None:
        here, there = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, make, name, words))
        self._process.start()
        there.close()
        self._pipe = here
        self._answer()

    def timed_steps(self, count: int) -> tuple[float, dict[str, float]]:
        answer: tuple[float, dict[str, float]] = self.ask("timed_steps", count)
        return answer

    def turn(self) -> int:
        return int(self.ask("turn"))

    def memory(self, turn: int) -> int:
        return int(self.ask("memory", turn))

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def ask(self, name: str, *args: int) -> Any:
        self._pipe.send((name, args))
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("a process that measures has ended") from None


def serve(pipe: Connection, make: BenchmarkFactory, name: str, words: argparse.Namespace) -> None:
    """Make a way and do as it is asked until nobody asks any more."""
    torch.set_num_threads(words.threads)
    way = make(name, words)
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            asked, args = pipe.recv()
            pipe.send(getattr(way, asked)(*args))


@dataclass
class Measurement:
    """A way's figures. seconds, phases: of the best step. memory: most bytes that a step took beside weights."""

    seconds: float = float("inf")
    phases: dict[str, float] = field(default_factory=dict)
    memory: int = 0
    first_seconds: float = 0.0


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def synthetic_batch(sizes: tuple[int, ...], plan: BuildInfo, count: int = 0) -> Batch:
    """A batch of one group, or of so many samples."""
    count = count or plan.group_size
    lengths = torch.randint(min(4, plan.max_words), plan.max_words + 1, (count,))
    vectors = torch.randn(count, plan.data.vector_dim)
    words = torch.randint(1, plan.vocabulary_size, (count, plan.max_words))
    return Batch(
        images=tuple(torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8) for size in sizes),
        captions=Captions(words * (torch.arange(plan.max_words) < lengths[:, None]), lengths, vectors),
        class_ids=torch.arange(count),
        attributes=torch.randint(0, 2, (count, len(plan.data.attributes[0]))).float(),
        ids=tuple(str(i) for i in range(count)),
        groups=1,
    )


def build_system(run: RunConfig, stage: str, vocabulary_size: int) -> tuple[System, BuildInfo]:
    """A stage's system on data that is not there: its attributes are those that the recipe names."""
    domains = run.stages[stage].model.get("domains") or [{}]
    attributes = tuple(tuple(domain.get("attributes", ())) for domain in domains)
    extent = DataInfo(("",) * vocabulary_size, EPOCH_IMAGES, vector_dim=1024, attributes=attributes)
    plan = StageRun(run, stage).build_info(extent)
    torch.manual_seed(0)
    return StageRun(run, stage).build(plan), plan


def build_trainer(
    system: System, plan: BuildInfo, precision: Precision, device: torch.device, kind: type[TimedTrainer] = TimedTrainer
) -> TimedTrainer:
    world = World(device=device)
    return kind(
        system,
        stage="bench",
        seed=0,
        group_size=plan.group_size,
        share=Share.of(world, 1),
        world=world,
        precision=precision,
    )


def make_benchmark(name: str, words: argparse.Namespace) -> StepBenchmark:
    """name: "authors" or "best"."""
    run, stage = select_stage(words)
    device = torch.device(words.device)
    system, plan = build_system(run, stage, words.vocabulary_size)
    if name == "authors":
        trainer = build_trainer(
            system, plan, Precision(words.precision or reference_steps.FLOAT32.name), device, TimedReferenceTrainer
        )
    else:
        keep_freed_memory()
        trainer = build_trainer(system, plan, Precision(words.precision or run.precision), device)
    return StepBenchmark(trainer, synthetic_batch(system.sizes, plan))


def measure(ways: Mapping[str, StepBenchmark | RemoteBenchmark], steps: int) -> dict[str, Measurement]:
    """The best of `steps` steps of each way, taken in turns after a first one, which is told apart.

    Where roles are updated at different steps (StarGAN's generator at every fifth), a step is the mean of a whole turn.
    """
    found = {name: Measurement() for name in ways}
    turn = 1
    for name, way in ways.items():
        found[name].first_seconds, _ = way.timed_steps(1)
        turn = max(turn, 1 + way.turn())
    for _ in range(steps):
        for name, way in ways.items():
            seconds, phases = way.timed_steps(turn)
            if seconds < found[name].seconds:
                found[name].seconds, found[name].phases = seconds, phases
    for name, way in ways.items():
        found[name].memory = way.memory(turn)
    return found


def peak_flops(device: torch.device, seconds: float = 1.0) -> float:
    """Operations a second of a product of two bfloat16 matrices: the best of those that fit into so many seconds."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device).bfloat16() for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * MATRIX**3 / best


def flops_per_image(system: System, plan: BuildInfo) -> float:
    """Of a step of ours, forward and backward. The system's networks are on the meta device."""
    vectors, attributes = plan.data.vector_dim, plan.data.attributes
    return measure_step(system, plan.group_size, plan.max_words, vectors, attributes).flops / plan.group_size


def print_table(ways: Mapping[str, Measurement], images: int, flops: float, peak: float) -> None:
    """Print the table. flops: of an image in our step. peak: of this machine, operations a second."""
    names = list(ways)
    print(f"{'phase':46}" + "".join(f"{name + ' ms':>16}" for name in names))
    for phase in dict.fromkeys(phase for way in ways.values() for phase in way.phases):
        print(f"{phase:46}" + "".join(f"{1e3 * way.phases.get(phase, 0.0):16.1f}" for way in ways.values()))
    rows: dict[str, Callable[[Measurement], float]] = {
        "step": lambda way: 1e3 * way.seconds,
        "first step": lambda way: 1e3 * way.first_seconds,
        "memory of a step, MiB": lambda way: way.memory / 2**20,
        "images/s": lambda way: images / way.seconds,
        f"% of {peak / 1e12:.2f} TFLOP/s (bfloat16 matmul)": lambda way: 100 * flops * images / way.seconds / peak,
    }
    for name, value in rows.items():
        print(f"{name:46}" + "".join(f"{value(way):16.1f}" for way in ways.values()))
    print(f"{flops / 1e9:.2f} GFLOP an image")
    if len(names) > 1:
        print(f"{names[1]} is {ways[names[0]].seconds / ways[names[1]].seconds:.2f} times as fast as {names[0]}")


def build_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("system", help="a stage's system: attngan, damsm, stackgan_pp, stargan ...")
    made.add_argument("--recipe", help="the recipe that has it (default: one of the system's name, for damsm attngan)")
    made.add_argument("--preset", default="demo")
    made.add_argument("--stage", help="the stage (default: the recipe's first of that system)")
    made.add_argument("--like", choices=["authors"], help="measure this way")
    made.add_argument("--best", action="store_true", help="measure ours (default: both)")
    made.add_argument("--steps", type=int, default=5, help="timed steps of each way (default: %(default)s)")
    made.add_argument("--group-size", type=int, help="samples of the one group (default: the preset's)")
    made.add_argument("--vocabulary-size", type=int, default=5450)
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--device", default="cpu")
    made.add_argument("--floor", type=float, help="end with 1 where both are measured and their ratio is below")
    made.add_argument(
        "--precision", choices=configuration.PRECISIONS, help="of both ways (default: float32 and the preset's)"
    )
    return made


def main() -> int:
    words = build_parser().parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    torch.set_num_threads(words.threads)
    device = torch.device(words.device)
    chosen = [name for name, asked in (("authors", words.like), ("best", words.best)) if asked] or ["authors", "best"]
    if words.floor is not None and len(chosen) < 2:
        print("error: --floor is of a ratio; leave --like and --best out", file=sys.stderr)
        return 2
    try:
        run, stage = select_stage(words)
        with torch.device("meta"):  # the processes that measure draw the weights
            system, plan = build_system(run, stage, words.vocabulary_size)
        flops = flops_per_image(system, plan)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{words.system} preset={words.preset}: {plan.group_size} images a step, sizes {system.sizes}, "
        f"{words.threads} threads, {device}, torch {torch.__version__}"
    )
    ways = {name: RemoteBenchmark(make_benchmark, name, words) for name in chosen}
    try:
        found = measure(ways, words.steps)
    finally:
        for way in ways.values():
            way.close()
    print_table(found, plan.group_size, flops, peak_flops(device))
    return check_floor({name: each.seconds for name, each in found.items()}, "best", words.floor)


def check_floor(seconds: Mapping[str, float], name: str, floor: float | None) -> int:
    """1, and a sentence, where this way is less than so many times as fast as the authors'; else 0."""
    ratio = seconds["authors"] / seconds[name] if floor is not None else 0.0
    if floor is None or ratio >= floor:
        return 0
    print(f"error: {ratio:.2f} times as fast as authors; --floor is {floor:g}", file=sys.stderr)
    return 1


def select_stage(words: argparse.Namespace) -> tuple[RunConfig, str]:
    """The run and its stage. Raises ValueError for what the recipe lacks."""
    recipe = words.recipe or {"damsm": "attngan", "style": "gan_cls", "captioner": "mirrorgan"}.get(
        words.system, words.system
    )
    settings = [f"preset={words.preset}", EMPTY_STORAGE]
    run = configuration.load(recipe, settings)
    names = [name for name, stage in run.stages.items() if stage.system == words.system]
    if not names:
        raise ValueError(f"recipe {recipe} has no stage of system '{words.system}'; it has {', '.join(run.stages)}")
    if words.stage is not None and words.stage not in names:
        raise ValueError(f"--stage {words.stage}: stages of system '{words.system}' are {', '.join(names)}")
    name = words.stage or names[0]
    if words.group_size is not None:
        run = configuration.load(recipe, [*settings, f"stages.{name}.group_size={words.group_size}"])
    return run, name


if __name__ == "__main__":
    sys.exit(main())
