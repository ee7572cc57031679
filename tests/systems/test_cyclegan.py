"""CycleGAN: published networks and losses, the image pool on any number of workers, and errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2idist.config import CheckpointConfig
from t2idist.contract import BuildInfo, DataInfo
from t2idist.engine.checkpoint.manager import CheckpointManager
from t2idist.engine.schedule import lr_factor
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World
from t2idist.losses.adversarial import LEAST_SQUARES, half_loss, loss_generated, patch_losses
from t2idist.nn.image_translation import PatchGan, ResnetGenerator
from t2idist.systems.cyclegan import Config, CycleGan, build
from tests.helpers import fixed_weights, small_systems, toy_gan
from tests.helpers.worker_processes import Workers


def build_info(*attributes: str, paired: bool = False) -> BuildInfo:
    return BuildInfo(1, 5, DataInfo(("",), 100, attributes=(attributes,), paired=paired))


# ------------------------------------------------------------------------------------------------- published numbers
def test_parameter_counts_are_the_published_ones() -> None:
    """As the released code prints them: G 11.378 M each, D 2.765 M each."""
    with torch.device("meta"):
        system = build(Config(), build_info("horse", "zebra"))
    counts = {name: fixed_weights.parameters(role.net) for name, role in system.roles.items()}
    assert counts == {"generator": 2 * 11_378_179, "discriminator_a": 2_764_737, "discriminator_b": 2_764_737}


def test_generator_has_the_layers_of_the_appendix() -> None:
    """c7s1-64, d128, d256, R256 x 9, u128, u64, c7s1-3 (appendix 7.2)."""
    with torch.device("meta"):
        net = ResnetGenerator(64, 9)
        sizes = []
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.register_forward_hook(lambda _, __, out: sizes.append((out.shape[1], out.shape[2])))
        net(torch.empty(1, 3, 256, 256))
    residual = [(256, 64)] * 18
    assert sizes == [(64, 256), (128, 128), (256, 64), *residual, (128, 128), (64, 256), (3, 256)]


@pytest.mark.parametrize(("layers", "pixels"), [(1, 16), (2, 34), (3, 70), (5, 286)])
def test_a_logit_of_the_discriminator_depends_on_a_patch(layers: int, pixels: int) -> None:
    """The receptive fields that the paper of pix2pix gives (appendix 6.1.2)."""
    net = PatchGan(3, 1, layers, "batch").double().eval()
    images = torch.rand(1, 3, 384, 384, dtype=torch.float64, requires_grad=True)
    logits = net(images)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], images)
    rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == pixels


def test_seventy_pixel_patches_of_256_pixels_are_30_by_30() -> None:
    with torch.device("meta"):
        assert PatchGan(3, 64, 3, "instance")(torch.empty(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_least_squares_losses_of_fixed_logits() -> None:
    """D: ((1.5 - 1)^2 + (0 - 1)^2) / 2 of real and (0.5^2 + 1^2) / 2 of fake, halved; G: the mean of (D - 1)^2."""
    logits = {1.0: torch.tensor([1.5, 0.0]), -1.0: torch.tensor([0.5, 1.0])}

    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([logits[float(image.mean())] for image in images])

    losses = patch_losses(Fixed(), torch.ones(1, 3, 2, 2), -torch.ones(1, 3, 2, 2), LEAST_SQUARES)
    assert float(losses.real) == 0.625 and float(losses.fake) == 0.625
    assert float(half_loss(losses)) == 0.625
    assert float(losses.accuracy_real) == 0.5 and float(losses.accuracy_fake) == 0.0, "the boundary is at 0.5"
    assert float(loss_generated(torch.tensor([0.5, 1.0]), LEAST_SQUARES)) == 0.125


class Shift(nn.Module):
    """Adds a constant, for losses that can be computed by hand."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, images: Tensor) -> Tensor:
        return images + self.constant


def test_cycle_and_identity_losses_of_fixed_generators() -> None:
    """A to B adds 0.5, B to A 0.25: each cycle is off by 0.75, and each identity by its constant."""
    with torch.device("meta"):
        system = build(Config(image_size=8), build_info("a", "b"))
    generators: Any = nn.Module()
    generators.a_to_b, generators.b_to_a = Shift(0.5), Shift(0.25)
    fakes, losses = system._cycle(generators, torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8))
    assert {name: float(value) for name, value in losses.items()} == {
        "cycle_a": 0.75, "cycle_b": 0.75, "identity_a": 0.25, "identity_b": 0.5,
    }  # fmt: skip
    assert float(fakes["b"].mean()) == 0.5 and float(fakes["a"].mean()) == 1.25


