"""Pix2pix: published networks, losses, directions, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from t2idist.contract import BuildInfo, DataInfo
from t2idist.engine.schedule import lr_factor
from t2idist.engine.world import World
from t2idist.losses.adversarial import BCE, half_loss, patch_losses
from t2idist.nn.image_translation import UnetGenerator
from t2idist.systems.pix2pix import Config, build
from tests.helpers import fixed_weights, small_systems, toy_gan

PAIRS = BuildInfo(1, 5, DataInfo(("",), 100, paired=True))


def test_parameter_counts_are_the_published_ones() -> None:
    """As the released code prints them: U-Net 54.414 M, D 2.769 M."""
    with torch.device("meta"):
        system = build(Config(), PAIRS)
    assert fixed_weights.parameters(system.roles["generator"].net) == 54_413_955
    assert fixed_weights.parameters(system.roles["discriminator"].net) == 2_768_705


def test_unet_has_the_layers_of_the_appendix() -> None:
    """Down C64-C128-C256-C512 x 5 to 1x1; up CD512 x 3, C512-C256-C128-C64, joined to the way down (6.1.1)."""
    with torch.device("meta"):
        net = UnetGenerator(64, 8)
        sizes = []
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                kind = "down" if isinstance(module, nn.Conv2d) else "up"
                module.register_forward_hook(
                    lambda m, __, out, kind=kind: sizes.append((kind, m.in_channels, out.shape[1], out.shape[2]))
                )
        assert net(torch.empty(1, 3, 256, 256)).shape == (1, 3, 256, 256)
    down = [(3, 64, 128), (64, 128, 64), (128, 256, 32), (256, 512, 16), *((512, 512, size) for size in (8, 4, 2, 1))]
    up = [
        (512, 512, 2),
        (1024, 512, 4),
        (1024, 512, 8),
        (1024, 512, 16),
        (1024, 256, 32),
        (512, 128, 64),
        (256, 64, 128),
    ]
    assert sizes == [*(("down", *each) for each in down), *(("up", *each) for each in up), ("up", 128, 3, 256)]
    dropped = [name for name, module in net.named_modules() if isinstance(module, nn.Dropout)]
    depths = [name.count("model") - 1 for name in dropped]
    assert sorted(depths) == [5, 6, 7], "CD512 three times, above the lowest level"


def test_binary_cross_entropy_of_patches() -> None:
    class Fixed(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :1]

    real, fake = torch.full((1, 6, 2, 2), 0.3), torch.full((1, 6, 2, 2), -0.7)
    losses = patch_losses(Fixed(), real, fake, BCE)
    expected = (torch.tensor(-0.3).exp().log1p() + torch.tensor(-0.7).exp().log1p()) / 2
    assert float(half_loss(losses)) == pytest.approx(float(expected))
    assert float(losses.accuracy_real) == 1 and float(losses.accuracy_fake) == 1


def test_the_generator_draws_as_it_was_trained_in_groups_of_one_image() -> None:
    torch.manual_seed(0)
    with_norms = UnetGenerator(4, 4, "affine", dropout=False)
    batch = UnetGenerator(4, 4, "batch", dropout=False)
    assert with_norms.state_dict().keys() == batch.state_dict().keys()
    batch.load_state_dict(with_norms.state_dict())
    images = torch.rand(1, 3, 16, 16)
    assert torch.allclose(with_norms(images), batch.train()(images), atol=1e-5)
    assert torch.allclose(with_norms.eval()(images), batch.train()(images), atol=1e-5)


def test_settings_are_the_published_ones() -> None:
    system = build(Config(generator_width=8), PAIRS)
    adam = system.roles["generator"].optimizer
    assert (adam.lr, adam.beta1, system.config.l1_weight) == (2e-4, 0.5, 100)
    assert [lr_factor(adam.schedule, images) for images in (0, 40_000, 60_000, 80_000)] == pytest.approx([1, 1, 0.5, 0])


@pytest.mark.parametrize(("direction", "target"), [("a_to_b", 1), ("b_to_a", 0)])
def test_a_direction_makes_one_image_of_the_pair_from_the_other(direction: str, target: int) -> None:
    """With nearly all weight on L1, the generator learns the partner of its input, in that direction."""
    model = {**small_systems.MODELS["pix2pix"], "direction": direction, "generator_lr": 5e-3, "dropout": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small_systems.MODELS, "pix2pix", model)
        trainer = small_systems.trainer(World(), "pix2pix", "float64", groups=1)
    batch = toy_gan.batch(0, range(1), small_systems.GROUP_SIZE, (16,), data_info=toy_gan.PAIRS)
    dark, light = torch.full_like(batch.images[0], 40), torch.full_like(batch.images[0], 200)
    object.__setattr__(batch, "images", (dark,))
    object.__setattr__(batch, "partners", (light,))
    for _ in range(30):
        trainer.run_step(batch)
    system: Any = trainer.system
    given = (dark, light)[1 - target].double() / 127.5 - 1
    made = system.to_domain(trainer.evaluation_nets(), given, target)
    wanted = (dark, light)[target].double() / 127.5 - 1
    assert float((made - wanted).abs().mean()) < 0.3
    assert system.targets == (target,)


@pytest.mark.parametrize(
    ("settings", "info", "message"),
    [
        ({}, BuildInfo(1, 5, DataInfo(("",), 9)), "pix2pix learns from pairs of images, and the data has none"),
        ({"image_size": 96}, PAIRS, "image_size is 96; the generator unet needs a power of 2"),
        ({"image_size": 30, "generator": "resnet"}, PAIRS, "image_size is 30; the generator resnet needs a multiple"),
        ({"domains": ("a",)}, PAIRS, "domains: a; give two names"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], info: BuildInfo, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Config(**settings), info)
