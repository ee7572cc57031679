"""Tests that cover every system, at the widths of small_systems.py."""

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
from tests.helpers.hardware import needs_bfloat16
from tests.helpers.worker_processes import Workers


def labels(*marks: pytest.MarkDecorator) -> list[object]:
    """Parametrise over all systems; those not in `small_systems.QUICK` get the marks."""
    return [name if name in small_systems.QUICK else pytest.param(name, marks=marks) for name in small_systems.MODELS]


WHOLE, SLOW = [pytest.mark.whole], [pytest.mark.slow]
SIZES = [
    pytest.param(name, size, marks=([] if size == 3 else WHOLE) if name in small_systems.QUICK else rare)
    for name in small_systems.MODELS
    for size, rare in ((2, SLOW), (3, WHOLE), (4, SLOW))
]
SINGLE = World()
STEPS = 10


def full_state(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters, EMA, averaged buffers and optimiser moments by name."""
    return {k: v.detach().clone() for k, v in (trainer.state() | trainer.averaged_buffers()).items()}


def train_steps(world: World, system: str, precision: str, steps: int) -> dict[str, Tensor]:
    trainer = small_systems.trainer(world, system, precision)
    small_systems.run_steps(trainer, steps)
    return full_state(trainer)


def resume_and_train(world: World, system: str, url: str) -> dict[str, Tensor]:
    """Resume at step 3, saved by another world, and train to step 6."""
    trainer = small_systems.trainer(world, system, "float64")
    restored = CheckpointManager(url, world, CheckpointConfig(), {}).restore(trainer)
    assert restored is not None and trainer.step == 3
    small_systems.run_steps(trainer, 3)
    return full_state(trainer)


def save_and_train(world: World, system: str, url: str) -> dict[str, Tensor]:
    trainer = small_systems.trainer(world, system, "float64")
    small_systems.run_steps(trainer, 3)
    checkpoints = CheckpointManager(url, world, CheckpointConfig(), {})
    checkpoints.save(trainer)
    checkpoints.finish()
    small_systems.run_steps(trainer, 3)
    return full_state(trainer)


def of_all_groups(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the states of all workers: each has the memory of its own groups."""
    return {k: v for state in reversed(states) for k, v in state.items()}


def relative_distances(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Distance of two states by name, relative to the norm of each tensor. `theirs` is of all groups."""
    assert ours.keys() <= theirs.keys()
    assert all(k.startswith("memory/") for k in theirs.keys() - ours.keys()), "only groups of other workers are missing"
    return {
        k: float((v.double() - theirs[k].double()).norm() / theirs[k].double().norm().clamp_min(1e-30))
        for k, v in ours.items()
        if not torch.equal(v, theirs[k])
    }


def test_every_system_is_tested() -> None:
    assert {small_systems.system_of(label) for label in small_systems.MODELS} == set(systems.names())


@pytest.mark.parametrize(("system", "size"), SIZES)
def test_any_number_of_workers_trains_the_same_model(workers: Workers, system: str, size: int) -> None:
    reference = workers.run(1, train_steps, system, "float64", STEPS)[0]
    for ours in workers.run(size, train_steps, system, "float64", STEPS):
        worst = relative_distances(ours, reference)
        assert max(worst.values(), default=0.0) < 1e-9, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("system", labels(pytest.mark.slow))
def test_float32_training_differs_by_rounding_only(workers: Workers, system: str) -> None:
    reference = workers.run(1, train_steps, system, "float32", STEPS)[0]
    for ours in workers.run(3, train_steps, system, "float32", STEPS):
        worst = relative_distances(ours, reference)
        assert max(worst.values(), default=0.0) < 1e-4, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("system", labels(pytest.mark.slow))
def test_resume_on_other_worker_counts_gives_the_same_state(workers: Workers, tmp_path: Path, system: str) -> None:
    whole = of_all_groups(workers.run(4, save_and_train, system, str(tmp_path)))
    same = of_all_groups(workers.run(4, resume_and_train, system, str(tmp_path)))
    assert all(torch.equal(whole[k], same[k]) for k in whole), "the same number of workers resumes bitwise"
    for size in (1, 2, 3):
        other = of_all_groups(workers.run(size, resume_and_train, system, str(tmp_path)))
        assert whole.keys() == other.keys()
        assert max(relative_distances(other, whole).values(), default=0.0) < 1e-9


@needs_bfloat16
@pytest.mark.parametrize("system", labels())
def test_bfloat16_training_stays_finite(system: str) -> None:
    trainer = small_systems.trainer(SINGLE, system, "bfloat16", groups=2)
    small_systems.run_steps(trainer, 2)
    assert all(bool(torch.isfinite(v).all()) for v in full_state(trainer).values())
    assert all(v == v for v in trainer.reduce_reports().values())


@pytest.mark.parametrize("system", labels())
def test_exported_networks_give_the_same_outputs(tmp_path: Path, system: str) -> None:
    trainer = small_systems.trainer(SINGLE, system, "float32")
    small_systems.run_steps(trainer, 1)
    nets = trainer.evaluation_nets()
    index = {"system": system, "config": {}, "plan": {}, "vocabulary": [], "images": trainer.images}
    export.write(str(tmp_path), nets, index)
    other = small_systems.trainer(SINGLE, system, "float32").evaluation_nets()
    for name, weights in export.read(str(tmp_path)).weights.items():
        export.load_into(other[name], weights, name)
    batch = toy_gan.batch(0, range(2), small_systems.GROUP_SIZE, trainer.system.sizes, small_systems.MAX_WORDS).to(
        SINGLE.device, torch.float32
    )
    assert torch.equal(run_exported_networks(trainer, nets, batch), run_exported_networks(trainer, other, batch))


def run_exported_networks(trainer: Trainer, nets: object, batch: object) -> Tensor:
    """Run the exported networks; returns the largest images, or the codes."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(len(batch.ids), *shape, generator=torch.Generator().manual_seed(1))  # type: ignore[attr-defined]

    with torch.no_grad():
        if hasattr(trainer.system, "sample"):
            output = trainer.system.sample(nets, batch.captions, noise)  # type: ignore[attr-defined]
            assert [image.shape[-1] for image in output.images] == list(trainer.system.sizes)
            assert float(output.images[-1].std()) > 1e-6
            return output.images[-1]
        if hasattr(trainer.system, "translate"):
            images = batch.images[-1]  # type: ignore[attr-defined]
            labels = trainer.system.read(nets, images, 0)  # type: ignore[attr-defined]
            changed = trainer.system.translate(nets, images, 1 - labels, 0)  # type: ignore[attr-defined]
            assert changed.shape == images.shape and float(changed.std()) > 1e-3
            return changed
        if hasattr(trainer.system, "to_domain"):
            outputs = [trainer.system.to_domain(nets, batch.images[-1], target) for target in trainer.system.targets]  # type: ignore[attr-defined]
            assert all(output.shape == batch.images[-1].shape and float(output.std()) > 1e-6 for output in outputs)  # type: ignore[attr-defined]
            return torch.cat(outputs)
        if hasattr(trainer.system, "describe"):
            return trainer.system.describe(nets, batch.images[-1], 5)  # type: ignore[attr-defined]
        embedder: Any = trainer.system
        codes = embedder.embed_images(nets, batch.images[-1]), embedder.embed_captions(nets, batch.captions)
        return torch.cat(codes)
