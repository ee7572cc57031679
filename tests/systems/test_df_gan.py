"""DF-GAN: published sizes, blocks against the published order of their layers, losses of a step, errors, learning."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist import systems
from t2idist.config.strict import from_dict
from t2idist.contract import BuildInfo, DataInfo, System
from t2idist.engine.world import World
from t2idist.losses.matching import wrong_pairs
from t2idist.systems.df_gan import (
    ConditionalAffine,
    Config,
    DeepFusionBlock,
    DownBlock,
    FusionGenerator,
    FusionUpBlock,
    OneWayDiscriminator,
)
from tests.helpers import small_systems, toy_gan
from tests.helpers.fixed_weights import fill, parameters
from tests.systems.test_loss_values import (
    TINY_DAMSM,
    build_info,
    build_system,
    caption_correlation,
    colour_batch,
    damsm_config,
    trainer,
)

SMALL = {"image_size": 16, "generator_width": 8, "discriminator_width": 8, "z_dim": 4}


# ------------------------------------------------------------------------------------------------ the published sizes
def test_parameter_counts_are_the_published_ones() -> None:
    """Released code at nf 32 and 256 px: G 9,744,131, D 6,619,206 and C, the logit head, 295,936 parameters.

    D has three 1x1 convolutions of 256 channels that it never uses.
    """
    with torch.device("meta"):
        system = build_system("df_gan", damsm_config(), 5450)
    discriminator = system.roles["discriminator"].net
    head = parameters(discriminator.get_submodule("logit"))
    assert parameters(system.roles["generator"].net) == 9_744_131
    assert (parameters(discriminator) - head + 3 * (256 * 256 + 256), head) == (6_619_206, 295_936)
    assert parameters(system.frozen["text"].net) == 2_075_320
    assert system.sizes == (256,) and system.exports == ("generator", "text")


def maps(blocks: nn.ModuleList | nn.Sequential) -> list[tuple[int, int]]:
    """Record channels and size of the output of each block, when it runs."""
    found: list[tuple[int, int]] = []
    for block in blocks:
        block.register_forward_hook(lambda _, __, output: found.append((output.shape[1], output.shape[2])))
    return found


def test_feature_maps_are_the_published_ones() -> None:
    """Released code: channels nf * min(2**i, 8), from the image's size (i = 0) down to 4x4."""
    with torch.device("meta"):
        generator, discriminator = FusionGenerator(32, 256, 100, 256), OneWayDiscriminator(32, 256, 256)
        up, down = maps(generator.blocks), maps(discriminator.blocks)
        images = generator(torch.zeros(2, 100), torch.zeros(2, 256))
        (logits,) = discriminator.conditionals(discriminator.features(images), torch.zeros(2, 256))
    assert images.shape == (2, 3, 256, 256) and logits.shape == (2,)
    assert up == [(256, 8), (256, 16), (256, 32), (128, 64), (64, 128), (32, 256)]
    assert down == [(64, 128), (128, 64), (256, 32), (256, 16), (256, 8), (256, 4)]


def test_defaults_are_the_published_settings() -> None:
    config = Config()
    assert (config.adversarial_loss, config.ma_gp_weight, config.discriminator_norm) == ("hinge", 2.0, "none")
    for lr in (1e-4, 4e-4):
        adam = config.adam_of(lr)
        assert (adam.lr, adam.beta1, adam.beta2, adam.schedule.kind) == (lr, 0.0, 0.9, "constant")
    assert config.adam_of(config.generator_lr).lr == 1e-4 and config.adam_of(config.discriminator_lr).lr == 4e-4


