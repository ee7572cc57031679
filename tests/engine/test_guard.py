"""Updates with a non-finite loss or gradient are skipped on every worker; too many in a row are a rollback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from t2idist.contract import Batch, Train
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from tests.engine.test_trainer import BUILD_INFO, GROUP_SIZE, GROUPS, snapshot, train_steps
from tests.helpers import toy_gan
from tests.helpers.runs import run_command, write_recipe
from tests.helpers.worker_processes import Workers


class NonFiniteGan(toy_gan.ToyGan):
    """A toy GAN with one non-finite value in group 3 of step 2: in an image, the generator's loss, or its gradient."""

    def __init__(self, how: str) -> None:
        super().__init__(BUILD_INFO)
        self.how = how

    def step(self, batch: Batch, train: Train) -> None:
        if train.step == 2 and batch.ids[-1].startswith("2-3-"):
            if self.how == "image":
                batch.images[-1][-1, 0, 0, 0] = torch.nan
            elif self.how == "loss":
                return super().step(batch, _ChangedLoss(train, lambda loss: loss + torch.inf))
            else:
                return super().step(batch, _ChangedLoss(train, lambda loss: loss + (loss * 0).sqrt()))
        return super().step(batch, train)


class _ChangedLoss:
    """Wraps `Train` and changes the loss that is applied."""

    def __init__(self, train: Train, change) -> None:  # type: ignore[no-untyped-def]
        self._train, self._change = train, change

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return getattr(self._train, name)

    def apply(self, role: str, loss: Tensor) -> None:
        self._train.apply(role, self._change(loss))


def run_with_nonfinite_step(
    world: World, how: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], int, int, str, dict[str, float]]:
    """Return the states before and after the step, skips in a row then and at the end, their cause, and the reports."""
    torch.manual_seed(3)
    trainer = Trainer(
        NonFiniteGan(how), stage="toy", seed=3, group_size=GROUP_SIZE, share=Share.of(world, GROUPS), world=world,
        precision=Precision("float64"),
    )  # fmt: skip
    train_steps(trainer, 2)
    before = snapshot(trainer)
    train_steps(trainer, 1)
    after = snapshot(trainer)
    guard = trainer.guard
    skips_after = guard.skips_in_a_row
    train_steps(trainer, 3)
    reports = trainer.reduce_reports() | {"skipped": guard.skipped_steps}
    return before, after, skips_after, guard.skips_in_a_row, trainer.reports.first_nonfinite, reports


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("how", "unchanged", "first"),
    [
        ("image", "discriminator/", "discriminator/loss"),
        ("loss", "generator/", "gradients of generator"),
        ("gradient", "generator/", "gradients of generator"),
    ],
)
def test_nonfinite_update_changes_nothing_on_any_worker(
    workers: Workers, size: int, how: str, unchanged: str, first: str
) -> None:
    for before, after, skips_after, skips_at_end, cause, reports in workers.run(size, run_with_nonfinite_step, how):
        for name, value in after.items():
            assert value.isfinite().all()
            if name.startswith(unchanged) and "/ema/" not in name and "num_batches" not in name:
                assert torch.equal(value, before[name]), name
        assert (skips_after, skips_at_end, reports["skipped"]) == (1, 0, 1)
        assert first in cause and cause.endswith("in step 2")
        assert all(torch.tensor(value).isfinite() for value in reports.values())


@pytest.mark.whole
def test_diverging_run_rolls_back_then_fails_and_names_the_first_cause(tmp_path: Path) -> None:
    settings = ["stages.attngan.model.generator_lr=1e37", "guard.rollbacks=1", "guard.skips_in_a_row=3"]
    failed = run_command(str(write_recipe(tmp_path)), "--local", *settings)
    assert failed.returncode != 0
    assert "stage attngan diverged 2 times: " in failed.stderr and "steps in a row up to step" in failed.stderr
    assert "; first: " in failed.stderr
    assert (tmp_path / "runs/tiny/damsm/export/export.json").exists()
