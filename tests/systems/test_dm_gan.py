"""DM-GAN: published sizes and names, the memory computed by hand, errors, and learning."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from t2idist import config as configuration
from t2idist.contract import System
from t2idist.nn.tree import MemoryStage
from t2idist.training.stages import StageRun
from tests.convert.author_files import PUBLISHED
from tests.helpers.fixed_weights import parameters
from tests.systems.test_loss_values import (
    SMALL,
    TINY_DAMSM,
    build_system,
    caption_correlation,
    colour_batch,
    damsm_config,
    parameter_counts,
    trainer,
)


# ------------------------------------------------------------------------------------------------ the published sizes
@pytest.mark.parametrize(("preset", "residuals", "expected"), [("cub", 2, 21_449_042), ("coco", 3, 22_335_314)])
def test_generator_is_the_released_one(preset: str, residuals: int, expected: int) -> None:
    """Names, shapes and count of the released code's G_NET."""
    with torch.device("meta"):
        net = build_system("dm_gan", damsm_config(), residuals=residuals).roles["generator"].net
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == PUBLISHED[f"dmgan/{preset}/netG"]
    assert parameters(net) == expected


def test_discriminators_are_the_released_ones_without_biases() -> None:
    """Released code: D_NET64, D_NET128 and D_NET256 at DF_DIM 32, less the biases of their convolutions."""
    with torch.device("meta"):
        system = build_system("dm_gan", damsm_config())
    counts = parameter_counts(system)
    del counts["generator"]
    assert list(counts.values()) == [1_878_242 - 736, 5_155_810 - 1_504, 18_264_546 - 3_040]
    for name in counts:
        net = system.roles[name].net
        convolutions = [module for module in net.modules() if parametrize.is_parametrized(module)]
        weights = [parameter for parameter in net.parameters() if parameter.dim() == 4]
        assert len(convolutions) == len(weights) > 0, "every convolution has spectral norm"


def test_presets_have_the_published_settings() -> None:
    """Section 3.5: lambda_1 1, lambda_2 5 and 50, batches of 10, Adam at 2e-4, 600 and 120 epochs."""
    for preset, weight, images in (("cub", 5.0, 600 * 8855), ("coco", 50.0, 120 * 82_783)):
        run = configuration.load("dm_gan", [f"preset={preset}", "data.source=x"])
        stage, model = run.stages["dm_gan"], StageRun(run, "dm_gan").model_config()
        assert (stage.group_size, stage.images) == (10, images)
        assert (model.kl_weight, model.damsm_weight, model.generator_lr, model.discriminator_lr) == (
            1,
            weight,
            2e-4,
            2e-4,
        )
        assert (model.generator_width, model.discriminator_norm) == (64, "spectral")


# ------------------------------------------------------------------------------------------------ memory
def small_stage(compat: str = "") -> Any:
    """A stage of one channel and words of one dimension, with weights that are easy to compute with."""
    net: Any = MemoryStage(1, 1, 1, 0, compat)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return net


WORDS = torch.tensor([[[2.0, -1.0]]])
FEATURES = torch.tensor([[[[1.0, 3.0]]]])  # mean 2


def test_memory_is_written_as_published() -> None:
    """Section 3.2: gates sigmoid(A w + B mean) of M_w(w), and one minus them of M_r(mean)."""
    memory = small_stage().write(FEATURES, WORDS)
    gates = [1 / (1 + math.exp(-(word + 2.0))) for word in (2.0, -1.0)]
    expected = [gates[0] * 2.0 + (1 - gates[0]) * 2.0, gates[1] * 0.0 + (1 - gates[1]) * 2.0]  # ReLU of -1 is 0
    torch.testing.assert_close(memory, torch.tensor([[expected, expected]]))


def test_memory_is_read_by_keys_as_published() -> None:
    """Sections 3.1 and 3.3: weights are a softmax of key times feature over words; a gate mixes what is read."""
    stage = small_stage()
    seen: list[Tensor] = []
    stage.residual.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    padding = torch.tensor([[False, False]])
    with torch.no_grad():
        stage.eval()(FEATURES, torch.zeros(1, 1), WORDS, padding, 1)
        memory = stage.write(FEATURES, WORDS)[0, 0]
    for position, feature in enumerate((1.0, 3.0)):
        keys = values = (2 * memory).tolist()  # both layers add the two equal dimensions
        scores = [math.exp(feature * key) for key in keys]
        read = sum(score * value for score, value in zip(scores, values, strict=True)) / sum(scores)
        gate = 1 / (1 + math.exp(-(feature + read)))
        refined = gate * read + (1 - gate) * feature
        torch.testing.assert_close(seen[0][0, :, 0, position], torch.tensor([refined, refined]))


def test_padding_is_never_read() -> None:
    torch.manual_seed(0)
    stage = MemoryStage(4, 6, 5, 1, "").eval()
    features, words = torch.randn(2, 4, 3, 3), torch.randn(2, 6, 5)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    changed = words.masked_fill(padding[:, None], 100.0)
    with torch.no_grad():
        (images, weights), (same, _) = (stage(features, torch.zeros(2, 5), w, padding, 1) for w in (words, changed))
    assert torch.equal(images, same) and not weights[1, 3:].any()
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 3, 3))


@pytest.mark.parametrize("compat", ["", "authors"])
def test_released_code_writes_the_mean_without_gradient(compat: str) -> None:
    features = FEATURES.clone().requires_grad_()
    small_stage(compat).write(features, WORDS).sum().backward()
    assert (features.grad is None) == (compat == "authors")


# ------------------------------------------------------------------------------------------------ errors
def test_invalid_settings_are_refused() -> None:
    damsm = damsm_config(**TINY_DAMSM)
    with pytest.raises(ValueError, match=r"uses\.damsm is missing; dm_gan takes its text and image encoder"):
        build_system("dm_gan", **SMALL)
    with pytest.raises(ValueError, match="group_size is 1; dm_gan pairs images with wrong captions"):
        build_system("dm_gan", damsm, group_size=1, **SMALL)
    with pytest.raises(ValueError, match="compat: 'old'; expected '' or 'authors'"):
        build_system("dm_gan", damsm, compat="old", **SMALL)


# ------------------------------------------------------------------------------------------------ learning
@pytest.mark.whole
def test_dm_gan_learns_to_follow_captions() -> None:
    damsm = damsm_config(**TINY_DAMSM, dropout=0.1, lr=5e-3)
    torch.manual_seed(0)
    encoders = trainer(build_system("damsm", vocabulary_size=15, group_size=8, **asdict(damsm)), 8)
    for step in range(60):
        encoders.run_step(colour_batch((32,), step))
    torch.manual_seed(2)
    rates = {"generator_lr": 1e-3, "discriminator_lr": 1e-3, "ema_half_life_images": 200.0}
    system: System = build_system(
        "dm_gan", damsm, 15, 16, **SMALL, z_dim=4, condition_dim=8, unit_text=True, damsm_weight=1.0, **rates
    )
    for name, net in encoders.evaluation_nets().items():
        system.frozen[name].net.load_state_dict(net.state_dict())
    run = trainer(system, 16)
    assert caption_correlation(run) < 0.2
    for step in range(100):
        run.run_step(colour_batch(system.sizes, step, repeats=2))
    assert caption_correlation(run) > 0.6