# ------------------------------------------------------------------------------------------------ blocks
def test_affine_scales_and_shifts_channels_by_the_condition() -> None:
    net = ConditionalAffine(1, 2)
    x, condition = torch.randn(2, 2, 3, 3), torch.tensor([[2.0], [-1.0]])
    assert torch.equal(net(x, condition), x), "at first it changes nothing"
    with torch.no_grad():
        for part, offset in ((net.scale, 0.0), (net.shift, 10.0)):
            part[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
            part[0].bias.zero_()
            part[2].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
            part[2].bias.fill_(offset)
    factors = torch.tensor([[2.0, 0.0], [0.0, 3.0]])[:, :, None, None]  # ReLU(c) and 3 * ReLU(-c)
    torch.testing.assert_close(net(x, condition), factors * x + factors + 10)


def randomised(net: nn.Module) -> nn.Module:
    """Fill all weights, so that none is at its initial 0."""
    return fill(net.double())


@pytest.mark.parametrize("channels_out", [4, 6])
def test_up_block_equals_the_published_order(channels_out: int) -> None:
    """Upsampling first, then fusion, convolution, fusion, convolution, and a 1x1 shortcut if channels change."""
    block: Any = randomised(FusionUpBlock(5, 4, channels_out))
    x, condition = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5).double()
    up = F.interpolate(x, scale_factor=2)
    residual = F.conv2d(block.fusion1(up, condition), block.conv1.weight, block.conv1.bias, padding=1)
    residual = F.conv2d(block.fusion2(residual, condition), block.conv2.weight, block.conv2.bias, padding=1)
    shortcut = up if channels_out == 4 else F.conv2d(up, block.shortcut.weight, block.shortcut.bias)
    torch.testing.assert_close(block(x, condition), shortcut + residual, rtol=1e-10, atol=1e-12)


def test_fusion_block_is_two_affines_with_leaky_relu() -> None:
    block: Any = randomised(DeepFusionBlock(5, 4))
    x, condition = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5).double()
    expected = x
    for affine in block.affines:
        expected = F.leaky_relu(affine(expected, condition), 0.2)
    torch.testing.assert_close(block(x, condition), expected)


