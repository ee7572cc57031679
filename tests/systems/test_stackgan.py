"""StackGAN: published sizes and names, parts computed by hand, errors, and learning."""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2idist import systems
from t2idist.config.strict import from_dict
from t2idist.contract import Batch, BuildInfo, DataInfo, System
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from t2idist.losses.adversarial import generator_loss, joint_logits, joint_losses, loss_real, matching_aware_losses
from t2idist.losses.matching import wrong_pairs
from t2idist.nn.conditioning import LinearConditioning
from t2idist.nn.discriminators import StageDiscriminator
from t2idist.nn.two_stage import StageOneGenerator, StageTwoGenerator
from tests.helpers.fixed_weights import fill, fingerprint, parameters
from tests.systems.test_loss_values import TINY_DAMSM, caption_correlation, colour_batch, damsm_config

VECTOR_DIM = 12
TINY = {"generator_width": 16, "discriminator_width": 8, "z_dim": 4, "condition_dim": 8}


def build_info(vector_dim: int = VECTOR_DIM, group_size: int = 16, **sources: Any) -> BuildInfo:
    return BuildInfo(group_size, 5, DataInfo(("",) * 15, 1000, vector_dim), sources)


def build_system(info: BuildInfo, **settings: Any) -> System:
    module = systems.load("stackgan")
    return module.build(from_dict(module.Config, settings), info)


def export_index(system: System, info: BuildInfo) -> dict[str, Any]:
    """Index of the export of a stackgan stage."""
    stackgan: Any = system
    return {"system": "stackgan", "config": asdict(stackgan.config), "plan": info.describe()}


# ------------------------------------------------------------------------------------------------ the published sizes
PUBLISHED = {
    "coco": ((192, 96, 2), (20_020_832, 12_407_425, 37_130_480, 159_889_538)),
    "cub": ((128, 64, 4), (10_301_248, 5_715_713, 26_290_080, 71_269_122)),
}
NAMES = {
    "stage1_netG": "6a742b8fbfc1d9d2",
    "stage1_netD": "b8f64c4869b23f04",
    "stage2_netG": "52c0e438200dd466",
    "stage2_netD": "62004a6812907588",
}
"""Names and shapes (hashed) of the released networks for COCO; stage 2's generator without ``STAGE1_G.``."""


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameter_counts_and_names_are_the_published_ones(preset: str) -> None:
    (width, discriminator_width, residuals), counts = PUBLISHED[preset]
    settings = {"generator_width": width, "discriminator_width": discriminator_width, "residuals": residuals}
    info = build_info(1024)
    with torch.device("meta"):
        first = build_system(info, **settings)
        second = build_system(build_info(1024, stage1=export_index(first, info)), stage=2, image_size=256, **settings)
    nets = [role.net for system in (first, second) for role in system.roles.values()]
    assert tuple(parameters(net) for net in nets) == counts
    assert fingerprint(second.frozen["stage1"].net) == fingerprint(nets[0])
    if preset == "coco":
        assert [fingerprint(net) for net in nets] == list(NAMES.values())
        assert parameters(nets[2]) + parameters(second.frozen["stage1"].net) == 57_151_312


# ------------------------------------------------------------------------------------------------ parts
@pytest.mark.parametrize(("low", "high"), [(16, 32), (16, 64), (32, 64), (64, 128)])
def test_generators_have_the_configured_image_size(low: int, high: int) -> None:
    shape = {"width": 8, "text_dim": 6, "condition_dim": 3, "compat": ""}
    first = StageOneGenerator(image_size=low, z_dim=4, **shape)
    second = StageTwoGenerator(low_size=low, image_size=high, residuals=1, **shape)
    normal, text = torch.randn(2, 3), torch.randn(2, 6)
    small = first(torch.randn(2, 4), normal, text).images[0]
    assert small.shape == (2, 3, low, low)
    assert second(small, normal, text).images[0].shape == (2, 3, high, high)


def test_conditioning_with_compat_authors_has_no_negative_statistics() -> None:
    net = LinearConditioning(2, 2)
    nn.init.eye_(net.fc.weight)
    with torch.no_grad():
        net.fc.weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
        net.fc.bias.zero_()
    text, normal = torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0, -1.0]])
    condition, mean, log_variance = net(text, normal)
    assert mean.tolist() == [[0.5, -0.5]] and log_variance.tolist() == [[2.0, -2.0]]
    torch.testing.assert_close(condition, torch.tensor([[0.5 + torch.e, -0.5 - 1 / torch.e]]))
    theirs = LinearConditioning(2, 2, "authors")
    theirs.load_state_dict(net.state_dict())
    condition, mean, log_variance = theirs(text, normal)
    assert mean.tolist() == [[0.5, 0.0]] and log_variance.tolist() == [[2.0, 0.0]]
    torch.testing.assert_close(condition, torch.tensor([[0.5 + torch.e, -1.0]]))


def test_matching_aware_losses_equal_the_pair_terms_of_joint_losses() -> None:
    net = fill(StageDiscriminator(4, 16, 3, unconditional=True))
    real, fake, condition = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16), torch.randn(4, 3)
    pairs = wrong_pairs(torch.tensor([0, 1, 1, 2]), 2)
    losses = joint_losses(net, real, fake, condition, pairs, 2)
    ours = matching_aware_losses(net, real, fake, condition, pairs, 2)
    for name in ("real", "wrong", "fake"):
        torch.testing.assert_close(getattr(ours, name), getattr(losses, name))
    features = net.features(fake)
    both = loss_real(net.conditional(features, condition)) + loss_real(net.unconditional(features))
    torch.testing.assert_close(generator_loss(joint_logits, net, fake, condition), both)


