"""StarGAN: released networks and losses, labels, errors, and learning."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from t2idist import config as configuration
from t2idist import systems
from t2idist.config.strict import from_dict
from t2idist.contract import Batch, BuildInfo, Captions, DataInfo
from t2idist.engine.schedule import lr_factor
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from t2idist.losses.penalties import gradient_penalty, unit_gradient_penalty
from t2idist.nn.stargan import ConditionalInstanceNorm2d, PatchDiscriminator, TranslationGenerator, instance_norm
from t2idist.sampling.attribute_edits import AttributeEditor
from t2idist.systems.stargan import Config, Domain, StarGan, build, shuffled
from tests.helpers import fixed_weights, small_systems, toy_gan

HAIR = ("Black_Hair", "Blond_Hair", "Brown_Hair")
CELEBA = (*HAIR, "Male", "Young")
RAFD = ("angry", "contemptuous", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")


def build_info(*attributes: tuple[str, ...]) -> BuildInfo:
    return BuildInfo(16, 5, DataInfo(("",), 100, attributes=attributes))


# ------------------------------------------------------------------------------------------ released networks
@pytest.mark.parametrize(
    ("size", "attributes", "parameters", "names"),
    [
        (128, (CELEBA,), (8_430_528, 44_762_048), ("208d83d1008f1cc3", "74b6bfca2c650e96")),
        (128, (RAFD,), (8_439_936, 44_786_624), None),
        (256, (CELEBA, RAFD), (8_461_888, 45_147_072), ("091baf7274a947a4", "8ceeb30c706ecda8")),
        (256, (CELEBA,), (8_430_528, 44_884_928), None),
    ],
)
def test_parameter_counts_names_and_shapes_are_the_published_ones(
    size: int, attributes: tuple[tuple[str, ...], ...], parameters: tuple[int, ...], names: tuple[str, ...] | None
) -> None:
    with torch.device("meta"):
        system = build(Config(image_size=size), build_info(*attributes))
    nets = [system.roles[name].net for name in ("generator", "discriminator")]
    assert tuple(fixed_weights.parameters(net) for net in nets) == parameters
    assert names is None or tuple(fixed_weights.fingerprint(net) for net in nets) == names


@pytest.fixture(scope="module")
def authors() -> dict[str, Tensor]:
    return load_file(Path(__file__).parents[1] / "convert/authors" / "stargan.safetensors")


@pytest.mark.parametrize("training", [True, False])
def test_generator_reproduces_released_outputs_in_either_mode(authors: dict[str, Tensor], training: bool) -> None:
    net = fixed_weights.fill(TranslationGenerator(16, 5, 2)).train(training)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        generated = net(authors["images"], authors["labels"])
    torch.testing.assert_close(generated[:, :, ::4, ::4], authors["translated"], atol=1e-5, rtol=0)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items()), (
        "running averages must not change"
    )


def test_discriminator_reproduces_released_outputs(authors: dict[str, Tensor]) -> None:
    net = fixed_weights.fill(PatchDiscriminator(16, 64, 5, 4))
    images = authors["images"].clone().requires_grad_()
    scores, classes = net(images)
    torch.testing.assert_close(scores[:, None], authors["scores"], atol=1e-5, rtol=0)
    torch.testing.assert_close(classes, authors["classes"], atol=1e-5, rtol=0)
    torch.testing.assert_close(net.scores(images), scores)
    penalty = unit_gradient_penalty(scores, images)
    torch.testing.assert_close(penalty.view(1), authors["penalty"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
def test_labels_at_the_border_equal_constant_planes(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = TranslationGenerator(4, 3, 1).double()
    images, labels = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    planes = torch.cat([images, labels[:, :, None, None].expand(-1, -1, *size)], dim=1)
    first, rest = net.main[0], net.main[1:]
    torch.testing.assert_close(
        net(images, labels), rest(F.conv2d(planes, first.weight, padding=3)).tanh(), atol=1e-9, rtol=0
    )
    net(images, labels).square().sum().backward()
    assert first.weight.grad is not None
    assert torch.equal(first.weight.grad[:, 3:, 3, 3], torch.zeros(4, 3, dtype=torch.float64)), (
        "these weights have no effect"
    )
    assert bool(first.weight.grad[:, 3:].any())


def test_modulated_norms_apply_labels_at_all_positions_in_either_layout() -> None:
    torch.manual_seed(0)
    net = TranslationGenerator(4, 3, 1, modulated=True).double()
    images, labels = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[:2]
    generated, plain = net(images, labels), net(images, 0 * labels)
    assert ((generated - plain).abs().amax(dim=1) > 0).float().mean() > 0.99
    published = TranslationGenerator(4, 0, 1).double()
    published.load_state_dict({k: v for k, v in net.state_dict().items() if "by_labels" not in k})
    padded = F.pad(images, (3,) * 4)
    torch.testing.assert_close(plain, published.main(padded).tanh(), atol=1e-9, rtol=0)
    laid = copy.deepcopy(net).to(memory_format=torch.channels_last)
    in_rows = laid(images.contiguous(memory_format=torch.channels_last), labels)
    torch.testing.assert_close(in_rows, generated, atol=1e-9, rtol=0)
    for out in (generated, in_rows):
        out.square().sum().backward()
    for (name, one), two in zip(net.named_parameters(), laid.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-9, rtol=1e-9, msg=name)
        assert one.grad is not None and bool(one.grad.any()), name


def test_masked_generator_blends_input_and_output() -> None:
    torch.manual_seed(0)
    net = TranslationGenerator(4, 3, 1, masked=True)
    images, labels = torch.rand(2, 3, 16, 16) * 2 - 1, torch.ones(2, 3)
    planes = torch.randn(2, 4, 16, 16)
    planes[:, 3, :8], planes[:, 3, 8:12], planes[:, 3, 12:] = 50.0, -50.0, 0.0
    net.main[-1].register_forward_hook(lambda *_: planes)
    generated, output = net(images, labels), planes[:, :3].tanh()
    torch.testing.assert_close(generated[:, :, :8], images[:, :, :8])
    torch.testing.assert_close(generated[:, :, 8:12], output[:, :, 8:12])
    torch.testing.assert_close(generated[:, :, 12:], (images + output)[:, :, 12:] / 2)


def test_norm_uses_the_statistics_of_each_image() -> None:
    torch.manual_seed(0)
    norm, x = ConditionalInstanceNorm2d(3).eval(), torch.randn(4, 3, 5, 5) * 3 + 1
    torch.testing.assert_close(norm(x)[2:3], norm(x[2:3]))
    assert norm(x).mean(dim=(2, 3)).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------ penalty
def test_unit_gradient_penalty_has_the_published_value() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4, 3, 8, 8), torch.randn(3, 8, 8)
    x.requires_grad_()
    assert unit_gradient_penalty((0.1 * w * x**3).flatten(1).sum(1), x).item() == pytest.approx(56.0799675, abs=1e-4)


def test_gradient_penalty_interpolates_in_full_precision() -> None:
    real, fake = torch.full((3, 1, 2, 2), 2.0), torch.zeros(3, 1, 2, 2)
    mixing = torch.tensor([0.0, 0.5, 1.0])
    seen: list[Tensor] = []
    weight = torch.ones((), requires_grad=True)

    def score(images: Tensor) -> Tensor:
        seen.append(images)
        return (weight * images.square() / 2).flatten(1).sum(1)

    with torch.autocast("cpu", torch.bfloat16):
        penalty = gradient_penalty(score, real.bfloat16(), fake.bfloat16(), mixing)
    assert seen[0].dtype == torch.float32 and seen[0][:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]
    norms = torch.tensor([0.0, 2.0, 4.0])  # of the slope, which is the image
    assert penalty.item() == pytest.approx((norms - 1).square().mean().item())
    penalty.backward()
    assert weight.grad is not None and weight.grad.item() == pytest.approx((2 * (norms - 1) * norms).mean().item())


def test_penalty_uses_the_sum_over_patches() -> None:
    torch.manual_seed(0)
    system = build(Config(image_size=16, generator_width=4, discriminator_width=4, layers=2), build_info(HAIR))
    net = system.roles["discriminator"].net
    real, fake, own = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16), torch.ones(4, 3)
    penalty = system._discriminator_losses(net, real, fake, own, torch.ones(4), 0)[3]
    images = real.clone().requires_grad_()
    scores = net(images)[0]
    (slope,) = torch.autograd.grad(scores.sum(), images)
    norms = slope.flatten(1).norm(dim=1)
    assert penalty.item() == pytest.approx((norms - 1).square().mean().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------ labels
def test_shuffled_labels_stay_in_their_group() -> None:
    labels = torch.arange(24.0).view(12, 2)
    keys = torch.randn(12, generator=torch.Generator().manual_seed(0))
    both = shuffled(labels, keys, 2)
    for rows in (slice(0, 6), slice(6, 12)):
        assert sorted(both[rows].tolist()) == labels[rows].tolist() and not torch.equal(both[rows], labels[rows])
        assert torch.equal(both[rows], shuffled(labels[rows], keys[rows], 1)), "groups are independent"


def two_domain_system(**settings: Any) -> StarGan:
    tiny = {"image_size": 16, "generator_width": 4, "residuals": 1, "discriminator_width": 4, "layers": 2}
    domains = (Domain(("Male", "Black_Hair")), Domain(exclusive=True))
    return build(Config(**{**tiny, "domains": domains, **settings}), build_info(CELEBA, RAFD))


def test_condition_has_the_mask_of_known_labels() -> None:
    system = two_domain_system()
    assert [columns.tolist() for columns in system._columns] == [[3, 0], list(range(8))]
    ones = system._condition(torch.ones(1, 2), 0), system._condition(torch.ones(1, 8), 1)
    assert ones[0].tolist() == [[1] * 2 + [0] * 8 + [1, 0]]
    assert ones[1].tolist() == [[0] * 2 + [1] * 8 + [0, 1]]
    alone = build(Config(image_size=16, layers=2), build_info(CELEBA))
    assert alone._condition(torch.ones(1, 5), 0).tolist() == [[1] * 5], "a single domain has no mask"


def test_class_loss_uses_the_logits_of_the_domain() -> None:
    torch.manual_seed(0)
    system = two_domain_system()
    logits = torch.randn(6, 10, requires_grad=True)
    yes_no, kinds = torch.randint(0, 2, (6, 2)).float(), torch.randint(0, 8, (6,))
    summed = F.binary_cross_entropy_with_logits(logits[:, :2], yes_no, reduction="sum") / 6
    torch.testing.assert_close(system._class_loss(logits, yes_no, 0), summed)
    one_hot = F.one_hot(kinds, 8).float()
    exclusive = system._class_loss(logits, one_hot, 1)
    torch.testing.assert_close(exclusive, F.cross_entropy(logits[:, 2:], kinds))
    (gradient,) = torch.autograd.grad(exclusive, logits)
    assert not gradient[:, :2].any() and bool(gradient[:, 2:].all())


def test_label_changes_keep_labels_consistent() -> None:
    labels = AttributeEditor.from_names((*HAIR, "Male", "Wearing_Hat"), one_hot=False)
    assert [(trait.name, trait.attributes) for trait in labels.traits] == [
        ("hair colour", HAIR), ("Male", ("Male",)), ("Wearing_Hat", ("Wearing_Hat",)),
    ]  # fmt: skip
    own = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0]])
    assert labels.set_attribute(own, "Blond_Hair").tolist() == [[0, 1, 0, 1, 0], [0, 1, 0, 0, 1], [0, 1, 0, 0, 0]]
    assert labels.flip(own, "Male").tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 0]]
    hair = labels.traits[0]
    assert labels.trait_classes(own, hair).tolist() == [0, 2, -1]
    assert labels.change_trait(own, hair)[:, :3].tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert len(list(labels.alternatives(own, hair))) == 2
    assert all(
        not (other[:2] == own[:2]).all(1).any() for trait in labels.traits for other in labels.alternatives(own, trait)
    )
    titles = [title for title, _ in labels.grid_edits(99)]
    assert titles[:5] == [*HAIR, "Male", "Wearing_Hat"]
    assert titles[5:] == ["hair colour + Male", "hair colour + Wearing_Hat", "Male + Wearing_Hat",
                          "hair colour + Male + Wearing_Hat"]  # fmt: skip
    both = dict(labels.grid_edits(99))["hair colour + Male"](own)
    assert both.tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 1, 1], [1, 0, 0, 1, 0]]
    apart = dataclasses.replace(labels, exclusive=torch.zeros(5, 5, dtype=torch.bool))
    apart.exclusive[4, :3] = apart.exclusive[:3, 4] = True
    assert apart.flip(own, "Wearing_Hat").tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert not any("hair colour + Wearing_Hat" in title for title, _ in apart.grid_edits(99))
    with pytest.raises(ValueError, match="'Hat' is not among the attributes that this export changes: Black_Hair"):
        labels.index("Hat")


def test_exclusive_labels_change_to_another_label() -> None:
    labels = AttributeEditor.from_names(("happy", "sad", "neutral"), one_hot=True)
    own = torch.eye(3)
    assert labels.set_attribute(own, "sad").tolist() == [[0, 1, 0]] * 3
    (trait,) = labels.traits
    assert labels.change_trait(own, trait).tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]


# ------------------------------------------------------------------------------------------------ turns, rates, errors
def trainer(system: StarGan, group_size: int = small_systems.GROUP_SIZE, groups: int = 1) -> Trainer:
    world = World()
    return Trainer(system, stage="stargan", seed=0, group_size=group_size, share=Share.of(world, groups), world=world,
                   precision=Precision("float32"))  # fmt: skip


@pytest.mark.parametrize("every", [1, 2, 3])
def test_generator_is_updated_for_each_domain(every: int) -> None:
    torch.manual_seed(0)
    run = trainer(two_domain_system(discriminator_steps=every))
    weights = {name: role.net for name, role in run.system.roles.items()}
    trained = []
    for step in range(6 * every):
        before = {name: [p.clone() for p in net.parameters()] for name, net in weights.items()}
        extent = DataInfo(("",), 1, attributes=(CELEBA, RAFD))
        run.run_step(
            toy_gan.batch(
                step,
                range(1),
                small_systems.GROUP_SIZE,
                (16,),
                5,
                dataclasses.replace(toy_gan.DATA_INFO, attributes=extent.attributes),
            )
        )
        moved = {
            name for name, net in weights.items()
            if any(not torch.equal(a, b) for a, b in zip(before[name], net.parameters(), strict=True))
        }  # fmt: skip
        assert "discriminator" in moved
        if "generator" in moved:
            trained.append(step)
    assert trained == [step for step in range(6 * every) if (step // 2 + 1) % every == 0]
    assert {step % 2 for step in trained} == {0, 1}


@pytest.mark.parametrize("preset", configuration.recipes()["stargan"])
def test_learning_rate_of_every_preset_falls_to_zero(preset: str) -> None:
    run = configuration.load("stargan", [f"preset={preset}"])
    stage = run.stages["stargan"]
    module = systems.load("stargan")
    settings = from_dict(module.Config, stage.model)
    names = tuple(domain.attributes for domain in settings.domains)
    with torch.device("meta"):
        system = build(settings, build_info(*names))
        authors = build(dataclasses.replace(settings, compat="authors"), build_info(*names))
    for name, role in system.roles.items():
        rate = role.optimizer.schedule
        assert [lr_factor(rate, share * stage.images // 4) for share in (0, 2, 3, 4)] == pytest.approx([1, 1, 0.5, 0])
        assert lr_factor(authors.roles[name].optimizer.schedule, stage.images) == pytest.approx(0.999)


@pytest.mark.parametrize(
    ("settings", "attributes", "message"),
    [
        ({"compat": "old"}, (CELEBA,), "compat: 'old'; expected '' or 'authors'"),
        ({"image_size": 100}, (CELEBA,), "image_size is 100 and layers is 6"),
        ({"discriminator_steps": 0}, (CELEBA,), "discriminator_steps: 0"),
        ({"decay_end_images": 5.0}, (CELEBA,), "decay_end_images is 5; it must be above"),
        ({}, ((),), "the data has none"),
        ({}, (), "the data has none"),
        (
            {"domains": (Domain(("Hat",)),)},
            (CELEBA,),
            r"domains\[0\]\.attributes: 'Hat' is not an attribute of the data",
        ),
        (
            {"domains": (Domain(("Male", "Male")),)},
            (CELEBA,),
            r"domains\[0\]\.attributes: Male, Male: one is given twice",
        ),
        ({"domains": (Domain(("Male",), True),)}, (CELEBA,), r"domains\[0\]\.exclusive: it needs at least two"),
        ({"domains": (Domain(), Domain())}, (CELEBA,), "domains has 2 entries and the stage has 1 data sets"),
    ],
)
def test_build_rejects_invalid_settings(settings: dict[str, Any], attributes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(from_dict(Config, settings), build_info(*attributes))


# ------------------------------------------------------------------------------------------------ learning
def square_batch(step: int, count: int) -> Batch:
    """Images of noise with a square that is red or blue, and the label "red"."""
    generator = torch.Generator().manual_seed(step)
    red = torch.randint(0, 2, (count, 1), generator=generator).float()
    images = 0.1 * torch.randn(count, 3, 16, 16, generator=generator)
    side = (2 * red - 1)[:, :, None] * 0.8
    images[:, 0, 4:12, 4:12] += side
    images[:, 2, 4:12, 4:12] -= side
    none = Captions(
        torch.zeros(count, 1, dtype=torch.int64), torch.ones(count, dtype=torch.int64), torch.zeros(count, 0)
    )
    return Batch((images,), none, torch.arange(count), red, tuple(map(str, range(count))), 1)


@pytest.mark.whole
@pytest.mark.parametrize("more", [{}, {"modulated": True, "masked": True}], ids=["published", "modulated, masked"])
def test_stargan_learns_to_change_a_colour(more: dict[str, bool]) -> None:
    torch.manual_seed(0)
    settings = Config(
        **more, image_size=16, generator_width=8, residuals=1, discriminator_width=16, layers=2, discriminator_steps=2,
        generator_lr=2e-3, discriminator_lr=2e-3, decay_start_images=1200.0, decay_end_images=2400.0,
    )  # fmt: skip
    system = build(settings, build_info(("red",)))
    run = trainer(system, group_size=16)

    def changed() -> tuple[float, float]:
        """Share of squares with the requested colour, and the error of the reconstruction."""
        nets, batch = run.evaluation_nets(), square_batch(10_000, 64)
        images, own = batch.images[0], batch.attributes
        with torch.no_grad():
            generated = system.translate(nets, images, 1 - own, 0)
            back = system.translate(nets, generated, own, 0)
        square = generated[:, :, 4:12, 4:12].mean(dim=(2, 3))
        seen = (square[:, 0] > square[:, 2]).float()
        return float((seen == 1 - own[:, 0]).float().mean()), float((back - images).abs().mean())

    before = changed()
    for step in range(150):
        run.run_step(square_batch(step, 16))
    after = changed()
    nets, batch = run.evaluation_nets(), square_batch(10_001, 64)
    with torch.no_grad():
        assert float((system.read(nets, batch.images[0], 0) == batch.attributes).float().mean()) > 0.95
    assert before[0] < 0.75 and after[0] > 0.9
    assert after[1] < 0.15 < before[1]


def test_norm_equals_the_plain_form_in_either_layout() -> None:
    torch.manual_seed(0)
    norm = ConditionalInstanceNorm2d(6).double()
    given = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = given.clone(memory_format=layout).requires_grad_()
        norm.zero_grad()
        out = norm(x)
        out.sin().sum().backward()
        assert x.grad is not None and norm.weight.grad is not None and out.is_contiguous(memory_format=layout)
        results.append((out.detach(), x.grad, norm.weight.grad.clone()))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(results[0][0], instance_norm(given, norm.weight, norm.bias, norm.eps))
