"""Options that are in no paper's preset: norms of the discriminator, R1 and learning rates that fall."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from t2idist.contract import Schedule
from t2idist.engine.schedule import lr_factor
from t2idist.engine.world import World
from t2idist.losses.adversarial import joint_losses
from t2idist.losses.matching import wrong_pairs
from t2idist.nn.blocks import couples_samples, replace_batch_norm
from t2idist.nn.discriminators import AttnDiscriminator
from t2idist.systems._options import GanOptions
from tests.helpers import small_systems


@pytest.mark.parametrize("label", [label for label in small_systems.MODELS if label.endswith("-options")])
def test_the_penalty_is_in_every_kth_step_and_the_rates_fall(label: str) -> None:
    trainer = small_systems.trainer(World(), label, "float64", groups=1)
    penalised = []
    for _ in range(4):
        small_systems.run_steps(trainer, 1)
        penalised.append(any(name.endswith("/r1") for name in trainer.reduce_reports()))
    assert penalised == [True, False, True, False]
    for role in trainer.system.roles.values():
        factors = [lr_factor(role.optimizer.schedule, images) for images in (0, 24, 57, 90, 1000)]
        assert factors == pytest.approx([1, 1, 0.6, 0.2, 0.2])


def test_the_weight_of_a_lazy_penalty_is_that_of_all_its_steps() -> None:
    options = GanOptions(r1_weight=0.5, r1_every=3)
    assert [options.r1_weight_in(step) for step in range(4)] == [1.5, 0, 0, 1.5]
    assert not any(GanOptions().r1_weight_in(step) for step in range(4))


def test_without_options_the_published_schedule_holds() -> None:
    published = Schedule("exponential", factor=0.5, every_images=10)
    assert GanOptions().adam(1e-3, published).schedule == published
    assert GanOptions(decay_end_images=10).adam(1e-3, published).schedule.kind == "linear"


@pytest.mark.parametrize("norm", ["group", "none"])
def test_norms_of_the_discriminator_are_replaced_and_it_runs_once_for_both_kinds_of_images(norm: str) -> None:
    torch.manual_seed(0)
    net = AttnDiscriminator(8, 16, 6)
    assert couples_samples(net)
    replace_batch_norm(net, norm)
    net.double()
    assert not couples_samples(net)
    assert any(isinstance(module, nn.GroupNorm) for module in net.modules()) == (norm == "group")
    real, fake = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    condition, pairs = torch.randn(6, 6, dtype=torch.float64), wrong_pairs(torch.arange(6), 2)
    passes: list[int] = []
    net.img_code_s4.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    losses = joint_losses(net, real, fake, condition, pairs, 2)
    assert passes == [12]
    own, other = net.conditionals(net.features(real), condition, condition[pairs.caption])
    expected = nn.functional.softplus(-own).mean(), nn.functional.softplus(other).mean()
    torch.testing.assert_close((losses.real, losses.wrong), expected, rtol=1e-12, atol=0)
    generated = net.conditional(net.features(fake), condition)
    torch.testing.assert_close(losses.fake, nn.functional.softplus(generated).mean(), rtol=1e-12, atol=0)