def test_exports_depend_on_the_source_of_sentence_vectors() -> None:
    info = build_info()
    first = build_system(info, image_size=16, **TINY)
    assert not first.frozen and first.exports == ("generator",)
    second = build_system(build_info(stage1=export_index(first, info)), stage=2, image_size=32, **TINY)
    assert second.exports == ("generator", "stage1")
    damsm = {"system": "damsm", "config": asdict(damsm_config(**TINY_DAMSM)), "plan": build_info(0).describe()}
    read = build_info(0, text=damsm)
    first = build_system(read, image_size=16, **TINY)
    assert first.frozen["text"].source == "text" and first.exports == ("generator", "text")
    second = build_system(build_info(0, stage1=export_index(first, read)), stage=2, image_size=32, **TINY)
    assert second.frozen["text"].source == "stage1" and second.exports == ("generator", "stage1", "text")
    assert second.roles["generator"].net.ca_net.fc.in_features == TINY_DAMSM["embedding_dim"]


# ------------------------------------------------------------------------------------------------ errors
def test_build_rejects_invalid_settings() -> None:
    info = build_info()
    first = export_index(build_system(info, image_size=16, **TINY), info)
    later = {"stage": 2, "image_size": 32, **TINY}
    second = export_index(build_system(build_info(stage1=first), **later), build_info(stage1=first))
    other = {**first, "system": "attngan"}
    for where, settings, message in (
        (info, {"stage": 3}, "stage is 3; it must be 1 or 2"),
        (info, {"compat": "old"}, "compat: 'old'; expected '' or 'authors'"),
        (info, {"image_size": 48}, "image_size is 48; it must be one of 16, 32, 64, 128, 256"),
        (info, {"lr_halved_every_epochs": 0.0}, "lr_halved_every_epochs: 0.0; it must be above 0"),
        (build_info(group_size=1), {}, "group_size is 1"),
        (build_info(0), {}, r"uses\.text is missing"),
        (info, later, r"uses\.stage1 is missing"),
        (build_info(stage1=other), later, "of system 'attngan'; it must be of 'stackgan'"),
        (build_info(stage1=second), later, "of stage 2; it must be of stage 1"),
        (build_info(stage1=first, text=other), later, r"uses\.text: stage 2 uses the text encoder of its stage 1"),
        (build_info(stage1=first), {**later, "z_dim": 5}, "z_dim is 5, but 4 in its stage 1"),
        (build_info(stage1=first), {**later, "unit_text": True}, "unit_text is True, but False in its stage 1"),
        (build_info(stage1=first), {**later, "image_size": 16}, "image_size is 16; it must be above stage 1's 16"),
        (build_info(7, stage1=first), later, "sentence vectors of 12 elements and this data has 7"),
    ):
        with pytest.raises(ValueError, match=message):
            build_system(where, **settings)


# ------------------------------------------------------------------------------------------------ learning
class Recorder(Trainer):
    """A trainer that records the shapes of the noise of a step."""

    noise_shapes: list[tuple[int, ...]]

    def noise(self, *shape: int) -> Tensor:
        self.noise_shapes.append(shape)
        return super().noise(*shape)


def trainer(system: System) -> Recorder:
    world = World()
    precision = Precision("float32")
    run = Recorder(
        system, stage="colours", seed=0, group_size=16, share=Share.of(world, 1), world=world, precision=precision
    )
    run.noise_shapes = []
    return run


def with_vectors(batch: Batch) -> Batch:
    """Give the captions of a colour batch sentence vectors, one for each colour plus noise.

    They are long: the conditioning layer starts with weights of N(0, 0.02), and small vectors have an effect only late.
    """
    table = 15 * torch.randn(8, VECTOR_DIM, generator=torch.Generator().manual_seed(3))
    noise = 0.1 * torch.randn(len(batch.ids), VECTOR_DIM, generator=torch.Generator().manual_seed(4))
    return replace(batch, captions=replace(batch.captions, vectors=table[batch.class_ids] + noise))


def trained(system: System, steps: int) -> Recorder:
    run = trainer(system)
    assert caption_correlation(run, with_vectors) < 0.2
    for step in range(steps):
        run.run_step(with_vectors(colour_batch(system.sizes, step, repeats=2)))
    return run


@pytest.mark.slow
def test_both_stages_learn_to_follow_captions() -> None:
    torch.manual_seed(1)
    info = build_info()
    rates = {"generator_lr": 2e-3, "discriminator_lr": 2e-3, "kl_weight": 0.1, "ema_half_life_images": 400.0}
    first = trained(build_system(info, image_size=16, **TINY, **rates), 150)
    assert caption_correlation(first, with_vectors) > 0.5
    assert first.noise_shapes[:2] == [(4,), (8,)]
    rates |= {"generator_lr": 1e-3, "discriminator_lr": 5e-4}
    settings = {**TINY, **rates, "stage": 2, "image_size": 32, "residuals": 1}
    correlations = []
    for seed in range(3):  # one in ten of such small second stages learns nothing
        torch.manual_seed(seed)
        second = build_system(build_info(stage1=export_index(first.system, info)), **settings)
        second.frozen["stage1"].net.load_state_dict(first.evaluation_nets()["generator"].state_dict())
        run = trained(second, 200)
        assert run.noise_shapes[:3] == [(4,), (8,), (8,)]
        correlations.append(caption_correlation(run, with_vectors))
    assert statistics.median(correlations) > 0.35, correlations
    output: list[tuple[int, ...]] = []

    def noise(*shape: int) -> Tensor:
        output.append(shape)
        return torch.zeros(16, *shape)

    system: Any = run.system
    system.sample(run.evaluation_nets(), with_vectors(colour_batch((32,), 0, repeats=2)).captions, noise)
    assert output == run.noise_shapes[:3], "sampling draws noise in the same calls as training"
