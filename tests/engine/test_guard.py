"""A loss or a gradient that is not finite changes nothing, on any worker; too many in a row lead back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from t2idist.contract import Batch, Train
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from tests.engine.test_trainer import GROUP_SIZE, GROUPS, PLAN, snapshot, step
from tests.helpers import toy_gan
from tests.helpers.runs import run_command, write_recipe
from tests.helpers.worker_processes import Workers


class Poisoned(toy_gan.ToyGan):
    """Step 2 spoils one thing, in group 3 only: the generator's loss, a picture, or a gradient behind a finite loss."""

    def __init__(self, how: str) -> None:
        super().__init__(PLAN)
        self.how = how

    def step(self, batch: Batch, train: Train) -> None:
        if train.step == 2 and batch.ids[-1].startswith("2-3-"):
            if self.how == "picture":
                batch.images[-1][-1, 0, 0, 0] = torch.nan
            elif self.how == "loss":
                return super().step(batch, _Spoiled(train, lambda loss: loss + torch.inf))
            else:
                return super().step(batch, _Spoiled(train, lambda loss: loss + (loss * 0).sqrt()))
        return super().step(batch, train)


class _Spoiled:
    """The engine as a system sees it, with a generator's loss that goes wrong."""

    def __init__(self, train: Train, spoil) -> None:  # type: ignore[no-untyped-def]
        self._train, self._spoil = train, spoil

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return getattr(self._train, name)

    def apply(self, role: str, loss: Tensor) -> None:
        self._train.apply(role, self._spoil(loss))


def poisoned(world: World, how: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int, int, str, dict[str, float]]:
    torch.manual_seed(3)
    made = Trainer(
        Poisoned(how), stage="toy", seed=3, group_size=GROUP_SIZE, share=Share.of(world, GROUPS), world=world,
        precision=Precision("float64"),
    )  # fmt: skip
    step(made, 2)
    before = snapshot(made)
    step(made, 1)
    after = snapshot(made)
    in_a_row = made.guard.skips_in_a_row
    step(made, 3)
    values = made.reduce_reports()
    return before, after, in_a_row, made.guard.skips_in_a_row, made.first_nonfinite, values | {"skipped": made.guard.skipped_steps}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("how", "kept", "first"),
    [
        ("picture", "discriminator/", "discriminator/loss"),
        ("loss", "generator/", "gradients of generator"),
        ("gradient", "generator/", "gradients of generator"),
    ],
)
def test_a_bad_update_changes_nothing_on_any_worker(
    workers: Workers, size: int, how: str, kept: str, first: str
) -> None:
    for before, after, in_a_row, later, first_bad, values in workers.run(size, poisoned, how):
        for name, value in after.items():
            assert value.isfinite().all()
            if name.startswith(kept) and "/ema/" not in name and "num_batches" not in name:
                assert torch.equal(value, before[name]), name
        assert (in_a_row, later, values["skipped"]) == (1, 0, 1)
        assert first in first_bad and first_bad.endswith("in step 2")
        assert all(torch.tensor(value).isfinite() for value in values.values())


@pytest.mark.whole
def test_a_run_that_diverges_goes_back_and_then_ends_with_a_report_of_what_went_first(tmp_path: Path) -> None:
    words = ["stages.attngan.model.generator_lr=1e37", "guard.rollbacks=1", "guard.skips_in_a_row=3"]
    failed = run_command(str(write_recipe(tmp_path)), "--local", *words)
    assert failed.returncode != 0
    assert "stage attngan diverged 2 times: " in failed.stderr and "steps in a row up to step" in failed.stderr
    assert "; first: " in failed.stderr
    assert (tmp_path / "runs/tiny/damsm/export/export.json").exists()