def test_settings_are_the_published_ones() -> None:
    system = build(Config(), build_info("horse", "zebra"))
    adam = system.roles["generator"].optimizer
    assert (adam.lr, adam.beta1, adam.beta2) == (2e-4, 0.5, 0.999)
    factors = [lr_factor(adam.schedule, images) for images in (0, 133_400, 200_100, 266_800)]
    assert factors == pytest.approx([1, 1, 0.5, 0])
    weights = system.roles["generator"].net.get_parameter("a_to_b.model.10.conv_block.1.weight")
    assert float(weights.std()) == pytest.approx(0.02, rel=0.01)


# --------------------------------------------------------------------------------------------------- the image pool
class Groups:
    """`contract.Train` with a memory and noise only, for G groups."""

    def __init__(self, pool: Tensor, group_size: int) -> None:
        self.pool, self.group_size, self.step = pool, group_size, 0

    def memory(self, name: str) -> Tensor:
        return self.pool

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(len(self.pool) * self.group_size, *shape)


def test_the_pool_returns_half_of_the_images_from_before() -> None:
    torch.manual_seed(0)
    size, group_size, groups = 10, 2, 3
    config = Config(domains=("a", "b"), pool_size=size, image_size=4)
    with torch.device("meta"):
        system = CycleGan(config, ("a", "b"), group_size)
    train: Any = Groups(torch.zeros(groups, size, 3, 4, 4), group_size)
    exchanged, ages = 0, []
    steps = 400
    for step in range(steps):
        train.decide = lambda rule, step=step: rule(step, 0)
        numbers = torch.arange(groups * group_size) % group_size + step * group_size + 1.0
        offsets = torch.arange(groups).repeat_interleave(group_size) * 10_000
        fake = (numbers + offsets)[:, None, None, None].expand(-1, 3, 4, 4)
        seen = system._exchange("pool_a", fake, train)
        assert torch.equal(seen, seen[:, :1, :1, :1].expand_as(seen)), "images are exchanged whole"
        values = seen[:, 0, 0, 0]
        assert torch.equal(values // 10_000, offsets / 10_000), "never with another group's"
        if step * group_size < size:
            assert torch.equal(seen, fake), "while it fills, images pass"
        different = values != fake[:, 0, 0, 0]
        exchanged += int(different.sum())
        ages += (fake[:, 0, 0, 0] - values)[different].tolist()
    share = exchanged / ((steps - size / group_size) * groups * group_size)
    assert 0.45 < share < 0.55
    assert max(ages) > 2 * size, "images stay for a while"
    assert min(ages) > 0


def still_trainer(world: World, precision: str = "float64") -> Trainer:
    """A trainer of a CycleGAN whose weights do not move, so that the pool is a function of the data alone."""
    model = {**small_systems.MODELS["cyclegan"], "generator_lr": 1e-300, "discriminator_lr": 1e-300}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small_systems.MODELS, "cyclegan", model)
        return small_systems.trainer(world, "cyclegan", precision)


def pools(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.state().items() if name.startswith("memory/")}


def train_and_save(world: World, url: str, save_after: int, steps: int) -> dict[str, Tensor]:
    """Train, save on the way, and go on until the workers are killed, as it were."""
    trainer = still_trainer(world)
    checkpoints = CheckpointManager(url, world, CheckpointConfig(), {})
    small_systems.run_steps(trainer, save_after)
    checkpoints.save(trainer)
    checkpoints.finish()
    small_systems.run_steps(trainer, steps - save_after)
    return pools(trainer)


