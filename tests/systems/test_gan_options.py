"""Options that are in no paper's preset: losses, norms, penalties, augmentation, and rates that fall."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from t2idist.config import CheckpointConfig
from t2idist.contract import Schedule
from t2idist.engine.checkpoint.manager import CheckpointManager
from t2idist.engine.schedule import ema_decay, lr_factor
from t2idist.engine.world import World
from t2idist.losses import augmentation
from t2idist.losses.adversarial import (
    BCE,
    HINGE,
    generator_loss,
    joint_logits,
    joint_losses,
    loss_fake,
    loss_generated,
    loss_real,
    masked_loss_fake,
)
from t2idist.losses.matching import wrong_pairs
from t2idist.losses.penalties import matching_aware_penalty
from t2idist.nn.blocks import couples_samples, replace_batch_norm
from t2idist.nn.discriminators import AttnDiscriminator
from t2idist.nn.fast.layers import use_fast_layers
from t2idist.nn.init import orthogonal_
from t2idist.nn.spectral_norm import add_spectral_norm
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


def test_spectral_norm_scales_every_weight_and_is_learnt_through() -> None:
    torch.manual_seed(0)
    net = AttnDiscriminator(8, 16, 6)
    replace_batch_norm(net, "spectral")
    orthogonal_(net)
    for weight in net.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    add_spectral_norm(net)
    use_fast_layers(net)
    weights = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(weights) == 5
    for weight in weights:
        largest = float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2))
        assert 0.999 < largest < 1.1  # power iterations approach it from below
    images, condition = torch.randn(4, 3, 16, 16), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        net.conditional(net.features(images), condition).float().sum().backward()
    assert all(
        weight.grad is not None and weight.grad.abs().sum() > 0
        for name, weight in net.named_parameters()
        if "UNCOND" not in name
    )


def test_hinge_loss_and_what_it_rejects() -> None:
    logits = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    assert loss_real(logits, HINGE) == pytest.approx((3 + 1 + 0.5 + 0) / 4)
    assert loss_fake(logits, HINGE) == pytest.approx((0 + 1 + 1.5 + 4) / 4)
    assert loss_generated(logits, HINGE) == pytest.approx(-logits.mean().item())
    keep = torch.tensor([True, True, False, False])
    assert masked_loss_fake(logits, keep, 2, HINGE) == pytest.approx(0.5 * (0 + 1) / 2)
    with pytest.raises(ValueError, match="augment: 'blur'; there are color, translation, cutout"):
        GanOptions(augment=("blur",))


def test_top_k_keeps_the_largest_logits_of_each_group() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0, -3.0, -2.0], requires_grad=True)
    loss = loss_generated(logits, replace(HINGE, kept=0.5), groups=2)
    assert loss.item() == -((3 + 2) + (-1 - 2)) / 4
    loss.backward()
    assert logits.grad is not None and logits.grad.tolist() == [0, -0.25, -0.25, -0.25, 0, -0.25]
    assert loss_generated(logits, replace(HINGE, kept=0.01), groups=2).item() == -(3 - 1) / 2


def test_relativistic_losses_take_differences_of_logits() -> None:
    torch.manual_seed(0)
    net = AttnDiscriminator(8, 16, 6)
    replace_batch_norm(net, "none")
    net.double()
    kind = replace(BCE, relativistic=True)
    real, fake = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    condition, pairs = torch.randn(6, 6, dtype=torch.float64), wrong_pairs(torch.arange(6), 2)
    losses = joint_losses(net, real, fake, condition, pairs, 2, kind)
    own, other = net.conditionals(net.features(real), condition, condition[pairs.caption])
    generated = net.conditional(net.features(fake), condition)
    alone_real, alone_fake = (net.unconditional(net.features(images)) for images in (real, fake))
    for loss, difference in (
        (losses.real, own - generated), (losses.fake, own - generated), (losses.wrong, own - other),
        (losses.real_alone, alone_real - alone_fake), (losses.fake_alone, alone_real - alone_fake),
    ):  # fmt: skip
        torch.testing.assert_close(loss, nn.functional.softplus(-difference).mean(), rtol=1e-12, atol=0)
    ours = generator_loss(joint_logits, net, fake, condition, kind=kind, real=real, groups=2)
    expected = nn.functional.softplus(own - generated).mean() + nn.functional.softplus(alone_real - alone_fake).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_matching_aware_penalty_is_the_published_one() -> None:
    """DF-GAN's `MA_GP`: 2 (|d score / d (image, condition)|)^6, with the weight 2 left out; and its gradient."""
    torch.manual_seed(0)
    net = AttnDiscriminator(8, 16, 6)
    replace_batch_norm(net, "group")
    net.double()
    real, condition = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)

    def score(images: Tensor, vectors: Tensor) -> Tensor:
        return net.conditional(net.features(images), vectors)

    image, vector = real.clone().requires_grad_(), condition.clone().requires_grad_()
    gradients = torch.autograd.grad(score(image, vector).sum(), (image, vector), create_graph=True)
    expected = torch.cat([gradient.flatten(1) for gradient in gradients], 1).norm(dim=1).pow(6).mean()
    ours = matching_aware_penalty(score, real, condition)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    weights = [weight for weight in net.parameters() if weight.dim() > 1]
    for own, plain in zip(*(torch.autograd.grad(x, weights, allow_unused=True) for x in (ours, expected)), strict=True):
        assert (own is None) == (plain is None)
        if own is not None:
            torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("images", "half_life"), [(0, 4), (100, 54), (392, 200), (10_000, 200)])
