"""Where the time of a training step goes: images/s by phase on synthetic data, float32 against the preset's precision.

    python tools/bench_step.py attngan --preset demo [--steps 5] [--group-size B] [--threads 2] [--device cpu]

Both settings run in one process in turns, so that whatever else the machine does meets both alike; the best step of
each counts, and phases are those of that step. Frozen networks have newly drawn weights: it is time that is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from t2idist import config as configuration
from t2idist import stages
from t2idist.config import RunConfig
from t2idist.contract import Batch, Captions, Extent, Plan, System
from t2idist.engine.strategy import Precision
from t2idist.engine.train import Trainer
from t2idist.engine.world import Share, World

EPOCH_IMAGES = 10_000
NOWHERE = "storage=memory://bench"
"""So that no export of an earlier run is looked at."""


class Stopwatch(Trainer):
    """The trainer, with the seconds of each phase of a step."""

    seconds: dict[str, float]

    def forward(self, role: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._phase(f"{role} forward"):
            return super().forward(role, fn, *args, **kwargs)

    def apply(self, role: str, loss: Tensor) -> None:
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
        if self.world.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def timed_step(self, batch: Batch) -> tuple[float, dict[str, float]]:
        """Seconds of one step, and of its phases."""
        self.seconds = {}
        start = self._now()
        self.run_step(batch)
        total = self._now() - start
        return total, {**self.seconds, "the rest": total - sum(self.seconds.values())}


def synthetic_batch(sizes: tuple[int, ...], plan: Plan) -> Batch:
    count = plan.group_size
    lengths = torch.randint(min(4, plan.max_words), plan.max_words + 1, (count,))
    vectors = torch.randn(count, plan.extent.vector_dim)
    words = torch.randint(1, plan.vocabulary_size, (count, plan.max_words))
    return Batch(
        images=tuple(torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8) for size in sizes),
        captions=Captions(words * (torch.arange(plan.max_words) < lengths[:, None]), lengths, vectors),
        class_ids=torch.arange(count),
        attributes=torch.randint(0, 2, (count, len(plan.extent.attributes[0]))).float(),
        ids=tuple(str(i) for i in range(count)),
        groups=1,
    )


def system_of(run: RunConfig, stage: str, vocabulary_size: int) -> tuple[System, Plan]:
    plan = stages.plan(run, stage, Extent(("",) * vocabulary_size, EPOCH_IMAGES))
    torch.manual_seed(0)
    return stages.build(run, stage, plan), plan


def stopwatch(system: System, plan: Plan, precision: str, device: torch.device) -> Stopwatch:
    world = World(device=device)
    return Stopwatch(
        system,
        stage="bench",
        seed=0,
        group_size=plan.group_size,
        share=Share.of(world, 1),
        world=world,
        precision=Precision(precision),
    )


def measure(runs: dict[str, Stopwatch], batch: Batch, steps: int) -> dict[str, tuple[float, dict[str, float]]]:
    """The best of `steps` steps of each run, taken in turns after one that does not count."""
    best: dict[str, tuple[float, dict[str, float]]] = {}
    for step in range(steps + 1):
        for name, run in runs.items():
            timed = run.timed_step(batch)
            if step and (name not in best or timed[0] < best[name][0]):
                best[name] = timed
    return best


def show(best: dict[str, tuple[float, dict[str, float]]], images: int) -> None:
    names = list(best)
    print(f"{'phase':46}" + "".join(f"{name + ' ms':>16}" for name in names))
    for phase in best[names[0]][1]:
        print(f"{phase:46}" + "".join(f"{1e3 * best[name][1][phase]:16.1f}" for name in names))
    print(f"{'step':46}" + "".join(f"{1e3 * best[name][0]:16.1f}" for name in names))
    print(f"{'images/s':46}" + "".join(f"{images / best[name][0]:16.1f}" for name in names))
    if len(names) > 1:
        print(f"{names[1]} is {best[names[0]][0] / best[names[1]][0]:.2f} times as fast as {names[0]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", help="a stage's system: damsm, attngan, stackgan_pp")
    parser.add_argument(
        "--recipe", help="the recipe that has it (default: one of the system's name, for damsm attngan)"
    )
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each setting")
    parser.add_argument("--group-size", type=int, help="samples of the one group (default: the preset's)")
    parser.add_argument("--vocabulary-size", type=int, default=5450)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    recipe = words.recipe or {"damsm": "attngan"}.get(words.system, words.system)
    try:
        run = configuration.load(recipe, [f"preset={words.preset}", NOWHERE])
        chosen = [name for name, stage in run.stages.items() if stage.system == words.system]
        if not chosen:
            raise ValueError(f"recipe {recipe} has no stage of system '{words.system}'; it has {', '.join(run.stages)}")
        name = chosen[0]
        if words.group_size is not None:
            run = configuration.load(
                recipe, [f"preset={words.preset}", NOWHERE, f"stages.{name}.group_size={words.group_size}"]
            )
        settings = dict.fromkeys(("float32", run.precision))
        made = {precision: system_of(run, name, words.vocabulary_size) for precision in settings}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    system, plan = made[run.precision]
    device = torch.device(words.device)
    runs = {precision: stopwatch(*each, precision, device) for precision, each in made.items()}
    print(
        f"{words.system} preset={words.preset}: {plan.group_size} images a step, sizes {system.sizes}, "
        f"{words.threads} threads, {device}, torch {torch.__version__}"
    )
    show(measure(runs, synthetic_batch(system.sizes, plan), words.steps), plan.group_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