def restore_and_train(world: World, url: str, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    trainer = still_trainer(world)
    assert CheckpointManager(url, world, CheckpointConfig(), {}).restore(trainer) is not None
    restored = pools(trainer)
    small_systems.run_steps(trainer, steps - trainer.step)
    return restored, pools(trainer)


def joined(of_workers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value for pools_of_worker in of_workers for name, value in pools_of_worker.items()}


@pytest.mark.whole
def test_the_pool_resumes_bitwise_on_another_number_of_workers(workers: Workers, tmp_path: Path) -> None:
    """Killed after step 7, resumed from step 4 on 1, 3 and 4 workers; 3 images a step overfill the pools of 5."""
    whole = joined(workers.run(2, train_and_save, str(tmp_path / "whole"), 7, 7))
    saved = joined(workers.run(2, train_and_save, str(tmp_path / "killed"), 4, 4))
    joined(workers.run(2, train_and_save, str(tmp_path / "killed"), 4, 7))
    assert len(whole) == 2 * small_systems.GROUPS
    assert all(not torch.equal(whole[name], saved[name]) for name in whole), "three steps change every pool"
    for size in (1, 3, 4):
        results = workers.run(size, restore_and_train, str(tmp_path / "killed"), 7)
        restored, after = (joined([result[i] for result in results]) for i in range(2))
        assert restored.keys() == after.keys() == whole.keys()
        assert all(torch.equal(restored[name], saved[name]) for name in saved)
        assert all(torch.equal(after[name], whole[name]) for name in whole)


def test_parts_of_a_workers_groups_have_their_own_pools() -> None:
    at_once, in_parts = (small_systems.trainer(World(), "cyclegan", "float64", 4, parts) for parts in (None, 1))
    for trainer in (at_once, in_parts):
        small_systems.run_steps(trainer, 4)
    for name, value in pools(at_once).items():
        assert torch.allclose(value, pools(in_parts)[name], rtol=0, atol=1e-9), name


# ------------------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("settings", "info", "message"),
    [
        ({}, build_info("a", "b", "c"), "domains: none, and the data has 3 attributes; give two different attributes"),
        ({}, build_info(), "domains: none, and the data has 0 attributes"),
        (
            {"domains": ("a", "a")},
            build_info("a", "b"),
            "domains: a, a; give two different attributes of the data: a, b",
        ),
        ({"domains": ("a", "x")}, build_info("a", "b"), "domains: 'x' is not an attribute of the data: a, b"),
        ({"image_size": 30}, build_info("a", "b"), "image_size is 30; it must be a multiple of 4"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], info: BuildInfo, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Config(**settings), info)


def test_least_squares_are_not_relativistic() -> None:
    with pytest.raises(ValueError, match="relativistic: true, but adversarial_loss is least_squares"):
        Config(relativistic=True)


def test_pairs_and_two_attributes_need_no_names() -> None:
    with torch.device("meta"):
        assert build(Config(), build_info("a", "b")).domains == ("a", "b")
        assert build(Config(), build_info(paired=True)).domains == ("A", "B")
        assert build(Config(domains=("x", "y")), build_info(paired=True)).domains == ("x", "y")


def test_every_generator_learns_from_both_domains() -> None:
    trainer = small_systems.trainer(World(), "cyclegan", "float64")
    before = {k: v.clone() for k, v in trainer.state().items() if k.startswith("generator/net")}
    small_systems.run_steps(trainer, 1)
    after = trainer.state()
    frozen = {k for k, v in before.items() if torch.equal(after[k], v)}
    biases = {
        f"generator/net/{k}" for k, p in trainer.role_network("generator").named_parameters() if not p.requires_grad
    }
    assert frozen == biases, "only biases that the norms remove stand still"


@pytest.mark.slow
def test_domains_of_other_colours_are_translated() -> None:
    """Red squares on dark ground become blue ones, and back, while the places of the squares stay."""
    model = {**small_systems.MODELS["cyclegan"], "generator_width": 8, "generator_lr": 2e-3, "discriminator_lr": 1e-3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small_systems.MODELS, "cyclegan", {**model, "decay_end_images": 1e9, "decay_start_images": 9e8})
        trainer = small_systems.trainer(World(), "cyclegan", "float64", groups=1)

    def squares(channel: int, seed: int) -> Tensor:
        images = torch.full((small_systems.GROUP_SIZE, 3, 16, 16), 30, dtype=torch.uint8)
        corners = torch.randint(0, 9, (len(images), 2), generator=torch.Generator().manual_seed(seed))
        for image, (y, x) in zip(images, corners.tolist(), strict=True):
            image[channel, y : y + 7, x : x + 7] = 220
        return images

    template = toy_gan.batch(0, range(1), small_systems.GROUP_SIZE, (16,))
    for step in range(400):
        batch = replace(template, images=(squares(0, 2 * step),), partners=(squares(2, 2 * step + 1),))
        trainer.run_step(batch)
    system: Any = trainer.system
    for target, (own, other) in ((1, (0, 2)), (0, (2, 0))):
        images = squares(own, 10_001)
        made = system.to_domain(trainer.evaluation_nets(), images.double() / 127.5 - 1, target)
        inside = images[:, own] == 220
        assert float(made[:, other][inside].mean()) > float(made[:, other][~inside].mean()) + 0.5
        assert float(made[:, other][inside].mean()) > float(made[:, own][inside].mean()) + 0.5
