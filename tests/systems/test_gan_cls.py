"""DCGAN, GAN-CLS and the style encoder: published sizes, losses computed by hand, errors, and learning."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2idist import systems
from t2idist.config.strict import from_dict
from t2idist.contract import Batch, BuildInfo, Captions, DataInfo, System
from t2idist.engine.trainer import Trainer
from t2idist.losses.adversarial import matching_aware_losses
from t2idist.losses.matching import WrongPairs
from t2idist.nn.discriminators import PairDiscriminator
from t2idist.nn.text_encoders import unit_scale
from tests.helpers.fixed_weights import fill, fingerprint, parameters
from tests.systems.test_loss_values import COLOURS, TINY_DAMSM, colour_batch, parameter_counts, trainer

VECTORS = len(COLOURS)
TINY: dict[str, Any] = {"image_size": 16, "generator_width": 16, "discriminator_width": 16, "z_dim": 4}
TINY_TEXT = {**TINY, "condition_dim": 8}


def build_info(vector_dim: int = 1024, group_size: int = 64, sources: Any = None) -> BuildInfo:
    return BuildInfo(group_size, 5, DataInfo(("",) * 15, 8855, vector_dim), sources or {})


def build_system(name: str, info: BuildInfo, **settings: Any) -> System:
    module = systems.load(name)
    return module.build(from_dict(module.Config, settings), info)


def export_index(system: str, info: BuildInfo, **settings: Any) -> dict[str, Any]:
    """Index of an export of `system`."""
    config = asdict(systems.load(system).Config(**settings))
    return {"system": system, "config": config, "plan": info.describe()}


def build_on_meta(name: str, info: BuildInfo, **settings: Any) -> System:
    with torch.device("meta"):
        return build_system(name, info, **settings)


# ------------------------------------------------------------------------------------------------ the published sizes
COCO = {"generator_width": 196, "discriminator_width": 196, "text_norm": False, "interpolate": False}
PORT = {"residual": False, "generator_width": 64, "discriminator_width": 64, "compat": "authors"}


def parameters_with_biases(net: nn.Module) -> int:
    """Count parameters as if every convolution had a bias, as in the published files (the code keeps them at zero)."""
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert all(m.bias is None for m in convolutions)
    return parameters(net) + sum(m.out_channels for m in convolutions)


@pytest.mark.parametrize(
    ("settings", "expected", "biased"),
    [
        ({}, (18_905_472, 4_030_080), (18_909_699, 4_032_321)),
        (COCO, (41_101_080, 36_183_440), (41_107_551, 36_190_301)),
        ({"compat": "authors"}, (18_905_472, 4_030_080), (18_909_699, 4_032_321)),
        (PORT, (4_756_736, 2_899_072), None),
    ],
)
def test_gan_cls_parameter_counts_are_the_published_ones(
    settings: dict[str, Any], expected: tuple[int, int], biased: tuple[int, int] | None
) -> None:
    system = build_on_meta("gan_cls", build_info(), **settings)
    assert parameter_counts(system) == dict(zip(("generator", "discriminator"), expected, strict=True))
    if biased is not None:
        assert tuple(parameters_with_biases(role.net) for role in system.roles.values()) == biased


def test_plain_layout_has_the_parameter_names_of_the_port() -> None:
    system = build_on_meta("gan_cls", build_info(), **PORT)
    assert fingerprint(system.roles["generator"].net) == "fe4b6e1d687185cb"
    assert fingerprint(system.roles["discriminator"].net) == "1529a0aa9c18af15"
    assert parameters(system.roles["generator"].net.get_submodule("projection")) == 131_456


def test_dcgan_parameter_counts_and_shapes() -> None:
    widths = {"generator_width": 64, "discriminator_width": 64}
    assert parameter_counts(build_on_meta("dcgan", build_info(), **widths)) == {
        "generator": 3_576_704,
        "discriminator": 2_765_568,
    }
    with_captions = build_on_meta("dcgan", build_info(), conditional=True, **widths)
    assert parameter_counts(with_captions) == parameter_counts(
        build_on_meta("gan_cls", build_info(), **{**PORT, "compat": ""})
    )
    generator = build_on_meta("dcgan", build_info()).roles["generator"].net
    assert generator.get_submodule("netG.0").weight.shape == (100, 1024, 4, 4)


@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize("residual", [False, True])
def test_networks_have_the_configured_image_size(size: int, residual: bool) -> None:
    torch.manual_seed(0)
    widths = {"generator_width": 2, "discriminator_width": 2}
    system: Any = build_system("gan_cls", build_info(6), image_size=size, residual=residual, **widths)
    z, text = torch.randn(3, 100), torch.randn(3, 6)
    output = system.roles["generator"].net(z, text)
    assert output.shape == (3, 3, size, size)
    assert system.roles["discriminator"].net(output, text).shape == (3,)
    assert system.sizes == (size,)


def test_each_layout_has_its_order_of_text_and_noise() -> None:
    for residual, first in ((True, "z"), (False, "text")):
        net: Any = fill(build_system("gan_cls", build_info(6), residual=residual, **TINY_TEXT).roles["generator"].net)
        z, text = torch.randn(2, 4), torch.randn(2, 6)
        parts = {"z": z, "text": net.projection(text)}
        rest = "text" if first == "z" else "z"
        assert torch.equal(net(z, text), net.netG(torch.cat([parts[first], parts[rest]], 1)))


def test_released_int_script_lacks_a_leaky_relu() -> None:
    def count_leaky_relus(**settings: Any) -> int:
        net = build_on_meta("gan_cls", build_info(), **settings).roles["discriminator"].net
        return sum(isinstance(m, nn.LeakyReLU) for m in net.get_submodule("netD_1").children())

    assert count_leaky_relus() == 4
    assert count_leaky_relus(compat="authors", interpolate=False) == 4
    assert count_leaky_relus(compat="authors") == 3
    assert count_leaky_relus(compat="authors", residual=False) == 4
    assert (
        count_leaky_relus(compat="authors", image_size=16) == 2
    )  # the last but one layer has no BatchNorm at this size


def test_only_the_ports_discriminator_cannot_detect_mismatches() -> None:
    """Its logit is an image term plus a text term, so a caption adds the same to every image."""

    def spread_of_effect(**settings: Any) -> float:
        net: Any = fill(
            build_system("gan_cls", build_info(6), **TINY_TEXT, **settings).roles["discriminator"].net
        ).double()
        torch.manual_seed(0)
        images, texts = torch.rand(9, 3, 16, 16).double(), torch.randn(2, 6).double()
        first, second = (net(images, text.expand(9, 6)) for text in texts)
        return (first - second).std().item()

    assert spread_of_effect(residual=False, compat="authors") < 1e-12
    for settings in ({"residual": False}, {"residual": True}, {"residual": True, "compat": "authors"}):
        assert spread_of_effect(**settings) > 1e-2


# --------------------------------------------------------------------------------------------------------- losses
class MeanColourDiscriminator(PairDiscriminator):
    """A discriminator whose logit is the mean colour plus the condition."""

    def features(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    def conditionals(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:
        return [features + condition[:, 0] for condition in conditions]


def test_matching_aware_losses_match_hand_computation() -> None:
    real, fake = (torch.tensor(v).view(3, 1, 1, 1).expand(3, 3, 2, 2) for v in ([1.0, 0.0, 2.0], [0.5, -1.0, 0.0]))
    condition = torch.tensor([[3.0], [2.0], [1.0]])
    pairs = WrongPairs(torch.tensor([1, 2, 0]), torch.tensor([False, True, True]))
    losses = matching_aware_losses(MeanColourDiscriminator(), real, fake, condition, pairs, 1)
    softplus = nn.functional.softplus
    torch.testing.assert_close(losses.real, softplus(-torch.tensor([4.0, 2.0, 3.0])).mean())
    torch.testing.assert_close(losses.wrong, softplus(torch.tensor([1.0, 5.0])).mean())
    torch.testing.assert_close(losses.fake, softplus(torch.tensor([3.5, 1.0, 1.0])).mean())
    assert losses.accuracy_matching == 0.5  # 2 against 1, 3 against 5; the first pair is of one class


def text_batch(step: int, repeats: int = 1, size: int = 16) -> Batch:
    """Images of one colour, each with a sentence vector for it."""
    batch = colour_batch((size,), step, repeats)
    vectors = nn.functional.one_hot(batch.class_ids, VECTORS).float()
    return replace(batch, captions=replace(batch.captions, vectors=vectors))


@pytest.mark.parametrize(
    "settings",
    [
        {"matching_aware": True, "interpolate": True},
        {"matching_aware": True, "interpolate": True, "beta": 0.2, "interpolation_weight": 3.0},
        {"matching_aware": True, "interpolate": True, "compat": "authors", "interpolation_weight": 3.0},
        {"matching_aware": False, "interpolate": True},
        {"matching_aware": True, "interpolate": False},
        {"matching_aware": False, "interpolate": False, "unit_text": True},
    ],
)
def test_gan_cls_step_matches_hand_computation(settings: dict[str, Any]) -> None:
    """Recompute the reports and gradients of the first step from the initial networks."""
    torch.manual_seed(0)
    names = ("generator", "discriminator")
    system: Any = build_system("gan_cls", build_info(VECTORS, 8), **TINY_TEXT, discriminator_lr=1e-30, **settings)
    run = trainer(system, 8)
    generator, discriminator = (system.roles[name].net for name in names)
    batch = text_batch(0)
    text = unit_scale(batch.captions.vectors) if settings.get("unit_text") else batch.captions.vectors
    run.noise_source.start(0)
    noises = [run.noise_source.normal(4) for _ in range(2)]
    beta = settings.get("beta", 0.5)
    texts = [text, beta * text + (1 - beta) * text.roll(-1, 0)]
    fakes = [generator(z, t) for z, t in zip(noises, texts, strict=True)]
    softplus = nn.functional.softplus

    real = softplus(-discriminator(batch.images[-1], text)).mean()
    wrong = softplus(discriminator(batch.images[-1], text.roll(-1, 0))).mean()
    fake = softplus(discriminator(fakes[0].detach(), text)).mean()
    loss_value = real + (wrong + fake) / 2 if settings["matching_aware"] else real + fake
    discriminator_gradients = torch.autograd.grad(
        loss_value, [p for p in discriminator.parameters() if p.requires_grad]
    )

    plain, mixed = (softplus(-discriminator(f, t)).mean() for f, t in zip(fakes, texts, strict=True))
    weight = settings.get("interpolation_weight", 1.0)
    loss = plain + weight * mixed if settings["interpolate"] else plain
    if settings.get("compat") == "authors":
        loss = (2 * plain + weight * mixed) / 3
    generator_gradients = torch.autograd.grad(loss, [p for p in generator.parameters() if p.requires_grad])

    run.run_step(batch)
    reports = run.reduce_reports()
    expected = {"discriminator/real": real, "discriminator/wrong": wrong, "discriminator/fake": fake}
    expected["generator/adversarial"] = plain
    if settings["interpolate"]:
        expected["generator/interpolated"] = mixed
    shares = {name for name in reports if name.startswith("discriminator/accuracy_")}
    assert len(shares) == 4 and all(0 <= reports[name] <= 1 for name in shares)
    expected |= {
        f"norm/{name}": torch.stack([gradient.norm() for gradient in gradients]).norm()
        for name, gradients in zip(names, (generator_gradients, discriminator_gradients), strict=True)
    }
    assert reports.keys() - shares == expected.keys()
    for name, value in expected.items():
        assert reports[name] == pytest.approx(value.item(), rel=1e-4 if name.startswith("norm/") else 1e-5), name
    for name, gradients in zip(names, (generator_gradients, discriminator_gradients), strict=True):
        trained = [n for n, p in system.roles[name].net.named_parameters() if p.requires_grad]
        state = run.state()
        for parameter, gradient in zip(trained, gradients, strict=True):
            moment = state[f"{name}/adam/{parameter}/exp_avg"]  # after one step (1 - beta1) of the gradient
            torch.testing.assert_close(moment, 0.5 * gradient, rtol=1e-3, atol=1e-6, msg=f"{name} {parameter}")


def test_learning_rate_schedule_is_the_published_one() -> None:
    for settings, epochs in (({}, 100), ({"lr_every_epochs": 40.0}, 40)):
        for role in build_on_meta("gan_cls", build_info(), **settings).roles.values():
            schedule = role.optimizer.schedule
            assert (schedule.kind, schedule.factor, schedule.every_images) == ("exponential", 0.5, epochs * 8855)


def test_bias_before_batch_norm_is_not_trained() -> None:
    for role in build_on_meta("gan_cls", build_info(), **PORT).roles.values():
        frozen = [name for name, p in role.net.named_parameters() if not p.requires_grad]
        assert frozen in (["projection.0.bias"], ["projector.projection.0.bias"])


# --------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("name", "info", "settings", "sentence"),
    [
        ("gan_cls", build_info(0), {}, r"uses\.text is missing"),
        ("dcgan", build_info(0), {"conditional": True}, r"uses\.text is missing"),
        ("gan_cls", build_info(group_size=1), {}, "group_size is 1; gan_cls"),
        ("dcgan", build_info(group_size=1), {"conditional": True}, "group_size is 1; dcgan"),
        ("gan_cls", build_info(), {"compat": "old"}, "compat: 'old'; expected '' or 'authors'"),
        ("gan_cls", build_info(), {"beta": 1.5}, "beta: 1.5; it must be from 0 to 1"),
        ("gan_cls", build_info(), {"image_size": 48}, "image_size is 48; it must be a power of two, at least 16"),
        ("dcgan", build_info(), {"image_size": 8}, "image_size is 8; it must be a power of two, at least 16"),
        ("style", build_info(), {}, r"uses\.generator is missing"),
        (
            "style",
            build_info(sources={"generator": export_index("dcgan", build_info())}),
            {},
            "uses.generator: the export is of system 'dcgan' without captions; it must be of 'gan_cls'",
        ),
        (
            "style",
            build_info(12, sources={"generator": export_index("gan_cls", build_info(11))}),
            {},
            "it was trained on sentence vectors of 11 elements and this data has 12",
        ),
        (
            "style",
            build_info(sources={"generator": export_index("damsm", build_info(), **TINY_DAMSM)}),
            {},
            "uses.generator: the export is of system 'damsm'; it must be of 'gan_cls'",
        ),
    ],
)
def test_build_rejects_invalid_settings(name: str, info: BuildInfo, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_on_meta(name, info, **settings)


def test_sample_rejects_captions_without_vectors() -> None:
    system: Any = build_system("gan_cls", build_info(VECTORS), **TINY_TEXT)
    captions = Captions(torch.ones(2, 5, dtype=torch.int64), torch.ones(2, dtype=torch.int64), torch.zeros(2, 0))
    with pytest.raises(ValueError, match="captions without sentence vectors"):
        system.sample({"generator": system.roles["generator"].net}, captions, lambda *shape: torch.zeros(2, *shape))


# -------------------------------------------------------------------------------------------------------- learning
def caption_correlation(run: Trainer) -> float:
    """Correlate the mean colours of generated images with the colours that their vectors name."""
    batch = text_batch(2000, repeats=8)
    generator = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> Tensor:
        return torch.randn(len(batch.ids), *shape, generator=generator)

    system: Any = run.system
    with torch.no_grad():
        output = system.sample(run.evaluation_nets(), batch.captions, noise)
    means = output.images[-1].mean(dim=(2, 3))
    return torch.corrcoef(torch.stack([means.flatten(), COLOURS[batch.class_ids].flatten()]))[0, 1].item()


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gan_cls", {"residual": True}),
        ("gan_cls", {"residual": False}),
        ("gan_cls", {"residual": False, "matching_aware": False}),
        ("dcgan", {"conditional": True}),
    ],
)
def test_generated_images_follow_captions(name: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(1)
    rates = {"generator_lr": 2e-3, "discriminator_lr": 2e-3, "ema_half_life_images": 100.0}
    run = trainer(build_system(name, build_info(VECTORS, 16), **TINY_TEXT, **rates, **settings), 16)
    assert caption_correlation(run) < 0.2
    for step in range(100):
        run.run_step(text_batch(step, repeats=2))
        if step == 50:
            run.reduce_reports()
    assert caption_correlation(run) > 0.5
    reports = run.reduce_reports()
    if settings.get("matching_aware", name == "gan_cls"):
        assert reports["discriminator/accuracy_matching"] > 0.8
