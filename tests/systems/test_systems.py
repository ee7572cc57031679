"""What holds for every file in systems/, without a line of its own: see small.py for the widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2idist import systems
from t2idist.config import CheckpointConfig
from t2idist.engine.checkpoint import export
from t2idist.engine.checkpoint.manager import CheckpointManager
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World
from tests.helpers import small_systems, toy_gan
from tests.helpers.worker_processes import Workers


def labels(*marks: pytest.MarkDecorator) -> list[object]:
    """All systems, those outside of `small.QUICK` with these marks."""
    return [name if name in small_systems.QUICK else pytest.param(name, marks=marks) for name in small_systems.MODELS]


SIZES = [
    pytest.param(
        name, size, marks=() if name in small_systems.QUICK else [pytest.mark.whole if size == 3 else pytest.mark.slow]
    )
    for name in small_systems.MODELS
    for size in (2, 3, 4)
]
ALONE = World()
STEPS = 10


def snapshot(made: Trainer) -> dict[str, Tensor]:
    """Parameters, EMA, settled buffers and optimiser moments by name."""
    return {k: v.detach().clone() for k, v in (made.state() | made.settled_buffers()).items()}


def after(world: World, system: str, precision: str, steps: int) -> dict[str, Tensor]:
    made = small_systems.trainer(world, system, precision)
    small_systems.run_steps(made, steps)
    return snapshot(made)


def resumed(world: World, system: str, url: str) -> dict[str, Tensor]:
    """Step 3 of a run that another world saved at, taken up here, and on to step 6."""
    made = small_systems.trainer(world, system, "float64")
    found = CheckpointManager(url, world, CheckpointConfig(), {}).restore(made)
    assert found is not None and made.step == 3
    small_systems.run_steps(made, 3)
    return snapshot(made)


def saved(world: World, system: str, url: str) -> dict[str, Tensor]:
    made = small_systems.trainer(world, system, "float64")
    small_systems.run_steps(made, 3)
    checkpoints = CheckpointManager(url, world, CheckpointConfig(), {})
    checkpoints.save(made)
    checkpoints.finish()
    small_systems.run_steps(made, 3)
    return snapshot(made)


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """By name, the distance of two states relative to each tensor's norm."""
    assert ours.keys() == theirs.keys()
    return {
        k: float((ours[k].double() - v.double()).norm() / v.double().norm().clamp_min(1e-30))
        for k, v in theirs.items()
        if not torch.equal(ours[k], v)
    }


def test_every_system_is_tested() -> None:
    assert {small_systems.system_of(label) for label in small_systems.MODELS} == set(systems.names())


@pytest.mark.parametrize(("system", "size"), SIZES)
def test_any_number_of_workers_trains_the_same_model(workers: Workers, system: str, size: int) -> None:
    alone = workers.run(1, after, system, "float64", STEPS)[0]
    for ours in workers.run(size, after, system, "float64", STEPS):
        worst = apart(ours, alone)
        assert max(worst.values(), default=0.0) < 1e-9, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("system", labels(pytest.mark.slow))
def test_in_float32_it_is_the_same_to_rounding(workers: Workers, system: str) -> None:
    alone = workers.run(1, after, system, "float32", STEPS)[0]
    for ours in workers.run(3, after, system, "float32", STEPS):
        worst = apart(ours, alone)
        assert max(worst.values(), default=0.0) < 1e-4, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("system", labels(pytest.mark.slow))
def test_stopped_and_resumed_elsewhere(workers: Workers, tmp_path: Path, system: str) -> None:
    whole = workers.run(4, saved, system, str(tmp_path))[0]
    same = workers.run(4, resumed, system, str(tmp_path))[0]
    assert all(torch.equal(whole[k], same[k]) for k in whole), "the same number of workers resumes bitwise"
    for size in (1, 2, 3):
        other = workers.run(size, resumed, system, str(tmp_path))[0]
        assert max(apart(other, whole).values(), default=0.0) < 1e-9


@pytest.mark.parametrize("system", labels())
def test_bfloat16_trains_with_finite_numbers(system: str) -> None:
    made = small_systems.trainer(ALONE, system, "bfloat16", groups=2)
    small_systems.run_steps(made, 2)
    assert all(bool(torch.isfinite(v).all()) for v in snapshot(made).values())
    assert all(v == v for v in made.reduce_reports().values())


@pytest.mark.parametrize("system", labels())
def test_what_a_system_exports_samples_the_same_again(tmp_path: Path, system: str) -> None:
    made = small_systems.trainer(ALONE, system, "float32")
    small_systems.run_steps(made, 1)
    nets = made.evaluation_nets()
    index = {"system": system, "config": {}, "plan": {}, "vocabulary": [], "images": made.images}
    export.write(str(tmp_path), nets, index)
    other = small_systems.trainer(ALONE, system, "float32").evaluation_nets()
    for name, weights in export.read(str(tmp_path)).weights.items():
        export.load_into(other[name], weights, name)
    batch = toy_gan.batch(0, range(2), small_systems.GROUP_SIZE, made.system.sizes, small_systems.MAX_WORDS).to(
        ALONE.device, torch.float32
    )
    assert torch.equal(use(made, nets, batch), use(made, other, batch))


def use(made: Trainer, nets: object, batch: object) -> Tensor:
    """What the system's exported networks give: its largest pictures, or its codes."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(len(batch.ids), *shape, generator=torch.Generator().manual_seed(1))  # type: ignore[attr-defined]

    with torch.no_grad():
        if hasattr(made.system, "sample"):
            drawn = made.system.sample(nets, batch.captions, draw)  # type: ignore[attr-defined]
            assert [image.shape[-1] for image in drawn.images] == list(made.system.sizes)
            assert float(drawn.images[-1].std()) > 1e-6
            return drawn.images[-1]
        if hasattr(made.system, "translate"):
            images = batch.images[-1]  # type: ignore[attr-defined]
            labels = made.system.read(nets, images, 0)  # type: ignore[attr-defined]
            changed = made.system.translate(nets, images, 1 - labels, 0)  # type: ignore[attr-defined]
            assert changed.shape == images.shape and float(changed.std()) > 1e-3
            return changed
        if hasattr(made.system, "describe"):
            return made.system.describe(nets, batch.images[-1], 5)  # type: ignore[attr-defined]
        runs: Any = made.system
        codes = runs.embed_pictures(nets, batch.images[-1]), runs.embed_captions(nets, batch.captions)
        return torch.cat(codes)