def test_ema_half_life_grows_with_the_images_seen(images: int, half_life: float) -> None:
    assert ema_decay(200.0, 8, images, rampup=0.5) == 0.5 ** (8 / half_life)
    assert ema_decay(200.0, 8, images) == 0.5 ** (8 / 200)


# ------------------------------------------------------------ augmentation
def test_each_augmentation_does_what_its_name_says() -> None:
    torch.manual_seed(0)
    images = torch.rand(40, 3, 32, 32, dtype=torch.float64) - 0.5
    draws = torch.randn(40, augmentation.DRAWS, dtype=torch.float64)
    assert augmentation.augment(images, draws, ()) is images

    colored = augmentation.augment(images, draws, ["color"])
    for image, new in zip(images, colored, strict=True):  # each channel changes linearly with brightness and grey
        assert float(torch.corrcoef(torch.stack([image.mean(0).flatten(), new.mean(0).flatten()]))[0, 1]) > 0.999
    assert float((colored - images).abs().mean()) > 0.1

    shifts = set()
    for image, new in zip(images, augmentation.augment(images, draws, ["translation"]), strict=True):
        found = [
            (dy, dx)
            for dy in range(-4, 5)
            for dx in range(-4, 5)
            if torch.equal(new[:, 4 + dy : 28 + dy, 4 + dx : 28 + dx], image[:, 4:28, 4:28])
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 20 and {-4, 4} <= {number for pair in shifts for number in pair}

    for image, new in zip(images, augmentation.augment(images, draws, ["cutout"]), strict=True):
        cut = (new == 0).all(0)
        assert torch.equal(new[:, ~cut], image[:, ~cut])
        rows, columns = cut.any(1).sum(), cut.any(0).sum()
        assert cut.sum() == rows * columns and 0 < rows <= 16 and 0 < columns <= 16


def test_gradients_pass_through_augmentation_twice() -> None:
    torch.manual_seed(0)
    draws = torch.randn(2, augmentation.DRAWS, dtype=torch.float64)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def augmented(x: Tensor) -> Tensor:
        return augmentation.augment(x, draws, augmentation.KINDS).square()

    assert torch.autograd.gradcheck(augmented, (images,)) and torch.autograd.gradgradcheck(augmented, (images,))


class _StepOfTwoGroups:
    """What adaptive augmentation uses of `contract.Train`, in step 3 of two groups of 50 images."""

    def __init__(self) -> None:
        self.kept = torch.zeros(2, 2)
        self.reports: dict[str, float] = {}

    def memory(self, name: str) -> Tensor:
        assert name == "augmentation_discriminator"
        return self.kept

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(100, *shape)

    def decide(self, rule: Any) -> Any:
        return rule(3, 300)

    def report(self, name: str, value: Tensor) -> None:
        self.reports[name] = float(value)


def test_adaptive_augmentation_follows_the_share_of_real_images_taken_for_real() -> None:
    torch.manual_seed(0)
    options = GanOptions(augment=("color",), augment_target=0.6, augment_ramp_images=2000)
    assert options.memory_of(["generator", "discriminator"]) == {"augmentation_discriminator": (2,)}
    train: Any = _StepOfTwoGroups()
    images = torch.rand(100, 3, 8, 8)

    def augmented_of_each_group() -> list[float]:
        seen = options.augmented(train, "discriminator", images)
        return (seen != images).any(3).any(2).any(1).view(2, 50).float().mean(1).tolist()

    assert augmented_of_each_group() == [0, 0]
    accepted = torch.tensor([True] * 40 + [False] * 10 + [True] * 25 + [False] * 25)  # shares 0.8 and 0.5
    for _ in range(40):
        options.adapt_augmentation(train, "discriminator", accepted, 100)
    probabilities, shares = train.kept.unbind(1)
    assert shares.tolist() == pytest.approx([0.8, 0.5], abs=1e-3)
    assert float(probabilities[0]) == 1, "it rises by 0.05 a step, once the average share has passed 0.6"
    assert float(probabilities[1]) == 0 and train.reports["discriminator/augmented"] == float(probabilities.mean())
    train.kept[:, 0] = torch.tensor([0.5, 1.0])
    first, second = augmented_of_each_group()
    assert 0.3 < first < 0.7 and second == 1
    train.kept[:, 1] = 0.0
    for _ in range(15):
        options.adapt_augmentation(train, "discriminator", torch.zeros(100, dtype=torch.bool), 100)
    assert train.kept[:, 0].tolist() == pytest.approx([0, 0.25]), "it falls as fast"


def test_patches_of_an_image_do_not_speed_up_adaptive_augmentation() -> None:
    options = GanOptions(augment=("color",), augment_target=0.6, augment_ramp_images=2000)
    of_images, of_patches = _StepOfTwoGroups(), _StepOfTwoGroups()
    accepted = torch.tensor([True] * 45 + [False] * 5 + [True] * 25 + [False] * 25)
    for _ in range(12):
        for train, logits in ((of_images, accepted), (of_patches, accepted.repeat_interleave(9))):
            options.adapt_augmentation(cast(Any, train), "discriminator", logits, 100)
    assert of_images.kept[0, 0] > 0
    torch.testing.assert_close(of_patches.kept, of_images.kept)


@pytest.mark.parametrize(
    "label", [label for label, model in small_systems.MODELS.items() if model.get("augment_target")]
)
def test_adaptive_augmentation_is_under_way_in_the_tests_of_the_engine(label: str) -> None:
    trainer = small_systems.trainer(World(), label, "float64", groups=2)
    small_systems.run_steps(trainer, 7)
    kept = {name: value for name, value in trainer.state().items() if "/augmentation_discriminator" in name}
    assert len(kept) >= 2
    assert any(0 < float(probability) < 1 for probability, _ in kept.values()), kept


def test_a_run_goes_on_from_a_checkpoint_without_adaptive_augmentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**small_systems.MODELS["gan_cls-options"], "augment_target": 0.0}
    with monkeypatch.context() as patch:
        patch.setitem(small_systems.MODELS, "gan_cls-options", settings)
        without = small_systems.trainer(World(), "gan_cls-options", "float64")
    small_systems.run_steps(without, 2)
    checkpoints = CheckpointManager(str(tmp_path), World(), CheckpointConfig(), {})
    checkpoints.save(without)
    checkpoints.finish()
    trainer = small_systems.trainer(World(), "gan_cls-options", "float64")
    kept = [value for name, value in trainer.state().items() if name.startswith("memory/")]
    for value in kept:
        value.fill_(0.5)
    assert CheckpointManager(str(tmp_path), World(), CheckpointConfig(), {}).restore(trainer) is not None
    assert trainer.step == 2 and not any(value.any() for value in kept)
    small_systems.run_steps(trainer, 1)
    assert any(value.any() for value in kept)


def test_adaptive_augmentation_needs_something_to_adapt() -> None:
    with pytest.raises(ValueError, match=r"augment_target: there is nothing to adapt; set augment=\["):
        GanOptions(augment_target=0.8)
    assert not GanOptions(augment=("color",)).memory_of(["discriminator"])