@pytest.mark.parametrize("channels_out", [4, 6])
def test_down_block_equals_the_published_order(channels_out: int) -> None:
    """A 1x1 shortcut, then average pooling, plus a factor times conv4x4 (stride 2), LReLU, conv3x3, LReLU."""
    assert DownBlock(4, 6).factor.tolist() == [0.0]
    block: Any = randomised(DownBlock(4, channels_out))
    x = torch.randn(2, 4, 8, 8).double()
    residual = F.leaky_relu(F.conv2d(x, block.residual[0].weight, stride=2, padding=1), 0.2)
    residual = F.leaky_relu(F.conv2d(residual, block.residual[2].weight, padding=1), 0.2)
    shortcut = x if channels_out == 4 else F.conv2d(x, block.shortcut.weight, block.shortcut.bias)
    expected = F.avg_pool2d(shortcut, 2) + block.factor * residual
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------ a step
def test_step_minimises_the_published_losses() -> None:
    """D: hinge with the two negatives halved, + 2 |gradient|^6; G: - D. Adam's first step shows D's whole gradient."""
    run = small_systems.trainer(World(), "df_gan", "float64", groups=1)
    generator, net = (run.system.roles[name].net for name in ("generator", "discriminator"))
    fakes: list[Tensor] = []
    generator.register_forward_hook(lambda _, __, images: fakes.append(images.detach()))
    batch = toy_gan.batch(0, range(1), small_systems.GROUP_SIZE, run.system.sizes, small_systems.MAX_WORDS)
    batch = batch.to(torch.device("cpu"), torch.float64)
    with torch.no_grad():
        _, sentence = run.system.frozen["text"].net(batch.captions.tokens, batch.captions.lengths)
    sentence = sentence / sentence.square().mean(1, keepdim=True).sqrt()  # unit_text
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    run.run_step(batch)
    after = {name: p.detach().clone() for name, p in net.named_parameters()}

    def logits(images: Tensor, condition: Tensor) -> Tensor:
        out: Tensor = net.conditionals(net.features(images), condition)[0]
        return out

    adversarial = -logits(fakes[0], sentence).mean()
    net.load_state_dict(before)
    real, vectors = batch.images[-1].clone().requires_grad_(), sentence.clone().requires_grad_()
    pairs = wrong_pairs(batch.class_ids, 1)
    assert bool(pairs.keep.all())
    own = logits(real, vectors)
    wrong = F.relu(1 + logits(real, vectors[pairs.caption])).mean()
    fake = F.relu(1 + logits(fakes[0], vectors)).mean()
    slopes = torch.autograd.grad(own.sum(), (real, vectors), create_graph=True)
    norms = torch.cat([slope.flatten(1) for slope in slopes], dim=1).norm(dim=1)
    loss = F.relu(1 - own).mean() + (wrong + fake) / 2 + 2 * norms.pow(6).mean()
    reports = run.reduce_reports()
    assert reports["generator/adversarial"] == pytest.approx(adversarial.item())
    assert reports["discriminator/wrong"] == pytest.approx(wrong.item())
    assert reports["discriminator/fake"] == pytest.approx(fake.item())
    assert reports["discriminator/ma_gp"] == pytest.approx(norms.pow(6).mean().item())
    names = [name for name in before if name != "logit.0.bias"]
    gradients = torch.autograd.grad(loss, [dict(net.named_parameters())[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        step = 4e-4 * gradient / (gradient.abs() + 1e-8)  # both moments are this gradient's, corrected for their bias
        torch.testing.assert_close(after[name], before[name] - step, rtol=1e-6, atol=1e-9, msg=name)


def test_vectors_of_the_data_replace_the_encoder() -> None:
    config = from_dict(Config, SMALL)
    system = systems.load("df_gan").build(config, BuildInfo(8, 5, DataInfo(("<end>",), 100, vector_dim=12)))
    assert not system.frozen and system.exports == ("generator",)
    batch = colour_batch(system.sizes, 0)
    run = trainer(system, 8)
    run.run_step(replace(batch, captions=replace(batch.captions, vectors=torch.randn(8, 12))))
    assert run.reduce_reports()["discriminator/ma_gp"] > 0


# ------------------------------------------------------------------------------------------------ errors
def test_invalid_settings_are_refused() -> None:
    damsm = damsm_config(**TINY_DAMSM)
    for settings, message in (
        ({"discriminator_norm": "group"}, "discriminator_norm: 'group'; expected 'spectral' or 'none'"),
        ({"image_size": 48}, "image_size is 48; it must be a power of two, at least 16"),
        ({"beta1": 1.0}, "beta1: 1.0; it must be at least 0 and below 1"),
        ({"generator_lr": 0.0}, "generator_lr: 0.0; it must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build_system("df_gan", damsm, **{**SMALL, **settings})
    with pytest.raises(ValueError, match=r"uses\.text is missing"):
        build_system("df_gan", **SMALL)
    with pytest.raises(ValueError, match="group_size is 1; df_gan pairs images with wrong captions"):
        build_system("df_gan", damsm, group_size=1, **SMALL)
    other = build_info(20, 30, damsm, "text")
    with pytest.raises(ValueError, match="its vocabulary has 30 words and this data's has 31"):
        systems.load("df_gan").build(Config(), replace(other, data=DataInfo(("",) * 31, 1000)))


# ------------------------------------------------------------------------------------------------ learning
@pytest.mark.whole
def test_df_gan_learns_to_follow_captions() -> None:
    damsm = damsm_config(**TINY_DAMSM, dropout=0.1, lr=5e-3)
    torch.manual_seed(0)
    encoders = trainer(build_system("damsm", vocabulary_size=15, group_size=8, **asdict(damsm)), 8)
    for step in range(60):
        encoders.run_step(colour_batch((32,), step))
    rates = {"generator_lr": 1e-3, "discriminator_lr": 4e-3, "ema_half_life_images": 200.0, "unit_text": True}
    system: System = build_system("df_gan", damsm, vocabulary_size=15, group_size=16, **SMALL, **rates)
    system.frozen["text"].net.load_state_dict(encoders.evaluation_nets()["text"].state_dict())
    run = trainer(system, 16)
    assert caption_correlation(run) < 0.2
    for step in range(100):
        run.run_step(colour_batch(system.sizes, step, repeats=2))
    assert caption_correlation(run) > 0.6
