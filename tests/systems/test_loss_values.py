"""AttnGAN, StackGAN++ and DAMSM: published sizes, errors, and that they learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from t2idist import systems
from t2idist.config.strict import from_dict
from t2idist.contract import Batch, BuildInfo, Captions, DataInfo, System
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from tests.helpers.fixed_weights import parameters

VOCABULARY = {"cub": 5450, "coco": 27297}
COLOURS = torch.tensor(
    [[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1], [1, 1, 1], [-1, -1, -1]]
)


SLOT = {"attngan": "damsm", "stackgan_pp": "text", "dm_gan": "damsm", "df_gan": "text"}


def build_info(group_size: int, vocabulary_size: int, damsm: Any = None, slot: str = "damsm") -> BuildInfo:
    plan = BuildInfo(group_size, 5, DataInfo(("",) * vocabulary_size, 1000))
    if damsm is None:
        return plan
    source = {"system": "damsm", "config": asdict(damsm), "plan": plan.describe()}
    return replace(plan, sources={slot: source})


def build_system(
    name: str, damsm: Any = None, vocabulary_size: int = 5450, group_size: int = 20, **settings: Any
) -> System:
    module = systems.load(name)
    return module.build(
        from_dict(module.Config, settings), build_info(group_size, vocabulary_size, damsm, SLOT.get(name, ""))
    )


def damsm_config(**settings: Any) -> Any:
    return systems.load("damsm").Config(**settings)


def parameter_counts(system: System) -> dict[str, int]:
    return {name: parameters(role.net) for name, role in system.roles.items()}


# ------------------------------------------------------------------------------------------------ the papers' sizes
COCO = {"generator_width": 48, "discriminator_width": 96, "residuals": 3}


@pytest.mark.parametrize(
    ("preset", "settings", "expected"),
    [
        ("cub", {}, (7_084_592, 6_313_730, 19_424_002, 71_858_946)),
        ("coco", COCO, (13_811_456, 13_304_450, 42_800_258, 160_774_274)),
    ],
)
def test_attngan_parameter_counts_are_the_published_ones(
    preset: str, settings: dict[str, int], expected: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        system = build_system("attngan", damsm_config(), VOCABULARY[preset], **settings)
    names = ("generator", "discriminator_64", "discriminator_128", "discriminator_256")
    assert parameter_counts(system) == dict(zip(names, expected, strict=True))
    assert parameters(system.frozen["image"].net) == 22_506_720
    assert parameters(system.frozen["text"].net) == {"cub": 2_075_320, "coco": 8_629_420}[preset]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (21_239_696, 5_723_906, 18_834_178, 71_269_122)),
        ({"conditional": False}, (16_472_208, 2_765_569, 15_875_841, 68_310_785)),
    ],
)
def test_stackgan_pp_parameter_counts_are_the_published_ones(
    settings: dict[str, bool], expected: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        system = build_system("stackgan_pp", damsm_config(embedding_dim=1024), **settings)
    names = ("generator", "discriminator_64", "discriminator_128", "discriminator_256")
    assert parameter_counts(system) == dict(zip(names, expected, strict=True))


def test_damsm_parameter_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        system = build_system("damsm")
    (net,) = (role.net for role in system.roles.values())
    assert parameters(net.get_submodule("text")) == 2_075_320
    assert parameters(net.get_submodule("image")) == 22_506_720
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 2_075_320 + 721_152


# ---------------------------------------------------------------------------------------------------------- errors
SMALL = {"base_size": 16, "branches": 2, "generator_width": 8, "discriminator_width": 4, "residuals": 1}
TINY_DAMSM = {"embedding_dim": 16, "word_dim": 8, "trunk": "small", "trunk_width": 8, "image_size": 32}


@pytest.mark.parametrize("name", ["attngan", "stackgan_pp"])
def test_build_rejects_invalid_settings(name: str) -> None:
    damsm = damsm_config(**TINY_DAMSM)
    with pytest.raises(ValueError, match=rf"uses\.{SLOT[name]} is missing"):
        build_system(name, **SMALL)
    with pytest.raises(ValueError, match="group_size is 1"):
        build_system(name, damsm, group_size=1, **SMALL)
    with pytest.raises(ValueError, match="compat: 'old'; expected '' or 'authors'"):
        build_system(name, damsm, compat="old", **SMALL)
    module = systems.load(name)
    plan = build_info(20, 30, damsm, SLOT[name])
    with pytest.raises(ValueError, match="its vocabulary has 30 words and this data's has 31"):
        module.build(module.Config(**SMALL), replace(plan, data=DataInfo(("",) * 31, 1000)))
    other = {SLOT[name]: {**plan.sources[SLOT[name]], "system": "stream"}}
    with pytest.raises(ValueError, match="of system 'stream'; it must be of 'damsm'"):
        module.build(module.Config(**SMALL), replace(plan, sources=other))


def test_damsm_rejects_invalid_settings() -> None:
    for settings, message in (
        ({"trunk": "resnet"}, "trunk is 'resnet'"),
        ({"trunk": "small", "image_size": 40}, "image_size is 40"),
        ({"image_size": 64}, "image_size is 64; the trunk 'inception' needs at least 75"),
        ({"trunk": "small", "image_size": 64, "trunk_weights": "x"}, "trunk_weights is given"),
        ({**TINY_DAMSM, "embedding_dim": 15}, "embedding_dim is 15; it must be even"),
    ):
        with pytest.raises(ValueError, match=message):
            build_system("damsm", **settings)


# -------------------------------------------------------------------------------------------------------- learning
def colour_batch(sizes: tuple[int, ...], step: int, repeats: int = 1) -> Batch:
    """Images of one colour plus noise, each with a caption of a word for the colour and filler words."""
    generator = torch.Generator().manual_seed(step)
    kinds = torch.arange(len(COLOURS)).repeat(repeats)
    count = len(kinds)
    largest = COLOURS[kinds][:, :, None, None] * 0.8 + 0.1 * torch.randn(
        count, 3, sizes[-1], sizes[-1], generator=generator
    )
    images = tuple(torch.nn.functional.adaptive_avg_pool2d(largest, size) for size in sizes)
    lengths = torch.randint(1, 4, (count,), generator=generator)
    tokens = torch.where(
        torch.arange(5) < lengths[:, None], 9 + torch.randint(0, 5, (count, 5), generator=generator), 0
    )
    tokens[:, 0] = 1 + kinds
    captions = Captions(tokens, lengths, torch.zeros(count, 0))
    return Batch(images, captions, kinds, torch.zeros(count, 0), tuple(str(i) for i in range(count)), 1)


def trainer(system: System, group_size: int) -> Trainer:
    world = World()
    return Trainer(
        system,
        stage="colours",
        seed=0,
        group_size=group_size,
        share=Share.of(world, 1),
        world=world,
        precision=Precision("float32"),
    )


@pytest.fixture(scope="module")
def trained_damsm() -> Trainer:
    torch.manual_seed(0)
    run = trainer(build_system("damsm", vocabulary_size=15, group_size=8, **TINY_DAMSM, dropout=0.1, lr=5e-3), 8)
    for step in range(60):
        run.run_step(colour_batch((32,), step))
        if step == 0:
            first = run.reduce_reports()
    last = run.reduce_reports()
    assert all(last[name] < 0.75 * first[name] for name in first)
    return run


def test_damsm_learns_to_retrieve_captions(trained_damsm: Trainer) -> None:
    nets = trained_damsm.evaluation_nets()
    batch = colour_batch((32,), step=1000)
    system: Any = trained_damsm.system
    with torch.no_grad():
        codes = system.embed_images(nets, batch.images[-1])
        sentences = system.embed_captions(nets, batch.captions)
    similarity = torch.nn.functional.normalize(codes) @ torch.nn.functional.normalize(sentences).T
    assert (similarity.argmax(1) == torch.arange(8)).float().mean() >= 0.75


def caption_correlation(run: Trainer, transform: Callable[[Batch], Batch] = lambda batch: batch) -> float:
    """Correlate the mean colours of generated images with the colours that their captions name.

    transform: Applied to the batch of colours first.
    """
    nets = run.evaluation_nets()
    batch = transform(colour_batch(run.system.sizes, step=2000, repeats=8))
    generator = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> Tensor:
        return torch.randn(len(batch.ids), *shape, generator=generator)

    system: Any = run.system
    with torch.no_grad():
        output = system.sample(nets, batch.captions, noise)
    means = output.images[-1].mean(dim=(2, 3))
    return torch.corrcoef(torch.stack([means.flatten(), COLOURS[batch.class_ids].flatten()]))[0, 1].item()


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "settings", "seeds", "steps"),
    [
        ("attngan", {"damsm_weight": 1.0}, (2,), 200),
        ("attngan", {"damsm_weight": 0.0, "unit_text": True}, (2,), 200),
        # chaotic: one of three seeds fails
        pytest.param("stackgan_pp", {"colour_weight": 1.0}, (2, 3, 4), 400, marks=pytest.mark.slow),
    ],
)
def test_conditional_trees_learn_to_follow_captions(
    trained_damsm: Trainer, name: str, settings: dict[str, float], seeds: tuple[int, ...], steps: int
) -> None:
    assert median(trained_correlation(trained_damsm, name, settings, seed, steps) for seed in seeds) > 0.35


def trained_correlation(trained_damsm: Trainer, name: str, settings: dict[str, float], seed: int, steps: int) -> float:
    """Train a small tree, which has no correlation at first, and return its caption correlation."""
    torch.manual_seed(seed)
    damsm: Any = trained_damsm.system
    rates = {"generator_lr": 1e-3, "discriminator_lr": 1e-3, "ema_half_life_images": 200.0}
    system = build_system(
        name, damsm.config, vocabulary_size=15, group_size=16, **SMALL, z_dim=4, condition_dim=8, **rates, **settings
    )
    encoders = trained_damsm.evaluation_nets()
    for slot, frozen in system.frozen.items():
        frozen.net.load_state_dict(encoders[slot].state_dict())
    run = trainer(system, 16)
    assert caption_correlation(run) < 0.2
    for step in range(steps):
        run.run_step(colour_batch(system.sizes, step, repeats=2))
    return caption_correlation(run)
